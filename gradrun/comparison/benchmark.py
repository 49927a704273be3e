"""What a worker does: variants of one run timed in turns, weighed, and their outputs compared.

All variants live in one process and take turns in short blocks, so that layout, clocks and noise
are the same for each. Knows no other process; workers.py brings the job and takes the report.
"""

from __future__ import annotations

import gc
import math
import random
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradrun.comparison.equivalence import equivalence
from gradrun.comparison.protocol import Failure, Job, Marker, VariantMeasurement, WorkerReport
from gradrun.config.schema import RunConfig
from gradrun.core.cpu import available_cpus
from gradrun.core.errors import ConfigError, GradrunError
from gradrun.core.grad_mode import GradMode
from gradrun.data import open_data
from gradrun.data.batch import Batch
from gradrun.inference.device import device_context, resolve_device
from gradrun.inference.diagnosis import describe_model_error, explain_first_batch_failure
from gradrun.inference.environment import current_environment
from gradrun.inference.meters import (
    device_memory,
    measure_forward_memory,
    model_memory,
    process_memory,
    system_load,
)
from gradrun.inference.module_state import preserve_module_state
from gradrun.inference.reordering import commit_unit, restore_input_order
from gradrun.inference.runner import Runner, execution_context
from gradrun.inference.sampling import first_batches
from gradrun.models import class_names, load_model
from gradrun.models.imports import ImportSpace
from gradrun.output.formats import open_writer
from gradrun.results import stats
from gradrun.results.result import Phases

BLOCK_SECONDS = 0.01
"""A block is as many batches as take at least this long: clock reads and jitter vanish in it."""

_WARM_SECONDS = 0.2
_FEWEST_ROUNDS = 5
_PATIENCE = 3
"""Times the seconds asked for that slow variants may take to make their fewest rounds."""

_WARM_ORDER = list(GradMode)
"""What a model makes lazily is made in grad first, and so is an ordinary tensor."""


class LoadedVariant:
    """A variant with its model and batches, ready to be run in blocks."""

    def __init__(
        self, index: int, name: str, config: RunConfig, marker: Marker, space: ImportSpace
    ) -> None:
        self.index, self.name, self.config, self.marker = index, name, config, marker
        self.space = space
        self.device: torch.device
        run = config.run
        self.threads = available_cpus() if run.threads == "auto" else run.threads
        self.model: nn.Module
        self.batches: list[Batch]
        self.load_seconds = self.open_seconds = self.first_seconds = self.warm_seconds = 0.0
        self.batch_seconds = 0.0
        self.rounds: list[float] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """The variant's threads, mode and autocast."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with self.space.entered(), execution_context(self.config.run, self.device):
            yield

    def call(self, number: int) -> Any:
        """Run one batch; `number` counts on, the batches come round."""
        batch = self.batches[number % len(self.batches)]
        self.marker.at(self.index, number % len(self.batches))
        return self.model(*batch.args, **batch.kwargs)

    def block(self, count: int, first: int) -> float:
        """Seconds a batch over `count` batches from number `first` on."""
        model, batches = self.model, self.batches
        chosen = [batches[(first + i) % len(batches)] for i in range(count)]
        self.marker.at(self.index, first % len(batches))
        with self.active():
            self._settle()
            began = time.perf_counter_ns()
            for args, kwargs, _, _, _ in chosen:
                model(*args, **kwargs)
            self._settle()
            return (time.perf_counter_ns() - began) * 1e-9 / count

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def run_task(job: Job) -> WorkerReport:
    """Do a job; what a variant raises becomes a Failure, and the others go on."""
    marker = Marker(Path(job.marker))
    failures: list[Failure] = []
    ready: list[LoadedVariant] = []
    if job.kind == "predict":
        (runnable,) = _in_warm_order(job, marker)
        with _noted(failures, runnable, marker):
            _predict(runnable, job.trust_code)
        return WorkerReport(failures=tuple(failures))
    for runnable in _in_warm_order(job, marker):
        with _noted(failures, runnable, marker):
            marker.at(runnable.index, 0)  # a model's code may fail before its first batch
            with runnable.space.entered():
                _load(runnable, ready, job.trust_code)
            _warm_up(runnable)
            runnable.space.check()
            ready.append(runnable)
    ready.sort(key=lambda runnable: runnable.index)
    gc.freeze()  # the collector need not walk torch's modules between blocks
    gc.enable()
    with system_load.measure_system_load() as load_meter:
        if job.kind == "time":
            _time_in_turns(ready, job, failures, marker)
    trials, agreed = [], []
    for runnable in ready:
        with _noted(failures, runnable, marker):
            trials.append(_trial(runnable, weigh=job.kind == "weigh"))
    if job.kind == "time" and ready:
        base = ready[0]
        for runnable in ready[1:]:
            with _noted(failures, runnable, marker):
                agreed.append(equivalence(base, runnable))
    return WorkerReport(
        trials=tuple(trials),
        equivalence=tuple(agreed),
        failures=tuple(failures),
        disturbance=load_meter.noise(),
        environment=current_environment(ready[0].device) if ready else None,
    )


def _predict(runnable: LoadedVariant, trust_code: bool) -> None:
    """Write predictions for all of a variant's data into its folder, with no journal."""
    config = runnable.config
    runnable.marker.at(runnable.index, 0)
    with runnable.space.entered(), device_context(config.run) as device:
        model = load_model(config.model, device, trust_code=trust_code)
        data = open_data(config.data, seed=config.run.seed, model=config.model)
        runner = Runner(model, data, config, device)
        outputs = runner.prepare()
        sink = open_writer(config.output, data.samples, commit_unit(data), class_names(model))
        sink = restore_input_order(sink, data)
        sink.open(outputs)
        stopped = runner.run(sink).stopped
        sink.close()
    runnable.space.check()
    if stopped:
        raise stopped


