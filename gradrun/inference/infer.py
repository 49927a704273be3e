"""`gradrun.infer`, where the parts meet: config -> model and data -> runner -> result.

Knows the order of the steps; what each does stands in its own module.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from gradrun.config.load import ConfigSource, is_trusted, resolve_config
from gradrun.config.schema import RunConfig
from gradrun.core import files
from gradrun.core.errors import GradrunError, Interrupted, RunFailed, first_line
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.core.units import pluralize
from gradrun.core.version import __version__
from gradrun.data import open_data
from gradrun.data.source import HasFileList
from gradrun.inference import metrics
from gradrun.inference.device import device_context
from gradrun.inference.environment import current_environment
from gradrun.inference.recovery import BatchRecovery
from gradrun.inference.reordering import commit_unit, restore_input_order
from gradrun.inference.runner import Runner, TimedPass
from gradrun.inference.signals import GracefulShutdown
from gradrun.models import class_names, load_model
from gradrun.output.checkpointer import Checkpointer
from gradrun.output.fingerprint import fingerprint
from gradrun.output.formats import PredictionWriter, open_writer
from gradrun.output.journal import JournalHeader
from gradrun.output.quarantine import quarantined_positions
from gradrun.output.run_folder import RunFolder
from gradrun.output.transforms import Outputs
from gradrun.results.result import InferResult, RunInfo, Warning
from gradrun.results.run_warnings import run_warnings

T = TypeVar("T")

_NO_METRICS = "no_metrics"


def infer(
    config: ConfigSource,
    *,
    trust_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback = ignore,
    **overrides: Any,
) -> InferResult:
    """Run all data through the model and write every prediction below `output.path`.

    Args:
        config: the path of a YAML file, its content as a mapping, or a loaded config.
        trust_code: let a `python` model run the code that the config names.
        overwrite: replace an earlier run in the folder.
        resume: go on with an unfinished run in the folder; where there is none, begin one.
        progress: called with the number of predicted samples, a few times per second.
        overrides: sections or keys to change: `run={"mode": "grad"}`, `**{"run.mode": "grad"}`.

    Returns:
        What was measured: times in seconds, memory in bytes. It is in result.json too. Of a run
        that was finished already, its result, with the metrics that are asked for now.

    Raises:
        ConfigError: the config, model or data are wrong, or a resume would go on with another
            run; nothing was written.
        RunFailed, Interrupted: the run ended early; the predictions written stay, and the
            error's `result` holds what was measured.
    """
    loaded = resolve_config(config, overrides)
    config = loaded.config
    started_at = datetime.now(UTC).isoformat(timespec="seconds")

    training = bool(getattr(config.model, "training", False))

    with (
        GracefulShutdown() as interruption,
        loaded.error_locations(),
        device_context(config.run) as device,
    ):
        folder = RunFolder(
            config.output.path, overwrite=overwrite, resume=resume, inputs=config.input_files()
        )
        model, load_seconds = _timed(
            lambda: load_model(config.model, device, trust_code=is_trusted(trust_code))
        )
        data, open_seconds = _timed(
            lambda: open_data(config.data, seed=config.run.seed, model=config.model)
        )
        listed = data.files if isinstance(data, HasFileList) else ()
        head = fingerprint(config, data.samples, __version__, listed)
        folder.check_resumable(head)
        finished = folder.finished_result()
        if finished and _scored_alike(finished, config):
            return finished
        runner = Runner(model, data, config, device)
        outputs = runner.prepare()
        classes = class_names(model)
        compute = metrics.prepared(config, data, outputs, classes)
        if finished:
            return _scored_anew(finished, config, compute, folder)
        unit = commit_unit(data)
        sink = restore_input_order(open_writer(config.output, data.samples, unit, classes), data)
        environment = current_environment(device)
        with folder.locked():
            keeper = _opened(runner, folder, head, sink, outputs, unit)
            resumed_at = sink.written

            def beat(done: int) -> None:
                progress(Progress("predicting", resumed_at + done, data.samples))

            gathered = _predict(runner, keeper, beat, interruption)
            measured = runner.finish(gathered, load_seconds, open_seconds)
            # Of a batch that was not finished more may have been noted than is in the files.
            apart = sum(number < sink.written for number in quarantined_positions(folder.path))
            result = InferResult(
                gradrun=environment.gradrun,
                started_at=started_at,
                info=RunInfo.from_config(dumped := config.model_dump(mode="json")),
                config=dumped,
                environment=environment,
                measurements=(measured,),
                files=tuple(sink.files()),
                predictions=sink.written,
                quarantined=apart,
                resumed_at=resumed_at,
                warnings=(
                    *runner.warnings,
                    *_told_of_files(folder, sink, runner.rescue, apart),
                    # What to do about figures is no help with a run that did not come to its end.
                    *(
                        ()
                        if gathered.stopped
                        else run_warnings(measured, environment, training=training)
                    ),
                ),
            )
            if gathered.stopped:
                ended = _ended_early(
                    gathered.stopped, result, folder, keeper.committed, data.samples
                )
                # The disk that failed the run may fail its report too; the first error is told.
                with suppress(RunFailed, KeyboardInterrupt), interruption.deferred():
                    folder.save(ended.result)
                raise ended from gathered.stopped.__cause__
            result = _scored(result, compute, folder)
            with interruption.deferred():
                folder.save(result)
    return result


def _timed(step: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return step(), time.perf_counter() - began


def _opened(
    runner: Runner,
    folder: RunFolder,
    head: JournalHeader,
    sink: PredictionWriter,
    outputs: Outputs,
    unit: int,
) -> Checkpointer:
    """The sink with its files, behind what is kept of an earlier run, and the journal of both."""
    row_bytes = sum(tensor[:1].nbytes for tensor in outputs.values())
    try:
        journal, kept = folder.open_journal(head, unit)
        try:
            sink.open(outputs, kept)
            runner.rescue.quarantine.truncate(sink.written)
        except BaseException:
            journal.close()
            with suppress(OSError):
                sink.close()
            if not kept:  # the run has not begun, so nothing is to be resumed
                with suppress(OSError):
                    folder.clear()
            raise
    except GradrunError:
        raise
    except Exception as error:
        resumable = bool(folder.previous and folder.previous.committed)
        raise _unwritten(error, resumable=resumable) from error
    return Checkpointer(sink, journal, unit, row_bytes)


def _predict(
    runner: Runner,
    keeper: Checkpointer,
    beat: Callable[[int], None] | None,
    interruption: GracefulShutdown,
) -> TimedPass:
    """Fill the sink and end its files; what stops either is in the Pass, with what was done."""

    def keep() -> None:
        with interruption.deferred():
            try:
                keeper.commit_if_due()
            except OSError as error:  # the disk's fault, which no batch is to blame for
                raise _unwritten(error) from error

    sink, before = keeper.writer, keeper.writer.written
    gathered = runner.run(sink, keep, beat)
    began = time.perf_counter_ns()
    try:
        with interruption.deferred():
            keeper.close()
    except OSError as error:
        gathered.stopped = gathered.stopped or _unwritten(error)
    except KeyboardInterrupt:
        gathered.stopped = gathered.stopped or Interrupted()
    gathered.total_ns += time.perf_counter_ns() - began
    gathered.trim(sink.written - before)
    return gathered


def _unwritten(error: Exception, *, resumable: bool = False) -> RunFailed:
    reason = getattr(error, "strerror", None) or error
    file = Path(getattr(error, "filename", None) or "").name
    text = f"the predictions cannot be written: {reason}{f' ({file})' if file else ''}"
    return RunFailed(text, resumable=resumable)


def _told_of_files(
    folder: RunFolder, sink: PredictionWriter, rescue: BatchRecovery, apart: int
) -> list[Warning]:
    """What a reader of the predictions must know; `apart`: samples in them that have none."""
    found = []
    if rescue.most:
        found.append(
            Warning(
                code="out_of_memory",
                text=f"memory ran out at sample {rescue.cut_at:,}: from there on batches are of "
                f"{rescue.most}; set data.batch_size to that",
            )
        )
    if apart:
        verb, places = ("is", "its place") if apart == 1 else ("are", "their places")
        found.append(
            Warning(
                code="quarantined",
                text=f"{pluralize(apart, 'sample')} could not be predicted and {verb} in "
                f"{rescue.quarantine.path.name}, with what was wrong; there is no value in "
                f"{places} in the predictions, and batches that failed are not timed",
            )
        )
    if bad := sink.nonfinite:
        found.append(
            Warning(
                code="nonfinite",
                text=f"{pluralize(bad, 'prediction')} with NaN or an infinity, or of one; "
                "run.on_nonfinite: quarantine or stop says which",
            )
        )
    if folder.previous and folder.previous.torn:
        found.append(
            Warning(
                code="torn_journal",
                text="the journal's last line had been cut off; the predictions that it told of "
                "were made again",
            )
        )
    return found


def _scored(result: InferResult, compute: metrics.Compute | None, folder: RunFolder) -> InferResult:
    """With its metrics; or with why there are none, for the predictions are there all the same."""
    if compute is None:
        return result
    try:
        return result.replace(metrics=compute(folder.path))
    except Exception as error:
        said = f"the metrics could not be computed: {type(error).__name__}: {first_line(error)}"
        return result.replace(warnings=(*result.warnings, Warning(code=_NO_METRICS, text=said)))


def _scored_alike(finished: InferResult, config: RunConfig) -> bool:
    """Whether an earlier run has the metrics that this config asks for."""
    dumped = config.model_dump(mode="json")

    def asked(told: dict[str, Any]) -> list[Any]:
        return [told.get("metrics"), *(told["data"].get(key) for key in ("labels", "classes"))]

    failed = any(warning.code == _NO_METRICS for warning in finished.warnings)
    return asked(finished.config) == asked(dumped) and not failed


def _scored_anew(
    finished: InferResult, config: RunConfig, compute: metrics.Compute | None, folder: RunFolder
) -> InferResult:
    """An earlier run's result with other metrics, saved; nothing is predicted or measured."""
    dumped = config.model_dump(mode="json")
    result = finished.replace(
        config=finished.config | {key: dumped[key] for key in ("metrics", "data")},
        metrics=(),
        warnings=tuple(w for w in finished.warnings if w.code != _NO_METRICS),
    )
    with folder.locked():
        result = _scored(result, compute, folder)
        folder.save(result)
    return result


def _ended_early(
    error: GradrunError, result: InferResult, folder: RunFolder, kept: int, samples: int
) -> GradrunError:
    """The error with its result and with the place of what was kept."""
    reason = str(error)
    if files.is_disk_full(error):
        reason += f"; {folder.disk_space_hint(kept, samples)}"
    note = Warning(code="ended_early", text=f"{reason}, after {kept:,} of {samples:,} samples")
    return type(error)(
        f"{reason}; {kept:,} of {samples:,} predictions are kept in {folder.path}",
        result=result.replace(warnings=(*result.warnings, note)),
        resumable=True,
    )
