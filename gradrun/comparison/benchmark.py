"""Time variants in interleaved blocks, measure their memory and compare their outputs.

Runs inside a worker process: all variants share it, so that memory layout, clock speed and noise
are the same for each.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradrun.comparison.equivalence import equivalence
from gradrun.comparison.protocol import Failure, Job, Marker, WorkerReport
from gradrun.config.schema import RunConfig
from gradrun.core.cpu import thread_count
from gradrun.core.errors import ConfigError, GradrunError
from gradrun.core.grad_mode import GradMode
from gradrun.core.imports import ImportSpace
from gradrun.data import open_data
from gradrun.data.batch import Batch
from gradrun.data.source import BatchSource
from gradrun.engines.infer import infer
from gradrun.inference.compilation import compile_model
from gradrun.inference.device import execution_context, resolve_device
from gradrun.inference.diagnosis import describe_model_error, first_batch_errors
from gradrun.inference.environment import current_environment
from gradrun.inference.interpretation import describe
from gradrun.inference.meters import (
    device_memory,
    measure_forward_memory,
    model_memory,
    process_memory,
    system_load,
)
from gradrun.inference.meters.work import UNKNOWN, KnownWork, known_work
from gradrun.inference.module_state import preserve_module_state
from gradrun.inference.process_settings import process_settings
from gradrun.inference.sampling import batch_number, first_batches
from gradrun.inference.torchscript import compile_without_gradients
from gradrun.models import load_model
from gradrun.models.generation import take_times
from gradrun.models.loaded import LoadedModel
from gradrun.results import stats
from gradrun.results.result import Generation, Measurement, Memory, Phases, Statement

BLOCK_SECONDS = 0.01
"""Minimum length of a timing block, which makes clock overhead and jitter negligible."""

_WARM_UP_SECONDS = 0.2
_MIN_ROUNDS = 5
_MAX_OVERTIME = 3
"""Slow variants may take this many times the requested seconds to reach the minimum rounds."""

_LOAD_ORDER = list(GradMode)
"""Load in grad mode first, so that lazily created tensors are ordinary and fit every mode."""


@dataclass
class PlannedVariant:
    """A variant before its model is loaded."""

    index: int
    name: str
    config: RunConfig
    imports: ImportSpace


@dataclass
class LoadedVariant(PlannedVariant):
    """A variant with its model and batches."""

    marker: Marker
    device: torch.device
    threads: int
    loaded: LoadedModel
    data: BatchSource
    batches: list[Batch]
    load_seconds: float
    open_seconds: float
    first_seconds: float = 0.0
    warm_up_seconds: float = 0.0
    batch_seconds: float = 0.0
    """Time per batch at the end of the warm-up."""
    rounds: list[float] = field(default_factory=list)
    """Seconds per batch in each timed round."""
    generation: Generation | None = None
    """Times of the texts generated in these rounds."""

    @property
    def model(self) -> nn.Module:
        """The module."""
        return self.loaded.module

    @contextmanager
    def execution_context(self) -> Iterator[None]:
        """Set the variant's imports, threads, gradient mode and autocast."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with self.imports.entered(), execution_context(self.config.run, self.device):
            yield

    def run_batch(self, number: int) -> Any:
        """Return the model's output for a batch; numbers past the last batch wrap around."""
        number %= len(self.batches)
        batch = self.batches[number]
        self.marker.set(self.index, number)
        return self.model(*batch.args, **batch.kwargs)

    def warm_up(self) -> None:
        """Run batches until their time is steady.

        Raises:
            ConfigError: the model failed on the first batch.
        """
        began = time.perf_counter()
        seconds: list[float] = []
        with self.execution_context(), preserve_module_state(self.model):
            with first_batch_errors(self.model, self.batches[0], self.config.run.mode):
                self.run_batch(0)
            self.first_seconds = time.perf_counter() - began
            while not stats.is_steady(seconds) and time.perf_counter() - began < _WARM_UP_SECONDS:
                seconds.append(self.time_block(1, len(seconds)))
        self.warm_up_seconds = time.perf_counter() - began - self.first_seconds
        self.batch_seconds = min(seconds, default=self.first_seconds)

    def run_round(self, count: int, first: int) -> None:
        """Time `count` batches from number `first` as the next round."""
        take_times(self.model)  # those of the warm-up, or of another variant with this model
        self.rounds.append(self.time_block(count, first))
        if texts := take_times(self.model):
            self.generation = (self.generation or Generation()) + texts

    def time_block(self, count: int, first: int) -> float:
        """Run `count` batches from number `first` and return the seconds per batch.

        Batches of other sizes than the first one count by their samples.
        """
        model, batches = self.model, self.batches
        block = [batches[(first + i) % len(batches)] for i in range(count)]
        self.marker.set(self.index, first % len(batches))
        with self.execution_context():
            self._synchronize()
            began = time.perf_counter_ns()
            for args, kwargs, *_ in block:
                model(*args, **kwargs)
            self._synchronize()
            seconds = (time.perf_counter_ns() - began) * 1e-9
            return seconds * batches[0].size / sum(batch.size for batch in block)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def run_task(job: Job) -> WorkerReport:
    """Run a job; an exception in a variant becomes a Failure and the other variants continue."""
    planned = _plan(job)
    with process_settings(planned[0].config.run):
        return _run_planned(job, planned)


