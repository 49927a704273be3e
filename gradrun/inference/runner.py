"""A model and its data: the timed pass and the memory pass."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from gradrun.config.model import EagerModel
from gradrun.config.schema import RunConfig
from gradrun.core.errors import GradrunError, Interrupted, RunFailed, SampleError, first_line
from gradrun.core.progress import ProgressCallback, ignore
from gradrun.data.batch import Batch, transfer_to
from gradrun.data.prefetch import prefetch
from gradrun.data.source import BatchSource, has_row_checksums, read_one, whole_batches
from gradrun.inference.batch_independence import batch_dependence
from gradrun.inference.carried_state import carried_state
from gradrun.inference.compilation import (
    CompiledModel,
    compiled_graphs,
    is_compiled,
    recompilation_limit_hits,
)
from gradrun.inference.decoding import Decoder
from gradrun.inference.device import execution_context, seed_generators
from gradrun.inference.diagnosis import describe_model_error
from gradrun.inference.first_batch import QUARANTINE_HINT, PreparedRun, prepare
from gradrun.inference.meters import (
    FORWARD_MEMORY,
    device_memory,
    measure_forward_memory,
    model_memory,
    process_memory,
)
from gradrun.inference.meters.clock import clock_for
from gradrun.inference.meters.work import UNKNOWN, KnownWork, known_work
from gradrun.inference.metrics import Evaluation
from gradrun.inference.model_warnings import compilation_warnings
from gradrun.inference.timed_loop import CommitCallback, LargestBatch, TimedLoop, TimedPass
from gradrun.inference.transfers import TRANSFERS
from gradrun.models.generation import take_times
from gradrun.output.columns import ValueColumn
from gradrun.output.evidence_writer import LABELS, evidence_key
from gradrun.output.formats import RowWriter
from gradrun.output.kept_columns import kept_key
from gradrun.output.quarantine import SampleLog
from gradrun.output.tensor_transforms import Inputs, ModelFacts
from gradrun.output.transforms import Outputs, OutputSelector, SelectedOutput, ToHost, to_cpu
from gradrun.results.result import FirstBatch, Measurement, Memory, Phases, Warning

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

SKIP_SAMPLES = "--set run.on_error=quarantine"
"""Lets a resume continue after a sample that fails each time."""

PlanMetrics = Callable[[Sequence[SelectedOutput]], Evaluation | None]
"""Called with the model's outputs for the first batch, before transforms of their scores."""


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
        self.eager = model.eager if isinstance(model, CompiledModel) else model
        self.mode = config.run.mode
        self.warnings: list[Warning] = []
        self.facts, self.selector = facts, OutputSelector(config.output, facts, decode)
        self.select: Callable[..., Outputs] = self.selector
        self.plan_metrics, self._saves_labels = plan_metrics, False
        self.dtype = config.model.dtype if isinstance(config.model, EagerModel) else None
        self._transfer = transfer_to(device, self.dtype)

    def prepare(self, quarantine: SampleLog | None = None) -> PreparedRun:
        """Run the first batch, then warm up; writes no predictions.

        Args:
            quarantine: receives the samples that fail in the timed pass; default: a file in
                output.path.

        Raises:
            ConfigError: the model fails on the data, or the output config does not match it.
            RunFailed: the model fails when it runs the first batch again.
        """
        return prepare(self, quarantine)

    def check_batch_independence(self, prepared: PreparedRun) -> None:
        """Warn if predictions depend on the other samples of their batch; restores the model."""
        with execution_context(self.config.run, self.device):
            found = batch_dependence(
                self.model,
                prepared.first,
                prepared.rows,
                self.config,
                self.device,
                self.selector.as_returned,
            )
        if found:
            self.warn("batch_dependent", f"{found.text}; {found.advice}")

    def carried_state(self, prepared: PreparedRun) -> str | None:
        """Describe state that the model carries from batch to batch; None if it carries none.

        Runs the first samples twice, without writing predictions.
        """
        if (self.data.samples or self.data.batch_size + 1) <= self.data.batch_size:
            return None
        # A compiled model would be compiled again for a smaller batch.
        few = prepared.first if is_compiled(self.model) else prepared.first.slice(0, 2)
        with suppress(Exception, SystemExit), execution_context(self.config.run, self.device):
            return carried_state(self.model, few, self.predict)
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
        take_times(self.eager)  # those of the warm-up
        timed = TimedPass(writer.written, clock.seconds)
        in_flight = self._in_flight()
        batches = self._batches(writer.written, stop, ahead=prepared.prefetch)
        if (move := self._transfer) and in_flight == 1:
            batches = (move(batch) for batch in batches)
        loop = TimedLoop(self, writer, timed, clock, prepared.recovery, commit, progress)
        hits: list[str] = []
        try:
            with (
                execution_context(self.config.run, self.device),
                recompilation_limit_hits() as hits,
            ):
                if in_flight == 1:
                    loop.run(batches)
                else:
                    loop.run_overlapped(in_flight, batches)
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
        timed.generation = take_times(self.eager)
        timed.padding = self.data.padding(timed.start, timed.start + timed.done)
        self.warnings += compilation_warnings(self.data, compiled_graphs() - graphs, hits)
        return timed

    def _in_flight(self) -> int:
        """Return how many batches may be on the device at once."""
        # Data of unknown length may come slowly, and outputs are not to wait for later inputs.
        if self.device.type not in TRANSFERS or self.data.samples is None:
            return 1
        return self.config.run.in_flight

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
                self.warn("no_tensor_memory", text)
            else:
                memory = self._measure_forward(prepared.first, timed.largest)
        except KeyboardInterrupt:
            timed.stop(Interrupted("interrupted during the memory measurement"))
        except Exception as error:  # a model may raise anything
            self.warn(
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

    # --- shared --------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> Outputs:
        """Return the outputs of a batch, as in the timed pass."""
        batch.raise_errors()
        returned = self.model(*batch.args, **batch.kwargs)
        outputs = self.select(returned, batch.size, batch.kwargs)
        return self.with_labels(outputs, batch.labels)

    def with_labels(self, outputs: Outputs, labels: torch.Tensor | None) -> Outputs:
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

    def save_evidence(self, evaluation: Evaluation) -> None:
        """Add what the metrics need to the outputs of each batch."""
        if evaluation.evidence:
            self.select = _with_evidence(self.selector, evaluation)
        self._saves_labels = evaluation.saves_labels

    def kept_columns(self, batch: Batch) -> Outputs:
        """Return the columns of the input that are written beside the predictions of a batch."""
        return {
            kept_key(name): ValueColumn(values, self.data.kept_types.get(name))
            for name, values in batch.kept.items()
        }

    def read_batch(self, start: int, size: int) -> Batch:
        """Read the batch with this first sample and size again, on the device."""
        return self.to_device(self._part(start, size))

    def _part(self, start: int, size: int) -> Batch:
        # Read the full batch and slice it, so that texts are padded to the same length.
        batch, offset = self.batch_with(start), start - self.data.batch_start(start)
        return batch if batch.size == size else batch.slice(offset, offset + size)

    def batch_with(self, index: int) -> Batch:
        """Read the batch that has the sample run as number `index`, on the host."""
        batch = read_one(self.data, self.data.batch_start(index))
        assert batch
        return batch

    def to_device(self, batch: Batch) -> Batch:
        """Return a batch on the device, with floating-point inputs in the dtype of the model."""
        return self._transfer(batch) if self._transfer else batch

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

    def _correction_hint(self) -> str:
        """Describe how to continue after an unreadable sample."""
        # A resume accepts other rows behind the last commit, but no other image or array.
        if has_row_checksums(self.data):
            return f"; correct the row and resume, or{QUARANTINE_HINT.removeprefix(';')}"
        return QUARANTINE_HINT

    def warn(self, code: str, text: str) -> None:
        """Add a warning to the result."""
        self.warnings.append(Warning(code=code, text=text))


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
