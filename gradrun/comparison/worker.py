"""Run one job in a fresh process; as `python -m gradrun.comparison.worker`, be that process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from gradrun.comparison.protocol import Failure, Job, Marker, WorkerReport
from gradrun.engines.child_process import (
    end_with_parent,
    exit_cause,
    kill,
    start_child,
    take_stdout,
)


class Worker:
    """A fresh process for one job; the process ends with the `with` block."""

    def __init__(self, job: Job, *, threads: int) -> None:
        """Start the process with `threads` set for OpenMP and MKL before it imports torch."""
        self._folder = tempfile.TemporaryDirectory(prefix="gradrun-")
        self._marker = Path(self._folder.name) / "marker"
        self._marker.write_bytes(bytes(Marker.SIZE))
        self.job = job.replace(marker=str(self._marker))
        self._process = start_child("gradrun.comparison.worker", threads, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        kill(self._process)
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
            return self._failed(exit_cause(self._process.returncode))
        try:
            return WorkerReport.from_json(out)
        except ValueError:
            return self._failed("ended without a report")

    def _failed(self, cause: str) -> WorkerReport:
        variant, batch = Marker.read(self._marker)
        name = self.job.variants[variant].name if variant >= 0 else ""
        return WorkerReport(failures=(Failure(variant=name, batch=batch, error=cause),))


# --- the worker process --------------------------------------------------------------------------


def main() -> None:
    """Read a job from stdin, run it and write the report to stdout; other output goes to stderr."""
    gc.disable()  # until run_task() freezes the objects created by importing torch
    end_with_parent()
    replies = take_stdout()
    job = Job.from_json(sys.stdin.buffer.read())
    from gradrun.comparison.benchmark import run_task

    replies.write(run_task(job).to_json().encode())
    replies.flush()
    os._exit(0)  # skip torch's slow clean-up: the next worker is waiting


if __name__ == "__main__":
    main()
