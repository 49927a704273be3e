"""`gradrun.compare`: variants of one config measured side by side and saved.

Knows the order of the steps; needs no torch in its own process, since workers have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gradrun.comparison.protocol import Variant
from gradrun.comparison.session import Session, sentence
from gradrun.config.load import ConfigSource, is_trusted, load_config, resolve_config
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, Interrupted, RunFailed
from gradrun.core.grad_mode import GradMode
from gradrun.core.progress import ProgressCallback, ignore
from gradrun.core.suggest import suggest
from gradrun.output.run_folder import RunFolder
from gradrun.results.result import CompareResult, Comparison, RunInfo


class Comparisons(list[Comparison]):
    """The comparisons, each variant against the first; `result` holds everything measured."""

    result: CompareResult


def compare(
    config: ConfigSource,
    modes: Sequence[GradMode | str] | str = tuple(GradMode),
    *,
    over: tuple[str, Sequence[Any]] | None = None,
    trust_code: bool = False,
    progress: ProgressCallback = ignore,
    **overrides: Any,
) -> Comparisons:
    """Measure gradient modes, or the values of another key, side by side.

    Args:
        config: the path of a YAML file, its content as a mapping, or a loaded config.
        modes: the modes to compare; the first is the baseline, and one named twice shows the noise.
        over: compare along another key instead: `("run.threads", [1, 2])`.
        trust_code: let a `python` model run the code that the config names.
        progress: called before each process.
        overrides: as for `infer`.

    Returns:
        One Comparison for each variant but the first; above 1 is faster. The whole result is in
        `.result`, and in result.json in the folder beside output.path that ends in -compare.

    Raises:
        ConfigError: the config, model or data are wrong.
        RunFailed: a variant could not be run; the error's `result` holds the others.
        Interrupted: Ctrl-C; the error's `result` holds what had been measured.
    """
    loaded = resolve_config(config, overrides)
    whole = loaded.config
    target = whole.output.path.with_name(f"{whole.output.path.name}-compare")
    listed = modes.split(",") if isinstance(modes, str) else modes
    variants = _variants(whole, over or ("run.mode", listed), target)
    folder = RunFolder(target, overwrite=True)  # what is wrong with it is told before, not after
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    session = Session(variants, whole, trust_code=is_trusted(trust_code))
    interrupted = False
    with loaded.error_locations():
        try:
            found = session.run(progress)
        except KeyboardInterrupt:
            found = session.finalize()
            interrupted = True
    failures = tuple(sentence(failure) for failure in found.failures)
    if found.environment is None:
        if interrupted and not failures:
            raise Interrupted
        raise RunFailed("\n".join(failures) or "no process could measure")
    result = CompareResult(
        gradrun=found.environment.gradrun,
        started_at=started_at,
        info=RunInfo.from_config(variants[0].config),
        config=variants[0].config,
        environment=found.environment,
        measurements=tuple(found.measurements),
        comparisons=tuple(found.comparisons),
        equivalence=tuple(found.equivalence),
        failures=failures,
        warnings=tuple(found.warnings),
    )
    with folder.locked():
        folder.save(result)
    if failures:
        raise RunFailed("\n".join(failures), result=result)
    if interrupted:
        raise Interrupted(result=result)
    answer = Comparisons(result.comparisons)
    answer.result = result
    return answer


def _variants(config: RunConfig, axis: tuple[str, Sequence[Any]], target: Path) -> list[Variant]:
    """The config once for each value of a key, under names that tell them apart."""
    key, values = axis
    if key.partition(".")[0] in {"output", "measure"}:
        raise ConfigError(f"{key} changes nothing that is measured: compare along another key")
    if key == "run.mode":
        for value in values:
            if value not in list(GradMode):
                raise ConfigError(f"there is no mode {value!r}; {suggest(str(value), GradMode)}")
    if len(values) < 2:
        raise ConfigError(f"a comparison takes two values of {key} or more")
    base = config.replace({"output.path": target}).model_dump(mode="json")
    variants: list[Variant] = []
    for value in values:
        # A text is read as YAML, as on the command line: "1" is a number.
        change = [f"{key}={value}"] if isinstance(value, str) else {key: value}
        name = str(value) if key == "run.mode" else f"{key}={value}"
        while any(known.name == name for known in variants):
            name += " again"
        changed = load_config(base, change, source_name="--over").config.model_dump(mode="json")
        variants.append(Variant(name=name, config=changed))
    return variants
