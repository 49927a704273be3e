"""Run a model over a data source, measure it, and save predictions and result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gradrun.config.load import ConfigSource, is_trusted, resolve_config
from gradrun.config.schema import RunConfig
from gradrun.core import files
from gradrun.core.errors import ConfigError, GradrunError, Interrupted, RunFailed, first_line
from gradrun.core.imports import imported_files, target_root
from gradrun.core.options import option
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.core.units import count_of, pluralize
from gradrun.core.version import __version__
from gradrun.data import open_data
from gradrun.data.source import (
    BatchSource,
    HasFileList,
    HasIdColumn,
    HasIdentity,
    HasKeptColumns,
    HasRepeatedIds,
    HasRowChecksums,
    has_row_checksums,
    require_length,
)
from gradrun.inference.compilation import compile_model
from gradrun.inference.config_warnings import config_warnings, label_name_warnings, label_names
from gradrun.inference.decoding import open_decoder
from gradrun.inference.device import device_context
from gradrun.inference.environment import current_environment
from gradrun.inference.examples import describe_predictions
from gradrun.inference.interpretation import interpret
from gradrun.inference.meters.work import KnownWork
from gradrun.inference.metrics import CLASS_ORDER, Evaluation, plan_metrics
from gradrun.inference.recovery import BatchRecovery
from gradrun.inference.reordering import commit_unit, restore_input_order
from gradrun.inference.runner import CommitCallback, PreparedRun, Runner, TimedPass
from gradrun.inference.signals import GracefulShutdown
from gradrun.models import load_model
from gradrun.models.class_names import check_order
from gradrun.models.loaded import LoadedModel
from gradrun.output import class_labels, formats
from gradrun.output.checkpointer import Checkpointer
from gradrun.output.class_labels import ClassLabels
from gradrun.output.columns import row_bytes
from gradrun.output.evidence_writer import EvidenceWriter, is_evidence
from gradrun.output.fingerprint import assumed_unchanged, describe_code, fingerprint
from gradrun.output.formats import PredictionWriter, check_columns, open_writer
from gradrun.output.journal import InputChecksum, JournalHeader, no_checksum
from gradrun.output.quarantine import Quarantine, quarantined_positions
from gradrun.output.run_folder import RunFolder
from gradrun.output.transforms import resolve_output
from gradrun.results.result import Environment, InferResult, Memory, RunInfo, Statement, Warning
from gradrun.results.run_warnings import run_warnings

_NO_METRICS = "no_metrics"
_METRIC_WARNINGS = {_NO_METRICS, CLASS_ORDER, "labels_from_1", "label_names"}
"""Codes of warnings that depend on the metrics and the labels of a config."""


@dataclass(frozen=True)
class OpenedRun:
    """The opened model and data of a run."""

    header: JournalHeader
    model: LoadedModel
    runner: Runner
    """The module, data source, config and device."""
    load_seconds: float
    open_seconds: float


@dataclass(frozen=True)
class RunPlan(OpenedRun):
    """A run that is ready to start."""

    folder: RunFolder
    quarantine: Quarantine
    started_at: str
    finished: InferResult | None
    """The result of an earlier run that is complete and is to be resumed."""


@dataclass(frozen=True)
class Execution:
    """The outcome of the timed pass and the memory pass, complete or not."""

    timed: TimedPass
    memory: Memory
    known_work: KnownWork
    checkpointer: Checkpointer


RunPass = Callable[
    [RunPlan, PreparedRun, PredictionWriter, CommitCallback, ProgressCallback], TimedPass
]
"""Predicts all samples that the writer does not have yet."""


def run_in_this_process(
    plan: RunPlan,
    prepared: PreparedRun,
    writer: PredictionWriter,
    commit: CommitCallback,
    progress: ProgressCallback,
) -> TimedPass:
    """Predict all samples that the writer does not have yet, one batch after the other."""
    ordered = restore_input_order(writer, plan.runner.data)
    return plan.runner.run_timed_pass(prepared, ordered, commit, progress)


def infer(
    config: ConfigSource,
    *,
    trust_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback = ignore,
    run_pass: RunPass = run_in_this_process,
    statements: Sequence[Statement] = (),
    **overrides: Any,
) -> InferResult:
    """Run a config as `gradrun.infer` does, by `run_pass`.

    Args:
        config: as in `gradrun.infer`.
        trust_code: as in `gradrun.infer`.
        overwrite: as in `gradrun.infer`.
        resume: as in `gradrun.infer`.
        progress: as in `gradrun.infer`.
        run_pass: predicts the samples; an engine spreads them over workers.
        statements: interpretations of the caller, for the result.
        overrides: as in `gradrun.infer`.

    Raises:
        ConfigError: as `gradrun.infer`.
        RunFailed: as `gradrun.infer`.
        Interrupted: as `gradrun.infer`.
    """
    loaded = resolve_config(config, overrides)
    config = loaded.config
    with (
        GracefulShutdown() as shutdown,
        loaded.error_locations(),
        device_context(config.run) as device,
    ):
        plan = plan_run(
            config,
            device,
            trust_code=trust_code,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
        if run_pass is not run_in_this_process:
            require_length(plan.runner.data)
        if plan.finished and _has_same_metrics(plan.finished, config):
            return plan.finished
        runner, config = plan.runner, plan.runner.config
        progress(Progress("running the first batch"))
        prepared = runner.prepare(plan.quarantine)
        plan = _with_late_imports(plan)
        _check_metrics(plan, prepared)
        if plan.finished:
            return _replace_metrics(plan, plan.finished, prepared.evaluation)
        runner.warnings += _check_stateless(plan, prepared, run_pass)
        runner.check_batch_independence(prepared)
        # Before the lock creates the folder: a format may need a library that is missing.
        writer = _create_writer(plan, prepared)
        with plan.folder.locked():
            execution = execute(plan, prepared, writer, shutdown, progress, run_pass)
            result = build_result(plan, prepared, execution)
            written = formats.statements(
                config.output, prepared.outputs, plan.model.classes, prepared.class_counts
            )
            result = result.replace(interpretation=(*result.interpretation, *written, *statements))
            save(plan, execution, result, shutdown)
    return result


def plan_run(
    config: RunConfig,
    device: torch.device,
    *,
    trust_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback = ignore,
) -> RunPlan:
    """Open the run folder, model and data, and check that a resume continues the same run.

    Raises:
        ConfigError: one of them cannot be opened, or the folder has another run.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    folder = RunFolder(
        config.output.path, overwrite=overwrite, resume=resume, inputs=config.input_files()
    )
    opened = open_run(config, device, trust_code=trust_code, progress=progress)
    folder.check_resumable(opened.header, _input_checksum(opened.runner.data))
    return RunPlan(
        **vars(opened),
        folder=folder,
        quarantine=Quarantine(folder.path),
        started_at=started_at,
        finished=folder.finished_result(),
    )