def _run_planned(job: Job, planned: Sequence[PlannedVariant]) -> WorkerReport:
    marker = Marker(Path(job.marker))
    failures: list[Failure] = []
    if job.kind == "predict":
        with _record_failure(failures, planned[0], marker):
            _predict(planned[0], marker, job.trust_code)
        return WorkerReport(failures=tuple(failures))
    loaded: list[LoadedVariant] = []
    for variant in planned:
        with _record_failure(failures, variant, marker):
            loaded.append(_load(variant, loaded, marker, job.trust_code))
    loaded.sort(key=lambda variant: variant.index)
    gc.freeze()  # spare the collector torch's modules between blocks
    gc.enable()
    with system_load.SystemLoadMeter() as load:
        if job.kind == "time":
            loaded = _time_rounds(loaded, job, failures)
    measurements, compared = [], []
    for measured in loaded:
        with _record_failure(failures, measured, marker):
            alone = job.kind == "measure_memory"
            measure = _measure_process_memory if alone else _measure_tensor_memory
            memory = measure(measured, *_memory_batch(measured, job))
            known = UNKNOWN if alone else _known_work(measured)
            measurements.append(_measurement(measured, memory, known))
    if job.kind == "time":
        for candidate in loaded[1:]:
            with _record_failure(failures, candidate, marker):
                compared.append(equivalence(loaded[0], candidate))
    return WorkerReport(
        measurements=tuple(measurements),
        equivalence=tuple(compared),
        failures=tuple(failures),
        noise=load.noise(),
        environment=current_environment(loaded[0].device) if loaded else None,
        interpretation=_interpretation(loaded) if job.kind == "time" else (),
    )


def _predict(variant: PlannedVariant, marker: Marker, trust_code: bool) -> None:
    """Write predictions for all of a variant's data to its output folder."""
    marker.set(variant.index, 0)
    with variant.imports.entered():
        infer(variant.config, trust_code=trust_code, overwrite=True)
    variant.imports.check()


def _plan(job: Job) -> list[PlannedVariant]:
    """Parse the variants' configs and return them in load order."""
    worktrees = {task.worktree for task in job.variants}
    isolated = worktrees != {None}
    imports = {worktree: ImportSpace(worktree, isolated) for worktree in worktrees}
    planned = [
        PlannedVariant(
            index,
            task.name,
            RunConfig.model_validate(task.config, strict=False),
            imports[task.worktree],
        )
        for index, task in enumerate(job.variants)
    ]
    return sorted(planned, key=lambda variant: _LOAD_ORDER.index(variant.config.run.mode))


@contextmanager
def _record_failure(
    failures: list[Failure], variant: PlannedVariant, marker: Marker
) -> Iterator[None]:
    """Convert an exception inside the block into a Failure of the variant."""
    try:
        yield
    except Exception as error:  # user code can raise anything
        text = str(error)
        if not isinstance(error, GradrunError):
            text = describe_model_error(error, variant.config.run.mode)
        failures.append(
            Failure(
                variant=variant.name,
                batch=marker.batch,
                error=text,
                config_key=error.key if isinstance(error, ConfigError) else None,
            )
        )


def _load(
    variant: PlannedVariant, loaded: Sequence[LoadedVariant], marker: Marker, trust_code: bool
) -> LoadedVariant:
    """Load and warm up a variant, sharing the model and batches of an equal one."""
    config, imports = variant.config, variant.imports
    marker.set(variant.index, 0)  # the model's code can fail before its first batch
    device = resolve_device(config.run.device)
    seed = config.run.seed  # determines both weights and data
    key = (device, seed, config.model)
    alike = [v for v in loaded if (v.device, v.config.run.seed, v.config.model) == key]
    if config.model.compile:  # for the shapes of its batches
        alike = [v for v in alike if v.config.data == config.data]
    twin = next((v for v in alike if v.imports is imports), None)
    with imports.entered():
        if twin:
            model, load_seconds = twin.loaded, twin.load_seconds
        else:
            began = time.perf_counter()
            torch.manual_seed(seed)
            model = load_model(config.model, device, data=config.data, trust_code=trust_code)
            load_seconds = time.perf_counter() - began
        if twin and twin.config.data == config.data:
            data, batches, open_seconds = twin.data, twin.batches, twin.open_seconds
        else:
            began = time.perf_counter()
            data = open_data(
                config.data,
                seed=seed,
                model=config.model,
                model_classes=model.classes,
                device=device,
                trust_code=trust_code,
            )
            batches = first_batches(config, device, data)
            open_seconds = time.perf_counter() - began
        if not twin:
            compile_without_gradients(model.module, batches[0])
            model = compile_model(model, config.model.compile, data, device)
    threads = thread_count(config.run.threads)
    ready = LoadedVariant(
        variant.index, variant.name, config, imports, marker, device, threads, model, data,
        batches, load_seconds, open_seconds,
    )  # fmt: skip
    ready.warm_up()
    imports.check()
    return ready


