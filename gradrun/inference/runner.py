"""Run a model over data: first batch, warm-up, timed pass, memory pass."""

from __future__ import annotations

import errno
import itertools
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from gradrun.config.model import EagerModel
from gradrun.config.run import RunSection
from gradrun.config.schema import RunConfig
from gradrun.core.errors import (
    ConfigError,
    GradrunError,
    Interrupted,
    RunFailed,
    SampleError,
    first_line,
)
from gradrun.core.grad_mode import GradMode
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.core.units import pluralize
from gradrun.data.batch import Batch, transfer_to
from gradrun.data.prefetch import prefetch, should_prefetch
from gradrun.data.source import (
    BatchSource,
    has_row_checksums,
    read_one,
    whole_batches,
)
from gradrun.inference.batch_independence import Rows, batch_dependence, reference_rows
from gradrun.inference.carried_state import carried_state
from gradrun.inference.compilation import (
    CompiledModel,
    check_dtypes,
    compile_error,
    compiled_graphs,
    is_compiled,
    recompilation_limit_hits,
    runs_in_full_precision,
)
from gradrun.inference.decoding import Decoder
from gradrun.inference.device import seed_generators
from gradrun.inference.diagnosis import (
    describe_model_error,
    explain_first_batch_failure,
    ran_out_of_memory,
)
from gradrun.inference.meters import (
    FORWARD_MEMORY,
    device_memory,
    measure_forward_memory,
    model_memory,
    process_memory,
)
from gradrun.inference.meters.clock import Clock, clock_for
from gradrun.inference.meters.work import UNKNOWN, KnownWork, known_work
from gradrun.inference.metrics import Evaluation
from gradrun.inference.module_state import preserve_module_state
from gradrun.inference.recovery import BatchRecovery, Recovered, runnable_subset
from gradrun.inference.ring import InFlight, Ring
from gradrun.inference.transfers import TRANSFERS, SynchronousTransfers, Transfers
from gradrun.models.generation import take_times
from gradrun.modes import grad_mode
from gradrun.output import transforms
from gradrun.output.columns import ValueColumn
from gradrun.output.evidence_writer import LABELS, evidence_key
from gradrun.output.formats import RowWriter
from gradrun.output.kept_columns import kept_key
from gradrun.output.quarantine import Quarantine, SampleLog
from gradrun.output.tensor_transforms import Inputs, ModelFacts
from gradrun.output.transforms import (
    Outputs,
    OutputSelector,
    SelectedOutput,
    ToHost,
    iter_tensors,
    scored_outputs,
    to_cpu,
)
from gradrun.results import stats
from gradrun.results.result import (
    Compilation,
    FirstBatch,
    Generation,
    Measurement,
    Memory,
    Padding,
    Phases,
    Statement,
    Warning,
    WorkerStats,
)

WARM_UP_SECONDS = 0.3
"""Limit of an automatic warm-up, which ends earlier once the batch time is steady."""

_EAGER_SECONDS = 1.0
_EAGER_BATCHES = 5
"""Limits of the forwards without torch.compile, by which its gain is measured."""

_CALLBACK_NS = 200_000_000
"""Interval of commit and progress callbacks."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

QUARANTINE_HINT = "; set run.on_error: quarantine to skip such samples"

SKIP_SAMPLES = "--set run.on_error=quarantine"
"""Lets a resume continue after a sample that fails each time."""

PlanMetrics = Callable[[Sequence[SelectedOutput]], Evaluation | None]
"""Called with the model's outputs for the first batch, before transforms of their scores."""

CommitCallback = Callable[[], None]
"""Called between two batches, a few times per second, to commit predictions."""


@dataclass(frozen=True)
class PreparedRun:
    """The first batch and its outputs, after warm-up."""

    first: Batch
    outputs: Outputs
    """Outputs of the first batch, [size, ...] each: the template for a writer."""
    rows: Rows
    """A few rows of them as the model returned them, for the test of batch independence."""
    statements: tuple[Statement, ...]
    """How outputs are transformed, with their shapes."""
    class_counts: Mapping[str, int]
    """Number of classes of each output with class numbers or scores of classes."""
    evaluation: Evaluation | None
    """The metrics, if the config has any."""
    recovery: BatchRecovery
    prefetch: bool
    """Whether batches are read ahead in a thread."""
    compilation: Compilation | None
    """What model.compile cost and gains."""
    first_batch_seconds: float
    warm_up_seconds: float
    batch_seconds: float
    """Forward time of the first batch after the warm-up."""


class LargestBatch(NamedTuple):
    """The batch whose inputs have the most elements; the earliest of several."""

    elements: int
    start: int
    """The number of its first sample."""
    size: int