def open_run(
    config: RunConfig,
    device: torch.device,
    *,
    trust_code: bool = False,
    progress: ProgressCallback = ignore,
) -> OpenedRun:
    """Load the model and open the data of a config, and take their fingerprint.

    Raises:
        ConfigError: one of them cannot be opened.
    """
    progress(Progress("loading the model"))
    started = time.perf_counter()
    model = load_model(config.model, device, data=config.data, trust_code=is_trusted(trust_code))
    config = config.replace({"output": resolve_output(config.output, model)})
    loaded = time.perf_counter()
    progress(Progress("opening the data"))
    opening = time.perf_counter()
    data = open_data(
        config.data,
        seed=config.run.seed,
        model=config.model,
        model_classes=model.classes,
        trust_code=is_trusted(trust_code),
        keep=config.kept_columns,
    )
    opened = time.perf_counter()
    decode = None
    if target := config.output.decoder:
        roots = _code_roots(config)
        decode = open_decoder(target, beside=roots, trust_code=is_trusted(trust_code))
    model = compile_model(model, config.model.compile, data, device)
    compiled = time.perf_counter()
    check_order(label_names(data), model.classes)
    file_list = data.files if isinstance(data, HasFileList) else ()
    metrics = partial(plan_metrics, config, data, model=model)
    header = fingerprint(
        config,
        data.samples,
        __version__,
        listed=file_list,
        by_rows=has_row_checksums(data),
        classes=model.classes,
        id_type=data.id_type if isinstance(data, HasIdColumn) else "",
        kept_types={name: str(kind) for name, kind in data.kept_types.items()}
        if isinstance(data, HasKeptColumns)
        else {},
        identity=data.identity if isinstance(data, HasIdentity) else {},
        code=_code_files(config),
        resolved={"device": device.type, "threads": torch.get_num_threads()},
        versions={
            "torch": str(torch.__version__),
            "weights": "in files" if model.files else model.weights,
        },
    )
    return OpenedRun(
        header=header,
        model=model,
        runner=Runner(model.module, data, config, device, model, metrics, decode),
        load_seconds=loaded - started + compiled - opened,
        open_seconds=opened - opening,
    )


