"""Prepare a run: its first batch, what follows from its outputs, and the warm-up."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradrun.core.errors import ConfigError, GradrunError, RunFailed, SampleError, first_line
from gradrun.data.batch import Batch
from gradrun.data.prefetch import should_prefetch
from gradrun.data.source import read_one
from gradrun.inference.batch_independence import Rows, reference_rows
from gradrun.inference.compilation import (
    CompiledModel,
    check_dtypes,
    compile_error,
    compiled_graphs,
    is_compiled,
    runs_in_full_precision,
)
from gradrun.inference.device import execution_context
from gradrun.inference.diagnosis import describe_model_error, explain_first_batch_failure
from gradrun.inference.meters.clock import Clock, clock_for
from gradrun.inference.metrics import Evaluation
from gradrun.inference.model_warnings import (
    activation_warnings,
    class_dimension_warnings,
    graph_warnings,
)
from gradrun.inference.module_state import preserve_module_state
from gradrun.inference.recovery import BatchRecovery, runnable_subset
from gradrun.output.output_facts import ReturnedOutputs
from gradrun.output.quarantine import Quarantine, SampleLog
from gradrun.output.transforms import Outputs, scored_outputs
from gradrun.results import stats
from gradrun.results.result import Compilation, Statement

if TYPE_CHECKING:
    from gradrun.inference.runner import Runner

WARM_UP_SECONDS = 0.3
"""Limit of an automatic warm-up, which ends earlier once the batch time is steady."""

_EAGER_SECONDS = 1.0
_EAGER_BATCHES = 5
"""Limits of the forwards without torch.compile, by which its gain is measured."""

QUARANTINE_HINT = "; set run.on_error: quarantine to skip such samples"


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


def prepare(runner: Runner, quarantine: SampleLog | None) -> PreparedRun:
    """Run the first batch, then warm up; see `Runner.prepare`."""
    started = time.perf_counter()
    config = runner.config
    batch, clock = _first_batch(runner), clock_for(runner.device)
    # The first batch runs without model.compile too: to show what it gains, and for errors.
    compiling = isinstance(runner.model, CompiledModel)
    eager, graphs = clock_for(runner.device) if compiling else clock, compiled_graphs()
    with execution_context(config.run, runner.device), preserve_module_state(runner.model):
        first, returned, limit = _first_forward(runner, batch, eager)
        if isinstance(runner.model, CompiledModel):
            _time_eager(runner, first, eager)
            returned = _compile(runner, runner.model, first, returned, clock)
        runner.warnings += graph_warnings(returned, runner.mode)
        rows = reference_rows(runner.selector.as_returned(returned, first.size), first, config)
        returned, outputs = _first_outputs(runner, first, returned)
        first_batch_seconds = time.perf_counter() - started
        facts = ReturnedOutputs(config.output, returned, first.kwargs, runner.facts)
        statements, counts = tuple(facts.statements()), facts.class_counts()
        runner.warnings += activation_warnings(runner, facts)
        runner.warnings += class_dimension_warnings(runner.model, facts)
        evaluation = _plan_metrics(runner, first, returned)
        if evaluation:
            runner.save_evidence(evaluation)
            outputs |= evaluation.collect(returned, first.kwargs)
        outputs = runner.with_labels(outputs, first.labels)
        del returned, facts
        warm_up_started = time.perf_counter()
        compile_seconds = _warm_up(runner, first, clock)
        ahead = should_prefetch(runner.data, forward_seconds=clock.seconds[-1])
        warm_up_seconds = time.perf_counter() - warm_up_started
    compilation = None
    if compiling:
        first_batch_seconds -= sum(eager.seconds)
        compilation = Compilation(
            seconds=compile_seconds,
            graphs=compiled_graphs() - graphs,
            eager=median(eager.seconds[1:]),
            compiled=clock.seconds[-1],
        )
    recovery = BatchRecovery(
        run=config.run,
        quarantine=quarantine or Quarantine(config.output.path),
        template=outputs,
        predict=runner.predict,
        read_batch=runner.read_batch,
        input_position=runner.data.input_position,
        batch_limit=limit,
    )
    return PreparedRun(
        first=first,
        outputs=runner.kept_columns(first) | outputs,
        rows=rows,
        statements=statements,
        class_counts=counts,
        evaluation=evaluation,
        recovery=recovery,
        prefetch=ahead,
        compilation=compilation,
        first_batch_seconds=first_batch_seconds,
        warm_up_seconds=warm_up_seconds,
        batch_seconds=clock.seconds[-1],
    )


def _first_batch(runner: Runner) -> Batch:
    """Return a copy of the first batch; with on_error: quarantine, of its readable samples."""
    location = runner.config.data.location
    # The first alone: a source may read ahead for an iterator over all batches.
    first = [*filter(None, [read_one(runner.data, 0)])]
    others = runner.data.batches(sum(batch.size for batch in first))
    for batch in itertools.chain(first, others):
        rows = [row for row in range(batch.size) if row not in batch.errors]
        error = next(iter(batch.errors.values()), None)
        if error and runner.config.run.on_error != "quarantine":
            raise ConfigError(f"{error}{QUARANTINE_HINT}", location) from error
        if rows:
            break
    else:
        raise ConfigError(f"every sample is unreadable; the last error: {error}", location)
    batch = batch.select(rows) if error else batch
    try:
        # A copy, so that the source can release the chunk of the batch.
        return runner.to_device(batch).map(torch.clone)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"the first batch cannot be moved to {runner.device}: {first_line(error)}",
            "data.batch_size",
        ) from error


def _first_forward(runner: Runner, batch: Batch, clock: Clock) -> tuple[Batch, Any, int | None]:
    """Run the first batch, or the subset of it that the model can run.

    Returns:
        The batch, the model's output, and the batch limit after an out-of-memory error.
    """
    model = runner.eager
    try:
        returned = _forward(runner, batch, clock, model)
        if runner.config.output.decoder:
            runner.selector.structured(returned, batch.size)  # the user's function may fail
        return batch, returned, None
    except GradrunError:
        raise
    except (Exception, SystemExit) as error:  # a model may raise anything
        subset, limit = None, None
        if isinstance(error, Exception):
            subset, limit = runnable_subset(runner.config.run, runner.predict, batch, error)
        if subset is None and isinstance(error, SampleError):
            text = f"{error}{QUARANTINE_HINT}"
            raise ConfigError(text, runner.selector.key) from error
        if subset is None:
            raise explain_first_batch_failure(model, batch, error, runner.mode) from error
    return subset, _forward(runner, subset, clock, model), limit


def _time_eager(runner: Runner, batch: Batch, clock: Clock) -> None:
    """Repeat the first batch without model.compile: once, or more often if it is fast."""
    deadline = time.perf_counter() + _EAGER_SECONDS
    while len(clock.seconds) < 2 or (
        len(clock.seconds) <= _EAGER_BATCHES and time.perf_counter() < deadline
    ):
        _forward(runner, batch, clock, runner.eager)
        clock.finish()


def _compile(
    runner: Runner, model: CompiledModel, batch: Batch, eager_output: Any, clock: Clock
) -> Any:
    """Run the first batch through torch.compile; warn if this has no effect.

    Raises:
        ConfigError: the model cannot be compiled.
    """
    try:
        returned = _forward(runner, batch, clock)
    except GradrunError:
        raise
    except (Exception, SystemExit) as error:  # a compiler may raise anything
        raise compile_error(error, model.backend) from error
    clock.finish()
    check_dtypes(returned, eager_output)
    # An earlier run of this process may have compiled the same code.
    if compiled_graphs() == 0 and model.compiles(batch.args, batch.kwargs):
        runner.warn(
            "not_compiled",
            "torch.compile compiled no part of the model, which runs eagerly; gradrun audit "
            "shows why, and model.compile: false starts faster",
        )
    if runner.config.run.autocast:
        with torch.autocast(runner.device.type, enabled=False):
            full = _forward(runner, batch, clock_for(runner.device), model.eager)
        if runs_in_full_precision(returned, reduced=eager_output, full=full):
            runner.warn(
                "autocast_ignored",
                "run.autocast has no effect on the compiled model: its outputs are those of "
                "full precision; use model.dtype instead, or model.compile: false",
            )
    return returned


def _first_outputs(runner: Runner, first: Batch, returned: Any) -> tuple[Any, Outputs]:
    """Return the structure of the model's output, and the outputs to write."""
    try:
        structured = runner.selector.structured(returned, first.size)
        outputs = runner.selector.select(structured, first.size, first.kwargs, returned)
        return structured, outputs
    except GradrunError:
        raise
    except Exception as error:  # torch raises many types
        raise ConfigError(
            f"the transforms cannot be applied to this output: {first_line(error)}",
            "output.transform",
        ) from error


