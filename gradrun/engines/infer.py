"""`gradrun.infer`: run in this process, or spread over the workers of an engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any, NamedTuple

from gradrun.config.load import ConfigSource, LoadedConfig, is_trusted, resolve_config
from gradrun.config.schema import RunConfig
from gradrun.core.errors import GradrunError
from gradrun.core.progress import ProgressCallback, ignore
from gradrun.engines import processes, ray
from gradrun.engines.dispatch import Dispatcher
from gradrun.engines.engine import EngineRequest, StartedEngine
from gradrun.inference.infer import infer as infer_here
from gradrun.inference.interpretation import explain as explain_run
from gradrun.output import journal
from gradrun.results.result import InferResult, Statement


class EngineSource(NamedTuple):
    """The functions of one engine."""

    start: Callable[[EngineRequest], StartedEngine]
    """Request the workers."""
    offer: Callable[[Any], str]
    """Describe in a few words what the engine section can use, without starting workers."""


ENGINES = {
    "processes": EngineSource(processes.start, processes.offer),
    "ray": EngineSource(ray.start, ray.offer),
}
"""engine.source -> its functions."""


def infer(
    config: ConfigSource,
    *,
    trust_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback = ignore,
    **overrides: Any,
) -> InferResult:
    """Run all data through the model and write the predictions below `output.path`.

    Args:
        config: the path of a YAML file, its content as a mapping, or a loaded config.
        trust_code: allow the config to run code, such as a `python` model.
        overwrite: replace an earlier run in the folder.
        resume: continue an unfinished run in the folder, if any.
        progress: called at the start of each stage, such as loading the model; while predicting,
            a few times per second with the number of predicted samples.
        overrides: sections or keys to change: `run={"mode": "grad"}`, `**{"run.mode": "grad"}`.

    Returns:
        The measurements, with times in seconds and memory in bytes; also saved as result.json. If
        the run is already finished, its result, with the metrics of this config.

    Raises:
        ConfigError: the config, model or data are invalid, or the run to resume is a different
            one; nothing was written.
        RunFailed: the run ended early. Committed predictions stay; `result` has the measurements.
        Interrupted: as RunFailed, after Ctrl-C or SIGTERM.
    """
    loaded = resolve_config(config, overrides)
    options: dict[str, Any] = {
        "trust_code": is_trusted(trust_code),
        "overwrite": overwrite,
        "resume": resume,
        "progress": progress,
    }
    section = loaded.config.engine
    if section is None:
        return infer_here(loaded, **options)
    with loaded.error_locations():
        loaded.config.check_importable()
        threads = _threads_of(loaded.config) if resume else None
        request = EngineRequest(loaded.config, threads, options["trust_code"], progress)
        started = ENGINES[section.source].start(request)
    if started.engine is None:
        return infer_here(loaded, statements=started.statements, **options)
    with closing(started.engine):
        dispatcher = Dispatcher(started, section)
        return infer_here(
            LoadedConfig(started.config, loaded.locations),
            run_pass=dispatcher.run_pass,
            statements=started.statements,
            **options,
        )


def explain(loaded: LoadedConfig, *, trust_code: bool = False) -> tuple[Statement, ...]:
    """Open the model and the data of a config; state how they and the engine are interpreted.

    Raises:
        ConfigError: one of them cannot be opened, or no cluster answers.
    """
    statements = explain_run(loaded, trust_code=trust_code)
    section = loaded.config.engine
    if section is None:
        return statements
    with loaded.error_locations():
        return (*statements, Statement(topic="engine", text=ENGINES[section.source].offer(section)))


def _threads_of(config: RunConfig) -> int | None:
    """Return the threads of the run to resume, which its predictions may depend on."""
    path = config.output.path / journal.FILE_NAME
    with suppress(GradrunError):
        threads = journal.read(path).header.config["run"].get("threads")
        return threads if isinstance(threads, int) else None
    return None
