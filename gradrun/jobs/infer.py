"""`gradrun.infer`, where the parts meet: config -> model and data -> runner -> result.

Knows the order of the steps; what each does stands in its own module.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from gradrun import device as machine
from gradrun.advice import advice
from gradrun.config import RunConfig
from gradrun.data_sources import open_data
from gradrun.errors import GradrunError, RunFailed
from gradrun.jobs import resolved, trusted
from gradrun.model_sources import load_model
from gradrun.result import RunResult, Warning
from gradrun.runner import Pass, Runner
from gradrun.sinks import Sink, open_sink
from gradrun.store import RunFolder
from gradrun.yamlfile import located

Progress = Callable[[int, int], None]
"""Told (samples done, samples in all), a few times a second."""

T = TypeVar("T")


def infer(
    config: RunConfig | str | Path | Mapping[str, Any],
    *,
    trust_code: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **overrides: Any,
) -> RunResult:
    """Run all data through the model and write every prediction below `output.path`.

    Args:
        config: a RunConfig, a YAML file, or the same as a mapping.
        trust_code: let a `python` model run the code that the config names.
        overwrite: replace an earlier run in the folder.
        progress: called a few times a second with (samples done, samples in all).
        overrides: sections or keys to change: `run={"mode": "grad"}`, `**{"run.mode": "grad"}`.

    Returns:
        What was measured: times in seconds, memory in bytes. It is in result.json too.

    Raises:
        ConfigError: the config, model or data are wrong; nothing was written.
        RunFailed, Interrupted: the run ended early; the predictions written stay, and the
            error's `result` holds what was measured.
    """
    config = resolved(config, overrides)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")

    with located(config), machine.prepared(config.run) as device:
        folder = RunFolder(config.output.path, overwrite=overwrite, inputs=config.input_files())
        model, load_seconds = _timed(
            lambda: load_model(config.model, device, trust_code=trusted(trust_code))
        )
        data, open_seconds = _timed(lambda: open_data(config.data, config.run.seed))
        runner = Runner(model, data, config, device)
        outputs = runner.prepare()
        folder.begin()
        sink = open_sink(config.output, data.samples)
        beat = (lambda done: progress(done, data.samples)) if progress else None
        gathered = _predict(runner, sink, outputs, beat)
        measured = runner.finish(gathered, load_seconds, open_seconds)
        environment = machine.environment(device)

    result = RunResult(
        kind="infer",
        gradrun=environment.gradrun,
        started_at=started_at,
        config=config.model_dump(mode="json"),
        environment=environment,
        measurements=(measured,),
        files=tuple(sink.files()),
        warnings=(
            *runner.warnings,
            # What to do about figures is no help with a run that did not come to its end.
            *(() if gathered.stopped else advice(config, measured, environment)),
        ),
    )
    if gathered.stopped:
        raise _ended_early(gathered.stopped, result, folder, sink.written, data.samples)
    with _undisturbed():
        folder.save(result)
    return result


def _timed(step: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return step(), time.perf_counter() - began


def _predict(
    runner: Runner, sink: Sink, outputs: dict[str, Any], beat: Callable[[int], None] | None
) -> Pass:
    """Fill the sink and end its files; what stops either is in the Pass, with what was done."""
    try:
        sink.open(outputs)
        gathered = runner.run(sink, beat)
    except BaseException as error:
        with _undisturbed(), suppress(OSError):
            sink.close()
        if isinstance(error, Exception):
            raise _unwritten(error) from error
        raise
    began = time.perf_counter_ns()
    try:
        with _undisturbed():
            sink.close()
    except OSError as error:
        gathered.stopped = gathered.stopped or _unwritten(error)
    gathered.total_ns += time.perf_counter_ns() - began
    gathered.trim(sink.written)
    return gathered


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C wait for what takes milliseconds and must be whole: ending files, saving."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


def _unwritten(error: Exception) -> RunFailed:
    reason = getattr(error, "strerror", None) or error
    return RunFailed(f"the predictions cannot be written: {reason}")


def _ended_early(
    error: GradrunError, result: RunResult, folder: RunFolder, written: int, samples: int
) -> GradrunError:
    """The error with its result, which is saved too, and with the place of what was kept."""
    note = Warning(code="ended_early", text=f"{error}, after {written:,} of {samples:,} samples")
    ended = type(error)(
        f"{error}; {written:,} of {samples:,} predictions are kept in {folder.path}"
    )
    ended.__cause__ = error.__cause__  # what --debug shows
    ended.result = result.model_copy(update={"warnings": (*result.warnings, note)})
    # The disk that failed the run may fail its report too; the first error is the one to tell.
    with suppress(RunFailed, KeyboardInterrupt), _undisturbed():
        folder.save(ended.result)
    return ended
