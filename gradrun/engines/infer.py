"""`gradrun.infer`: run in this process, or spread over the workers of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, overload

from gradrun.config.load import ConfigSource, LoadedConfig, is_trusted, resolve_config
from gradrun.config.objects import is_object
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, GradrunError
from gradrun.core.grad_mode import GradMode
from gradrun.core.progress import ProgressCallback
from gradrun.core.remote import RemotePath
from gradrun.engines import processes, ray
from gradrun.engines.dispatch import run_pass
from gradrun.engines.engine import EngineRequest, StartedEngine
from gradrun.engines.objects import (
    Inference,
    collect,
    format_is_set,
    in_lines,
    is_consumed,
    open_config,
    restored,
    without_folder,
)
from gradrun.inference.infer import infer as infer_here
from gradrun.inference.interpretation import Explanation
from gradrun.inference.interpretation import explain as explain_run
from gradrun.inference.run_plan import RunOptions
from gradrun.output import journal
from gradrun.output.remote_folder import RemoteFolder
from gradrun.report.notebook import progress_display
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


@overload
def infer(
    config: ConfigSource,
    *,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    mode: GradMode | str | None = None,
    batch_size: int | None = None,
    output: Mapping[str, Any] | str | Path | None = None,
    trust_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    **overrides: Any,
) -> InferResult: ...


@overload
def infer(
    config: ConfigSource | None = None,
    *,
    model: Any = None,
    data: Any = None,
    labels: Any = None,
    mode: GradMode | str | None = None,
    batch_size: int | None = None,
    output: Mapping[str, Any] | str | Path | None = None,
    trust_code: bool = False,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    **overrides: Any,
) -> Inference: ...


def infer(
    config: ConfigSource | None = None,
    *,
    model: Any = None,
    data: Any = None,
    labels: Any = None,
    mode: GradMode | str | None = None,
    batch_size: int | None = None,
    output: Mapping[str, Any] | str | Path | None = None,
    trust_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    **overrides: Any,
) -> InferResult | Inference:
    """Run all data through the model and write or return the predictions.

    A config writes the predictions below its `output.path`. With a model or data in memory, or
    without a config, they are returned as arrays, and files are written only if `output` is set.

    Args:
        config: the path of a YAML file, its content as a mapping, or a loaded config.
        model: a torch.nn.Module, or the section `model` or changes to it.
        data: an array or tensor [samples, ...], a mapping of them by input name or a tuple of
            several, a pandas DataFrame, a list of texts or of image or audio files, or the section
            `data` or changes to it.
        labels: the true class or value of each sample of arrays in memory, for `metrics`.
        mode: sets run.mode.
        batch_size: sets data.batch_size.
        output: sets output.path, or the section `output` or changes to it.
        trust_code: allow the config to run code, such as a `python` model.
        overwrite: replace an earlier run in the folder.
        resume: continue an unfinished run in the folder, if any.
        progress: called at the start of each stage, such as loading the model; while predicting,
            a few times per second with the number of predicted samples. In a notebook, the default
            shows it.
        overrides: sections or keys to change: `run={"mode": "grad"}`, `**{"run.mode": "grad"}`.

    Returns:
        For a config, the measurements, with times in seconds and memory in bytes; also saved as
        result.json. If the run is already finished, its result, with the metrics of this config.
        For a model or data in memory, an Inference: the predictions by output name, and the result.

    Raises:
        ConfigError: the config, model or data are invalid, or the run to resume is a different
            one; nothing was written.
        RunFailed: the run ended early. Committed predictions stay; `result` has the measurements.
        Interrupted: as RunFailed, after Ctrl-C or SIGTERM.
    """
    overrides |= {"run.mode": str(mode)} if mode else {}
    overrides |= {"data.batch_size": batch_size} if batch_size is not None else {}
    if output is not None:
        overrides |= {"output": output} if isinstance(output, Mapping) else {"output.path": output}
    with progress_display(progress) as shown:
        options = RunOptions(is_trusted(trust_code), overwrite, resume, shown)
        if config is None or is_object(model) or is_object(data):
            return _infer_objects(config, model, data, labels, overrides, options)
        overrides |= {"model": model} if model is not None else {}
        overrides |= {"data": data} if data is not None else {}
        return infer_config(resolve_config(config, overrides), options)


def _infer_objects(
    config: ConfigSource | None,
    model: Any,
    data: Any,
    labels: Any,
    overrides: Mapping[str, Any],
    options: RunOptions,
) -> Inference:
    """Run a model or data in memory."""
    if options.resume:
        raise ConfigError("a run with a model or data in memory cannot be resumed")
    with TemporaryDirectory(prefix="gradrun-") as name:
        folder = Path(name)
        as_files = any(key.partition(".")[0] == "engine" for key in overrides)
        loaded, trusted = open_config(
            config, model, data, labels, overrides, folder, as_files=as_files
        )
        options = replace(options, trust_code=options.trust_code or trusted)
        if isinstance(loaded.config.output.path, RemotePath):
            raise ConfigError(
                "a model or data in memory need a local output folder; to write to a store, name "
                "both in a config"
            )
        with restored(model), without_folder(folder):
            try:
                result = infer_config(loaded, options)
            except ConfigError as error:
                fixed = format_is_set(loaded.config) or is_consumed(data)
                if error.key != "output.format" or fixed:
                    raise
                # The first outputs are not rows of one shape, which only some formats hold.
                loaded = LoadedConfig(in_lines(loaded.config))
                result = infer_config(loaded, options)
        return collect(result, loaded.config, data, folder)


def infer_config(loaded: LoadedConfig, options: RunOptions) -> InferResult:
    """Run a config in this process or by its engine, as `infer` does."""
    path, section = loaded.config.output.path, loaded.config.engine
    if isinstance(path, RemotePath):
        overwrite, resume = options.overwrite, options.resume
        with loaded.error_locations():
            inputs = loaded.config.input_files() if overwrite else ()
            store = RemoteFolder(path, overwrite=overwrite, resume=resume, inputs=inputs)
        with store.mirrored():
            local = loaded.config.replace({"output.path": store.local})
            return store.save(infer_config(LoadedConfig(local, loaded.locations), options))
    if section is None:
        return infer_here(loaded, options)
    with loaded.error_locations():
        loaded.config.check_importable()
        threads = _threads_of(loaded.config) if options.resume else None
        request = EngineRequest(loaded.config, threads, options.trust_code, options.progress)
        started = ENGINES[section.source].start(request)
    statements = [Statement(topic="engine", text=started.text)]
    if started.engine is None:
        return infer_here(loaded, options, statements=statements)
    with closing(started.engine):
        resolved = LoadedConfig(started.config, loaded.locations)
        return infer_here(resolved, options, partial(run_pass, started, section), statements)


def explain(loaded: LoadedConfig, *, trust_code: bool = False) -> Explanation:
    """Open the model and the data of a config; state how they and the engine are interpreted.

    Raises:
        ConfigError: one of them cannot be opened, or no cluster answers.
    """
    explained = explain_run(loaded, trust_code=trust_code)
    section = loaded.config.engine
    if section is None:
        return explained
    with loaded.error_locations():
        offer = Statement(topic="engine", text=ENGINES[section.source].offer(section))
    return explained._replace(statements=(*explained.statements, offer))


def _threads_of(config: RunConfig) -> int | None:
    """Return the threads of the run to resume, which its predictions may depend on."""
    path = config.output.path / journal.FILE_NAME
    with suppress(GradrunError):
        threads = journal.read(path).header.config["run"].get("threads")
        return threads if isinstance(threads, int) else None
    return None
