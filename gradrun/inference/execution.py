"""Write and measure the predictions of a run, and save its result."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gradrun.core import files
from gradrun.core.errors import ConfigError, GradrunError, Interrupted, RunFailed
from gradrun.core.progress import Progress, ProgressCallback
from gradrun.core.units import count_of
from gradrun.inference.first_batch import PreparedRun
from gradrun.inference.meters.work import KnownWork
from gradrun.inference.model_warnings import training_mode_warnings
from gradrun.inference.reordering import commit_unit, restore_input_order
from gradrun.inference.run_plan import RunPlan
from gradrun.inference.signals import GracefulShutdown
from gradrun.inference.timed_loop import CommitCallback, TimedPass
from gradrun.output import class_labels
from gradrun.output.checkpointer import Checkpointer
from gradrun.output.class_labels import ClassLabels
from gradrun.output.columns import row_bytes
from gradrun.output.evidence_writer import EvidenceWriter, is_evidence
from gradrun.output.formats import PredictionWriter, check_columns, open_writer
from gradrun.results.result import InferResult, Memory, Warning

RunPass = Callable[
    [RunPlan, PreparedRun, PredictionWriter, CommitCallback, ProgressCallback], TimedPass
]
"""Predicts all samples that the writer does not have yet."""


@dataclass(frozen=True)
class Execution:
    """The outcome of the timed pass and the memory pass, complete or not."""

    timed: TimedPass
    memory: Memory
    known_work: KnownWork
    checkpointer: Checkpointer


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


def create_writer(plan: RunPlan, prepared: PreparedRun) -> PredictionWriter:
    """Return the writer of a run, which creates no files yet.

    Raises:
        ConfigError: the format cannot store the outputs.
    """
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


def execute(
    plan: RunPlan,
    prepared: PreparedRun,
    writer: PredictionWriter,
    shutdown: GracefulShutdown,
    progress: ProgressCallback,
    run_pass: RunPass,
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
    runner.warnings += training_mode_warnings(runner)
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


def _open_files(plan: RunPlan, prepared: PreparedRun, writer: PredictionWriter) -> Checkpointer:
    """Open the journal, the predictions and the quarantine, after the last committed sample."""
    folder, unit = plan.folder, commit_unit(plan.runner.data)
    checksum = plan.runner.data.checksum
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


def _write_classes(plan: RunPlan, prepared: PreparedRun) -> None:
    labels = ClassLabels(plan.runner.config.output, plan.model.classes, prepared.class_counts)
    outputs = {name: out for name, out in prepared.outputs.items() if not is_evidence(name)}
    if labels.describes(outputs):
        files.replace_file(plan.folder.path / class_labels.FILE_NAME, labels.text())


def _write_error(error: Exception, *, resumable: bool = False) -> RunFailed:
    reason = getattr(error, "strerror", None) or error
    file = Path(getattr(error, "filename", None) or "").name
    text = f"the predictions cannot be written: {reason}{f' ({file})' if file else ''}"
    return RunFailed(text, resumable=resumable)


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
