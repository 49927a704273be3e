"""The timed loop: predict batches, write their outputs, and measure both."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gradrun.core.errors import GradrunError, RunFailed, first_line
from gradrun.core.progress import Progress, ProgressCallback
from gradrun.data.batch import Batch
from gradrun.inference.diagnosis import ran_out_of_memory
from gradrun.inference.meters.clock import Clock
from gradrun.inference.recovery import BatchRecovery, Recovered
from gradrun.inference.ring import InFlight, Ring
from gradrun.inference.transfers import TRANSFERS, Transfers
from gradrun.output.formats import RowWriter
from gradrun.results.result import Generation, Padding, WorkerStats

if TYPE_CHECKING:
    from gradrun.inference.runner import Runner

_CALLBACK_NS = 200_000_000
"""Interval of commit and progress callbacks."""

CommitCallback = Callable[[], None]
"""Called between two batches, a few times per second, to commit predictions."""


class LargestBatch(NamedTuple):
    """The batch whose inputs have the most elements; the earliest of several."""

    elements: int
    start: int
    """The number of its first sample."""
    size: int


NO_BATCH = LargestBatch(0, 0, 0)


@dataclass
class TimedPass:
    """The measurements of the timed pass, complete or not."""

    start: int
    """The number of the first sample."""
    seconds: array[float]
    """Forward time per timed batch."""
    sizes: array[int] = field(default_factory=lambda: array("q"))
    """Samples per timed batch."""
    elements: array[int] = field(default_factory=lambda: array("q"))
    """Elements of the inputs per timed batch."""
    recovered: int = 0
    """Samples of failed batches, which are not timed."""
    done: int = 0
    """Samples passed to the writer."""
    data_ns: int = 0
    total_ns: int = 0
    stopped: GradrunError | None = None
    """The error that ended the pass, if it did not complete."""
    padding: Padding | None = None
    """Token counts of padded texts."""
    generation: Generation | None = None
    """Times of generated texts."""
    largest: LargestBatch = NO_BATCH
    workers: tuple[WorkerStats, ...] = ()
    """The workers of an engine that ran the samples; empty if this process did."""

    def add(self, batch: Batch) -> None:
        """Count a batch whose forward was timed, before it is written."""
        elements = batch.elements
        if elements > self.largest.elements:
            self.largest = LargestBatch(elements, self.start + self.done, batch.size)
        self.sizes.append(batch.size)
        self.elements.append(elements)

    def stop(self, error: GradrunError) -> None:
        """Record why the pass ended early; the first error counts."""
        self.stopped = self.stopped or error

    def trim(self, written: int) -> None:
        """Remove trailing batches that are not completely in the `written` samples."""
        samples = sum(self.sizes) + self.recovered
        while samples > written and self.sizes:
            samples -= self.sizes.pop()


class _Failed(NamedTuple):
    """A batch that could not be started."""

    error: Exception
    timed: bool
    """Whether its forward pass was complete."""


class TimedLoop:
    """One pass over batches: runs a model, and passes its outputs to a writer."""

    def __init__(
        self,
        runner: Runner,
        writer: RowWriter,
        timed: TimedPass,
        clock: Clock,
        recovery: BatchRecovery,
        commit: CommitCallback,
        progress: ProgressCallback,
    ) -> None:
        """Store the parts of the pass; `timed` and `clock` receive its measurements."""
        self.runner, self.writer, self.timed, self.clock = runner, writer, timed, clock
        self.recovery, self.commit, self.progress = recovery, commit, progress
        self.check_finite = runner.config.run.on_nonfinite != "warn"
        self.total = runner.data.samples or 0  # an iterable finds its length at the end

    def run(self, batches: Iterator[Batch]) -> None:
        """Predict one batch after the other; the batches are on the device."""
        # Only local names, and no object per batch that a hand-written loop would not create:
        # this keeps the overhead within a few percent of such a loop.
        runner, timed, recovery = self.runner, self.timed, self.recovery
        model, select, with_labels = runner.model, runner.select, runner.with_labels
        write, sizes = self.writer.write, timed.sizes
        start, stop, now = self.clock.start, self.clock.stop, time.perf_counter_ns
        check_finite = self.check_finite
        largest, add_elements = 0, timed.elements.append
        began = mark = now()
        next_callback = began + _CALLBACK_NS
        try:
            for batch in recovery.split_to_fit(batches):
                args, kwargs, size, ids, errors, labels, kept, _ = batch
                read_ns = now() - mark
                try:
                    if errors:
                        batch.raise_errors()
                    start()
                    returned = model(*args, **kwargs)
                    stop()
                except Exception as error:  # a model may raise anything
                    recovered = self._recover(batch, error)
                    self._write(batch, recovered)
                    timed.recovered += size
                    began += now() - mark  # recovery is not part of the measured time
                    mark = now()
                    continue
                elements = 0
                for tensor in args:
                    elements += tensor.numel()
                for tensor in kwargs.values():
                    elements += tensor.numel()
                if elements > largest:
                    largest = elements
                    timed.largest = LargestBatch(elements, timed.start + timed.done, size)
                # Count before writing: if Ctrl-C comes in between, trim() removes the entry. The
                # other order could lose a written batch.
                sizes.append(size)
                add_elements(elements)
                try:
                    outputs, valid = select(returned, size, kwargs), None
                    if labels is not None:
                        outputs = with_labels(outputs, labels)
                except Exception as error:  # a user's function may raise anything
                    at = timed.start + timed.done
                    outputs, valid = recovery.recover(at, size, error)
                if check_finite:
                    at = timed.start + timed.done
                    outputs, valid = recovery.check_finite(at, batch, outputs, valid)
                if kept:
                    outputs = runner.kept_columns(batch) | outputs
                write(outputs, ids, valid)
                # In grad mode, the graph must be freed before the next forward.
                del returned, outputs
                timed.data_ns += read_ns
                timed.done += size
                mark = now()
                if mark > next_callback:
                    began += self._commit()
                    mark = now()
                    next_callback = mark + _CALLBACK_NS
        finally:
            timed.total_ns = mark - began

    def run_overlapped(self, in_flight: int, batches: Iterator[Batch]) -> None:
        """Do the same as `run`, with the next forwards started before outputs are written.

        An error belongs to the batch whose forward raised it. It is handled once the batches before
        are written, so that files and journal are the same as those of `run`.
        """
        runner, timed, recovery = self.runner, self.timed, self.recovery
        transfers = TRANSFERS[runner.device.type](runner.device, runner.dtype)
        now = time.perf_counter_ns
        began = mark = now()
        next_callback = began + _CALLBACK_NS

        def finish(entry: InFlight) -> None:
            nonlocal began, mark, next_callback
            try:
                entry.copied.wait()
            except Exception as error:
                raise self._device_error(error, len(ring)) from error
            timed.add(entry.batch)  # before writing, as in run
            self._write(entry.batch, (entry.outputs, None))
            mark = now()
            if mark > next_callback:
                began += self._commit()
                mark = now()
                next_callback = mark + _CALLBACK_NS

        ring = Ring(in_flight, finish)
        parts = recovery.split_to_fit(batches)
        try:
            while True:
                reading = now()
                with ring.drained_on_error():
                    batch = next(parts, None)
                if batch is None:
                    break
                if not ring.busy():  # otherwise the device did not wait for the data
                    timed.data_ns += now() - reading
                ring.make_room()
                with ring.drained_on_error():
                    started = self._start(batch, transfers)
                if isinstance(started, InFlight):
                    ring.add(started)
                    continue
                alone = not len(ring)
                ring.drain()
                recovering = now()
                if alone or not ran_out_of_memory(started.error):
                    recovered = self._recover(batch, started.error)
                else:
                    at = timed.start + timed.done
                    recovered = recovery.repeat(at, batch.size, started.error)
                    ring.size, transfers = 1, Transfers(runner.device, runner.dtype)
                if started.timed:
                    timed.add(batch)
                else:
                    timed.recovered += batch.size
                self._write(batch, recovered)
                mark = now()
                if not started.timed:
                    began += mark - recovering  # recovery is not part of the measured time
            ring.drain()
        finally:
            ring.discard()
            timed.total_ns = mark - began

    def _start(self, batch: Batch, transfers: Transfers) -> InFlight | _Failed:
        """Start the forward pass of a batch, and the copies of its inputs and outputs."""
        runner, forwarded = self.runner, False
        try:
            batch.raise_errors()
            moved = transfers.to_device(batch)
            self.clock.start()
            returned = runner.model(*moved.args, **moved.kwargs)
            self.clock.stop()
            forwarded = True
            outputs = runner.select(returned, batch.size, moved.kwargs, to_host=transfers.to_host)
            outputs = runner.with_labels(outputs, batch.labels)
            return InFlight(batch, outputs, transfers.mark())
        except Exception as error:  # a model or a user's function may raise anything
            with suppress(Exception):
                transfers.mark().wait()  # then the memory of its copies is free
            return _Failed(error, forwarded)

    def _recover(self, batch: Batch, error: Exception) -> Recovered:
        """Predict what is possible of a batch that failed on its way to the device or there."""
        at = self.timed.start + self.timed.done
        if not batch.errors:
            return self.recovery.recover(at, batch.size, error)
        return self.recovery.recover_unreadable(at, self.runner.to_device(batch))

    def _write(self, batch: Batch, recovered: Recovered) -> None:
        """Write the outputs of a batch, after the checks of `run.on_nonfinite`."""
        outputs, valid = recovered
        if self.check_finite:
            at = self.timed.start + self.timed.done
            outputs, valid = self.recovery.check_finite(at, batch, outputs, valid)
        if batch.kept:
            outputs = self.runner.kept_columns(batch) | outputs
        self.writer.write(outputs, batch.ids, valid)
        self.timed.done += batch.size

    def _commit(self) -> int:
        """Commit and report progress; return the nanoseconds of the display, which do not count."""
        self.commit()
        committed = time.perf_counter_ns()
        self.progress(Progress("predicting", self.timed.start + self.timed.done, self.total))
        return time.perf_counter_ns() - committed

    def _device_error(self, error: Exception, later: int) -> RunFailed:
        """Return the error to raise if the device failed while batches were in flight."""
        sample = self.runner.data.input_position(self.timed.start + self.timed.done)
        after = f", or in one of the {later} after it" if later > 1 else ""
        after = ", or in the one after it" if later == 1 else after
        return RunFailed(
            f"the device failed in the batch that starts at sample {sample:,}{after}: "
            f"{first_line(error)}; run.in_flight: 1 with CUDA_LAUNCH_BLOCKING=1 in the environment "
            "finds the operation"
        )
