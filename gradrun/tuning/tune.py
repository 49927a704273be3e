"""`gradrun.tune`: search the fastest setting of a config, confirm it, and write it as a config."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from gradrun.comparison.lanes import Deviation, Lane, open_lane
from gradrun.comparison.session import Session, Variant
from gradrun.config.load import ConfigSource, LoadedConfig, is_trusted, load_config, resolve_config
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, GradrunError, Interrupted
from gradrun.core.progress import ProgressCallback, ignore
from gradrun.core.suggest import suggest
from gradrun.inference.signals import GracefulShutdown
from gradrun.output.run_folder import RunFolder
from gradrun.results.ratios import compare_measured, metric_changes
from gradrun.results.result import (
    Comparison,
    Equivalence,
    Metric,
    RunInfo,
    TuneResult,
    TuneStatus,
)
from gradrun.results.trials import TunedKey, describe_value
from gradrun.tuning.confirm import BASELINE, TUNED, Confirmation, confirm
from gradrun.tuning.constraints import Constraints
from gradrun.tuning.facts import apply, value_of
from gradrun.tuning.journal import TuneJournal
from gradrun.tuning.rewrite import write_tuned
from gradrun.tuning.search import MIN_GAIN, Candidate, Gate, Search

_MACHINE = "tune.machine"


def tune(
    config: ConfigSource,
    file: str | Path | None = None,
    *,
    trust_code: bool = False,
    resume: bool = False,
    progress: ProgressCallback = ignore,
    now: Callable[[], float] = time.monotonic,
    **overrides: Any,
) -> TuneResult:
    """Find the fastest setting of a config within its section `tune`, and confirm it.

    Each setting runs in processes of its own. Only a setting that is faster in fresh processes on
    other samples, within all limits, is written.

    Args:
        config: the path of a YAML file, its content as a mapping, or a loaded config.
        file: the tuned config to write; default: the name of the config with -tuned. A config
            that does not come from a file is written without comments, if `file` is given.
        trust_code: as for `infer`.
        resume: continue an earlier run that was interrupted or had too small a budget: settings
            that failed or gained nothing in it are not tried again.
        progress: called before each setting.
        now: the clock of the budget.
        overrides: config values to change, as for `infer`: `tune={"within": {"max_rel": 0.01}}`.

    Returns:
        The settings that were tried and the confirmed one, also saved as result.json in the folder
        next to output.path whose name ends in -tune. `status` is "faster", "nothing_helps" or
        "inconclusive".

    Raises:
        ConfigError: the config, model or data is invalid, or differs from that of the run to
            resume.
        RunFailed: the config fails without changes.
        Interrupted: Ctrl-C or SIGTERM. The error has the result so far.
    """
    loaded = resolve_config(config, overrides)
    base, trusted = loaded.config, is_trusted(trust_code)
    source = Path(loaded.locations.name) if loaded.locations else None
    source = source if source and source.is_file() else None
    target = _target(source, file)
    folder = RunFolder(base.output.path.with_name(f"{base.output.path.name}-tune"), overwrite=True)
    _check_metric(base)
    _check_kept(base)

    def open_variant(variant: RunConfig, timeout: float) -> Lane:
        return open_lane(variant, trust_code=trusted, timeout=timeout)

    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    constraints = Constraints(base.tune, base.measure)
    journal = TuneJournal(folder.path, base, resume=resume)
    search = Search(
        base, constraints, open_variant, now=now, progress=progress,
        gate=_metric_gate(base, trusted), known=journal.known, save=journal.write,
    )  # fmt: skip
    with GracefulShutdown():
        with loaded.error_locations():
            try:
                result = _search(search, started_at, folder.path)
            except KeyboardInterrupt:  # before there was anything to keep
                raise Interrupted from None
        if result.unconfirmed and target:
            target = target.with_name(f"{target.stem}-unconfirmed{target.suffix}")
        with folder.locked():
            folder.save(result)
            if result.keys and target:  # it may fail, or be on a full disk
                result = _write(result, loaded, source, target)
                folder.save(result)
        if search.interrupted:
            raise Interrupted(result=result)
    return result


def _search(search: Search, started_at: str, folder: Path) -> TuneResult:
    """Search, then confirm the best setting, and the runner-up if that fails."""
    best = search.run()
    tried: list[Confirmation] = []
    try:
        if best is not search.baseline and not search.interrupted:
            tried.append(confirm(search, best))
            if tried[0].refused and (second := _runner_up(search, best)):
                tried.append(confirm(search, second, strict=True))
    except KeyboardInterrupt:
        search.interrupted = True
    accepted = next((c for c in tried if c.accepted), None)
    return _result(search, tried, accepted, started_at, folder)


def _runner_up(search: Search, best: Candidate) -> Candidate | None:
    """Return the next best setting that passed the gates."""
    ranked = sorted(
        (
            (trial.ratio, number)
            for number, trial in enumerate(search.trials)
            if trial.outcome in {"faster", "no_gain"} and trial.ratio and trial.low
            # A setting with all changes of the best would be refused for the same reason.
            if trial.ratio > 1 + MIN_GAIN and not best.changes.items() <= trial.changes.items()
        ),
        reverse=True,
    )
    if not ranked or search.left < -search.constraints.tune.budget / 10:
        return None
    number = ranked[0][1]
    changes = search.trials[number].changes
    start = search.trials[number].start_seconds or best.start
    config = apply(search.base, changes)
    return Candidate(changes, config, best.lane, start, best.deviation, None, number)


def _result(
    search: Search,
    tried: list[Confirmation],
    accepted: Confirmation | None,
    started_at: str,
    folder: Path,
) -> TuneResult:
    shown = accepted or next((c for c in tried if c.undecided), tried[0] if tried else None)
    status: TuneStatus = "faster" if accepted else "nothing_helps"
    ended = search.out_of_time or search.interrupted
    if not accepted and (ended or any(c.undecided for c in tried)):
        status = "inconclusive"
    unconfirmed = _unconfirmed(search, tried) if status == "inconclusive" else None
    measurements = tuple(shown.measurements) if shown else ()
    dumped = search.base.model_dump(mode="json")
    comparisons = compare_measured(measurements, search.constraints.measure.precision)
    found = shown.deviation if shown else None
    tune_section = search.constraints.tune
    environment = search.baseline.lane.ready.environment
    detectable = _detectable(search, comparisons)
    for confirmed in tried:
        if confirmed.refused:
            place = confirmed.candidate.trial
            search.trials[place] = search.trials[place].replace(
                outcome="no_gain", reason=confirmed.refused
            )
    return TuneResult(
        gradrun=environment.gradrun,
        started_at=started_at,
        info=RunInfo.from_config(dumped | {"output": dumped["output"] | {"path": str(folder)}}),
        config=dumped,
        environment=environment,
        measurements=measurements,
        comparisons=tuple(comparisons),
        equivalence=(
            Equivalence(
                baseline=BASELINE,
                candidate=TUNED,
                bitwise=found.bitwise,
                max_abs_diff=found.max_abs,
                equal=not search.constraints.violation(found),
            ),
        )
        if found
        else (),
        status=status,
        trials=tuple(search.trials),
        skipped=tuple(f"{name}: {reason}" for name, reason in search.skipped.items()),
        keys=tuple(_tuned_keys(search, accepted.candidate if accepted else unconfirmed, found)),
        unconfirmed=search.trials[unconfirmed.trial] if unconfirmed else None,
        refused=tuple(c.refused or c.undecided for c in tried if not c.accepted),
        tolerance=search.constraints.describe(),
        checked=found.samples if found else 0,
        max_rel=found.max_rel if found else None,
        cosine=found.cosine if found else None,
        steady=tune_section.steady,
        job_samples=tune_section.samples or search.facts.samples,
        start_seconds=search.baseline.start,
        tuned_start_cold=accepted.candidate.start if accepted else None,
        tuned_start=median(two for _, two in accepted.starts) if accepted else None,
        break_even=accepted.break_even if accepted else None,
        detectable=detectable,
        budget=tune_section.budget,
        seconds=search.now() - search.began,
        baseline_over=search.baseline_over,
        out_of_time=search.out_of_time,
        interrupted=search.interrupted,
        phases=search.spent,
    )


def _detectable(search: Search, comparisons: Sequence[Comparison]) -> float:
    """Return the least gain that the intervals of all measured settings exclude; 0 without any."""
    missed = [
        trial.high - 1 for trial in search.trials if trial.outcome == "no_gain" and trial.high
    ]
    missed += [(c.high / c.low - 1) / 2 for c in comparisons if c.low > 0]
    return max(search.constraints.measure.precision, MIN_GAIN, *missed) if missed else 0.0


def _unconfirmed(search: Search, tried: Sequence[Confirmation]) -> Candidate | None:
    """Return the best setting that the search measured, unless its confirmation refused it."""
    best = search.leader
    refused = any(c.refused and c.candidate.changes == best.changes for c in tried)
    return None if best is search.baseline or refused else best


def _tuned_keys(
    search: Search, chosen: Candidate | None, found: Deviation | None
) -> Iterator[TunedKey]:
    if chosen is None:
        return
    found = found or chosen.deviation
    # A runner-up has other keys; the gains are those of the best.
    gains = search.gains if chosen.changes == search.leader.changes else {}
    for key, value in chosen.changes.items():
        gain = gains.get(key)
        yield TunedKey(
            key=key,
            before=value_of(search.base, key),
            value=value,
            gain=gain.value if gain else None,
            low=gain.low if gain and gain.low > 0 else None,
            high=gain.high if gain and gain.low > 0 else None,
            max_rel=found.max_rel,
        )


# --- the tuned file ----------------------------------------------------------------------------


def _target(source: Path | None, file: str | Path | None) -> Path | None:
    """Return the file to write; None for a config in code without a file.

    Raises:
        ConfigError: it would replace the config or a file that tune did not write, or cannot be
            written.
    """
    if file is not None:
        target = Path(file).absolute()
    elif source:
        target = source.with_name(f"{source.stem}-tuned{source.suffix}")
    else:
        return None
    if source and target.resolve() == source.resolve():
        raise ConfigError(f"{file} is the config itself; choose another file for the tuned one")
    if not target.parent.is_dir():
        raise ConfigError(f"{file}: folder {target.parent} does not exist")
    _check_replaceable(target)
    return target


def _check_replaceable(target: Path) -> None:
    """Check before the search that a file can be written, and replaces only a tuned config.

    Raises:
        ConfigError: it cannot, or would replace another file.
    """
    if target.exists() and not target.is_file():
        raise ConfigError(f"{target} is not a regular file; choose another file")
    if not os.access(target.parent, os.W_OK):
        raise ConfigError(f"folder {target.parent} is not writable; choose another file")
    if not target.exists():
        return
    with target.open("rb") as file:
        if not file.readline(200).startswith(b"# gradrun tune "):
            raise ConfigError(
                f"{target} exists and was not written by gradrun tune; move it, or choose another "
                "file"
            )


def _write(
    result: TuneResult, loaded: LoadedConfig, source: Path | None, target: Path
) -> TuneResult:
    """Write the tuned config and return the result with its path."""
    from gradrun.core.files import replace_file

    machine = {"torch": result.environment.torch, "cpu": result.environment.cpu}
    changes = {key.key: key.value for key in result.keys} | {_MACHINE: machine}
    expected = original = apply(loaded.config, changes)
    if source:  # with the changes of --set, but not those of the section tune
        try:
            original = load_config(source).config
        except ConfigError:  # it needs those changes
            source = None
    if source:
        changes = dict(_overridden(original, loaded.config)) | changes
        expected = apply(original, changes)
    header = [result.headline(source.name if source else "the config")]
    comments = {key.key: _comment(key) for key in result.keys}
    if source:
        text = write_tuned(source, target, original, expected, changes, comments, header)
    else:
        import yaml

        dumped = expected.model_dump(mode="json", exclude_defaults=True)
        text = f"# {header[0]}\n" + yaml.safe_dump(dumped, sort_keys=False)
    try:
        replace_file(target, text)
    except OSError as error:
        text = f"{target} cannot be written: {error.strerror}"
        raise GradrunError(text, result=result) from error
    return result.replace(file=str(target))


def _overridden(original: RunConfig, used: RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of sections that --set changed, with their values."""
    before, now = (config.model_dump(mode="json", exclude={"tune"}) for config in (original, used))
    for section, values in now.items():
        old = before[section]
        if isinstance(values, dict) and isinstance(old, dict):
            yield from (
                (f"{section}.{key}", value)
                for key, value in values.items()
                if old.get(key) != value
            )
        elif values != old:
            yield section, values


