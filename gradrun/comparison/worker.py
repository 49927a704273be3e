"""A trial in a fresh process: one typed message there, one back, or what became of the process.

Knows processes, pipes and signals; what a trial does stands in trial.py. Run as
`python -m gradrun.comparison.worker` it is the other side.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from gradrun.comparison.protocol import Failure, Job, Marker, WorkerReport

_TAIL_LINES = 12


class Worker:
    """One job in a fresh process, which ends with the `with` block whatever happens."""

    def __init__(self, job: Job, *, threads: int) -> None:
        """Start it; `threads` are set for OpenMP and MKL before the process imports torch."""
        self._folder = tempfile.TemporaryDirectory(prefix="gradrun-")
        self._marker = Path(self._folder.name) / "marker"
        self._marker.write_bytes(bytes(Marker.SIZE))
        self.job = job.replace(marker=str(self._marker))
        # A session of its own: Ctrl-C reaches us alone, and we end whatever the worker started.
        self._process = subprocess.Popen(  # noqa: S603 - the words are our own
            [sys.executable, "-m", "gradrun.comparison.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(threads),
            start_new_session=True,
        )
        threading.Thread(target=_end_what_it_left, args=[self._process.pid], daemon=True).start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._process)
        self._folder.cleanup()

    def report(self, timeout: float | None) -> WorkerReport:
        """Wait, asleep, for the report; after `timeout` seconds, if any, the process is ended.

        A process that died gives a report with a Failure that names the variant and the batch.
        """
        try:
            asked = self.job.to_json().encode()
            out, printed = self._process.communicate(asked, timeout=timeout)
        except subprocess.TimeoutExpired:
            return self._failed(f"did not return within {timeout:g} s (measure.timeout)", b"")
        if self._process.returncode:
            return self._failed(_how_it_ended(self._process.returncode), printed)
        try:
            return WorkerReport.from_json(out)
        except ValueError:
            return self._failed("ended without a report", printed)

    def _failed(self, cause: str, printed: bytes) -> WorkerReport:
        variant, batch = Marker.read(self._marker)
        tail = printed.decode(errors="replace").splitlines()[-_TAIL_LINES:]
        name = self.job.variants[variant].name if variant >= 0 else ""
        failure = Failure(variant=name, batch=batch, error=cause, details="\n".join(tail))
        return WorkerReport(failures=(failure,))


def _environment(threads: int) -> dict[str, str]:
    count = str(threads)
    # The worker finds gradrun where we found it, also where that is no installed package.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Kill the worker with everything that it started, and reap it."""
    kill_group: Callable[[int, int], None] | None = getattr(os, "killpg", None)
    try:
        if kill_group:
            kill_group(worker.pid, signal.SIGKILL)
        else:
            worker.kill()
    except (ProcessLookupError, PermissionError):
        pass
    worker.wait()
    for pipe in (worker.stdin, worker.stdout, worker.stderr):
        if pipe:
            pipe.close()


def _end_what_it_left(worker: int) -> None:
    """Once the worker ends, kill what it started: that would keep its pipes open to the timeout."""
    if sys.platform == "linux":
        with suppress(ChildProcessError, ProcessLookupError, PermissionError):
            os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)  # the status is for Popen
            os.killpg(worker, signal.SIGKILL)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended its process with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


# --- the other side ----------------------------------------------------------------------------


def main() -> None:
    """Read a job from stdin, do it, write its report to stdout; all else goes to stderr."""
    gc.disable()  # until trial.py freezes what torch's import made
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a model prints must not mix with the report
    job = Job.from_json(sys.stdin.buffer.read())
    from gradrun.comparison.benchmark import run_task

    replies.write(run_task(job).to_json().encode())
    replies.flush()
    # No clean-up of torch's: the report is out, and the next worker waits.
    os._exit(0)


def _die_with_parent() -> None:
    """End when the parent does, however it ends (Linux; elsewhere its `finally` must do)."""
    signal.signal(signal.SIGINT, _ignored)
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if str(os.getppid()) not in sys.argv[1:]:
            os._exit(1)  # it ended before we could ask to be told


def _ignored(number: int, frame: FrameType | None) -> None:
    """The parent hears Ctrl-C and ends us."""


if __name__ == "__main__":
    main()
