"""Run `gradrun` in processes forked from one that has imported it, which saves seconds each.

A forked process receives signals, is killed and ends as a new one does. Use a new one where the
start, the imports or the environment of the interpreter matter.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

ROOT = Path(__file__).parents[2]
PROCESSES = multiprocessing.get_context("forkserver")
_MODULES = [
    "torch", "gradrun.cli.app", "gradrun.inference.infer", "rich.table",
    "gradrun.comparison.benchmark", "gradrun.engines.range_runner",
]  # fmt: skip
_STARTS = threading.Lock()
"""Starting a process reads the exit codes of those that ended, each of which is read only once."""


@contextmanager
def preloaded() -> Iterator[None]:
    """Start processes from one that has imported `gradrun`."""
    PROCESSES.set_forkserver_preload(_MODULES)
    with _STARTS:  # threads start children
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
        try:
            yield
        finally:
            if before:
                os.environ["PYTHONPATH"] = before
            else:
                del os.environ["PYTHONPATH"]


class _Forked:
    """A forked process, with the properties of `subprocess.Popen`."""

    _process: BaseProcess

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        with _STARTS:
            return self._process.exitcode


class ForkedCommand(_Forked):
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

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        """Wait for the end; return the exit code, or the number of the signal times -1."""
        connection.wait([self._process.sentinel], timeout)
        code = self.returncode
        if code is None:
            raise subprocess.TimeoutExpired("gradrun", timeout)
        return code

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


class ForkedChild(_Forked):
    """A child as of `start_child` in a forked process, with the parts of Popen that are used.

    It is not a child of this process, and OpenMP and MKL have no setting for its threads.
    """

    stderr: BinaryIO | None = None

    def __init__(self, module: str, threads: int, args: Sequence[str] = (), *, stderr: int) -> None:
        """Start the process; `stderr` is PIPE or DEVNULL of subprocess."""
        stdin, self.stdin = _pipe()
        self.stdout, stdout = _pipe()
        if stderr == subprocess.PIPE:
            self.stderr, errors = _pipe()
        elif stderr == subprocess.DEVNULL:
            errors = open(os.devnull, "wb")  # noqa: PTH123, SIM115
        else:
            errors = os.fdopen(os.dup(stderr), "wb")
        ends = (stdin, stdout, errors)
        setup = (Path.cwd(), dict(os.environ), None)
        streams = [_Descriptor(end.fileno()) for end in ends]
        self._process = PROCESSES.Process(target=_serve, args=(setup, streams, module, [*args]))
        with preloaded():
            self._process.start()
        for end in ends:
            end.close()
        self.stdout.read(1)  # the process has a group of its own, which kill() ends

    def wait(self) -> int:
        connection.wait([self._process.sentinel])
        code = self.returncode
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def communicate(self, message: bytes, timeout: float | None = None) -> tuple[bytes, None]:
        """Send a message, and return what the process writes until its end."""
        with suppress(BrokenPipeError), self.stdin:
            self.stdin.write(message)
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if not read:
            raise subprocess.TimeoutExpired("gradrun", timeout or 0.0)
        self.wait()
        return read[0], None


def _pipe() -> tuple[BinaryIO, BinaryIO]:
    """Return the ends of a pipe to read and to write."""
    reads, writes = os.pipe()
    return os.fdopen(reads, "rb"), os.fdopen(writes, "wb")


@contextmanager
def forked_children() -> Iterator[None]:
    """Fork the workers of engines, comparisons, checks and tunings from a preloaded process."""
    with (
        mock.patch("gradrun.engines.processes.start_child", ForkedChild),
        mock.patch("gradrun.comparison.worker.start_child", ForkedChild),
    ):
        yield


class _Descriptor:
    """A file descriptor, which is sent to the new process."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self._number),)


def _received(sent: Any) -> int:
    return sent.detach()


def _run(setup: Any, streams: list[int], words: list[str]) -> None:
    _take(setup, dict(enumerate(streams, 1)))
    from gradrun.cli import app

    sys.argv = ["gradrun", *words]
    app.main()


def _serve(setup: Any, streams: list[int], module: str, args: list[str]) -> None:
    os.setsid()
    os.write(streams[1], b"\0")
    _take(setup, dict(enumerate(streams)))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv = [module, str(os.getppid()), *args]
    importlib.import_module(module).main()


def _take(setup: Any, streams: dict[int, int]) -> None:
    """Take over a folder, environment variables and standard streams."""
    folder, environment, before = setup
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in streams.items():
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before:
        before()
