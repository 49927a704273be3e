"""Run variants in worker processes until their time ratios are known precisely enough."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from gradrun.comparison.protocol import Failure, Job, JobKind, VariantTask, WorkerReport
from gradrun.comparison.worker import Worker
from gradrun.config.check import CheckSection
from gradrun.config.run import MeasureSection
from gradrun.config.schema import RunConfig
from gradrun.core.cpu import thread_count
from gradrun.core.errors import ConfigError, GradrunError, RunFailed
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.core.units import pluralize
from gradrun.results.ratios import compare_measured
from gradrun.results.result import (
    Comparison,
    Environment,
    Equivalence,
    InferResult,
    Measurement,
    Memory,
    RunResult,
    Statement,
    SystemNoise,
    Warning,
)

MAX_STEAL, MAX_OTHERS = 0.02, 0.2
"""Share of stolen CPU time, and CPUs used by other processes, above which a process is repeated."""

MAX_PREEMPTIONS = 100
"""Involuntary switches per second and thread above which a process is repeated: one per block.

On two quiet cores a process with one thread had 2 to 8, and one with two threads 15 to 42 each.
"""

SLOW = 1.15
"""A process is repeated if its batches take this many times those of the fastest process."""

_SECONDS = 0.8
"""Measuring time per process; more does not reduce the variation between processes."""

_MAX_DISCARDED = 5
_MEMORY_WORKERS = 2
"""Processes that measure memory at the same time."""


@dataclass(frozen=True)
class Variant:
    """One side of a comparison."""

    name: str
    config: RunConfig
    worktree: tuple[str, str] | None = None
    """(repository, worktree): imports from the repository are redirected to the worktree."""


@dataclass
class SessionData:
    """Results collected from the worker processes."""

    measurements: list[Measurement] = field(default_factory=list)
    equivalence: list[Equivalence] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    warnings: list[Warning] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    environment: Environment | None = None
    interpretation: tuple[Statement, ...] = ()

    def is_enough(self, measure: MeasureSection, done: int, left: float, cost: float) -> bool:
        """Check whether the intervals are narrow after `done` processes, or the time is spent.

        `left` is the rest of the budget, and `cost` the time of one more process, in seconds.
        """
        if done < measure.processes:
            return left < cost and done > 1
        compared = compare_measured(self.measurements, measure.precision)
        return left < cost or all(is_precise(c, measure.precision) for c in compared)

    def conclude(
        self, measure: MeasureSection, done: int, noun: str = "process", *, interrupted: bool
    ) -> None:
        """Compute the comparisons; warn of too few processes, or intervals wider than asked."""
        self.comparisons = compare_measured(self.measurements, measure.precision)
        few = 0 < done < measure.processes
        wide = any(c.relative_width > measure.precision for c in self.comparisons)
        if not few and not wide:
            return
        text = f"the budget of {measure.budget:g} s was spent"
        text = "the comparison was interrupted" if interrupted else text
        text += f" after {f'{done} of at least ' if few else ''}"
        text += pluralize(measure.processes if few else done, noun)
        text += f", before the intervals were as narrow as {measure.precision:.1%}" if wide else ""
        text += "" if interrupted else "; reduce load on the machine or raise measure.budget"
        self.warnings.append(Warning(code="not_precise", text=text))


class Session:
    """One comparison: the variants that have not failed, and the data measured so far."""

    def __init__(
        self,
        variants: Sequence[Variant],
        config: RunConfig,
        *,
        trust_code: bool,
        memory_batch: int | None = None,
    ) -> None:
        """Compare variants; memory is that of a batch number, or of the largest that is timed."""
        for variant in variants:
            variant.config.check_importable()
        _check_process_settings(variants)
        self.variants, self.measure, self.trust_code = list(variants), config.measure, trust_code
        # Each variant sets its own number; the bits depend on it alone, not on the variables.
        self.threads = max(thread_count(v.config.run.threads) for v in variants)
        self.memory_batch = memory_batch
        self.data = SessionData()
        self.process_memory: dict[str, Memory] = {}
        self.discarded: list[SystemNoise] = []
        self.started = 0
        self.process_medians: dict[int, tuple[float, SystemNoise]] = {}
        self.deadline = time.monotonic() + self.measure.budget

    def run(self, progress: ProgressCallback = ignore) -> SessionData:
        """Measure each variant's memory, then time all variants in one process after another."""
        progress(Progress("measuring memory"))
        self._measure_memory()
        while self.variants:
            done = len(self.process_medians)
            progress(Progress("timing processes", done, max(done + 1, self.measure.processes)))
            began = time.monotonic()
            self._time_process()
            ended = time.monotonic()
            left, done = self.deadline - ended, len(self.process_medians)
            if self.data.is_enough(self.measure, done, left, ended - began):
                break
        return self.finalize()

    def compare_outputs(self) -> SessionData:
        """Compare outputs and tensor memory in one process; its few timings are not significant."""
        while self.variants:
            job = self._job("time", self.variants, 0).replace(seconds=0.0)
            (report,) = self._run_jobs([job], self.measure.timeout)
            self._record_failures(report)
            if report.measurements:
                self.data.environment = report.environment
                self.data.interpretation = report.interpretation
                self.data.equivalence = list(report.equivalence)
                self._add_measurements(0, report)
                break
            # A variant that killed the process took the others with it: run those again.
        return self.data

    def predict(self, folder: Path, changes: Mapping[str, Any]) -> InferResult:
        """Predict all data with the only variant in a worker, without a timeout.

        Raises:
            RunFailed: the variant fails.
        """
        (variant,) = self.variants
        config = variant.config.replace(
            {
                "output.path": folder,
                "measure.memory": False,
                "measure.batch_independence": False,
                "check": CheckSection(),
                **changes,
            }
        )
        job = self._job("predict", [replace(variant, config=config)], 0)
        (report,) = self._run_jobs([job], timeout=None)
        for failure in report.failures:
            raise RunFailed(failure.message)
        result = RunResult.load(folder)
        assert isinstance(result, InferResult)
        return result

    def finalize(self, *, interrupted: bool = False) -> SessionData:
        """Return the collected data with comparisons and warnings."""
        data = self.data
        data.conclude(self.measure, len(self.process_medians), interrupted=interrupted)
        if self.discarded:
            text = _describe_noise(self.discarded)
            data.warnings.append(Warning(code="noisy_machine", text=text))
        for variant in dict.fromkeys(m.variant for m in data.measurements):
            memories = {
                (m.memory.forward_peak, m.memory.retained)
                for m in data.measurements
                if m.variant == variant
            }
            if len(memories) > 1:
                text = f"{variant}: tensor memory differs between processes because the model's "
                text += "allocations are not deterministic; the reported values are examples"
                data.warnings.append(Warning(code="memory_differs", text=text))
        return data

    # --- jobs ------------------------------------------------------------------------------------

    def _job(self, kind: JobKind, variants: Sequence[Variant], seed: int) -> Job:
        return Job(
            kind=kind,
            variants=tuple(
                VariantTask(
                    name=variant.name,
                    config=variant.config.model_dump(mode="json"),
                    worktree=variant.worktree,
                )
                for variant in variants
            ),
            seed=seed,
            seconds=min(_SECONDS, self.measure.budget / (4 * self.measure.processes)),
            trust_code=self.trust_code,
            memory_batch=self.memory_batch,
        )

    def _run_jobs(self, jobs: Sequence[Job], timeout: float | None) -> list[WorkerReport]:
        """Run jobs at the same time and return their reports."""
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(job, threads=self.threads)) for job in jobs]
            return [worker.report(timeout) for worker in workers]

    def _measure_memory(self) -> None:
        """Measure each variant's peak in a separate process; untimed, so two run at once."""
        jobs = [self._job("measure_memory", [variant], 0) for variant in self.variants]
        for begin in range(0, len(jobs), _MEMORY_WORKERS):
            batch = jobs[begin : begin + _MEMORY_WORKERS]
            for report in self._run_jobs(batch, self.measure.timeout):
                self._record_failures(report)
                for measured in report.measurements:
                    self.process_memory[measured.variant] = measured.memory

    def _time_process(self) -> None:
        """Time all variants in one process; keep its data or discard it as noisy."""
        began = time.monotonic()
        process, self.started = self.started, self.started + 1
        job = self._job("time", self.variants, process)
        (report,) = self._run_jobs([job], self.measure.timeout)
        self._record_failures(report)
        if not report.measurements:
            return
        cost = time.monotonic() - began
        noise = report.noise
        noisy = noise.steal > MAX_STEAL or noise.others > MAX_OTHERS
        noisy = noisy or noise.preemptions > MAX_PREEMPTIONS * self.threads
        if noisy and self._can_repeat(cost):
            self.discarded.append(noise)
            return
        self.data.environment = self.data.environment or report.environment
        self.data.interpretation = self.data.interpretation or report.interpretation
        self.data.equivalence = self.data.equivalence or list(report.equivalence)
        self._add_measurements(process, report)
        # The machine is the cause when all variants slow down, whatever its counters show.
        fastest = min(seconds for seconds, _ in self.process_medians.values())
        for slow in [p for p, (s, _) in self.process_medians.items() if s > SLOW * fastest]:
            if self._can_repeat(cost):
                self._discard(slow)

    # --- data ------------------------------------------------------------------------------------

    def _add_measurements(self, process: int, report: WorkerReport) -> None:
        names = {variant.name for variant in self.variants}
        measured = [m for m in report.measurements if m.variant in names]
        for m in measured:
            memory = self._with_process_memory(m.variant, m.memory)
            self.data.measurements.append(m.replace(process=process, memory=memory))
        median_seconds = geometric_mean([median(m.batch_seconds) for m in measured])
        self.process_medians[process] = (median_seconds, report.noise)

    def _with_process_memory(self, variant: str, memory: Memory) -> Memory:
        alone = self.process_memory.get(variant)
        if alone is None:
            return memory
        return memory.replace(
            process_peak=alone.process_peak,
            process_method=alone.process_method,
            device_allocated=alone.device_allocated,
            device_reserved=alone.device_reserved,
        )

    def _discard(self, process: int) -> None:
        self.data.measurements = [m for m in self.data.measurements if m.process != process]
        self.discarded.append(self.process_medians.pop(process)[1])

    def _can_repeat(self, cost: float) -> bool:
        """Check that the budget allows a repetition and the minimum number of processes."""
        left = self.deadline - time.monotonic()
        missing = max(0, self.measure.processes - len(self.process_medians))
        return len(self.discarded) < _MAX_DISCARDED and left > cost * (missing + 1)

    def _record_failures(self, report: WorkerReport) -> None:
        """Drop variants that failed; raise a config error if no variant remains to run."""
        for failure in report.failures:
            if failure.config_key is not None and len(self.variants) == 1:
                raise ConfigError(failure.error, failure.config_key)
            self.data.failures.append(failure)
        failed = {failure.variant for failure in report.failures}
        if "" in failed:  # the process ended before it reached a variant
            failed = {variant.name for variant in self.variants}
        self.variants = [variant for variant in self.variants if variant.name not in failed]