def _comment(key: TunedKey) -> str:
    text = f"tune: {describe_value(key.before)} before"
    if key.gain:
        text += f"; {key.gain:.2f} x as fast with it"
        if key.low and key.high:
            text += f" ({key.low:.2f} to {key.high:.2f})"
    return text


# --- metrics -----------------------------------------------------------------------------------


def _check_metric(config: RunConfig) -> None:
    within = config.tune.within
    if within is None or within.metric is None:
        return
    names = [metric.title for metric in config.metrics]
    if within.metric not in names:
        listed = f"the config has {', '.join(names)}" if names else "the config has no metrics"
        raise ConfigError(f"unknown metric {within.metric!r}; {listed}", "tune.within.metric")


def _check_kept(config: RunConfig) -> None:
    dumped = config.model_dump(mode="json")
    for key in config.tune.keep:
        section, _, name = key.partition(".")
        keys = dumped.get(section)
        if section not in dumped or (name and isinstance(keys, dict) and name not in keys):
            known = [f"{section}.{k}" for k in keys] if isinstance(keys, dict) else [*dumped]
            raise ConfigError(f"unknown key {key!r}; {suggest(key, known)}", "tune.keep")


def _metric_gate(base: RunConfig, trust_code: bool) -> Gate | None:
    """Return a check that the metric of the tolerance does not become worse over all data."""
    within = base.tune.within
    if within is None or within.metric is None:
        return None
    section = next(metric for metric in base.metrics if metric.title == within.metric)
    known: dict[str, tuple[Metric, ...]] = {}

    def gate(config: RunConfig) -> str:
        if not known:
            try:
                known["base"] = _metrics(base, trust_code)
            except GradrunError as error:  # not a failure of the setting
                raise ConfigError(str(error), "tune.within.metric") from error
        changes = metric_changes(BASELINE, known["base"], TUNED, _metrics(config, trust_code))
        change = next(c for c in changes if c.name == within.metric)
        drop = change.before - change.value
        drop = -drop if section.lower_is_better else drop
        if drop <= within.drop + 1e-12:
            return ""
        return f"{within.metric} is {change.value:.4f} instead of {change.before:.4f}"

    return gate


def _metrics(config: RunConfig, trust_code: bool) -> tuple[Metric, ...]:
    """Run all data in a worker process and return the metrics."""
    session = Session([Variant(TUNED, config)], config, trust_code=trust_code)
    with TemporaryDirectory(prefix="gradrun-") as folder:
        return session.predict(Path(folder), {}).metrics