def _in_warm_order(job: Job, marker: Marker) -> list[LoadedVariant]:
    """In grad first: what a model makes lazily there is an ordinary tensor, fit for every mode."""
    apart = any(variant.moved for variant in job.variants)
    spaces = {moved: ImportSpace(moved, apart) for moved in {v.moved for v in job.variants}}
    runnables = [
        LoadedVariant(
            index,
            variant.name,
            RunConfig.model_validate(variant.config, strict=False),
            marker,
            spaces[variant.moved],
        )
        for index, variant in enumerate(job.variants)
    ]
    return sorted(runnables, key=lambda runnable: _WARM_ORDER.index(runnable.config.run.mode))


@contextmanager
def _noted(failures: list[Failure], runnable: LoadedVariant, marker: Marker) -> Iterator[None]:
    """Turn what the block raises into a Failure of the variant."""
    mode = runnable.config.run.mode
    try:
        yield
    except Exception as error:  # the user's model may raise anything
        failures.append(
            Failure(
                variant=runnable.name,
                batch=marker.batch,
                error=str(error)
                if isinstance(error, GradrunError)
                else describe_model_error(error, mode),
                details=traceback.format_exc(),
                config_key=error.key if isinstance(error, ConfigError) else None,
            )
        )


def _load(runnable: LoadedVariant, loaded: list[LoadedVariant], trust_code: bool) -> None:
    """Give the variant its model and batches: another's, where they are the same."""
    config = runnable.config
    device = runnable.device = resolve_device(config.run.device)
    seed = config.run.seed  # draws weights and data
    alike = [
        r
        for r in loaded
        if r.device == device and r.config.run.seed == seed and r.space is runnable.space
    ]
    twin = next((r for r in alike if r.config.model == config.model), None)
    if twin:
        runnable.model, runnable.load_seconds = twin.model, twin.load_seconds
    else:
        began = time.perf_counter()
        torch.manual_seed(config.run.seed)
        runnable.model = load_model(config.model, device, trust_code=trust_code)
        runnable.load_seconds = time.perf_counter() - began
    if twin and twin.config.data == config.data:
        runnable.batches, runnable.open_seconds = twin.batches, twin.open_seconds
    else:
        began = time.perf_counter()
        runnable.batches = first_batches(config, device)
        runnable.open_seconds = time.perf_counter() - began


def _warm_up(runnable: LoadedVariant) -> None:
    began = time.perf_counter()
    with runnable.active(), preserve_module_state(runnable.model):
        first = runnable.batches[0]
        try:
            runnable.call(0)
        except GradrunError:
            raise
        except Exception as error:  # whatever a model may raise
            mode = runnable.config.run.mode
            raise explain_first_batch_failure(
                runnable.model, first.args, first.kwargs, error, mode
            ) from error
        runnable.first_seconds = time.perf_counter() - began
        seconds: list[float] = []
        while not stats.is_steady(seconds) and time.perf_counter() - began < _WARM_SECONDS:
            seconds.append(runnable.block(1, len(seconds)))
    runnable.warm_seconds = time.perf_counter() - began - runnable.first_seconds
    runnable.batch_seconds = min(seconds, default=runnable.first_seconds)


def _time_in_turns(
    ready: list[LoadedVariant], job: Job, failures: list[Failure], marker: Marker
) -> None:
    """Rounds of one block a variant, in random order, until the time is spent."""
    if not ready:
        return
    order, shuffled = list(ready), random.Random(job.seed)  # noqa: S311
    count = math.ceil(BLOCK_SECONDS / min(runnable.batch_seconds for runnable in ready))
    began, done = time.perf_counter(), 0
    while done < _FEWEST_ROUNDS or time.perf_counter() - began < job.seconds:
        if done and time.perf_counter() - began > _PATIENCE * job.seconds:
            break
        shuffled.shuffle(order)
        for runnable in order:
            with _noted(failures, runnable, marker), preserve_module_state(runnable.model):
                runnable.rounds.append(runnable.block(count, done * count))
        done += 1
        for failed in [r for r in order if len(r.rounds) < done]:
            order.remove(failed)
            ready.remove(failed)


def _trial(runnable: LoadedVariant, *, weigh: bool) -> VariantMeasurement:
    """The variant's figures; what is weighed has its process to itself, so its peak counts."""
    first, resident = runnable.batches[0], None
    device_memory.reset(runnable.device)
    method = "unavailable"
    if weigh:
        with runnable.active():
            for number in range(len(runnable.batches)):
                runnable.call(number)
        resident, method = process_memory.peak_resident()
    allocated, reserved = device_memory.peaks(runnable.device)
    memory = model_memory(runnable.model, first)
    if not weigh and runnable.config.measure.memory:
        batch = first.map(torch.clone)
        runnable.marker.at(runnable.index, 0)
        with runnable.active():
            memory = measure_forward_memory(runnable.model, batch, runnable.device)
    return VariantMeasurement(
        variant=runnable.name,
        batch_seconds=tuple(runnable.rounds),
        batch_sizes=(first.size,) * len(runnable.rounds),
        phases=Phases(
            load_model=runnable.load_seconds,
            open_data=runnable.open_seconds,
            first_batch=runnable.first_seconds,
            warm_up=runnable.warm_seconds,
            data=0.0,
            forward=float(sum(runnable.rounds)),
            output=0.0,
        ),
        memory=memory.replace(
            process_peak=resident,
            process_method=method,
            device_allocated=allocated if weigh else None,
            device_reserved=reserved if weigh else None,
        ),
    )
