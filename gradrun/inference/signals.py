"""Handle SIGINT and SIGTERM during a run: the first ends it in order, the second at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from gradrun.core.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h\n"


class GracefulShutdown:
    """Raises KeyboardInterrupt at the first signal, or at the end of a deferred block.

    Outside the main thread it has no effect, and handlers set by the caller are not replaced.
    """

    def __init__(self) -> None:
        self.signal = 0
        """The number of the first signal, or 0."""
        self._deferred_blocks = 0
        self._pending = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}:
                    self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if self.signal and isinstance(error, KeyboardInterrupt):
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
        """The exit code by the convention of shells: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Delay the first signal to the end of a short block that must not be interrupted."""
        self._deferred_blocks += 1
        try:
            yield
        finally:
            self._deferred_blocks -= 1
        if self._pending and not self._deferred_blocks:
            self._pending = False
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)  # the progress bar hides it
            os._exit(128 + number)
        self.signal = number
        if self._deferred_blocks:
            self._pending = True
        else:
            raise KeyboardInterrupt