def _code_roots(config: RunConfig) -> dict[Path, str]:
    """Return the folders of the user's code for model and data, and what precedes file names."""
    roots: dict[Path, str] = {}
    for key, target in config.targets().items():
        section, _, _ = key.partition(".")
        root = getattr(getattr(config, section), "root", None)
        roots.setdefault(target_root(target, root), "" if section == "model" else f"{section}: ")
    return roots


def _code_files(config: RunConfig) -> dict[str, Path]:
    """Return name and path of each file of the user's code that has been imported."""
    roots = _code_roots(config)
    if config.output.decoder:
        roots.setdefault(target_root(config.output.decoder, None), "output: ")
    return {
        f"{prefix}{name}": path
        for root, prefix in roots.items()
        for name, path in imported_files(root).items()
    }


def _check_metrics(plan: RunPlan, prepared: PreparedRun) -> None:
    """Check the labels, and that an earlier run to resume saved what the metrics need."""
    if evaluation := prepared.evaluation:
        unit = commit_unit(plan.runner.data)
        previous = plan.folder.previous and plan.folder.previous.whole_batches(unit)
        evaluation.check_saved(previous.ranges if previous else ())
        evaluation.check_labels()


def _with_late_imports(plan: RunPlan) -> RunPlan:
    """Add the files of code that the first batch imported to the fingerprint."""
    late = describe_code(_code_files(plan.runner.config))
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


def execute(
    plan: RunPlan,
    prepared: PreparedRun,
    writer: PredictionWriter,
    shutdown: GracefulShutdown,
    progress: ProgressCallback = ignore,
    run_pass: RunPass = run_in_this_process,
) -> Execution:
    """Write and measure all predictions that are missing in the folder.

    An error or signal during the timed pass is in `timed.stopped`.

    Raises:
        GradrunError: the files could not be opened.
    """
    runner, checkpointer = plan.runner, _open_files(plan, prepared, writer)

    def commit() -> None:
        with shutdown.deferred():
            try:
                checkpointer.commit_if_due()
            except OSError as error:
                raise _write_error(error) from error

    progress(Progress("predicting", writer.written, runner.data.samples or 0))
    timed = run_pass(plan, prepared, writer, commit, progress)
    runner.check_training_mode()
    started = time.perf_counter_ns()
    try:
        with shutdown.deferred():
            checkpointer.close(finished=not timed.stopped)
    except OSError as error:
        timed.stop(_write_error(error))
    except KeyboardInterrupt:
        timed.stop(Interrupted())
    timed.total_ns += time.perf_counter_ns() - started
    timed.trim(writer.written - timed.start)
    progress(Progress("measuring memory"))
    memory = runner.measure_memory(prepared, timed)
    return Execution(timed, memory, runner.count_work(prepared, timed), checkpointer)


def build_result(plan: RunPlan, prepared: PreparedRun, execution: Execution) -> InferResult:
    """Combine the measurements, warnings and metrics of a run."""
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
        interpretation=statements,
        warnings=tuple(warnings),
    )
    if timed.stopped:
        return result
    scored = _add_metrics(result, prepared.evaluation, plan.folder)
    return _add_examples(scored, plan, prepared)


def save(
    plan: RunPlan, execution: Execution, result: InferResult, shutdown: GracefulShutdown
) -> None:
    """Write result.json.

    Raises:
        GradrunError: the run ended early, or the result cannot be written.
    """
    if not (stopped := execution.timed.stopped):
        with shutdown.deferred():
            plan.folder.save(result)
        return
    committed, samples = execution.checkpointer.committed, plan.runner.data.samples
    reason = str(stopped)
    if files.is_disk_full(stopped):
        reason += f"; {plan.folder.disk_space_hint(committed, samples)}"
    note = Warning(code="ended_early", text=f"{reason}, after {count_of(committed, samples)}")
    result = result.replace(warnings=(*result.warnings, note))
    # A full disk may also prevent saving the result; report the first error.
    with suppress(RunFailed, KeyboardInterrupt), shutdown.deferred():
        plan.folder.save(result)
    of_all = "" if samples is None else f" of {samples:,}"
    text = f"{reason}; {committed:,}{of_all} predictions are saved in {plan.folder.path}"
    raise type(stopped)(
        text, result=result, resumable=True, resume_options=stopped.resume_options
    ) from stopped.__cause__


