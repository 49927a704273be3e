"""`gradrun.compare`: measure variants of one config against each other and save the result."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gradrun.comparison.session import RoundSession, Session, Variant, need_own_processes
from gradrun.config.load import (
    ConfigSource,
    LoadedConfig,
    is_trusted,
    load_config,
    resolve_config,
)
from gradrun.config.objects import is_object
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, Interrupted, RunFailed
from gradrun.core.grad_mode import GradMode
from gradrun.core.progress import Progress, ProgressCallback
from gradrun.core.suggest import suggest
from gradrun.output.run_folder import RunFolder
from gradrun.report.notebook import progress_display
from gradrun.results.ratios import metric_changes
from gradrun.results.result import CompareResult, Comparison, InferResult, MetricChange, RunInfo


class Comparisons(list[Comparison]):
    """Comparisons of each variant with the first; `result` is the complete result."""

    def __init__(self, result: CompareResult) -> None:
        super().__init__(result.comparisons)
        self.result = result

    def _repr_html_(self) -> str:
        return self.result._repr_html_()


def compare(
    config: ConfigSource | None = None,
    modes: Sequence[GradMode | str] | str = tuple(GradMode),
    *,
    model: Any = None,
    data: Any = None,
    labels: Any = None,
    batch_size: int | None = None,
    over: tuple[str, Sequence[Any]] | None = None,
    against: ConfigSource | None = None,
    trust_code: bool = False,
    progress: ProgressCallback | None = None,
    **overrides: Any,
) -> Comparisons:
    """Measure gradient modes, or values of another config key, against each other.

    Args:
        config: the path of a YAML file, its content as a mapping, or a loaded config.
        modes: the modes to compare; the first is the baseline. A mode listed twice gives an A/A
            comparison, which shows the noise of the machine.
        model: a torch.nn.Module, or the section `model` or changes to it.
        data: arrays in memory as for `infer`, or the section `data` or changes to it.
        labels: the true class or value of each sample of arrays in memory, for `metrics`.
        batch_size: sets data.batch_size.
        over: compare values of another key instead, such as `("run.threads", [1, 2])`.
        against: compare with another config instead, which is the baseline. Both run in processes
            of their own, because they may differ in settings of a process.
        trust_code: allow a `python` model to run the code that the config names.
        progress: called before each process. In a notebook, the default shows it.
        overrides: config values to change, as for `infer`.

    Returns:
        One Comparison for each variant but the first; a ratio above 1 means faster. `.result` has
        the complete result, with the metrics of each variant over all data if the config names
        metrics. It is also saved as result.json in the folder next to output.path
        whose name ends in -compare, unless model or data are in memory and no output.path is set.

    Raises:
        ConfigError: the config, model or data is invalid.
        RunFailed: a variant failed; the error's `result` has the other variants.
        Interrupted: Ctrl-C; the error's `result` has the data measured so far.
    """
    overrides |= {"data.batch_size": batch_size} if batch_size is not None else {}
    with progress_display(progress) as shown, TemporaryDirectory(prefix="gradrun-") as folder:
        if config is not None and not (is_object(model) or is_object(data)):
            overrides |= {"model": model} if model is not None else {}
            overrides |= {"data": data} if data is not None else {}
            loaded = resolve_config(config, overrides)
        else:
            from gradrun.engines.objects import open_config  # needs torch in this process

            loaded, trusted = open_config(
                config, model, data, labels, overrides, Path(folder), as_files=True
            )
            trust_code = trust_code or trusted
        return _compare(loaded, modes, over, against, is_trusted(trust_code), shown)


def _compare(
    loaded: LoadedConfig,
    modes: Sequence[GradMode | str] | str,
    over: tuple[str, Sequence[Any]] | None,
    against: ConfigSource | None,
    trust_code: bool,
    progress: ProgressCallback,
) -> Comparisons:
    whole = loaded.config
    target = whole.output.path.with_name(f"{whole.output.path.name}-compare")
    listed = modes.split(",") if isinstance(modes, str) else modes
    axis = over or ("run.mode", listed)
    if against is None:
        variants = make_variants(whole, axis, target)
    else:
        variants = _two_configs(loaded, resolve_config(against), target)
    folder = RunFolder(target, overwrite=True)  # raises before anything runs
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    interrupted = False
    with loaded.error_locations():
        own = against is not None
        session = _session(axis[0], variants, whole, trust_code, own_processes=own)
        try:
            data = session.run(progress)
        except KeyboardInterrupt:
            data = session.finalize(interrupted=True)
            interrupted = True
    failures = tuple(failure.message for failure in data.failures)
    changes: tuple[MetricChange, ...] = ()
    if whole.metrics and not (failures or interrupted):
        changes = _metric_changes(variants, target, trust_code, progress)
    if data.environment is None:
        if interrupted and not failures:
            raise Interrupted
        raise RunFailed("\n".join(failures) or "no process returned a measurement")
    baseline = variants[0].config.model_dump(mode="json")
    result = CompareResult(
        gradrun=data.environment.gradrun,
        started_at=started_at,
        info=RunInfo.from_config(baseline),
        config=baseline,
        environment=data.environment,
        measurements=tuple(data.measurements),
        comparisons=tuple(data.comparisons),
        equivalence=tuple(data.equivalence),
        interpretation=data.interpretation,
        metric_changes=changes,
        failures=failures,
        warnings=tuple(data.warnings),
    )
    with folder.locked():
        folder.save(result)
    if failures:
        raise RunFailed("\n".join(failures), result=result)
    if interrupted:
        raise Interrupted(result=result)
    return Comparisons(result)


def _metric_changes(
    variants: Sequence[Variant], target: Path, trust_code: bool, progress: ProgressCallback
) -> tuple[MetricChange, ...]:
    """Compute the metrics of each variant over all data, each in a worker process."""
    results: list[InferResult] = []
    target.parent.mkdir(parents=True, exist_ok=True)
    for number, variant in enumerate(variants):
        progress(Progress("computing metrics", number, len(variants)))
        session = Session([variant], variant.config, trust_code=trust_code)
        with TemporaryDirectory(prefix=f"{target.name}-", dir=target.parent) as folder:
            results.append(session.predict(Path(folder), {}))
    baseline, *others = results
    return tuple(
        change
        for variant, other in zip(variants[1:], others, strict=True)
        for change in metric_changes(
            variants[0].name, baseline.metrics, variant.name, other.metrics
        )
    )


def _session(
    key: str, variants: list[Variant], config: RunConfig, trust_code: bool, *, own_processes: bool
) -> Session | RoundSession:
    """Return the session that can measure values of a config key."""
    # These change a run, and not the forward pass of a batch.
    whole = key.partition(".")[0] == "engine" or key == "run.in_flight"
    if own_processes or (not whole and need_own_processes(variants)):
        from gradrun.comparison.turns import turn_session

        return turn_session(variants, config, trust_code=trust_code)
    if not whole:
        return Session(variants, config, trust_code=trust_code)
    from gradrun.comparison.whole_runs import WholeRuns  # needs torch in this process

    return WholeRuns(variants, config, trust_code=trust_code)


def _two_configs(loaded: LoadedConfig, against: LoadedConfig, target: Path) -> list[Variant]:
    """Return the config that is compared with, under its file name, and the config."""
    variants: list[Variant] = []
    for one, default in ((against, "baseline"), (loaded, "config")):
        name = Path(one.locations.name).name if one.locations else default
        if any(known.name == name for known in variants):
            path = str(one.locations.name) if one.locations else name
            name = f"{name} again" if path == name else path
        variants.append(Variant(name, one.config.replace({"output.path": target})))
    return variants


def make_variants(
    config: RunConfig, axis: tuple[str, Sequence[Any]], target: Path
) -> list[Variant]:
    """Return the config with each value of a key, under unique names."""
    key, values = axis
    if key.partition(".")[0] in {"output", "measure"}:
        raise ConfigError(f"{key} does not affect the measurement; compare values of another key")
    if key == "run.mode":
        for value in values:
            if value not in list(GradMode):
                raise ConfigError(f"unknown mode {value!r}; {suggest(str(value), GradMode)}")
    if len(values) < 2:
        raise ConfigError(f"a comparison needs at least two values of {key}")
    base = config.replace({"output.path": target}).model_dump(mode="json")
    variants: list[Variant] = []
    for value in values:
        # A string is parsed as YAML, as on the command line: "1" is a number.
        change = [f"{key}={value}"] if isinstance(value, str) else {key: value}
        name = str(value) if key == "run.mode" else f"{key}={value}"
        while any(known.name == name for known in variants):
            name += " again"
        variants.append(Variant(name, load_config(base, change, source_name="--over").config))
    return variants
