"""The one loop: first batch, warm-up, the timed pass that writes predictions, the memory pass.

Knows how to run a model over data and what that took; prints nothing and opens nothing.
"""

from __future__ import annotations

import errno
import itertools
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

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
from gradrun.data.batch import Batch, transfer_to
from gradrun.data.prefetch import prefetch, should_prefetch
from gradrun.data.source import BatchSource, LengthGrouped, input_position
from gradrun.inference.device import seed_generators
from gradrun.inference.diagnosis import describe_model_error, explain_first_batch_failure
from gradrun.inference.meters import (
    FORWARD_MEMORY,
    clock,
    cpu_memory,
    device_memory,
    process_memory,
)
from gradrun.inference.meters.timeline import Forward
from gradrun.inference.module_state import preserve_module_state
from gradrun.inference.recovery import BatchRecovery
from gradrun.modes import grad_mode
from gradrun.output.formats import PredictionWriter
from gradrun.output.quarantine import Quarantine
from gradrun.output.transforms import Outputs, iter_tensors, output_selector
from gradrun.results import stats
from gradrun.results.result import Measurement, Memory, Padding, Phases, Warning

WARM_UP_SECONDS = 0.3
"""Warm-up goes on until the time is steady, and no longer than this."""

_BEAT_NS = 200_000_000
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

_SETS_APART = "; run.on_error: quarantine sets such samples apart and goes on"

ProgressCallback = Callable[[int], None]
"""Told how many samples are done, a few times a second."""

CommitCallback = Callable[[], None]
"""Asked a few times a second, between two batches, to make safe what was written."""


@dataclass
class TimedPass:
    """What the timed pass gathered, complete or not."""

    start: int = 0
    """The first sample."""
    sizes: array[int] = field(default_factory=lambda: array("q"))
    """Of the batches that were timed."""
    apart: int = 0
    """Samples of batches that failed and were rescued, which are not timed."""
    done: int = 0
    """Samples through model and sink."""
    data_ns: int = 0
    total_ns: int = 0
    stopped: GradrunError | None = None

    def trim(self, written: int) -> None:
        """Forget batches that did not come to be whole in the files."""
        kept = sum(self.sizes) + self.apart
        while kept > written and self.sizes:
            kept -= self.sizes.pop()