def _input_checksum(data: BatchSource) -> InputChecksum:
    return data.checksum if isinstance(data, HasRowChecksums) else no_checksum


def _create_writer(plan: RunPlan, prepared: PreparedRun) -> PredictionWriter:
    data, output = plan.runner.data, plan.runner.config.output
    check_columns(output, prepared.outputs)
    writer = open_writer(
        output,
        data.samples,
        commit_unit(data),
        plan.model.classes,
        has_ids=data.has_ids,
        class_counts=prepared.class_counts,
    )
    if any(map(is_evidence, prepared.outputs)):
        return EvidenceWriter(writer, output.path, data.samples)
    return writer


def _write_classes(plan: RunPlan, prepared: PreparedRun) -> None:
    labels = ClassLabels(plan.runner.config.output, plan.model.classes, prepared.class_counts)
    outputs = {name: out for name, out in prepared.outputs.items() if not is_evidence(name)}
    if labels.describes(outputs):
        files.replace_file(plan.folder.path / class_labels.FILE_NAME, labels.text())


def _open_files(plan: RunPlan, prepared: PreparedRun, writer: PredictionWriter) -> Checkpointer:
    """Open the journal, the predictions and the quarantine, after the last committed sample."""
    folder, unit = plan.folder, commit_unit(plan.runner.data)
    checksum = _input_checksum(plan.runner.data)
    try:
        journal, committed = folder.open_journal(plan.header, unit, checksum)
        try:
            writer.open(prepared.outputs, committed)
            _write_classes(plan, prepared)
            plan.quarantine.truncate(writer.written)
        except BaseException:
            journal.close()
            with suppress(OSError):
                writer.close()
            if not committed:  # leave no folder that looks like a run to resume
                with suppress(OSError):
                    folder.clear()
            raise
    except GradrunError:
        raise
    except ValueError as error:  # the format cannot represent the outputs
        raise ConfigError(str(error), "output.format") from error
    except Exception as error:
        resumable = bool(folder.previous and folder.previous.committed)
        raise _write_error(error, resumable=resumable) from error
    return Checkpointer(writer, journal, unit, row_bytes(prepared.outputs), checksum)


def _write_error(error: Exception, *, resumable: bool = False) -> RunFailed:
    reason = getattr(error, "strerror", None) or error
    file = Path(getattr(error, "filename", None) or "").name
    text = f"the predictions cannot be written: {reason}{f' ({file})' if file else ''}"
    return RunFailed(text, resumable=resumable)


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
    if isinstance(data, HasRepeatedIds) and (repeated := data.repeated_ids):
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


def _has_same_metrics(finished: InferResult, config: RunConfig) -> bool:
    """Whether an earlier run computed the metrics of this config, with the same labels."""

    def metric_keys(dumped: dict[str, Any]) -> list[Any]:
        return [dumped.get("metrics"), *(dumped["data"].get(key) for key in ("labels", "classes"))]

    failed = any(warning.code == _NO_METRICS for warning in finished.warnings)
    same = metric_keys(finished.config) == metric_keys(config.model_dump(mode="json"))
    return same and not failed


def _replace_metrics(
    plan: RunPlan, finished: InferResult, metrics: Evaluation | None
) -> InferResult:
    """Save an earlier run's result with the metrics of this config; predicts nothing."""
    dumped = plan.runner.config.model_dump(mode="json")
    result = finished.replace(
        config=finished.config | {key: dumped[key] for key in ("metrics", "data")},
        metrics=(),
        warnings=(
            *(w for w in finished.warnings if w.code not in _METRIC_WARNINGS),
            *label_name_warnings(label_names(plan.runner.data), plan.model.classes),
        ),
    )
    with plan.folder.locked():
        result = _add_metrics(result, metrics, plan.folder)
        plan.folder.save(result)
    return result
