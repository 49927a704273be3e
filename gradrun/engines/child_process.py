"""Start a child process of gradrun that ends with its parent, and kill it with its children."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

if sys.platform == "linux":
    import fcntl


def start_child(module: str, threads: int, args: Sequence[str] = (), **pipes: Any) -> Process:
    """Start `python -m module` in a new session, with pipes to its stdin and stdout.

    Ctrl-C reaches only the parent, and the children of the process can be killed with it.

    Args:
        module: a module whose main() calls `end_with_parent` first.
        threads: threads of OpenMP and MKL, which must be set before torch is imported.
    """
    child = subprocess.Popen(  # noqa: S603 - no argument comes from the user
        [sys.executable, "-m", module, str(os.getpid()), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_environment(threads),
        start_new_session=True,
        **pipes,
    )
    _enlarge(child.stdout)
    threading.Thread(target=_kill_orphans, args=[child.pid], daemon=True).start()
    return child


Process = subprocess.Popen[bytes]

_LENGTH = struct.Struct("<q")


def kill(child: Process) -> None:
    """Kill the process and its children, and reap it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe:
            with suppress(OSError):  # unsent data of a broken pipe
                pipe.close()


def exit_cause(code: int) -> str:
    """Describe how a process ended, as the end of a sentence about it."""
    if code >= 0:
        return f"ended its process with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _environment(threads: int) -> dict[str, str]:
    # The child imports the parent's gradrun even if that is not an installed package.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def _enlarge(pipe: IO[bytes] | None) -> None:
    """Let a pipe hold 1 MiB instead of 64 KiB, where the system allows it: fewer reads."""
    if pipe and sys.platform == "linux":
        with suppress(OSError):  # the limit of the user
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)


def _kill_orphans(child: int) -> None:
    """Wait for the process, then kill its children, which would keep its pipes open."""
    if sys.platform == "linux":
        with suppress(ChildProcessError, ProcessLookupError, PermissionError):
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # Popen still needs the status
            os.killpg(child, signal.SIGKILL)


# --- in the child process ------------------------------------------------------------------------


def end_with_parent() -> None:
    """Ignore Ctrl-C, which the parent handles; on Linux, die when the parent dies."""
    signal.signal(signal.SIGINT, lambda *_: None)
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if str(os.getppid()) not in sys.argv[1:]:
            os._exit(1)  # the parent died before prctl() took effect


def take_stdout() -> Any:
    """Return the binary stdout for replies; other output, such as a model's, goes to stderr."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


# --- messages on pipes ---------------------------------------------------------------------------


def write_frame(file: IO[bytes], data: bytes) -> None:
    """Write one message with its length."""
    file.write(_LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def read_frame(file: IO[bytes]) -> bytearray | None:
    """Read one message; None at the end of the pipe."""
    header = file.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(header)
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size and (count := file.readinto(view[filled:])):  # type: ignore[attr-defined]
        filled += count
    return data if filled == size else None
