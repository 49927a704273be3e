"""`gradrun.check`: run a model, measure it, and evaluate the limits of its config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gradrun.checks import evaluate, golden
from gradrun.checks.reference import Reference, checked_config, measurements_in, open_reference
from gradrun.comparison.protocol import Failure
from gradrun.comparison.session import Session, SessionData, Variant
from gradrun.config.load import ConfigSource, is_trusted, resolve_config
from gradrun.config.schema import RunConfig
from gradrun.core.errors import (
    ConfigError,
    GradrunError,
    ModelInputError,
    RunFailed,
    UnsupportedValues,
)
from gradrun.core.grad_mode import GradMode
from gradrun.core.options import option
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.core.version import __version__
from gradrun.engines.infer import infer
from gradrun.inference.device import resolve_device
from gradrun.inference.environment import current_environment
from gradrun.inference.signals import GracefulShutdown
from gradrun.output.run_folder import RunFolder, locked_check_folder
from gradrun.results.ratios import metric_changes, time_ratio
from gradrun.results.result import (
    CheckResult,
    Equivalence,
    InferResult,
    Metric,
    MetricChange,
    Outcome,
    Output,
    RunInfo,
    Warning,
)

_NO_GOLDEN = "golden outputs require output.format npy: rows of jsonl can differ in shape"
_PROCESS_MEMORY = ("process_peak", "device_allocated", "device_reserved")


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
    """Check a model against the `check` section of its config.

    Args:
        config: the path of a YAML file, its content as a mapping, or a loaded config.
        baseline: path of an earlier result to find regressions against.
        against: another config, or a git revision of this one, to measure side by side.
        save_baseline: path to write the result to as a later baseline.
        update_expected: write the golden outputs instead of comparing with them.
        trust_code: allow `python` models of both sides to run the code that the config names.
        sets: "key.path=value" changes to the configs of both sides; alternative to `overrides`.
        progress: called several times in each stage.
        overrides: config values to change, as for `infer`.

    Returns:
        A result with `outcomes` and `status`. It is also saved as result.json, with the
        predictions, in the folder next to output.path whose name ends in -check.

    Raises:
        ConfigError: the config, the data or the reference is invalid.
        RunFailed: the reference cannot run.
    """
    if baseline and against:
        raise ConfigError(
            f"{option('baseline', 'PATH')} and {option('against', 'REFERENCE')} cannot be combined"
        )
    if sets and overrides:
        raise TypeError("sets and overrides cannot be combined")
    changes = sets or overrides
    loaded = resolve_config(config, changes)
    checked = checked_config(loaded.config)
    with (
        GracefulShutdown(),  # unwind on SIGTERM, so that a worktree is removed
        loaded.error_locations(),
        open_reference(loaded, baseline, against, changes) as reference,
    ):
        missing = reference.missing if reference else ""
        _validate(checked, reference, update_expected=update_expected, saves=bool(save_baseline))
        with locked_check_folder(checked.output.path):
            try:
                checked, predicted = _predict(checked, trust_code, progress)
            except (ModelInputError, RunFailed) as error:
                result = _failed_result(checked, error)
            else:
                present = None if missing else reference
                run = CheckRun(checked, predicted, present, is_trusted(trust_code), progress)
                result = run.result(timed=bool(save_baseline), update_expected=update_expected)
            outcomes = (o.replace(source=loaded.location(o.key)) for o in result.outcomes)
            warnings = [*result.warnings]
            if missing:
                text = f"checked without a reference: {missing}, so no regression can be detected"
                warnings.append(Warning(code="no_reference", text=text))
            result = result.replace(outcomes=tuple(outcomes), warnings=tuple(warnings))
            folder = RunFolder(checked.output.path, overwrite=True)
            with folder.locked():
                folder.save(result)
    if save_baseline:
        try:
            result.save(Path(save_baseline))
        except OSError as error:
            raise GradrunError(f"{save_baseline} cannot be written: {error.strerror}") from error
    return result


def _validate(
    config: RunConfig, reference: Reference | None, *, update_expected: bool, saves: bool
) -> None:
    """Raise a ConfigError for a request that would fail, or check nothing, after a long run."""
    config.check_importable()
    expected, mode = config.check.expected, config.run.mode
    earlier = reference.result if reference else None
    if earlier and not measurements_in(earlier.measurements, mode):
        raise ConfigError(f"the baseline has no measurement in {mode}", "check.mode")
    if expected and config.output.format == "jsonl":
        raise ConfigError(_NO_GOLDEN, "check.expected")
    if expected and any(parent.is_file() for parent in expected.parents):
        raise ConfigError(f"a parent folder of {expected} is a file", "check.expected")
    if update_expected and expected is None:
        raise ConfigError(f"{option('update_expected')} requires check.expected, the file to write")
    if expected and not update_expected and not expected.exists():
        text = f"{expected} does not exist; {option('update_expected')} creates it"
        raise ConfigError(text, "check.expected")
    if not (evaluate.has_checks(config.check) or reference or saves):
        text = "nothing to check: smoke tests are off and no limit, baseline or reference is set"
        raise ConfigError(text, "check.smoke")


def _predict(
    config: RunConfig, trust_code: bool, progress: ProgressCallback
) -> tuple[RunConfig, InferResult]:
    """Write the predictions, as lines of JSON if arrays cannot store them.

    Returns:
        The config with the format, and the result.
    """
    run = partial(infer, trust_code=trust_code, overwrite=True, progress=progress)
    try:
        return config, run(config)
    except UnsupportedValues as error:
        if config.check.expected:
            raise ConfigError(_NO_GOLDEN, "check.expected") from error
    lines = config.replace({"output.format": "jsonl"})
    return lines, run(lines)


def _failed_result(config: RunConfig, error: GradrunError) -> CheckResult:
    """Return the result of a model that did not run."""
    dumped = config.model_dump(mode="json")
    return CheckResult(
        gradrun=__version__,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        info=RunInfo.from_config(dumped),
        config=dumped,
        environment=current_environment(resolve_device(config.run.device)),
        measurements=error.result.measurements if error.result else (),
        outcomes=(evaluate.model_failed("model runs", str(error)),),
    )


class CheckRun:
    """Measures and evaluates a model whose predictions have been written."""

    def __init__(
        self,
        config: RunConfig,
        predicted: InferResult,
        reference: Reference | None,
        trust_code: bool,
        progress: ProgressCallback,
    ) -> None:
        self.config, self.section, self.predicted = config, config.check, predicted
        self.mode, self.reference = config.run.mode, reference
        self.trust_code, self.progress = trust_code, progress
        self.variants = [self._variant(self.mode)]
        self.other_sizes: list[str] = []
        self.other_conditions: list[str] = []
        self.metric_changes: tuple[MetricChange, ...] = ()
        if reference and (earlier := reference.result):
            old = measurements_in(earlier.measurements, self.mode)
            self.other_sizes = evaluate.batch_size_difference(old, predicted.measurements)
            machine = evaluate.machine_differences(earlier.environment, predicted.environment)
            self.other_conditions = [*machine, *self.other_sizes]
        elif reference and reference.config:
            tolerances = {"measure.rtol": self.section.rtol, "measure.atol": self.section.atol}
            other = reference.config.replace(tolerances)
            self.variants.append(Variant(reference.variant, other, reference.worktree))

    def result(self, *, timed: bool, update_expected: bool) -> CheckResult:
        """Measure the variants and return the result with all outcomes."""
        predictions = golden.load_predictions(self.config.output.path, self.predicted.files)
        outputs = golden.summarize(predictions)
        other_modes = [mode for mode in GradMode if mode is not self.mode and self.section.smoke]
        compared = self._session(other_modes).compare_outputs()
        if failed := [f for f in compared.failures if f.variant in (str(self.mode), "")]:
            return self._failed_in_worker(outputs, failed[0])
        self._raise_failures(compared)
        measured = self._time() if timed or self._needs_timing() else compared
        assert measured.environment
        memory = next(m.memory for m in measured.measurements if m.variant == self.mode)
        outcomes = [
            *self._smoke(compared),
            *evaluate.memory_limits(self.section, memory),
            *evaluate.speedup_limits(self.section, self.mode, measured.measurements),
            *evaluate.metric_limits(self.section, self.predicted.metrics),
            *self._regression(compared, measured, outputs),
            *self._expected(predictions, update_expected),
        ]
        return self._result(
            environment=measured.environment,
            measurements=tuple(measured.measurements),
            comparisons=tuple(measured.comparisons),
            equivalence=tuple(compared.equivalence),
            outputs=outputs,
            outcomes=tuple(outcomes),
            warnings=tuple(measured.warnings),
        )

    def _failed_in_worker(self, outputs: tuple[Output, ...], failure: Failure) -> CheckResult:
        """Return the result of a model that ran here but failed in a worker process."""
        outcomes = self._smoke_of_run([]) if self.section.smoke else []
        failed = evaluate.model_failed("model runs in a new process", failure.message)
        return self._result(
            environment=self.predicted.environment,
            measurements=self.predicted.measurements,
            outputs=outputs,
            outcomes=(*outcomes, failed),
            warnings=self.predicted.warnings,
        )

    def _result(self, **fields: Any) -> CheckResult:
        """Return a result with the predictions and metrics of the run."""
        predicted = self.predicted
        return CheckResult(
            gradrun=predicted.gradrun,
            started_at=predicted.started_at,
            info=predicted.info,
            config=predicted.config,
            files=predicted.files,
            predictions=predicted.predictions,
            quarantined=predicted.quarantined,
            metrics=predicted.metrics,
            metric_changes=self.metric_changes,
            interpretation=predicted.interpretation,
            **fields,
        )

    # --- measure ---------------------------------------------------------------------------------

    def _variant(self, mode: GradMode) -> Variant:
        return Variant(str(mode), self.config.replace({"run.mode": mode}))

    def _session(self, other_modes: Sequence[GradMode]) -> Session:
        variants = [*self.variants, *map(self._variant, other_modes)]
        largest = self.predicted.measurements[0].memory.batch
        return Session(variants, self.config, trust_code=self.trust_code, memory_batch=largest)

    def _needs_timing(self) -> bool:
        limits = self.section.limits.model_dump(exclude_none=True)
        growth = self.section.regression.model_dump(exclude_none=True) if self.reference else {}
        return bool(
            evaluate.timed_modes(self.section)
            or any(name in limits or name in growth for name in _PROCESS_MEMORY)
            or ("time" in growth and not self.other_conditions)
        )

    def _time(self) -> SessionData:
        modes = evaluate.timed_modes(self.section)
        session = self._session([mode for mode in modes if mode is not self.mode])
        measured = session.run(self.progress)
        self._raise_failures(measured)
        return measured

    def _raise_failures(self, data: SessionData) -> None:
        """Raise RunFailed if the checked model or the reference failed."""
        required = {"", *(variant.name for variant in self.variants)}
        for failure in data.failures:
            if failure.variant in required:
                raise RunFailed(failure.message)

    # --- evaluate --------------------------------------------------------------------------------

    def _smoke(self, compared: SessionData) -> list[Outcome]:
        if not self.section.smoke:
            return []
        modes = [e for e in compared.equivalence if e.candidate in set(GradMode)]
        return [
            *self._smoke_of_run(modes),
            *(
                evaluate.model_failed(f"outputs match {failure.variant}", failure.error)
                for failure in compared.failures
            ),
        ]

    def _smoke_of_run(self, modes: Sequence[Equivalence]) -> list[Outcome]:
        tested = self.config.measure.batch_independence
        return evaluate.smoke(self.predicted, modes, batch_independence=tested)

    def _regression(
        self, compared: SessionData, measured: SessionData, outputs: tuple[Output, ...]
    ) -> list[Outcome]:
        if self.reference is None:
            return []
        name, section = self.reference.name, self.section
        if before := self.reference.result:
            old = measurements_in(before.measurements, self.mode)
            now = measurements_in(measured.measurements, self.mode)
            slowdown = evaluate.unpaired_slowdown(old, now)
            previous = before.outputs if isinstance(before, CheckResult) else ()
            old_metrics = before.metrics if isinstance(before, CheckResult | InferResult) else ()
            return [
                *evaluate.time_regression(section, name, slowdown, self.other_conditions),
                *evaluate.memory_regression(
                    section, name, old[0].memory, now[0].memory, self.other_sizes
                ),
                *self._metric_regression(name, old_metrics),
                *evaluate.outputs_regression(section, name, previous, outputs),
            ]
        variant = self.reference.variant
        memory = {m.variant: m.memory for m in measured.measurements}
        slowdown = time_ratio(measured.measurements, str(self.mode), variant)
        modules = [e.first_module for e in compared.equivalence if e.candidate == variant]
        differences: dict[str, str] = {}
        scores: tuple[Metric, ...] = ()
        if section.regression.outputs or self.config.metrics:
            differences, scores = self._run_reference()
        return [
            *evaluate.time_regression(section, name, slowdown),
            *evaluate.memory_regression(section, name, memory[variant], memory[str(self.mode)]),
            *self._metric_regression(name, scores),
            *evaluate.same_outputs(section, name, differences, next(iter(modules), None)),
        ]

    def _metric_regression(self, name: str, before: Sequence[Metric]) -> Iterator[Outcome]:
        now, metrics = self.predicted.metrics, self.config.metrics
        self.metric_changes = metric_changes(name, before, "this run", now)
        return evaluate.metric_regression(self.section, name, before, now, metrics)

    def _run_reference(self) -> tuple[dict[str, str], tuple[Metric, ...]]:
        """Write the reference's predictions for all of its data.

        Returns:
            Their differences from the predictions of this run, and the reference's metrics.
        """
        own, other = self.config.output, self.variants[1]
        with TemporaryDirectory(prefix=f"{own.path.name}-against-", dir=own.path.parent) as folder:
            self.progress(Progress("predicting with the reference"))
            session = Session([other], self.config, trust_code=self.trust_code)
            changes = {"output.format": own.format, "metrics": self.config.metrics}
            result, section = session.predict(Path(folder), changes), self.section
            differences = (
                golden.compare_runs(
                    Path(folder), own.path, self.predicted.files, section.rtol, section.atol
                )
                if section.regression.outputs
                else {}
            )
            return differences, result.metrics

    def _expected(self, predictions: dict[str, golden.Array], update: bool) -> list[Outcome]:
        file, section = self.section.expected, self.section
        if file is None:
            return []
        differences = None
        if update:
            golden.write(file, predictions)
        else:
            differences = golden.compare_with_file(file, predictions, section.rtol, section.atol)
        return [evaluate.golden(file.name, differences)]
