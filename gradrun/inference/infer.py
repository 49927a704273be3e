"""A run in this process: open, prepare, check, execute, save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gradrun.config.load import LoadedConfig
from gradrun.core.errors import ConfigError
from gradrun.core.options import option
from gradrun.core.progress import Progress
from gradrun.data.source import require_length
from gradrun.inference.device import device_context
from gradrun.inference.execution import RunPass, create_writer, execute, run_in_this_process, save
from gradrun.inference.first_batch import PreparedRun
from gradrun.inference.reordering import commit_unit
from gradrun.inference.run_plan import RunOptions, RunPlan, code_files, plan_run
from gradrun.inference.run_result import build_result, has_same_metrics, replace_metrics
from gradrun.inference.signals import GracefulShutdown
from gradrun.output.fingerprint import describe_code
from gradrun.results.result import InferResult, Statement, Warning


def infer(
    loaded: LoadedConfig,
    options: RunOptions,
    run_pass: RunPass = run_in_this_process,
    statements: Sequence[Statement] = (),
) -> InferResult:
    """Run a config as `gradrun.infer` does.

    Args:
        loaded: the config.
        options: how to start.
        run_pass: predicts the samples; an engine spreads them over workers.
        statements: interpretations of the caller, for the result.

    Raises:
        ConfigError: as `gradrun.infer`.
        RunFailed: as `gradrun.infer`.
        Interrupted: as `gradrun.infer`.
    """
    config = loaded.config
    with (
        GracefulShutdown() as shutdown,
        loaded.error_locations(),
        device_context(config.run) as device,
    ):
        plan = plan_run(config, device, options)
        runner = plan.runner
        if run_pass is not run_in_this_process:
            require_length(runner.data)
        if plan.finished and has_same_metrics(plan.finished, config):
            return plan.finished
        options.progress(Progress("running the first batch"))
        prepared = runner.prepare(plan.quarantine)
        plan = _with_late_imports(plan)
        _check_metrics(plan, prepared)
        if plan.finished:
            return replace_metrics(plan, plan.finished, prepared.evaluation)
        runner.warnings += _check_stateless(plan, prepared, run_pass)
        runner.check_batch_independence(prepared)
        # Before the lock creates the folder: a format may need a library that is missing.
        writer = create_writer(plan, prepared)
        with plan.folder.locked():
            execution = execute(plan, prepared, writer, shutdown, options.progress, run_pass)
            result = build_result(plan, prepared, execution, statements)
            save(plan, execution, result, shutdown)
    return result


def _check_metrics(plan: RunPlan, prepared: PreparedRun) -> None:
    """Check the labels, and that an earlier run to resume saved what the metrics need."""
    if evaluation := prepared.evaluation:
        unit = commit_unit(plan.runner.data)
        previous = plan.folder.previous and plan.folder.previous.whole_batches(unit)
        evaluation.check_saved(previous.ranges if previous else ())
        evaluation.check_labels()


def _with_late_imports(plan: RunPlan) -> RunPlan:
    """Add the files of code that the first batch imported to the fingerprint."""
    late = describe_code(code_files(plan.runner.config))
    header = plan.header.model_copy(update={"files": plan.header.files | late})
    return replace(plan, header=header)


def _check_stateless(plan: RunPlan, prepared: PreparedRun, run_pass: RunPass) -> Iterator[Warning]:
    """Yield a warning if predictions depend on earlier batches.

    Raises:
        ConfigError: they do, and a run is resumed, whose state is lost, or the run has workers,
            each with a state of its own.
    """
    carried = plan.runner.carried_state(prepared)
    if carried is None:
        return
    previous = plan.folder.previous
    text = f"the model carries state from batch to batch{carried}"
    if previous and previous.committed:
        raise ConfigError(
            f"cannot resume {plan.folder.path}: {text}, and the state after the committed batches "
            f"is lost. Start over with {option('overwrite')}, or reset the state in forward",
            "output.path",
        )
    if run_pass is not run_in_this_process:
        raise ConfigError(
            f"{text}, and each worker would have its own; run it without an engine, or reset the "
            "state in forward",
            "engine",
        )
    yield Warning(
        code="carries_state",
        text=f"{text}: its predictions depend on the batches before them, and the run cannot be "
        "resumed; reset the state in forward",
    )
