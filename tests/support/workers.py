"""Run worker jobs in the test process, which has imported torch already."""

from __future__ import annotations

import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gradrun.comparison import benchmark, session
from gradrun.comparison.protocol import Job, Marker, WorkerReport


class InProcessWorker:
    """Replaces `gradrun.comparison.worker.Worker`; messages are serialized all the same."""

    def __init__(self, job: Job, *, threads: int) -> None:
        self.job = job

    def __enter__(self) -> InProcessWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def report(self, timeout: float | None) -> WorkerReport:
        threads = torch.get_num_threads()
        with tempfile.NamedTemporaryFile() as marker:
            marker.write(bytes(Marker.SIZE))
            marker.flush()
            job = Job.from_json(self.job.replace(marker=marker.name).to_json())
            try:
                return WorkerReport.from_json(benchmark.run_task(job).to_json())
            finally:
                torch.set_num_threads(threads)


@contextmanager
def in_process_workers() -> Iterator[None]:
    """Run all jobs of sessions in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "Worker", InProcessWorker)
        keep_gc_unfrozen(patch)
        yield


def keep_gc_unfrozen(patch: pytest.MonkeyPatch) -> None:
    """Keep run_task from freezing imported objects, as it does in a worker process."""
    nothing = types.SimpleNamespace(freeze=lambda: None, enable=lambda: None)
    patch.setattr(benchmark, "gc", nothing)