class Runner:
    """A model, its data and a mode, taken through the passes in order: prepare, run, finish."""

    def __init__(
        self, model: nn.Module, data: BatchSource, config: RunConfig, device: torch.device
    ) -> None:
        self.model, self.data, self.config, self.device = model, data, config, device
        self.mode = config.run.mode
        self.read = output_selector(config.output)
        model_type = config.model.dtype if isinstance(config.model, EagerModel) else None
        self.move = transfer_to(device, model_type)
        self.clock: clock.Clock = clock.clock_for(device)
        self.warnings: list[Warning] = []
        self.first_seconds = self.warm_seconds = 0.0
        self.ahead = False
        quarantine = Quarantine(config.output.path)
        self.rescue = BatchRecovery(config.run, self._predicted, self._again, quarantine)
        self.rescue.place = lambda at: input_position(data, at)

    def prepare(self) -> Outputs:
        """Run the first batch, then warm up; nothing of it is kept.

        Returns:
            The first batch's outputs, [size, ...] each, for a sink to make room.

        Raises:
            ConfigError: the model refuses the data, or its outputs cannot be kept.
        """
        began = time.perf_counter()
        self.first = self._first_batch()
        with execution_context(self.config.run, self.device), preserve_module_state(self.model):
            outputs = self._first_outputs()
            self.first_seconds = time.perf_counter() - began
            try:
                self._warm_up()
            except (Exception, SystemExit) as error:  # whatever a model may raise
                raise RunFailed(
                    f"the model ran its first batch, and failed when it ran it again: "
                    f"{describe_model_error(error, self.mode)}"
                ) from error
        self.warm_seconds = time.perf_counter() - began - self.first_seconds
        return outputs

    def run(
        self,
        sink: PredictionWriter,
        keep: CommitCallback | None = None,
        beat: ProgressCallback | None = None,
    ) -> TimedPass:
        """The timed pass: every batch that the sink does not have yet, through the model into it.

        A fault or Ctrl-C ends it early, with `stopped` set and the clocks of what ran.
        """
        device_memory.reset(self.device)
        seed_generators(self.config.run.seed, self.device)  # dropout in training mode repeats
        gathered = TimedPass(start=sink.written)
        batches = self._batches(sink.written)
        try:
            with execution_context(self.config.run, self.device):
                self._loop(
                    self.rescue.cut(batches), sink, gathered, keep or _nothing, beat or _nothing
                )
        except KeyboardInterrupt:
            gathered.stopped = Interrupted()
        except BaseException as error:  # whatever a model may raise, sys.exit() included
            gathered.stopped = self._stop(error, gathered)
        finally:
            batches.close()
        try:
            self.clock.finish()
        except Exception as error:  # a fault on the device shows at the first wait after it
            gathered.stopped = gathered.stopped or self._stop(error, gathered)
        return gathered

    def _loop(
        self,
        batches: Iterator[Batch],
        sink: PredictionWriter,
        gathered: TimedPass,
        keep: CommitCallback,
        beat: ProgressCallback,
    ) -> None:
        # Every name is local and nothing is made per batch that a hand-written loop would not
        # make: this is what keeps gradrun within a few per cent of one.
        model, read, write, sizes = self.model, self.read, sink.write, gathered.sizes
        start, stop, now = self.clock.start, self.clock.stop, time.perf_counter_ns
        checked = self.config.run.on_nonfinite != "warn"
        began = mark = now()
        next_beat = began + _BEAT_NS
        try:
            for batch in batches:
                args, kwargs, size, ids, faults = batch
                read_ns = now() - mark
                try:
                    if faults:
                        batch.raise_errors()
                    start()
                    returned = model(*args, **kwargs)
                    stop()
                except Exception as error:  # whatever a model may raise
                    self._rescued(batch, error, sink, gathered)
                    began += now() - mark  # what a rescue takes says nothing of the model
                    mark = now()
                    continue
                # Counted before it is written: Ctrl-C between the two must not lose a batch that
                # is in the file. One that is not is forgotten by trim().
                sizes.append(size)
                if checked:
                    self._write_checked(batch, read(returned, size, kwargs), sink, gathered)
                else:
                    write(read(returned, size, kwargs), ids)
                # The graph that grad mode keeps must not live into the next forward.
                del returned
                gathered.data_ns += read_ns
                gathered.done += size
                mark = now()
                if mark > next_beat:
                    keep()
                    kept = now()
                    beat(gathered.done)
                    mark = now()
                    began += mark - kept  # drawing is not the run's time
                    next_beat = mark + _BEAT_NS
        finally:
            gathered.total_ns = mark - began

    def _rescued(
        self, batch: Batch, error: Exception, sink: PredictionWriter, gathered: TimedPass
    ) -> None:
        """Write what can be made of a batch that failed, untimed."""
        at = gathered.start + gathered.done
        if batch.errors:
            outputs, missing = self.rescue.unreadable(at, batch)
        else:
            outputs, missing = self.rescue.failed(at, batch.size, error)
        sink.write(outputs, batch.ids, _valid(batch.size, missing))
        gathered.apart += batch.size
        gathered.done += batch.size

    def _write_checked(
        self, batch: Batch, outputs: Outputs, sink: PredictionWriter, gathered: TimedPass
    ) -> None:
        at = gathered.start + gathered.done
        outputs, missing = self.rescue.check(at, batch, outputs)
        sink.write(outputs, batch.ids, _valid(batch.size, missing))

    def _again(self, at: int, size: int) -> Batch:
        """A batch of any place and size, read anew."""
        # From the whole batch: texts are padded to its longest, whatever piece is run again.
        ahead = at % self.data.batch_size
        batch = next(self.data.batches(at - ahead))
        batch = batch if batch.size == size else batch.slice(ahead, ahead + size)
        return self.move(batch) if self.move else batch

    def finish(self, gathered: TimedPass, load_seconds: float, open_seconds: float) -> Measurement:
        """Read the meters, then count tensor memory in a pass of its own."""
        resident, method = process_memory.peak_resident()
        allocated, reserved = device_memory.peaks(self.device)
        if training := self._in_training():
            self._warn(
                "training_inside",
                f"{training} ran in training mode, though model.training is off: its dropout or "
                "batch norm goes into the predictions; gradrun audit says more",
            )
        if resident is None:
            self._warn("no_process_peak", "this system does not say a process's peak memory")
        memory = self._memory_pass(gathered)
        seconds = tuple(self.clock.seconds[: len(gathered.sizes)])
        sizes = tuple(gathered.sizes[: len(seconds)])
        data, total = gathered.data_ns * 1e-9, gathered.total_ns * 1e-9
        forward = float(sum(seconds))
        return Measurement(
            mode=self.mode,
            batch_limit=self.rescue.most,
            padding=self._padding(gathered),
            batch_seconds=seconds,
            batch_sizes=sizes,
            phases=Phases(
                load_model=load_seconds,
                open_data=open_seconds,
                first_batch=self.first_seconds,
                warm_up=self.warm_seconds,
                data=data,
                forward=forward,
                output=max(0.0, total - data - forward),
            ),
            memory=Memory(
                weights=cpu_memory.weight_bytes(self.model),
                inputs=cpu_memory.storage_bytes(self.first.tensors()),
                forward_peak=memory and memory.peak,
                retained=memory and memory.retained,
                timeline=memory and memory.timeline,
                peak_module=memory and memory.peak_module,
                process_peak=resident,
                process_method=method,
                device_allocated=allocated,
                device_reserved=reserved,
            ),
        )

    def _padding(self, gathered: TimedPass) -> Padding | None:
        if not isinstance(self.data, LengthGrouped):
            return None
        return self.data.padding(gathered.start, gathered.start + gathered.done)

    def _stop(self, error: BaseException, gathered: TimedPass) -> GradrunError:
        """What ended the pass, as the error to raise once everything is saved."""
        if isinstance(error, GradrunError):
            text = str(error)
        elif isinstance(error, SampleError):
            text = f"{error}{_SETS_APART}"
        elif isinstance(error, OSError) and error.errno in _DISK_FAULTS:
            text = f"the predictions cannot be written: {error.strerror}"
        else:
            at = gathered.start + gathered.done
            first = input_position(self.data, at)
            text = (
                f"batch {at // self.data.batch_size}, which begins at sample {first:,}, failed: "
                f"{describe_model_error(error, self.mode)}"
            )
        stopped = RunFailed(text)
        stopped.__cause__ = error
        return stopped

    def _in_training(self) -> str:
        """The modules whose training mode changes predictions, where nobody asked for it."""
        if getattr(self.config.model, "training", False):
            return ""
        kinds = nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm
        named = self.model.named_modules()
        found = [name for name, m in named if m.training and isinstance(m, kinds)]
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return ", ".join(found[:3]) + more

    # --- the steps -----------------------------------------------------------------------------

    def _first_batch(self) -> Batch:
        batch = self._first_readable()
        try:
            # A copy: the window that it lies in is given back when the run moves on.
            return (self.move(batch) if self.move else batch).map(torch.clone)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"the first batch cannot be brought to {self.device}: {first_line(error)}",
                "data.batch_size",
            ) from error

    def _first_readable(self) -> Batch:
        """The first batch, without the samples at fault where these are set apart."""
        for batch in self.data.batches():
            sound = [row for row in range(batch.size) if row not in batch.errors]
            fault = next(iter(batch.errors.values()), None)
            if fault is None:
                return batch
            if self.config.run.on_error != "quarantine":
                raise ConfigError(f"{fault}{_SETS_APART}", "data.path") from fault
            if sound:
                return batch.select(sound)
        raise ConfigError(f"no sample can be read; the last: {fault}", "data.path")

    def _predicted(self, batch: Batch) -> Outputs:
        batch.raise_errors()
        return self.read(self.model(*batch.args, **batch.kwargs), batch.size, batch.kwargs)

    def _first_returned(self) -> Any:
        try:
            return self._call(self.first)
        except GradrunError:
            raise
        except (Exception, SystemExit) as error:  # whatever a model may raise
            one = None
            if isinstance(error, Exception):
                one = self.rescue.healthy(self.first, error)
            if one is None:
                given = self.first.args, self.first.kwargs
                raise explain_first_batch_failure(self.model, *given, error, self.mode) from error
        # A sample of it is at fault; the others show what outputs look like.
        self.first = one
        return self._call(self.first)

    def _first_outputs(self) -> Outputs:
        returned = self._first_returned()
        self._note_graph(returned)
        try:
            self.rescue.like = self.read(returned, self.first.size, self.first.kwargs)
            return self.rescue.like
        except GradrunError:
            raise
        except Exception as error:  # torch has many ways to say that it cannot
            words = ", ".join(self.config.output.transform)
            raise ConfigError(
                f"{words} cannot take this output: {first_line(error)}",
                "output.transform",
            ) from error

    def _note_graph(self, returned: Any) -> None:
        kept = [name for name, tensor in iter_tensors(returned) if tensor.requires_grad]
        if kept and self.mode is not GradMode.GRAD:
            self._warn(
                "graph_kept",
                f"output {kept[0]} keeps a graph, though the mode is {self.mode}: something in the "
                "model turns gradients on again; gradrun audit names it",
            )

    def _batches(self, start: int) -> Any:
        batches: Iterator[Batch] = self.data.batches(start)
        if self.ahead:
            batches = prefetch(batches)
        return (self.move(batch) for batch in batches) if self.move else batches

    def _call(self, batch: Batch) -> Any:
        """Run a copy of the batch, since a model may change its input in place."""
        batch = batch.map(torch.clone)
        self.clock.start()
        returned = self.model(*batch.args, **batch.kwargs)
        self.clock.stop()
        return returned

    def _warm_up(self) -> None:
        """Repeat the first batch until its time is steady, or as often as the config says.

        A forward of a second or more is left alone: what is cold in it is small beside the rest.
        """
        asked = self.config.run.warmup
        rounds = range(asked) if isinstance(asked, int) else itertools.count()
        deadline = time.perf_counter() + WARM_UP_SECONDS
        for _ in rounds:
            self.clock.finish()
            late = time.perf_counter() > deadline or self.clock.seconds[-1] > 1.0
            if asked == "auto" and (late or stats.is_steady(self.clock.seconds[1:])):
                break
            self._call(self.first)
        self.clock.finish()
        self.ahead = should_prefetch(self.data, forward_seconds=self.clock.seconds[-1])
        self.clock = clock.clock_for(self.device)

    def _memory_pass(self, gathered: TimedPass) -> Forward | None:
        """The first batch's; None after a stop, without a meter, on a fault."""
        if gathered.stopped or not self.config.measure.memory:
            return None
        meter, batch = FORWARD_MEMORY.get(self.device.type), self.first.map(torch.clone)
        if meter is None:
            self._warn("no_tensor_memory", f"{self.device.type} does not count a forward's memory")
            return None
        try:
            with execution_context(self.config.run, self.device), preserve_module_state(self.model):
                return meter(lambda: self.model(*batch.args, **batch.kwargs), self.model)
        except KeyboardInterrupt:
            gathered.stopped = Interrupted("interrupted while memory was counted")
        except Exception as error:  # the predictions are safe already
            self._warn(
                "no_tensor_memory",
                f"tensor memory could not be counted ({type(error).__name__}: "
                f"{first_line(error)}); measure.memory: false does without",
            )
        return None

    def _warn(self, code: str, text: str) -> None:
        self.warnings.append(Warning(code=code, text=text))


def _valid(size: int, missing: set[int]) -> torch.Tensor | None:
    """Mask [size] of the samples with a prediction; None if all have one."""
    if not missing:
        return None
    valid = torch.ones(size, dtype=torch.bool)
    valid[sorted(missing)] = False
    return valid


def _nothing(*_: object) -> None:
    """Nobody asked to be told."""


@contextmanager
def execution_context(run: RunSection, device: torch.device) -> Iterator[None]:
    """The gradient mode and autocast that a config asks for."""
    with ExitStack() as stack:
        stack.enter_context(grad_mode(run.mode))
        if run.autocast:
            kind = getattr(torch, run.autocast)
            stack.enter_context(torch.autocast(device.type, dtype=kind))
        yield