NO_BATCH = LargestBatch(0, 0, 0)


class _Failed(NamedTuple):
    """A batch that could not be started."""

    error: Exception
    timed: bool
    """Whether its forward pass was complete."""


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


class Runner:
    """A model and its data, run in this order: prepare, run_timed_pass, measure_memory."""

    def __init__(
        self,
        model: nn.Module,
        data: BatchSource,
        config: RunConfig,
        device: torch.device,
        facts: ModelFacts | None = None,
        plan_metrics: PlanMetrics | None = None,
        decode: Decoder | None = None,
    ) -> None:
        self.model, self.data, self.config, self.device = model, data, config, device
        self._eager = model.eager if isinstance(model, CompiledModel) else model
        self.mode = config.run.mode
        self.warnings: list[Warning] = []
        self._facts, self._selector = facts, OutputSelector(config.output, facts, decode)
        self._select: Callable[..., Outputs] = self._selector
        self._plan_metrics, self._saves_labels = plan_metrics, False
        self._dtype = config.model.dtype if isinstance(config.model, EagerModel) else None
        self._transfer = transfer_to(device, self._dtype)

    def prepare(self, quarantine: SampleLog | None = None) -> PreparedRun:
        """Run the first batch, then warm up; writes no predictions.

        Args:
            quarantine: receives the samples that fail in the timed pass; default: a file in
                output.path.

        Raises:
            ConfigError: the model fails on the data, or the output config does not match it.
            RunFailed: the model fails when it runs the first batch again.
        """
        started = time.perf_counter()
        batch, clock = self._first_batch(), clock_for(self.device)
        # The first batch runs without model.compile too: to show what it gains, and for errors.
        compiling = isinstance(self.model, CompiledModel)
        eager, graphs = clock_for(self.device) if compiling else clock, compiled_graphs()
        with execution_context(self.config.run, self.device), preserve_module_state(self.model):
            first, returned, limit = self._first_forward(batch, eager)
            if isinstance(self.model, CompiledModel):
                self._time_eager(first, eager)
                returned = self._compile(self.model, first, returned, clock)
            self._check_graph(returned)
            rows = reference_rows(
                self._selector.as_returned(returned, first.size), first, self.config
            )
            returned, outputs = self._first_outputs(first, returned)
            first_batch_seconds = time.perf_counter() - started
            statements = tuple(
                transforms.statements(self.config.output, returned, first.kwargs, self._facts)
            )
            self._check_activations(first, returned)
            self._check_class_dimension(first, returned)
            counts = transforms.class_counts(
                self.config.output, returned, first.kwargs, self._facts
            )
            evaluation = self._prepare_metrics(first, returned)
            if evaluation and evaluation.evidence:
                self._select = _with_evidence(self._selector, evaluation)
                outputs |= evaluation.collect(returned, first.kwargs)
            self._saves_labels = evaluation is not None and evaluation.saves_labels
            outputs = self._with_labels(outputs, first.labels)
            del returned
            warm_up_started = time.perf_counter()
            try:
                if self.config.run.warmup != 0 and is_compiled(self.model):
                    self._compile_other_shapes(first, clock)
                compile_seconds = sum(clock.seconds)
                self._warm_up(first, clock)
                ahead = should_prefetch(self.data, forward_seconds=clock.seconds[-1])
            except (Exception, SystemExit) as error:  # a model may raise anything
                raise RunFailed(
                    f"the model ran its first batch, but failed when it ran it again: "
                    f"{describe_model_error(error, self.mode)}"
                ) from error
            warm_up_seconds = time.perf_counter() - warm_up_started
        recovery = BatchRecovery(
            run=self.config.run,
            quarantine=quarantine or Quarantine(self.config.output.path),
            template=outputs,
            predict=self._predict,
            read_batch=self.read_batch,
            input_position=self.data.input_position,
            batch_limit=limit,
        )
        return PreparedRun(
            first=first,
            outputs=self.kept_columns(first) | outputs,
            rows=rows,
            statements=statements,
            class_counts=counts,
            evaluation=evaluation,
            recovery=recovery,
            prefetch=ahead,
            compilation=Compilation(
                seconds=compile_seconds,
                graphs=compiled_graphs() - graphs,
                eager=median(eager.seconds[1:]),
                compiled=clock.seconds[-1],
            )
            if compiling
            else None,
            first_batch_seconds=first_batch_seconds - (sum(eager.seconds) if compiling else 0.0),
            warm_up_seconds=warm_up_seconds,
            batch_seconds=clock.seconds[-1],
        )

    def check_batch_independence(self, prepared: PreparedRun) -> None:
        """Warn if predictions depend on the other samples of their batch; restores the model."""
        with execution_context(self.config.run, self.device):
            found = batch_dependence(
                self.model,
                prepared.first,
                prepared.rows,
                self.config,
                self.device,
                self._selector.as_returned,
            )
        if found:
            self._warn("batch_dependent", f"{found.text}; {found.advice}")

    def carried_state(self, prepared: PreparedRun) -> str | None:
        """Describe state that the model carries from batch to batch; None if it carries none.

        Runs the first samples twice, without writing predictions.
        """
        if (self.data.samples or self.data.batch_size + 1) <= self.data.batch_size:
            return None
        # A compiled model would be compiled again for a smaller batch.
        few = prepared.first if is_compiled(self.model) else prepared.first.slice(0, 2)
        with suppress(Exception, SystemExit), execution_context(self.config.run, self.device):
            return carried_state(self.model, few, self._predict)
        return None  # the model cannot run the small batch

    def run_timed_pass(
        self,
        prepared: PreparedRun,
        writer: RowWriter,
        commit: CommitCallback = lambda: None,
        progress: ProgressCallback = ignore,
        stop: int | None = None,
    ) -> TimedPass:
        """Predict the samples that the writer does not have yet, up to `stop` or all.

        An error or Ctrl-C ends the pass early; it is in `stopped`, with the measurements up to it.
        """
        device_memory.reset(self.device)
        graphs = compiled_graphs()
        seed_generators(self.config.run.seed, self.device)  # dropout in training mode repeats
        clock = clock_for(self.device)
        take_times(self._eager)  # those of the warm-up
        timed = TimedPass(writer.written, clock.seconds)
        in_flight = self._in_flight()
        batches = self._batches(writer.written, stop, ahead=prepared.prefetch)
        if (move := self._transfer) and in_flight == 1:
            batches = (move(batch) for batch in batches)
        loop = self._loop if in_flight == 1 else partial(self._overlapped_loop, in_flight)
        hits: list[str] = []
        try:
            with (
                execution_context(self.config.run, self.device),
                recompilation_limit_hits() as hits,
            ):
                loop(batches, writer, timed, clock, prepared.recovery, commit, progress)
        except KeyboardInterrupt:
            timed.stop(Interrupted())
        except BaseException as error:  # a model may raise anything, also SystemExit
            timed.stop(self.stop_error(error, timed))
        finally:
            batches.close()
        try:
            clock.finish()
        except Exception as error:  # errors of a device appear at the next synchronization
            timed.stop(self.stop_error(error, timed))
        timed.generation = take_times(self._eager)
        timed.padding = self.data.padding(timed.start, timed.start + timed.done)
        if compiled := compiled_graphs() - graphs:
            self._warn_of_compilation(compiled)
        if hits:
            self._warn(
                "recompilation_limit",
                f"{hits[0].splitlines()[0]}: batches of further shapes ran eagerly; set "
                "model.compile.dynamic: true, or keep the shapes of the inputs the same",
            )
        return timed

    def _loop(
        self,
        batches: Iterator[Batch],
        writer: RowWriter,
        timed: TimedPass,
        clock: Clock,
        recovery: BatchRecovery,
        commit: CommitCallback,
        progress: ProgressCallback,
    ) -> None:
        # Only local names, and no object per batch that a hand-written loop would not create:
        # this keeps the overhead within a few percent of such a loop.
        with_labels = self._with_labels
        model, select, write, sizes = self.model, self._select, writer.write, timed.sizes
        start, stop, now = clock.start, clock.stop, time.perf_counter_ns
        check_finite = self.config.run.on_nonfinite != "warn"
        largest, add_elements = 0, timed.elements.append
        total = self.data.samples or 0  # an iterable finds its length at the end
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
                    recovered = self._recover(batch, error, timed, recovery)
                    self._write(batch, recovered, writer, timed, recovery)
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
                    outputs = self.kept_columns(batch) | outputs
                write(outputs, ids, valid)
                # In grad mode, the graph must be freed before the next forward.
                del returned, outputs
                timed.data_ns += read_ns
                timed.done += size
                mark = now()
                if mark > next_callback:
                    began += self._commit(timed, total, commit, progress)
                    mark = now()
                    next_callback = mark + _CALLBACK_NS
        finally:
            timed.total_ns = mark - began

    def _overlapped_loop(
        self,
        in_flight: int,
        batches: Iterator[Batch],
        writer: RowWriter,
        timed: TimedPass,
        clock: Clock,
        recovery: BatchRecovery,
        commit: CommitCallback,
        progress: ProgressCallback,
    ) -> None:
        """Do the same as `_loop`, with the next forwards started before outputs are written.

        An error belongs to the batch whose forward raised it. It is handled once the batches before
        are written, so that files and journal are the same as those of `_loop`.
        """
        transfers = TRANSFERS[self.device.type](self.device, self._dtype)
        now, total = time.perf_counter_ns, self.data.samples or 0
        began = mark = now()
        next_callback = began + _CALLBACK_NS

        def finish(entry: InFlight) -> None:
            nonlocal began, mark, next_callback
            try:
                entry.copied.wait()
            except Exception as error:
                raise self._device_error(error, timed, len(ring)) from error
            timed.add(entry.batch)  # before writing, as in _loop
            self._write(entry.batch, (entry.outputs, None), writer, timed, recovery)
            mark = now()
            if mark > next_callback:
                began += self._commit(timed, total, commit, progress)
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
                    started = self._start(batch, transfers, clock)
                if isinstance(started, InFlight):
                    ring.add(started)
                    continue
                alone = not len(ring)
                ring.drain()
                recovering = now()
                if alone or not ran_out_of_memory(started.error):
                    recovered = self._recover(batch, started.error, timed, recovery)
                else:
                    at = timed.start + timed.done
                    recovered = recovery.repeat(at, batch.size, started.error)
                    ring.size, transfers = 1, SynchronousTransfers(self.device, self._dtype)
                if started.timed:
                    timed.add(batch)
                else:
                    timed.recovered += batch.size
                self._write(batch, recovered, writer, timed, recovery)
                mark = now()
                if not started.timed:
                    began += mark - recovering  # recovery is not part of the measured time
            ring.drain()
        finally:
            ring.discard()
            timed.total_ns = mark - began

    def _start(self, batch: Batch, transfers: Transfers, clock: Clock) -> InFlight | _Failed:
        """Start the forward pass of a batch, and the copies of its inputs and outputs."""
        forwarded = False
        try:
            batch.raise_errors()
            moved = transfers.to_device(batch)
            clock.start()
            returned = self.model(*moved.args, **moved.kwargs)
            clock.stop()
            forwarded = True
            outputs = self._select(returned, batch.size, moved.kwargs, to_host=transfers.to_host)
            outputs = self._with_labels(outputs, batch.labels)
            return InFlight(batch, outputs, transfers.mark())
        except Exception as error:  # a model or a user's function may raise anything
            with suppress(Exception):
                transfers.mark().wait()  # then the memory of its copies is free
            return _Failed(error, forwarded)

    def _recover(
        self, batch: Batch, error: Exception, timed: TimedPass, recovery: BatchRecovery
    ) -> Recovered:
        """Predict what is possible of a batch that failed on its way to the device or there."""
        at = timed.start + timed.done
        if not batch.errors:
            return recovery.recover(at, batch.size, error)
        return recovery.recover_unreadable(at, self._to_device(batch))

    def _write(
        self,
        batch: Batch,
        recovered: Recovered,
        writer: RowWriter,
        timed: TimedPass,
        recovery: BatchRecovery,
    ) -> None:
        """Write the outputs of a batch, after the checks of `run.on_nonfinite`."""
        outputs, valid = recovered
        if self.config.run.on_nonfinite != "warn":
            at = timed.start + timed.done
            outputs, valid = recovery.check_finite(at, batch, outputs, valid)
        if batch.kept:
            outputs = self.kept_columns(batch) | outputs
        writer.write(outputs, batch.ids, valid)
        timed.done += batch.size

    @staticmethod
    def _commit(
        timed: TimedPass, total: int, commit: CommitCallback, progress: ProgressCallback
    ) -> int:
        """Commit and report progress; return the nanoseconds of the display, which do not count."""
        commit()
        committed = time.perf_counter_ns()
        progress(Progress("predicting", timed.start + timed.done, total))
        return time.perf_counter_ns() - committed

    def _in_flight(self) -> int:
        """Return how many batches may be on the device at once."""
        # Data of unknown length may come slowly, and outputs are not to wait for later inputs.
        if self.device.type not in TRANSFERS or self.data.samples is None:
            return 1
        return self.config.run.in_flight

    def _device_error(self, error: Exception, timed: TimedPass, later: int) -> RunFailed:
        """Return the error to raise if the device failed while batches were in flight."""
        sample = self.data.input_position(timed.start + timed.done)
        after = f", or in one of the {later} after it" if later > 1 else ""
        after = ", or in the one after it" if later == 1 else after
        return RunFailed(
            f"the device failed in the batch that starts at sample {sample:,}{after}: "
            f"{first_line(error)}; run.in_flight: 1 with CUDA_LAUNCH_BLOCKING=1 in the environment "
            "finds the operation"
        )

    def measure_memory(self, prepared: PreparedRun, timed: TimedPass) -> Memory:
        """Read the memory meters, then measure forwards of the first and the largest batch.

        The forward pass is skipped after a stop, or if `measure.memory` is off. Its failure is a
        warning, because the predictions are complete.
        """
        process_peak, method = process_memory.peak_resident()
        allocated, reserved = device_memory.peaks(self.device)
        memory = model_memory(self.model, prepared.first)
        try:
            if timed.stopped or not self.config.measure.memory:
                pass
            elif self.device.type not in FORWARD_MEMORY:
                text = f"{self.device.type} has no meter for the memory of a forward pass"
                self._warn("no_tensor_memory", text)
            else:
                memory = self._measure_forward(prepared.first, timed.largest)
        except KeyboardInterrupt:
            timed.stop(Interrupted("interrupted during the memory measurement"))
        except Exception as error:  # a model may raise anything
            self._warn(
                "no_tensor_memory",
                f"the memory of tensors was not measured ({type(error).__name__}: "
                f"{first_line(error)}); measure.memory: false skips this pass",
            )
        return memory.replace(
            process_peak=process_peak,
            process_method=method,
            device_allocated=allocated,
            device_reserved=reserved,
        )

    def count_work(self, prepared: PreparedRun, timed: TimedPass) -> KnownWork:
        """Count the operations of the first batch, if the peaks of the machine are known.

        Skipped after a stop, if `measure.memory` is off, and with workers, which share the peaks.
        """
        if timed.stopped or timed.workers or not self.config.measure.memory:
            return UNKNOWN
        try:
            with execution_context(self.config.run, self.device):
                return known_work(self.model, prepared.first, self.device)
        except KeyboardInterrupt:
            timed.stop(Interrupted("interrupted while operations were counted"))
            return UNKNOWN

    def _measure_forward(self, first: Batch, largest: LargestBatch) -> Memory:
        """Measure the first batch and, if that is another one, the largest."""
        with execution_context(self.config.run, self.device):
            memory = measure_forward_memory(self.model, first.map(torch.clone), self.device)
            if largest.elements <= first.elements:
                return memory.replace(batch=0)
            # A copy, so that the source can release the chunk of the batch.
            batch = self.read_batch(largest.start, largest.size).map(torch.clone)
            measured = measure_forward_memory(self.model, batch, self.device)
        return measured.replace(
            batch=None if _variable(self.data) else largest.start // self.data.batch_size,
            first_batch=FirstBatch(
                shape=memory.shape,
                inputs=memory.inputs,
                forward_peak=memory.forward_peak,
                retained=memory.retained,
            ),
        )

    def measurement(
        self,
        prepared: PreparedRun,
        timed: TimedPass,
        memory: Memory,
        load_seconds: float,
        open_seconds: float,
        known: KnownWork = UNKNOWN,
    ) -> Measurement:
        """Combine the measurements of all passes."""
        seconds = tuple(timed.seconds[: len(timed.sizes)])
        workers = sum(bool(worker.samples) for worker in timed.workers) or 1
        data, forward = timed.data_ns * 1e-9 / workers, float(sum(seconds)) / workers
        total = timed.total_ns * 1e-9
        if not timed.workers:  # with several batches in flight, a part of the reading overlaps
            data = min(data, max(0.0, total - forward))
        return Measurement(
            mode=self.mode,
            batch_limit=prepared.recovery.batch_limit,
            padding=timed.padding,
            generation=timed.generation,
            workers=timed.workers,
            batch_seconds=seconds,
            batch_sizes=tuple(timed.sizes[: len(seconds)]),
            batch_elements=_uneven(timed.elements, timed.sizes[: len(seconds)]),
            phases=Phases(
                load_model=load_seconds,
                open_data=open_seconds,
                first_batch=prepared.first_batch_seconds,
                warm_up=prepared.warm_up_seconds,
                data=data,
                forward=forward,
                output=max(0.0, total - data - forward),
            ),
            memory=memory,
            work=known.work,
            peaks=known.peaks,
            compilation=prepared.compilation,
        )

    # --- prepare -------------------------------------------------------------------------------

    def _first_batch(self) -> Batch:
        """Return a copy of the first batch; with on_error: quarantine, of its readable samples."""
        location = self.config.data.location
        # The first alone: a source may read ahead for an iterator over all batches.
        first = [*filter(None, [read_one(self.data, 0)])]
        others = self.data.batches(sum(batch.size for batch in first))
        for batch in itertools.chain(first, others):
            rows = [row for row in range(batch.size) if row not in batch.errors]
            error = next(iter(batch.errors.values()), None)
            if error and self.config.run.on_error != "quarantine":
                raise ConfigError(f"{error}{QUARANTINE_HINT}", location) from error
            if rows:
                break
        else:
            raise ConfigError(f"every sample is unreadable; the last error: {error}", location)
        batch = batch.select(rows) if error else batch
        try:
            # A copy, so that the source can release the chunk of the batch.
            return self._to_device(batch).map(torch.clone)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"the first batch cannot be moved to {self.device}: {first_line(error)}",
                "data.batch_size",
            ) from error

    def _first_forward(self, batch: Batch, clock: Clock) -> tuple[Batch, Any, int | None]:
        """Run the first batch, or the subset of it that the model can run.

        Returns:
            The batch, the model's output, and the batch limit after an out-of-memory error.
        """
        model = self._eager
        try:
            returned = self._forward(batch, clock, model)
            if self.config.output.decoder:
                self._selector.structured(returned, batch.size)  # the user's function may fail
            return batch, returned, None
        except GradrunError:
            raise
        except (Exception, SystemExit) as error:  # a model may raise anything
            subset, limit = None, None
            if isinstance(error, Exception):
                subset, limit = runnable_subset(self.config.run, self._predict, batch, error)
            if subset is None and isinstance(error, SampleError):
                text = f"{error}{QUARANTINE_HINT}"
                raise ConfigError(text, self._selector.key) from error
            if subset is None:
                raise explain_first_batch_failure(
                    model, batch.args, batch.kwargs, error, self.mode
                ) from error
        return subset, self._forward(subset, clock, model), limit

    def _time_eager(self, batch: Batch, clock: Clock) -> None:
        """Repeat the first batch without model.compile: once, or more often if it is fast."""
        deadline = time.perf_counter() + _EAGER_SECONDS
        while len(clock.seconds) < 2 or (
            len(clock.seconds) <= _EAGER_BATCHES and time.perf_counter() < deadline
        ):
            self._forward(batch, clock, self._eager)
            clock.finish()

    def _compile(self, model: CompiledModel, batch: Batch, eager_output: Any, clock: Clock) -> Any:
        """Run the first batch through torch.compile; warn if this has no effect.

        Raises:
            ConfigError: the model cannot be compiled.
        """
        try:
            returned = self._forward(batch, clock)
        except GradrunError:
            raise
        except (Exception, SystemExit) as error:  # a compiler may raise anything
            raise compile_error(error, model.backend) from error
        clock.finish()
        check_dtypes(returned, eager_output)
        # An earlier run of this process may have compiled the same code.
        if compiled_graphs() == 0 and model.compiles(batch.args, batch.kwargs):
            self._warn(
                "not_compiled",
                "torch.compile compiled no part of the model, which runs eagerly; gradrun audit "
                "shows why, and model.compile: false starts faster",
            )
        if self.config.run.autocast:
            with torch.autocast(self.device.type, enabled=False):
                full = self._forward(batch, clock_for(self.device), model.eager)
            if runs_in_full_precision(returned, reduced=eager_output, full=full):
                self._warn(
                    "autocast_ignored",
                    "run.autocast has no effect on the compiled model: its outputs are those of "
                    "full precision; use model.dtype instead, or model.compile: false",
                )
        return returned

    def _first_outputs(self, first: Batch, returned: Any) -> tuple[Any, Outputs]:
        """Return the structure of the model's output, and the outputs to write."""
        try:
            structured = self._selector.structured(returned, first.size)
            outputs = self._selector.select(structured, first.size, first.kwargs, returned)
            return structured, outputs
        except GradrunError:
            raise
        except Exception as error:  # torch raises many types
            raise ConfigError(
                f"the transforms cannot be applied to this output: {first_line(error)}",
                "output.transform",
            ) from error

    def _prepare_metrics(self, first: Batch, returned: Any) -> Evaluation | None:
        if self._plan_metrics is None:
            return None
        outputs = scored_outputs(returned, self.config.output, first.kwargs, model=self._facts)
        return self._plan_metrics(outputs)

    def _check_graph(self, returned: Any) -> None:
        names = [name for name, tensor in iter_tensors(returned) if tensor.requires_grad]
        if names and self.mode is not GradMode.GRAD:
            self._warn(
                "graph_kept",
                f"output {names[0]} has a gradient graph in mode {self.mode}: code in the model "
                "enables gradients; run gradrun audit to find it",
            )

    def _warm_up(self, batch: Batch, clock: Clock) -> None:
        """Repeat the first batch until its time is steady, or `run.warmup` times.

        A forward of over a second is not repeated, because its cold start is relatively small.
        """
        warmup = self.config.run.warmup
        deadline = time.perf_counter() + WARM_UP_SECONDS
        for _ in range(warmup) if isinstance(warmup, int) else itertools.count():
            clock.finish()
            late = time.perf_counter() > deadline or clock.seconds[-1] > 1.0
            if warmup == "auto" and (late or stats.is_steady(clock.seconds[1:])):
                break
            self._forward(batch, clock)
        clock.finish()

    def _compile_other_shapes(self, first: Batch, clock: Clock) -> None:
        """Run a shorter last batch and a batch of texts of another length, then the first again.

        torch.compile compiles a model for each of them, which would otherwise be part of the timed
        pass.
        """
        size, batch = self.data.batch_size, first
        samples = self.data.samples or 0
        if self.data.of_texts and samples >= 2 * size:
            batch = self._to_device(self._batch_with(size))
            self._forward(batch, clock)
        last = samples % size
        if 0 < last < min(first.size, batch.size):
            self._forward(batch.slice(0, last), clock)
        self._forward(first, clock)

    # --- shared --------------------------------------------------------------------------------

    def _forward(self, batch: Batch, clock: Clock, model: nn.Module | None = None) -> Any:
        """Run the model on a copy of the batch, because it may change its input in place."""
        batch, model = batch.map(torch.clone), self.model if model is None else model
        clock.start()
        returned = model(*batch.args, **batch.kwargs)
        clock.stop()
        return returned

    def _predict(self, batch: Batch) -> Outputs:
        batch.raise_errors()
        returned = self.model(*batch.args, **batch.kwargs)
        outputs = self._select(returned, batch.size, batch.kwargs)
        return self._with_labels(outputs, batch.labels)

    def _with_labels(self, outputs: Outputs, labels: torch.Tensor | None) -> Outputs:
        """Add the labels of a batch to its outputs, if metrics need them."""
        if labels is None or not self._saves_labels:
            return outputs
        return outputs | {evidence_key(LABELS): labels}

    def _batches(self, start: int, stop: int | None, *, ahead: bool) -> Any:
        size = whole_batches(self.data)
        samples = self.data.samples or 0
        if stop is not None and (start % size or (stop % size and stop < samples)):
            return (self._part(*part) for part in [(start, stop - start)])
        batches: Iterator[Batch] = self.data.batches(start, stop)
        return prefetch(batches) if ahead else batches

    def kept_columns(self, batch: Batch) -> Outputs:
        """Return the columns of the input that are written beside the predictions of a batch."""
        return {
            kept_key(name): ValueColumn(values, self.data.kept_types.get(name))
            for name, values in batch.kept.items()
        }

    def read_batch(self, start: int, size: int) -> Batch:
        """Read the batch with this first sample and size again, on the device."""
        return self._to_device(self._part(start, size))

    def _part(self, start: int, size: int) -> Batch:
        # Read the full batch and slice it, so that texts are padded to the same length.
        batch, offset = self._batch_with(start), start - self.data.batch_start(start)
        return batch if batch.size == size else batch.slice(offset, offset + size)

    def _batch_with(self, index: int) -> Batch:
        """Read the batch that has the sample run as number `index`, on the host."""
        batch = read_one(self.data, self.data.batch_start(index))
        assert batch
        return batch

    def _to_device(self, batch: Batch) -> Batch:
        return self._transfer(batch) if self._transfer else batch

    def _check_class_dimension(self, first: Batch, returned: Any) -> None:
        """Warn if a transform uses another dimension than that of the last layer's outputs."""
        if (head := _last_layer(self.model)) is None:
            return
        name, classes = head
        arguments = classes, self.config.output, returned, first.kwargs, self._facts
        for output, dim, size, other in transforms.misplaced_classes(*arguments):
            self._warn(
                "class_dimension",
                f"the transform of output {output!r} uses dimension {dim} with {size} values, but "
                f"the model's last layer, {name}, has {classes} outputs, as many as dimension "
                f"{other}: if these are the classes, set output.dim: {other}",
            )

    def _check_activations(self, first: Batch, returned: Any) -> None:
        """Warn if softmax or sigmoid reads probabilities, in the first and in the last batch."""
        config, facts = self.config.output, self._facts
        found = [*transforms.double_activations(config, returned, first.kwargs, facts)]
        size, samples = self.data.batch_size, self.data.samples
        # A full batch where possible, because few logits may be within 0 to 1 by chance.
        start = size if samples is None else (samples // size - 1) * size
        if found and start > 0:
            with suppress(Exception, SystemExit):  # then the first batch decides
                last = self._to_device(self._batch_with(start))
                last.raise_errors()
                again = self._selector.structured(self.model(*last.args, **last.kwargs), last.size)
                also = [*transforms.double_activations(config, again, last.kwargs, facts)]
                found = [item for item in found if item in also]
        for output, activation in found:
            sums, instead = ", and those of a sample add up to 1", " or argmax"
            if activation == "sigmoid":
                sums, instead = "", ", or threshold with output.threshold: 0.5"
            self._warn(
                "double_activation",
                f"the values of output {output!r} before {activation} are all within 0 to 1{sums}: "
                f"they seem to be probabilities already, and {activation} changes them; use "
                f"output.transform: none{instead}",
            )

    def check_training_mode(self) -> None:
        """Warn about modules whose training mode affects predictions, if config disables it."""
        if getattr(self.config.model, "training", False):
            return
        kinds = nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm
        modules = self.model.named_modules()
        names = [name for name, m in modules if m.training and isinstance(m, kinds)]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self._warn(
                "training_inside",
                f"{', '.join(names[:3])}{more} ran in training mode, although model.training is "
                "off: dropout or batch norm affects the predictions; run gradrun audit for details",
            )

    def stop_error(self, error: BaseException, timed: TimedPass) -> GradrunError:
        """Return the error to raise once the result is saved."""
        if isinstance(error, GradrunError):
            text = str(error)
        elif isinstance(error, SampleError):
            text = f"{error}{self._correction_hint()}"
        elif isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            text = f"the predictions cannot be written: {error.strerror}"
        else:
            sample = timed.start + timed.done
            number = f"batch {sample // self.data.batch_size}, which"
            text = (
                f"{'the batch that' if _variable(self.data) else number} starts at sample "
                f"{self.data.input_position(sample):,}, failed: "
                f"{describe_model_error(error, self.mode)}"
            )
        of_sample = not isinstance(error, GradrunError | OSError)
        options = error.resume_options if isinstance(error, GradrunError) else ""
        if of_sample and self.config.run.on_error != "quarantine":
            options = SKIP_SAMPLES
        stopped = RunFailed(text, resume_options=options)
        stopped.__cause__ = error  # as `raise ... from` does; it is raised after saving
        return stopped

    def _warn_of_compilation(self, graphs: int) -> None:
        remedy = (
            "data.padding: max_length gives all texts one length, or set model.compile: false"
            if self.data.of_texts
            else "keep the shapes of the inputs the same, or set model.compile.dynamic: true, or "
            "model.compile: false"
        )
        self._warn(
            "recompiled",
            f"torch.compile compiled {pluralize(graphs, 'graph')} during the timed pass, for other "
            f"shapes of the inputs, and the measured times include this; {remedy}",
        )

    def _correction_hint(self) -> str:
        """Describe how to continue after an unreadable sample."""
        # A resume accepts other rows behind the last commit, but no other image or array.
        if has_row_checksums(self.data):
            return f"; correct the row and resume, or{QUARANTINE_HINT.removeprefix(';')}"
        return QUARANTINE_HINT

    def _warn(self, code: str, text: str) -> None:
        self.warnings.append(Warning(code=code, text=text))


def _last_layer(model: nn.Module) -> tuple[str, int] | None:
    """Return the name of the last linear or convolutional layer, and the number of its outputs."""
    sizes = [
        (name, getattr(module, "out_features", getattr(module, "out_channels", None)))
        for name, module in model.named_modules()
    ]
    return next(((name, n) for name, n in reversed(sizes) if isinstance(n, int)), None)


def _with_evidence(selector: OutputSelector, evaluation: Evaluation) -> Callable[..., Outputs]:
    """Add what the metrics need to the selected outputs."""

    def select_with_evidence(
        returned: Any, size: int, inputs: Inputs, to_host: ToHost = to_cpu
    ) -> Outputs:
        structured = selector.structured(returned, size)
        outputs = selector.select(structured, size, inputs, returned, to_host)
        return outputs | evaluation.collect(structured, inputs, to_host)

    return select_with_evidence


def _variable(data: BatchSource) -> bool:
    """Return whether batches differ in their number of samples."""
    return whole_batches(data) != data.batch_size


def _uneven(elements: array[int], sizes: array[int]) -> tuple[int, ...]:
    """Return the elements of the batches of these sizes if they differ per sample, else ()."""
    pairs = list(zip(elements, sizes, strict=False))
    uneven = len({count / size for count, size in pairs}) > 1
    return tuple(count for count, _ in pairs) if uneven else ()


@contextmanager
def execution_context(run: RunSection, device: torch.device) -> Iterator[None]:
    """Apply the gradient mode and autocast of a config."""
    dtype = getattr(torch, run.autocast) if run.autocast else None
    autocast = torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()
    with grad_mode(run.mode), autocast:
        yield
