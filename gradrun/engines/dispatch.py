"""The driver of a spread run: give ranges to workers, and write their results in input order."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch

from gradrun.config.engine import EngineConfig
from gradrun.core.errors import Interrupted, RunFailed
from gradrun.core.progress import Progress, ProgressCallback, WorkerProgress
from gradrun.core.units import pluralize
from gradrun.data.source import require_length, whole_batches
from gradrun.engines.engine import Engine, Lost, StartedEngine, start_error
from gradrun.engines.messages import (
    Done,
    Failed,
    Quarantined,
    Ready,
    Rows,
    Task,
    pack_rows,
    unpack_rows,
)
from gradrun.engines.range_runner import outputs_checksum
from gradrun.engines.schedule import RANGES_AHEAD, Schedule, Span
from gradrun.inference.environment import current_environment
from gradrun.inference.first_batch import QUARANTINE_HINT, PreparedRun
from gradrun.inference.reordering import ReorderBuffer, commit_unit
from gradrun.inference.run_plan import RunPlan
from gradrun.inference.runner import SKIP_SAMPLES
from gradrun.inference.timed_loop import CommitCallback, LargestBatch, TimedPass
from gradrun.output.columns import blank, row_bytes
from gradrun.output.fingerprint import changed_properties
from gradrun.output.formats import RowWriter
from gradrun.results.result import Generation, Padding, Warning, WorkerRange, WorkerStats

SPAN_SECONDS = 1.0
"""Target duration of a range; sending one costs a few milliseconds."""

_SPAN_BYTES = 16 * 1024 * 1024
_HELD_BYTES = 256 * 1024 * 1024
"""Results that wait for earlier ones."""

_POLL_SECONDS = 0.2
_PROGRESS_SECONDS = 0.2
_MAX_FAILED_STARTS = 3
_LEAST_TIMEOUT = 60.0
_TIMEOUT_FACTOR = 20

_PROPERTIES = {
    "gradrun": "version of gradrun is",
    "torch": "version of torch is",
    "threads": "number of threads is",
}
"""Properties of an Environment that change predictions -> their names in an error."""

_MIXED = "engine.mixed: allow accepts this"


@dataclass
class _Worker:
    """What the driver knows about a worker that is ready."""

    ready: Ready
    stats: WorkerStats
    """Without its ranges."""
    ranges: list[WorkerRange] = field(default_factory=list)
    span_size: int = 1
    """Samples that it predicts in about SPAN_SECONDS."""
    busy_since: float = 0.0
    """When it began its current range; 0 if it has none."""


def run_pass(
    started: StartedEngine,
    section: EngineConfig,
    plan: RunPlan,
    prepared: PreparedRun,
    writer: RowWriter,
    commit: CommitCallback,
    progress: ProgressCallback,
) -> TimedPass:
    """Predict every sample that the writer does not have yet, by the workers of an engine.

    A RunPass, given the workers that were requested for the run of the plan.
    """
    assert started.engine
    current = _Pass(started.engine, started.workers, section, plan, prepared, writer)
    timed = current.timed
    try:
        current.begin(started.ready)
        next_progress = 0.0
        while not current.schedule.finished:
            current.step()
            commit()
            if (now := time.perf_counter()) >= next_progress:
                progress(current.progress())
                next_progress = now + _PROGRESS_SECONDS
    except KeyboardInterrupt:
        timed.stop(Interrupted())
    except BaseException as error:
        timed.stop(plan.runner.stop_error(error, timed))
    finally:
        current.finish()
        started.engine.close()  # kills processes, which is not part of the pass
    return timed


class _Pass:
    """The state of one pass over the samples of a run."""

    def __init__(
        self,
        engine: Engine,
        requested: int,
        section: EngineConfig,
        plan: RunPlan,
        prepared: PreparedRun,
        writer: RowWriter,
    ) -> None:
        self.engine, self.requested, self.section = engine, requested, section
        self.plan, self.prepared = plan, prepared
        data = plan.runner.data
        self.samples = require_length(data)
        self.schedule = Schedule(
            writer.written,
            self.samples,
            unit=commit_unit(data),
            batch_size=whole_batches(data),
            workers=requested,
        )
        self.timed = TimedPass(writer.written, array("d"))
        self.workers: dict[int, _Worker] = {}
        self._positions: dict[int, int] = {}
        self._writer = writer
        if data.grouped:
            self._writer = ReorderBuffer(
                writer, self._take_positions, data.chunk_size, self.samples
            )
        self._results: dict[Span, Done] = {}
        self._durations: list[float] = []
        self._failed_starts = self._starting = 0
        self._first_ready = 0.0
        self._checksum = outputs_checksum(prepared.outputs)
        self._max_bytes = min(_SPAN_BYTES, _HELD_BYTES // (RANGES_AHEAD * requested))
        self._row_bytes = row_bytes(prepared.outputs)

    def begin(self, ready: Iterable[tuple[int, Ready]]) -> None:
        """Use the workers that are ready, and end those for which there is nothing to do."""
        schedule, requested = self.schedule, self.requested
        units = -(-(schedule.stop - schedule.written) // schedule.unit)
        self._starting = min(requested, units)
        kept = self.engine.keep(self._starting)
        if 0 < units < requested:
            noun, key, data = "batch", "data.batch_size", self.plan.runner.data
            if data.grouped:
                noun, key = "length group", "data.group_by_length"
            if data.variable:
                key = "data.batch_size"
            text = (
                f"{units:,} of {requested:,} workers used: {pluralize(units, noun)} ({key}) to "
                "predict, and each runs on one worker"
            )
            self.plan.runner.warnings.append(Warning(code="fewer_workers", text=text))
        for number, message in ready:
            if number in kept:
                self.add_worker(number, message)

    # --- events --------------------------------------------------------------------------------

    def step(self) -> None:
        """Assign ranges, handle the next event, and write the results whose turn it is."""
        for number, worker in self._alive():
            while span := self.schedule.assign(number, worker.span_size):
                worker.busy_since = worker.busy_since or time.perf_counter()
                self.engine.send(number, Task(start=span.start, stop=span.stop))
        if event := self.engine.next(_POLL_SECONDS):
            number, message = event
            match message:
                case Ready():
                    self.add_worker(number, message)
                case Done():
                    self._complete(number, message)
                case Failed() | Lost():
                    self._lose(number, message)
        self._stop_hanging_workers()
        for span in self.schedule.release():
            self._write(self._results.pop(span))

    def add_worker(self, number: int, ready: Ready) -> None:
        """Use a worker, unless it would predict differently."""
        self._failed_starts = 0
        self._starting -= 1
        self._first_ready = self._first_ready or time.perf_counter()
        cold_start = ready.load_seconds + ready.open_seconds + ready.first_batch_seconds
        stats = WorkerStats(worker=number, node=ready.node, cold_start=cold_start)
        self.workers[number] = _Worker(ready, stats)
        if difference := self._difference(ready):
            self.engine.stop(number)
            self._record_loss(number, difference, rejected=True)
            if not self._remaining():
                raise RunFailed(
                    f"worker {number} on {ready.node} cannot take part: {difference}",
                    resumable=True,
                )
            return
        self.schedule.add_worker(number)
        self._set_span_size(number, ready.batch_seconds / self.prepared.first.size)

    def _complete(self, number: int, done: Done) -> None:
        now, worker = time.perf_counter(), self.workers[number]
        span = Span(done.start, done.stop)
        began, worker.busy_since = worker.busy_since, 0.0
        needed = self.schedule.complete(number, span)
        if self.schedule.running(number):
            worker.busy_since = now
        stats = worker.stats
        worker.stats = stats = stats.replace(
            busy=stats.busy + now - began, process_peak=done.process_peak
        )
        if not needed:
            return
        worker.stats = stats.replace(
            samples=stats.samples + span.size,
            data=stats.data + done.data_seconds,
            forward=stats.forward + sum(array("d", done.batch_seconds)),
        )
        worker.ranges.append(
            WorkerRange(
                start=span.start,
                stop=span.stop,
                began=began - self._first_ready,
                ended=now - self._first_ready,
            )
        )
        self._durations.append(now - began)
        # The values of other samples may be larger than those of the first batch.
        used = sum(event.nbytes for event in done.events if isinstance(event, Rows))
        self._row_bytes = max(self._row_bytes, used // span.size)
        self._set_span_size(number, done.seconds / span.size)
        self._keep_result(span, done)

    def _lose(self, number: int, event: Failed | Lost) -> None:
        worker = self.workers.get(number)
        cause = event.cause if isinstance(event, Lost) else event.error
        if worker:
            self._record_loss(number, cause)
        else:
            self._fail_start(number, event, cause)
        for sample in self.schedule.lose_worker(number):
            self._keep_result(sample, self._isolate(sample, cause))
        idle = self.schedule.unassigned and self._failed_starts < _MAX_FAILED_STARTS
        if idle or not self._remaining():
            self.engine.start(1)
            self._starting += 1

    def _fail_start(self, number: int, event: Failed | Lost, cause: str) -> None:
        """Warn of a worker that ended before it was ready; fail if none is left."""
        self._starting -= 1
        self._failed_starts += 1
        if self._remaining():
            text = f"worker {number} could not start, and the others continued: {cause}"
            self.plan.runner.warnings.append(Warning(code="worker_failed", text=text))
        elif self._failed_starts >= _MAX_FAILED_STARTS or isinstance(event, Failed):
            raise start_error(number, event)

    def _stop_hanging_workers(self) -> None:
        limit = self.section.timeout
        if limit is None:
            usual = median(self._durations) if self._durations else 0.0
            limit = max(_LEAST_TIMEOUT, _TIMEOUT_FACTOR * usual)
        now = time.perf_counter()
        for number, worker in self._alive():
            if worker.busy_since and now - worker.busy_since > limit:
                self.engine.stop(number)
                self._lose(number, Lost(f"did not finish a range in {limit:g} s (engine.timeout)"))

    def _alive(self) -> list[tuple[int, _Worker]]:
        return [
            (number, worker) for number, worker in self.workers.items() if not worker.stats.lost
        ]

    def _remaining(self) -> bool:
        """Whether a worker is ready or may become so."""
        return bool(self._starting or self._alive())

    def _record_loss(self, number: int, cause: str, *, rejected: bool = False) -> None:
        worker = self.workers[number]
        lost_at = time.perf_counter() - self._first_ready
        worker.stats = worker.stats.replace(lost=cause, lost_at=lost_at, rejected=rejected)

    def _difference(self, ready: Ready) -> str:
        """Say how a worker differs from the driver in what changes predictions."""
        for path, described in self.plan.header.files.items():
            # A worker has not imported all modules yet.
            if changed_properties(ready.files.get(path, described), described):
                return f"its {path} differs from that of the driver"
        if self.section.mixed == "allow":
            return ""
        here = current_environment(self.plan.runner.device)
        for name in _PROPERTIES:
            theirs, ours = getattr(ready.environment, name), getattr(here, name)
            if theirs != ours:
                return f"its {_PROPERTIES[name]} {theirs}, and {ours} in the driver; {_MIXED}"
        if ready.checksum != self._checksum:
            if ready.environment.cpu == here.cpu:
                return (
                    "its predictions of the first batch differ on equal hardware: the model "
                    "depends on its process, such as arguments, environment or random numbers"
                )
            return (
                f"its predictions of the first batch differ; its processor is "
                f"{ready.environment.cpu}, and {here.cpu} in the driver; {_MIXED}"
            )
        return ""

    # --- results -------------------------------------------------------------------------------

    def _set_span_size(self, number: int, seconds_per_sample: float) -> None:
        rows = int(SPAN_SECONDS / max(seconds_per_sample, 1e-9))
        most = self._max_bytes // max(1, self._row_bytes)
        self.workers[number].span_size = max(1, min(rows, most))

    def _keep_result(self, span: Span, done: Done) -> None:
        self._results[span] = done
        if done.error is not None:
            self.schedule.end_at(span)

    def _isolate(self, sample: Span, cause: str) -> Done:
        """Return the result of a sample that ended its second worker."""
        runner, index = self.plan.runner, sample.start
        position = runner.data.input_position(index)
        text = f"its worker process {cause}"
        if runner.config.run.on_error != "quarantine":
            return Done(
                start=index,
                stop=index + 1,
                recovered=1,
                error=f"sample {position:,} failed: {text}{QUARANTINE_HINT}",
                resume_options=SKIP_SAMPLES,
            )
        batch = runner.read_batch(index, 1)
        sample_id = batch.ids[0]
        outputs = {name: blank(column, 1) for name, column in self.prepared.outputs.items()}
        outputs |= runner.kept_columns(batch)
        line = Quarantined(sample=position, id=sample_id, error=text, details="")
        row = pack_rows(outputs, [sample_id], torch.zeros(1, dtype=torch.bool))
        return Done(
            start=index, stop=index + 1, events=[line, row], positions=[position], recovered=1
        )

    def _write(self, done: Done) -> None:
        timed, recovery = self.timed, self.prepared.recovery
        if done.positions is not None:
            self._positions.update(zip(range(done.start, done.stop), done.positions, strict=False))
        for event in done.events:
            if isinstance(event, Quarantined):
                recovery.quarantine_sample(event.sample, event.id, event.error, event.details)
            else:
                self._writer.write(*unpack_rows(event))
                timed.done += event.size
        if done.batch_limit:
            recovery.limit_batches(done.batch_limit, done.limited_from)
        timed.seconds.frombytes(done.batch_seconds)
        timed.sizes.frombytes(done.batch_sizes)
        timed.elements.frombytes(done.batch_elements)
        timed.recovered += done.recovered
        timed.data_ns += round(done.data_seconds * 1e9)
        if done.padding:
            timed.padding = (timed.padding or Padding()) + done.padding
        if done.generation:
            timed.generation = (timed.generation or Generation()) + done.generation
        if done.largest[0] > timed.largest.elements:
            timed.largest = LargestBatch(*done.largest)
        data = self.plan.runner.data
        if done.flags:
            data.flags[done.start : done.stop] = np.frombuffer(done.flags, data.flags.dtype)
        if done.interrupted:
            raise KeyboardInterrupt
        if done.error is not None:
            raise RunFailed(done.error, resume_options=done.resume_options)

    def progress(self) -> Progress:
        """Describe how much of the run is done, and by which workers."""
        now, name = time.perf_counter(), self.engine.name
        if not self.workers:
            return Progress(f"starting {name}")
        alive = sorted(self._alive())
        several = len({worker.ready.node for _, worker in alive}) > 1
        rejected = sum(worker.stats.rejected for worker in self.workers.values())
        lost = len(self.workers) - len(alive) - rejected
        others = {"lost": lost, "rejected": rejected, "starting": self._starting}
        return Progress(
            f"predicting on {name}",
            self.timed.start + self.timed.done,
            self.samples,
            workers=tuple(
                WorkerProgress(
                    f"worker {number}{f' on {worker.ready.node}' if several else ''}",
                    worker.stats.samples,
                    worker.stats.samples / worker.stats.busy if worker.stats.busy else 0.0,
                    now - worker.busy_since if worker.busy_since else None,
                )
                for number, worker in alive
            ),
            other_workers=", ".join(f"{n:,} {state}" for state, n in others.items() if n),
        )

    def _take_positions(self, start: int, stop: int) -> list[int]:
        return [self._positions.pop(index) for index in range(start, stop)]

    def finish(self) -> None:
        """Store the wall time and the workers in the timed pass."""
        if self._first_ready:
            self.timed.total_ns = round((time.perf_counter() - self._first_ready) * 1e9)
        self.timed.workers = tuple(
            worker.stats.replace(
                ranges=tuple(worker.ranges), repeated=self.schedule.repeated[number]
            )
            for number, worker in self.workers.items()
        )
