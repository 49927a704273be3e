"""SIGINT and SIGTERM while a run is under way: the first ends it in order, the second at once.

Knows signals; not what has to be put in order.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from gradrun.core.errors import Interrupted

_OURS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h\n"


class GracefulShutdown:
    """Raises KeyboardInterrupt at the first signal, or when a block that must be whole has ended.

    In another thread than the main one, and over handlers that are not Python's own, it does
    nothing: whoever set those knows better.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that was heard first."""
        self._whole = 0
        self._owed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is threading.main_thread():
            for number in _OURS:
                if signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.number and isinstance(error, KeyboardInterrupt):
            raise Interrupted(exit_code=self.exit_code) from error
        if isinstance(error, Interrupted) and error.exit_code != self.exit_code:
            raise Interrupted(
                str(error),
                exit_code=self.exit_code,
                result=error.result,
                resumable=error.resumable,
            ) from error.__cause__

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.number or signal.SIGINT)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the first signal wait for what takes milliseconds and must be whole."""
        self._whole += 1
        try:
            yield
        finally:
            self._whole -= 1
        if self._owed and not self._whole:
            self._owed = False
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)  # a progress bar may have hidden it
            os._exit(128 + number)
        self.number = number
        if self._whole:
            self._owed = True
        else:
            raise KeyboardInterrupt