class RoundSession(ABC):
    """A comparison in rounds, each of which starts all variants; as Session otherwise."""

    stage: str
    """Name of the rounds in the progress."""
    noun: str
    """Name of a round in warnings."""

    def __init__(self, variants: Sequence[Variant], measure: MeasureSection) -> None:
        self.variants, self.measure = list(variants), measure
        self.data, self.rounds = SessionData(), 0
        self.deadline = time.monotonic() + measure.budget

    def run(self, progress: ProgressCallback = ignore) -> SessionData:
        """Run rounds until the intervals are narrow or the budget is spent."""
        while len(self.variants) > 1:
            total = max(self.rounds + 1, self.measure.processes)
            progress(Progress(self.stage, self.rounds, total))
            began = time.monotonic()
            self.run_round()
            ended = time.monotonic()
            left, cost = self.deadline - ended, ended - began
            if self.rounds and self.data.is_enough(self.measure, self.rounds, left, cost):
                break
        return self.finalize()

    @abstractmethod
    def run_round(self) -> None:
        """Run all variants, and count the round if its times are kept."""

    def drop(self, variant: Variant, error: GradrunError) -> None:
        """Record a failure, and leave the variant out of further rounds."""
        self.data.failures.append(Failure(variant=variant.name, batch=0, error=str(error)))
        self.variants.remove(variant)

    def add_equivalence(
        self, variant: Variant, *, bitwise: bool, max_abs_diff: float, equal: bool
    ) -> None:
        """Record the difference of a variant's outputs from those of the first."""
        self.data.equivalence.append(
            Equivalence(
                baseline=self.variants[0].name,
                candidate=variant.name,
                bitwise=bitwise,
                max_abs_diff=max_abs_diff,
                equal=equal,
            )
        )

    def finalize(self, *, interrupted: bool = False) -> SessionData:
        """Return the collected data with comparisons and warnings."""
        self.data.conclude(self.measure, self.rounds, self.noun, interrupted=interrupted)
        return self.data