def _plan_metrics(runner: Runner, first: Batch, returned: Any) -> Evaluation | None:
    if runner.plan_metrics is None:
        return None
    outputs = scored_outputs(returned, runner.config.output, first.kwargs, model=runner.facts)
    return runner.plan_metrics(outputs)


def _warm_up(runner: Runner, first: Batch, clock: Clock) -> float:
    """Warm up, for all shapes of the run; return the seconds of the forwards that compiled.

    Raises:
        RunFailed: the model fails.
    """
    try:
        if runner.config.run.warmup != 0 and is_compiled(runner.model):
            _compile_other_shapes(runner, first, clock)
        compile_seconds = sum(clock.seconds)
        _repeat(runner, first, clock)
    except (Exception, SystemExit) as error:  # a model may raise anything
        raise RunFailed(
            f"the model ran its first batch, but failed when it ran it again: "
            f"{describe_model_error(error, runner.mode)}"
        ) from error
    return compile_seconds


def _repeat(runner: Runner, batch: Batch, clock: Clock) -> None:
    """Repeat the first batch until its time is steady, or `run.warmup` times.

    A forward of over a second is not repeated, because its cold start is relatively small.
    """
    warmup = runner.config.run.warmup
    deadline = time.perf_counter() + WARM_UP_SECONDS
    for _ in range(warmup) if isinstance(warmup, int) else itertools.count():
        clock.finish()
        late = time.perf_counter() > deadline or clock.seconds[-1] > 1.0
        if warmup == "auto" and (late or stats.is_steady(clock.seconds[1:])):
            break
        _forward(runner, batch, clock)
    clock.finish()


def _compile_other_shapes(runner: Runner, first: Batch, clock: Clock) -> None:
    """Run a shorter last batch and a batch of texts of another length, then the first again.

    torch.compile compiles a model for each of them, which would otherwise be part of the timed
    pass.
    """
    size, batch = runner.data.batch_size, first
    samples = runner.data.samples or 0
    if runner.data.of_texts and samples >= 2 * size:
        batch = runner.to_device(runner.batch_with(size))
        _forward(runner, batch, clock)
    last = samples % size
    if 0 < last < min(first.size, batch.size):
        _forward(runner, batch.slice(0, last), clock)
    _forward(runner, first, clock)


def _forward(runner: Runner, batch: Batch, clock: Clock, model: nn.Module | None = None) -> Any:
    """Run the model on a copy of the batch, because it may change its input in place."""
    batch, model = batch.map(torch.clone), runner.model if model is None else model
    clock.start()
    returned = model(*batch.args, **batch.kwargs)
    clock.stop()
    return returned
