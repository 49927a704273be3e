"""The result of a run: measurements, interpretation, warnings, metrics and examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gradrun.config.schema import RunConfig
from gradrun.core.errors import first_line
from gradrun.core.units import count_of, pluralize
from gradrun.data.source import BatchSource
from gradrun.inference.config_warnings import config_warnings, label_name_warnings
from gradrun.inference.environment import current_environment
from gradrun.inference.examples import describe_predictions
from gradrun.inference.execution import Execution
from gradrun.inference.first_batch import PreparedRun
from gradrun.inference.interpretation import interpret
from gradrun.inference.metrics import CLASS_ORDER, Evaluation
from gradrun.inference.recovery import BatchRecovery
from gradrun.inference.run_plan import RunPlan
from gradrun.output import formats
from gradrun.output.fingerprint import assumed_unchanged
from gradrun.output.formats import PredictionWriter
from gradrun.output.quarantine import quarantined_positions
from gradrun.output.run_folder import RunFolder
from gradrun.results.result import Environment, InferResult, RunInfo, Statement, Warning
from gradrun.results.run_warnings import run_warnings

_NO_METRICS = "no_metrics"
_METRIC_WARNINGS = {_NO_METRICS, CLASS_ORDER, "labels_from_1", "label_names"}
"""Codes of warnings that depend on the metrics and the labels of a config."""


def build_result(
    plan: RunPlan, prepared: PreparedRun, execution: Execution, others: Iterable[Statement]
) -> InferResult:
    """Combine the measurements, warnings and metrics of a run; `others`: more interpretations."""
    runner, timed, writer = plan.runner, execution.timed, execution.checkpointer.writer
    environment = current_environment(runner.device)
    measurement = runner.measurement(
        prepared,
        timed,
        execution.memory,
        plan.load_seconds,
        plan.open_seconds,
        execution.known_work,
    )
    # An unfinished batch may have more quarantined samples than the files have rows.
    positions = quarantined_positions(plan.folder.path)
    quarantined = sum(position < writer.written for position in positions)
    warnings = [
        *runner.warnings,
        *_output_warnings(plan.folder, writer, prepared.recovery, quarantined),
        *_class_warnings(plan.model.classes, prepared.class_counts),
        *_id_warnings(runner.data),
        *_resume_warnings(plan),
        *_machine_warnings(runner.config, environment),
    ]
    if not timed.stopped:
        training = bool(getattr(runner.config.model, "training", False))
        warnings += run_warnings(measurement, environment, training=training)
    statements = interpret(
        plan.model, runner.data, prepared.statements, measurement.padding, runner.config.run
    )
    warnings += config_warnings(runner.config, plan.model, runner.data, statements)
    written = formats.statements(
        runner.config.output, prepared.outputs, plan.model.classes, prepared.class_counts
    )
    dumped = runner.config.model_dump(mode="json")
    result = InferResult(
        gradrun=environment.gradrun,
        started_at=plan.started_at,
        info=RunInfo.from_config(dumped),
        config=dumped,
        environment=environment,
        measurements=(measurement,),
        files=tuple(writer.files()),
        predictions=writer.written,
        quarantined=quarantined,
        resumed_at=timed.start,
        interpretation=(*statements, *written, *others),
        warnings=tuple(warnings),
    )
    if timed.stopped:
        return result
    scored = _add_metrics(result, prepared.evaluation, plan.folder)
    return _add_examples(scored, plan, prepared)


def _output_warnings(
    folder: RunFolder, writer: PredictionWriter, recovery: BatchRecovery, quarantined: int
) -> list[Warning]:
    texts = {
        "out_of_memory": recovery.batch_limit
        and f"out of memory at sample {recovery.limited_from:,}: batches after it were split to "
        f"{recovery.batch_limit}; set data.batch_size to that",
        "quarantined": quarantined
        and f"{pluralize(quarantined, 'sample')} could not be predicted; "
        f"{recovery.quarantine.path.name} lists the errors. The predictions mark them as missing, "
        "and failed batches are not timed",
        "nonfinite": writer.nonfinite
        and f"{pluralize(writer.nonfinite, 'prediction')} with NaN or infinity; set "
        "run.on_nonfinite to quarantine or stop to list them",
        "torn_journal": folder.previous
        and folder.previous.torn
        and "the last line of the journal was incomplete; its predictions were made again",
    }
    return [Warning(code=code, text=str(text)) for code, text in texts.items() if text]


def _resume_warnings(plan: RunPlan) -> Iterator[Warning]:
    if previous := plan.folder.previous:
        for file in assumed_unchanged(previous.header, plan.header):
            text = (
                f"{file} has another modification time than at the start of the run; its size and "
                "the parts that were compared are the same"
            )
            yield Warning(code="assumed_unchanged", text=text)


def _machine_warnings(config: RunConfig, environment: Environment) -> Iterator[Warning]:
    """Warn about a config that was tuned on another machine or with another torch."""
    if tuned := config.tune.machine:
        differing = [
            f"{name} {then} (here {now})"
            for name, then, now in (
                ("torch", tuned.torch, environment.torch),
                ("CPU", tuned.cpu, environment.cpu),
            )
            if then != now
        ]
        if differing:
            text = (
                f"the config was tuned with {' and '.join(differing)}; other settings may be "
                "faster here: run gradrun tune again"
            )
            yield Warning(code="tuned_elsewhere", text=text)


def _class_warnings(names: Sequence[str], counts: Mapping[str, int]) -> list[Warning]:
    """Warn about outputs with another number of classes than there are names."""
    suffixes = {"class", "score", "indices", "values"}
    outputs = {
        name.rpartition(".")[0] if name.rpartition(".")[2] in suffixes else name: count
        for name, count in counts.items()
        if names and count != len(names)
    }
    return [
        Warning(
            code="class_names",
            text=f"output {output or 'prediction'} has {count} classes, and there are {len(names)} "
            "class names; its classes are written as numbers",
        )
        for output, count in outputs.items()
    ]


def _id_warnings(data: BatchSource) -> Iterator[Warning]:
    if repeated := data.repeated_ids:
        text = (
            f"{count_of(repeated, data.samples)} "
            f"{'has' if repeated == 1 else 'have'} the id of an earlier sample; match predictions "
            "with their inputs by order, or make the ids unique"
        )
        yield Warning(code="repeated_ids", text=text)


def _add_metrics(result: InferResult, metrics: Evaluation | None, folder: RunFolder) -> InferResult:
    """Compute the metrics; a failure becomes a warning, because the predictions are complete."""
    if metrics is None:
        return result
    try:
        computed = metrics.compute(folder.path)
    except Exception as error:
        text = f"the metrics could not be computed: {type(error).__name__}: {first_line(error)}"
        return result.replace(warnings=(*result.warnings, Warning(code=_NO_METRICS, text=text)))
    found = (*metrics.label_warnings(), *metrics.class_order_warnings())
    return result.replace(metrics=computed, warnings=(*result.warnings, *found))


def _add_examples(result: InferResult, plan: RunPlan, prepared: PreparedRun) -> InferResult:
    """Describe predictions for reports; a failure becomes a warning."""
    output, data = plan.runner.config.output, plan.runner.data
    try:
        classes, examples = describe_predictions(
            output, data, plan.model.classes, prepared.outputs, prepared.class_counts
        )
    except Exception as error:
        text = f"the report has no examples: {type(error).__name__}: {first_line(error)}"
        warning = Warning(code="no_examples", text=text)
        return result.replace(warnings=(*result.warnings, warning))
    return result.replace(class_distribution=classes, examples=examples)


def has_same_metrics(finished: InferResult, config: RunConfig) -> bool:
    """Whether an earlier run computed the metrics of this config, with the same labels."""

    def metric_keys(dumped: dict[str, Any]) -> list[Any]:
        return [dumped.get("metrics"), *(dumped["data"].get(key) for key in ("labels", "classes"))]

    failed = any(warning.code == _NO_METRICS for warning in finished.warnings)
    same = metric_keys(finished.config) == metric_keys(config.model_dump(mode="json"))
    return same and not failed


def replace_metrics(
    plan: RunPlan, finished: InferResult, metrics: Evaluation | None
) -> InferResult:
    """Save an earlier run's result with the metrics of this config; predicts nothing."""
    dumped = plan.runner.config.model_dump(mode="json")
    result = finished.replace(
        config=finished.config | {key: dumped[key] for key in ("metrics", "data")},
        metrics=(),
        warnings=(
            *(w for w in finished.warnings if w.code not in _METRIC_WARNINGS),
            *label_name_warnings(plan.runner.data.classes, plan.model.classes),
        ),
    )
    with plan.folder.locked():
        result = _add_metrics(result, metrics, plan.folder)
        plan.folder.save(result)
    return result