def need_own_processes(variants: Sequence[Variant]) -> str:
    """Return the first key that prevents variants from running in one process, or ""."""
    settings = [variant.config.run.process_settings for variant in variants]
    return next((key for key in settings[0] if len({s[key] for s in settings}) > 1), "")


def _check_process_settings(variants: Sequence[Variant]) -> None:
    """Check that all variants can run in one process."""
    if key := need_own_processes(variants):
        raise ConfigError(
            f"{' and '.join(v.name for v in variants)} have different values, and this comparison "
            "runs them in one process, which has one; set the same value, or use gradrun compare "
            f"--over {key}=...",
            key,
        )


def is_precise(comparison: Comparison, precision: float) -> bool:
    """Check whether the interval is narrow enough to stop.

    A ratio near the edge of the no-difference range needs half the width. Stopping on the verdict
    itself would increase the rate of false positives.
    """
    clear = comparison.verdict == "no_difference" or abs(comparison.ratio - 1) >= 2 * precision
    return comparison.relative_width <= (precision if clear else precision / 2)


def _describe_noise(discarded: Sequence[SystemNoise]) -> str:
    others = max(noise.others for noise in discarded)
    steal = max(noise.steal for noise in discarded)
    preemptions = max(noise.preemptions for noise in discarded)
    parts = {
        f"other processes used up to {others:.1f} CPUs": others >= 0.05,
        f"{steal:.0%} of CPU time was stolen": steal >= 0.005,
        f"{preemptions:.0f} involuntary switches per second": preemptions > MAX_PREEMPTIONS,
    }
    causes = ", ".join(part for part, significant in parts.items() if significant)
    return (
        f"{pluralize(len(discarded), 'process')} measured again because the machine was slower or "
        f"busier then{f' ({causes})' if causes else ''}"
    )
