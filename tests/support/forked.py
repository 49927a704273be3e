"""Run `gradrun` in processes forked from one that has imported it, which saves seconds each.

A forked process receives signals, is killed and ends as a new one does. Use a new one where the
start, the imports or the environment of the interpreter matter.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROCESSES = multiprocessing.get_context("forkserver")
_MODULES = ["torch", "gradrun.cli.app", "gradrun.inference.infer", "rich.table"]


@contextmanager
def preloaded() -> Iterator[None]:
    """Start processes from one that has imported `gradrun`."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    PROCESSES.set_forkserver_preload(_MODULES)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class ForkedCommand:
    """A `gradrun` command in a forked process, with the methods of `subprocess.Popen`."""

    def __init__(
        self,
        *words: object,
        cwd: Path | None = None,
        env: Mapping[str, str] = {},
        before: Callable[[], None] | None = None,
    ) -> None:
        """Start the command.

        Args:
            words: its arguments.
            cwd: its folder; default: that of this process.
            env: variables that it gets in addition to those of this process.
            before: a function of a module, called first in the new process.
        """
        self._output = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        setup = (cwd or Path.cwd(), {**os.environ, **env}, before)
        streams = [_Descriptor(file.fileno()) for file in self._output]
        self._process = PROCESSES.Process(target=_run, args=(setup, streams, [*map(str, words)]))
        with preloaded():
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 120) -> int:
        """Wait for the end; return the exit code, or the number of the signal times -1."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("gradrun", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end; return the text on stdout and stderr."""
        self.wait(timeout)
        texts = []
        for file in self._output:
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Descriptor:
    """A file descriptor, which is sent to the new process."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self._number),)


def _received(sent: Any) -> int:
    return sent.detach()


def _run(setup: Any, streams: list[int], words: list[str]) -> None:
    folder, environment, before = setup
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before:
        before()
    from gradrun.cli import app

    sys.argv = ["gradrun", *words]
    app.main()
