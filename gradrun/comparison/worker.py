"""Run one job in a fresh process; as `python -m gradrun.comparison.worker`, be that process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from gradrun.comparison.protocol import Failure, Job, Marker, WorkerReport


class Worker:
    """A fresh process for one job; the process ends with the `with` block."""

    def __init__(self, job: Job, *, threads: int) -> None:
        """Start the process with `threads` set for OpenMP and MKL before it imports torch."""
        self._folder = tempfile.TemporaryDirectory(prefix="gradrun-")
        self._marker = Path(self._folder.name) / "marker"
        self._marker.write_bytes(bytes(Marker.SIZE))
        self.job = job.replace(marker=str(self._marker))
        # A new session: Ctrl-C reaches only the parent, and the worker's children can be killed.
        self._process = subprocess.Popen(  # noqa: S603 - no argument comes from the user
            [sys.executable, "-m", "gradrun.comparison.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(threads),
            start_new_session=True,
        )
        threading.Thread(target=_kill_orphans, args=[self._process.pid], daemon=True).start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        _kill(self._process)
        self._folder.cleanup()

    def report(self, timeout: float | None) -> WorkerReport:
        """Send the job and wait for the report; kill the process after `timeout` seconds.

        If the process dies, the report contains a Failure with the variant and batch it was at.
        """
        try:
            message = self.job.to_json().encode()
            out, _ = self._process.communicate(message, timeout=timeout)
        except subprocess.TimeoutExpired:
            return self._failed(f"did not return within {timeout:g} s (measure.timeout)")
        if self._process.returncode:
            return self._failed(_exit_cause(self._process.returncode))
        try:
            return WorkerReport.from_json(out)
        except ValueError:
            return self._failed("ended without a report")

    def _failed(self, cause: str) -> WorkerReport:
        variant, batch = Marker.read(self._marker)
        name = self.job.variants[variant].name if variant >= 0 else ""
        return WorkerReport(failures=(Failure(variant=name, batch=batch, error=cause),))


def _environment(threads: int) -> dict[str, str]:
    # The worker imports the parent's gradrun even if that is not an installed package.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """Kill the worker and its children, and reap it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe:
            pipe.close()


def _kill_orphans(worker: int) -> None:
    """Wait for the worker, then kill its children, which would keep its pipes open."""
    if sys.platform == "linux":
        with suppress(ChildProcessError, ProcessLookupError, PermissionError):
            os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)  # Popen still needs the status
            os.killpg(worker, signal.SIGKILL)


def _exit_cause(code: int) -> str:
    if code >= 0:
        return f"ended its process with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


# --- the worker process --------------------------------------------------------------------------


def main() -> None:
    """Read a job from stdin, run it and write the report to stdout; other output goes to stderr."""
    gc.disable()  # until run_task() freezes the objects created by importing torch
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a model's prints must not mix with the report
    job = Job.from_json(sys.stdin.buffer.read())
    from gradrun.comparison.benchmark import run_task

    replies.write(run_task(job).to_json().encode())
    replies.flush()
    os._exit(0)  # skip torch's slow clean-up: the next worker is waiting


def _die_with_parent() -> None:
    """Ignore Ctrl-C, which the parent handles; on Linux, die when the parent dies."""
    signal.signal(signal.SIGINT, lambda *_: None)
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if str(os.getppid()) not in sys.argv[1:]:
            os._exit(1)  # the parent died before prctl() took effect


if __name__ == "__main__":
    main()