def _time_rounds(
    loaded: Sequence[LoadedVariant], job: Job, failures: list[Failure]
) -> list[LoadedVariant]:
    """Time rounds of one block per variant in random order until the time is spent.

    Returns:
        The variants that did not fail, in the given order.
    """
    order, shuffled = list(loaded), random.Random(job.seed)  # noqa: S311
    count = math.ceil(BLOCK_SECONDS / min((v.batch_seconds for v in loaded), default=1.0))
    began, done = time.perf_counter(), 0
    while order and (done < _MIN_ROUNDS or time.perf_counter() - began < job.seconds):
        if done and time.perf_counter() - began > _MAX_OVERTIME * job.seconds:
            break
        shuffled.shuffle(order)
        for variant in order:
            with (
                _record_failure(failures, variant, variant.marker),
                preserve_module_state(variant.model),
            ):
                variant.run_round(count, done * count)
        done += 1
        order = [variant for variant in order if len(variant.rounds) == done]
    return [variant for variant in loaded if variant in order]


def _interpretation(variants: Sequence[LoadedVariant]) -> tuple[Statement, ...]:
    """Return the statements of the first variant, and those in which others differ from it."""
    statements: list[Statement] = []
    for variant in variants:
        try:
            with variant.execution_context():
                own = describe(variant.config, variant.loaded, variant.data)
        except ConfigError:  # of the output section, which a comparison does not use
            continue
        named = f" ({variant.name})" if statements else ""
        known = set(statements)
        statements += [
            statement.replace(topic=f"{statement.topic}{named}")
            for statement in own
            if statement not in known
        ]
    return tuple(statements)


def _memory_batch(variant: LoadedVariant, job: Job) -> tuple[int, Batch]:
    """Return the batch of the job, or the largest of those that are timed, and its number."""
    if (number := job.memory_batch) is not None:
        with variant.imports.entered():
            batch = batch_number(variant.config, variant.device, number, trust_code=job.trust_code)
        if batch is not None:
            return number, batch
    numbers = range(len(variant.batches))
    number = max(numbers, key=lambda number: variant.batches[number].elements)
    return number, variant.batches[number].map(torch.clone)


def _measure_process_memory(variant: LoadedVariant, number: int, batch: Batch) -> Memory:
    """Run all batches in a process without other variants, whose peak is therefore its own."""
    device_memory.reset(variant.device)
    with variant.execution_context():
        for timed in range(len(variant.batches)):
            variant.run_batch(timed)
        variant.model(*batch.args, **batch.kwargs)
    peak, method = process_memory.peak_resident()
    allocated, reserved = device_memory.peaks(variant.device)
    return model_memory(variant.model, batch).replace(
        process_peak=peak,
        process_method=method,
        device_allocated=allocated,
        device_reserved=reserved,
    )


def _measure_tensor_memory(variant: LoadedVariant, number: int, batch: Batch) -> Memory:
    if not variant.config.measure.memory:
        return model_memory(variant.model, batch)
    variant.marker.set(variant.index, number)
    with variant.execution_context():
        memory = measure_forward_memory(variant.model, batch, variant.device)
    return memory.replace(batch=number)


def _known_work(variant: LoadedVariant) -> KnownWork:
    """Count the operations of a batch, if all batches are alike and the machine's peaks known."""
    first, *others = variant.batches
    if not variant.config.measure.memory or any(b.shape != first.shape for b in others):
        return UNKNOWN
    with variant.execution_context():
        return known_work(variant.model, first, variant.device)


def _measurement(variant: LoadedVariant, memory: Memory, known: KnownWork) -> Measurement:
    rounds = tuple(variant.rounds)
    return Measurement(
        mode=variant.config.run.mode,
        variant=variant.name,
        batch_seconds=rounds,
        batch_sizes=(variant.batches[0].size,) * len(rounds),
        phases=Phases(
            load_model=variant.load_seconds,
            open_data=variant.open_seconds,
            first_batch=variant.first_seconds,
            warm_up=variant.warm_up_seconds,
            forward=sum(rounds, 0.0),
        ),
        memory=memory,
        generation=variant.generation,
        work=known.work,
        peaks=known.peaks,
    )
