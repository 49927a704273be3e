"""`gradrun.check`: a config's limits and baselines held against what a run gives and costs.

Knows the order of the steps: predict everything, look at the modes, time what a limit asks for; how
a figure is judged stands in checks.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gradrun.checks import evaluate, golden
from gradrun.checks.git_worktree import git_worktree
from gradrun.comparison.protocol import Failure, Variant
from gradrun.comparison.session import Session, SessionData, sentence
from gradrun.config.load import ConfigSource, LoadedConfig, is_trusted, load_config, resolve_config
from gradrun.config.run import MetricSection
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError, GradrunError, ModelInputError, RunFailed
from gradrun.core.grad_mode import GradMode
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.core.version import __version__
from gradrun.inference.device import resolve_device
from gradrun.inference.environment import current_environment
from gradrun.inference.infer import infer
from gradrun.inference.signals import GracefulShutdown
from gradrun.output.run_folder import RunFolder, locked_check_folder
from gradrun.results.ratios import paired
from gradrun.results.result import (
    CheckResult,
    InferResult,
    Measurement,
    Outcome,
    RunInfo,
    RunResult,
)

_OF_A_PROCESS = ("process_peak", "device_allocated", "device_reserved")


@dataclass
class Reference:
    """What a model is compared with: an earlier result, or another config that runs beside it."""

    name: str
    result: RunResult | None = None
    config: RunConfig | None = None
    moved: tuple[str, str] | None = None
    """Of a revision: the repository, and the folder that stands in its place."""

    @property
    def variant(self) -> str:
        """What it is called among the variants of a session."""
        return f"against {self.name}"


def check(
    config: ConfigSource,
    *,
    baseline: str | Path | None = None,
    against: str | Path | None = None,
    save_baseline: str | Path | None = None,
    update_expected: bool = False,
    trust_code: bool = False,
    sets: Sequence[str] = (),
    progress: ProgressCallback = ignore,
    **overrides: Any,
) -> CheckResult:
    """Hold a model against the `check` section of its config.

    Args:
        config: the path of a YAML file, its content as a mapping, or a loaded config.
        baseline: an earlier result with which regressions are found.
        against: another config, or a git revision of this one, that is measured side by side.
        save_baseline: where to write the result as a baseline for later.
        update_expected: write the golden outputs instead of comparing with them.
        trust_code: let a `python` model run the code that the config names, on both sides.
        sets: changes as on the command line, "key.path=value", on both sides; or overrides.
        progress: called several times in each stage of the check.
        overrides: as for `infer`.

    Returns:
        A result whose `outcomes` and `status` say what came of it. It is in result.json too, in the
        folder beside output.path that ends in -check, with the predictions.

    Raises:
        ConfigError: the config, the data or the baseline are wrong.
        RunFailed: the other side cannot run.
    """
    if baseline and against:
        raise ConfigError("--baseline and --against both name what to compare with: choose one")
    if sets and overrides:
        raise TypeError("changes are told as sets or as overrides, not both")
    changes = sets or overrides
    whole = resolve_config(config, changes)
    subject = _subject(whole.config)
    if baseline and not Path(baseline).exists():
        raise ConfigError(f"--baseline {baseline}: there is none; --save-baseline writes it")
    earlier = RunResult.load(baseline) if baseline else None
    with whole.error_locations():
        _refuse_early(subject, earlier, update_expected)
        if not (evaluate.something(subject.check) or earlier or against or save_baseline):
            text = "nothing is asked: smoke is off, and there is no limit and nothing to compare"
            raise ConfigError(f"{text} with; --baseline or --against names one", "check.smoke")
    with (
        GracefulShutdown(),  # a SIGTERM must not leave a checked-out revision behind
        whole.error_locations(),
        _rival(whole, earlier, baseline, against, changes) as rival,
        locked_check_folder(subject.output.path),
    ):
        try:
            predicted = infer(
                subject,
                trust_code=trust_code,
                overwrite=True,
                progress=progress,
            )
        except (ModelInputError, RunFailed) as error:
            result = _failed(subject, error)
        else:
            work = _CheckRun(subject, predicted, rival, is_trusted(trust_code), progress)
            result = work.result(timed=bool(save_baseline), update_expected=update_expected)
        result = result.replace(outcomes=evaluate.placed(result.outcomes, whole.location))
        folder = RunFolder(subject.output.path, overwrite=True)
        with folder.locked():
            folder.save(result)
    if save_baseline:
        _save(result, Path(save_baseline))
    return result


def _subject(config: RunConfig) -> RunConfig:
    """The config as it is checked: in the mode asked for, in a folder of its own."""
    path = config.output.path
    # Rows of one shape are compared best; only jsonl takes others.
    form = "jsonl" if config.output.format == "jsonl" else "npy"
    known = {metric.title for metric in config.metrics}
    limited = [name for name in config.check.limits.of_metrics() if name not in known]
    missing = [MetricSection.model_validate({"name": name}) for name in limited]
    return config.replace(
        {
            "metrics": (*config.metrics, *missing),
            "run.mode": config.check.mode or config.run.mode,
            "output.path": path.with_name(f"{path.name}-check"),
            "output.format": form,
        }
    )


def _refuse_early(config: RunConfig, earlier: RunResult | None, update_expected: bool) -> None:
    """Find out before a long run what would be found out after it."""
    expected, mode = config.check.expected, config.run.mode
    if earlier and not _of_mode(earlier.measurements, mode):
        raise ConfigError(f"the baseline holds no measurement in {mode}", "check.mode")
    if expected and config.output.format == "jsonl":
        text = "output.format is jsonl, whose rows may differ in shape; golden outputs take npy"
        raise ConfigError(text, "check.expected")
    if expected and any(place.is_file() for place in expected.parents):
        raise ConfigError(f"{expected} lies below a file", "check.expected")
    if update_expected and expected is None:
        raise ConfigError("--update-expected takes a check.expected to write")
    if expected and not update_expected and not expected.exists():
        raise ConfigError(f"there is no {expected}; --update-expected writes it", "check.expected")


def _save(result: CheckResult, path: Path) -> None:
    try:
        result.save(path)
    except OSError as error:
        raise GradrunError(f"{path} cannot be written: {error.strerror}") from error


def _failed(config: RunConfig, error: GradrunError) -> CheckResult:
    """The result of a model that did not run."""
    device = resolve_device(config.run.device)
    return CheckResult(
        gradrun=__version__,
        started_at=_now(),
        info=RunInfo.from_config(dumped := config.model_dump(mode="json")),
        config=dumped,
        environment=current_environment(device),
        measurements=error.result.measurements if error.result else (),
        outcomes=(evaluate.failed_smoke("runs", str(error)),),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- what it is compared with ------------------------------------------------------------------


@contextmanager
def _rival(
    whole: LoadedConfig,
    earlier: RunResult | None,
    baseline: str | Path | None,
    against: str | Path | None,
    changes: Mapping[str, Any] | Sequence[str],
) -> Iterator[Reference | None]:
    if earlier:
        yield Reference(Path(str(baseline)).name, result=earlier)
    elif against is None:
        yield None
    elif Path(against).is_file():
        other = load_config(Path(against), changes)
        yield Reference(Path(against).name, config=_subject(other.config))
    else:
        own = Path(whole.locations.name) if whole.locations else None
        if own is None or not own.is_file():
            raise ConfigError("--against a revision takes a config that is a file")
        beside = own.parent.resolve()
        with git_worktree(str(against), beside, whole.config.input_files()) as out:
            file = out.of(beside) / own.name
            if not file.is_file():
                raise ConfigError(f"--against {against}: {own.name} is not in that revision")
            config = _subject(load_config(file, changes).config)
            yield Reference(str(against), config=config, moved=(str(out.top), str(out.tree)))


# --- the steps ---------------------------------------------------------------------------------


class _CheckRun:
    """One check of a model that ran: what its modes and its rival are, in figures."""

    def __init__(
        self,
        config: RunConfig,
        predicted: InferResult,
        rival: Reference | None,
        trust_code: bool,
        progress: ProgressCallback,
    ) -> None:
        self.config, self.asked, self.predicted = config, config.check, predicted
        self.mode, self.rival, self.trust_code = config.run.mode, rival, trust_code
        self.progress = progress
        self.name = str(self.mode)

    def result(self, *, timed: bool, update_expected: bool) -> CheckResult:
        """Everything asked for, as Outcomes."""
        outputs = golden.predictions(self.config.output.path, self.predicted.files)
        described = golden.described(outputs)
        looked = self._session(self._looked_at()).look()
        if failed := [f for f in looked.failures if f.variant in (self.name, "")]:
            return self._without_figures(described, failed[0])
        self._see_that_both_ran(looked)
        measured = self._timed() if timed or self._needs_time() else looked
        memory = next(m.memory for m in measured.measurements if m.variant == self.name)
        outcomes = [
            *self._smoke(looked),
            *evaluate.memory_limits(self.asked, memory),
            *evaluate.speedup_limits(self.asked, self.mode, measured.measurements),
            *evaluate.metric_limits(self.asked, self.predicted.metrics),
            *self._regression(looked, measured, described),
            *self._expected(outputs, update_expected),
        ]
        assert measured.environment
        return CheckResult(
            gradrun=__version__,
            started_at=self.predicted.started_at,
            info=self.predicted.info,
            config=self.predicted.config,
            environment=measured.environment,
            measurements=tuple(measured.measurements),
            comparisons=tuple(measured.comparisons),
            equivalence=tuple(looked.equivalence),
            files=self.predicted.files,
            predictions=self.predicted.predictions,
            quarantined=self.predicted.quarantined,
            metrics=self.predicted.metrics,
            outputs=described,
            outcomes=tuple(outcomes),
            warnings=tuple(measured.warnings),
        )

    def _without_figures(self, described: Any, failure: Failure) -> CheckResult:
        """What a model came to that ran over the data, and not in a fresh process."""
        outcomes = evaluate.smoke(self.predicted, []) if self.asked.smoke else []
        ended = evaluate.failed_smoke("runs again", sentence(failure))
        return CheckResult(
            gradrun=self.predicted.gradrun,
            started_at=self.predicted.started_at,
            info=self.predicted.info,
            config=self.predicted.config,
            environment=self.predicted.environment,
            measurements=self.predicted.measurements,
            files=self.predicted.files,
            predictions=self.predicted.predictions,
            quarantined=self.predicted.quarantined,
            metrics=self.predicted.metrics,
            outputs=described,
            outcomes=(*outcomes, ended),
            warnings=self.predicted.warnings,
        )

    # --- measuring -----------------------------------------------------------------------------

    def _session(self, variants: Sequence[Variant]) -> Session:
        return Session(variants, self.config, trust_code=self.trust_code)

    def _variant(self, mode: GradMode) -> Variant:
        dumped = self.config.model_dump(mode="json")
        return Variant(name=str(mode), config=dumped | {"run": dumped["run"] | {"mode": mode}})

    def _own_and_rival(self) -> list[Variant]:
        variants = [self._variant(self.mode)]
        if self.rival and self.rival.config:
            dumped = self.rival.config.model_dump(mode="json")
            dumped["measure"] |= {"rtol": self.asked.rtol, "atol": self.asked.atol}
            variants.append(Variant(name=self.rival.variant, config=dumped, moved=self.rival.moved))
        return variants

    def _looked_at(self) -> list[Variant]:
        others = [mode for mode in GradMode if mode is not self.mode and self.asked.smoke]
        return [*self._own_and_rival(), *map(self._variant, others)]

    def _needs_time(self) -> bool:
        limits = self.asked.limits.model_dump(exclude_none=True)
        grown = self.asked.regression.model_dump(exclude_none=True) if self.rival else {}
        of_a_process = any(name in limits or name in grown for name in _OF_A_PROCESS)
        grows = "time" in grown and not self._measured_otherwise()
        return bool(grows or evaluate.modes_timed(self.asked) or of_a_process)

    def _measured_otherwise(self) -> list[str]:
        """What was otherwise where the earlier result was measured: its times say nothing here."""
        if not (self.rival and self.rival.result):
            return []
        before, now = self.rival.result, self.predicted
        return [
            *evaluate.machines_differ(before.environment, now.environment),
            *self._batches_differ(before),
        ]

    def _batches_differ(self, before: RunResult) -> list[str]:
        return evaluate.batches_differ(
            _of_mode(before.measurements, self.mode), self.predicted.measurements
        )

    def _timed(self) -> SessionData:
        others = [mode for mode in evaluate.modes_timed(self.asked) if mode is not self.mode]
        session = self._session([*self._own_and_rival(), *map(self._variant, others)])
        measured = session.run(self.progress)
        self._see_that_both_ran(measured)
        return measured

    def _see_that_both_ran(self, found: SessionData) -> None:
        """What failed, beside another mode in the smoke check, ends the check."""
        needed = [variant.name for variant in self._own_and_rival()]
        for failure in found.failures:
            if failure.variant in (*needed, ""):
                raise RunFailed(sentence(failure))

    # --- judging -------------------------------------------------------------------------------

    def _smoke(self, looked: SessionData) -> list[Outcome]:
        if not self.asked.smoke:
            return []
        modes = [found for found in looked.equivalence if found.candidate in set(GradMode)]
        found = evaluate.smoke(self.predicted, modes)
        return found + [
            evaluate.failed_smoke(f"{failure.variant} agrees", failure.error)
            for failure in looked.failures
        ]

    def _regression(
        self, looked: SessionData, measured: SessionData, described: Any
    ) -> list[Outcome]:
        if self.rival is None:
            return []
        if self.rival.result:
            return self._since(self.rival.result, measured, described)
        name, variant, asked = self.rival.name, self.rival.variant, self.asked
        by_name = {m.variant: m.memory for m in measured.measurements}
        slowdown = paired(measured.measurements, self.name, variant)
        parting = [e.first_module for e in looked.equivalence if e.candidate == variant]
        return [
            *evaluate.time_regression(asked, name, slowdown),
            *evaluate.memory_regression(asked, name, by_name[variant], by_name[self.name]),
            *(
                evaluate.same_outputs(asked, name, self._differences(), next(iter(parting), None))
                if asked.regression.outputs
                else ()
            ),
        ]

    def _differences(self) -> dict[str, str]:
        """How the predictions differ from those that the rival makes of all of its data."""
        own = self.config.output
        _, rival = self._own_and_rival()
        with TemporaryDirectory(prefix=f"{own.path.name}-against-", dir=own.path.parent) as folder:
            output = rival.config["output"] | {"path": folder, "format": own.format}
            rival = rival.replace(config=rival.config | {"output": output})
            self.progress(Progress("predicting with the reference", 0, 1))
            for failure in self._session([rival]).predict():
                raise RunFailed(sentence(failure))
            files = self.predicted.files
            return golden.differences_from(
                Path(folder), own.path, files, self.asked.rtol, self.asked.atol
            )

    def _since(self, before: RunResult, measured: SessionData, described: Any) -> list[Outcome]:
        """Regressions since an earlier result."""
        assert self.rival
        old = _of_mode(before.measurements, self.mode)
        now = _of_mode(measured.measurements, self.mode)
        batches, differs = self._batches_differ(before), self._measured_otherwise()
        name, asked = self.rival.name, self.asked
        outputs = before.outputs if isinstance(before, CheckResult) else ()
        return [
            *evaluate.time_regression(asked, name, evaluate.apart(old, now), differs),
            *evaluate.memory_regression(asked, name, old[0].memory, now[0].memory, batches),
            *evaluate.outputs_regression(asked, name, outputs, described),
        ]

    def _expected(self, outputs: Any, update: bool) -> list[Outcome]:
        asked = self.asked
        if asked.expected is None:
            return []
        if update:
            golden.write(asked.expected, outputs)
            return [evaluate.golden_written(asked.expected.name)]
        found = golden.differences(asked.expected, outputs, asked.rtol, asked.atol)
        return [evaluate.golden(found, asked.expected.name)]


def _of_mode(measurements: Sequence[Measurement], mode: GradMode) -> list[Measurement]:
    """Of variants of the model itself, and not of what it was compared with."""
    return [m for m in measurements if m.mode == mode and m.variant in {"", str(mode)}]
