"""Variants of one run side by side: worker processes -> Measurements -> Comparisons.

Knows when enough has been measured and what to do about a worker that fails or was disturbed; how
a worker measures stands in trial.py, what the figures mean in conclusion.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import geometric_mean, median
from typing import Any

from gradrun.comparison.protocol import Failure, Job, Variant, WorkerReport
from gradrun.comparison.worker import Worker
from gradrun.config.schema import RunConfig
from gradrun.core.cpu import available_cpus
from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.core.units import pluralize
from gradrun.results.ratios import compare_measured
from gradrun.results.result import (
    Comparison,
    Environment,
    Equivalence,
    Measurement,
    SystemNoise,
    Warning,
)

STEAL, OTHERS = 0.02, 0.2
"""Shares of the machine's time and processors that others may take before a process is redone."""

PREEMPTIONS = 100
"""Involuntary switches a second and thread after which a process is redone: one in every block.

On two quiet cores a process of one thread saw 2 to 8, and one of two threads 15 to 42 each.
"""

SLOW = 1.15
"""Times the quickest process's batches after which a process is redone."""

_SECONDS = 0.8
"""Of measuring in one process: more would not narrow what differs from process to process."""

_REDONE_AT_MOST = 5
_WEIGHED_AT_ONCE = 2

"""Told (what is being done, processes measured, processes wanted)."""


@dataclass
class SessionData:
    """Everything that worker processes found."""

    measurements: list[Measurement] = field(default_factory=list)
    equivalence: list[Equivalence] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    warnings: list[Warning] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    environment: Environment | None = None


class Session:
    """One comparison: which variants still stand, and what is known of them."""

    def __init__(self, variants: Sequence[Variant], config: RunConfig, *, trust_code: bool) -> None:
        self.variants, self.measure, self.trust_code = list(variants), config.measure, trust_code
        wanted = [RunConfig.model_validate(v.config, strict=False).run.threads for v in variants]
        self.threads = max(available_cpus() if t == "auto" else t for t in wanted)
        self.found = SessionData()
        self.peaks: dict[str, Any] = {}
        self.redone: list[SystemNoise] = []
        self.asked = 0
        self.paces: dict[int, tuple[float, SystemNoise]] = {}
        self.deadline = time.monotonic() + self.measure.budget

    def run(self, progress: ProgressCallback = ignore) -> SessionData:
        """Weigh each variant, then time them in process after process until it is enough."""
        progress(Progress("measuring memory", 0, self.measure.processes))
        self._weigh()
        while self.variants:
            done = len(self.paces)
            progress(Progress("timing processes", done, max(done + 1, self.measure.processes)))
            began = time.monotonic()
            self._time()
            if self._enough(time.monotonic() - began):
                break
        return self.finalize()

    def look(self) -> SessionData:
        """What one process says of outputs and tensor memory; its few times say nothing."""
        while self.variants:
            job = self._job("time", self.variants, 0).replace(seconds=0.0)
            (report,) = self._ask([job], self.measure.timeout)
            self._note_failures(report)
            if report.trials:
                self.found.environment = report.environment
                self.found.equivalence = [*report.equivalence]
                self._keep(0, report)
                break
            # A variant that ended the process took the others with it: ask those again.
        return self.found

    def predict(self) -> list[Failure]:
        """Let the one variant that there is fill its folder, however long that takes."""
        (report,) = self._ask([self._job("predict", self.variants, 0)], timeout=None)
        return list(report.failures)

    # --- the steps -----------------------------------------------------------------------------

    def _job(self, kind: Any, variants: Sequence[Variant], seed: int) -> Job:
        share = self.measure.budget / (4 * self.measure.processes)
        return Job(
            kind=kind,
            variants=tuple(variants),
            seed=seed,
            seconds=min(_SECONDS, share),
            trust_code=self.trust_code,
        )

    def _ask(self, jobs: Sequence[Job], timeout: float | None) -> list[WorkerReport]:
        """The reports of jobs that run at once."""
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(job, threads=self.threads)) for job in jobs]
            return [worker.report(timeout) for worker in workers]

    def _weigh(self) -> None:
        """Each variant's peak in a process that runs nothing else; untimed, so some at once."""
        jobs = [self._job("weigh", [variant], 0) for variant in self.variants]
        for begin in range(0, len(jobs), _WEIGHED_AT_ONCE):
            for report in self._ask(jobs[begin : begin + _WEIGHED_AT_ONCE], self.measure.timeout):
                self._note_failures(report)
                for trial in report.trials:
                    self.peaks[trial.variant] = trial.memory

    def _time(self) -> None:
        """One process with all variants; kept, or to be done again."""
        began = time.monotonic()
        process, self.asked = self.asked, self.asked + 1
        job = self._job("time", self.variants, process)
        (report,) = self._ask([job], self.measure.timeout)
        self._note_failures(report)
        if not report.trials:
            return
        cost = time.monotonic() - began
        if self._disturbed(report.disturbance) and self._time_for_another(cost):
            self.redone.append(report.disturbance)
            return
        self.found.environment = self.found.environment or report.environment
        self.found.equivalence = self.found.equivalence or list(report.equivalence)
        self._keep(process, report)
        for slow in self._outpaced():
            if self._time_for_another(cost):
                self._drop(slow)

    def _keep(self, process: int, report: WorkerReport) -> None:
        modes = {v.name: GradMode(v.config["run"]["mode"]) for v in self.variants}
        trials = [trial for trial in report.trials if trial.variant in modes]
        for trial in trials:
            self.found.measurements.append(
                Measurement(
                    mode=modes[trial.variant],
                    variant=trial.variant,
                    process=process,
                    batch_seconds=trial.batch_seconds,
                    batch_sizes=trial.batch_sizes,
                    phases=trial.phases,
                    memory=self._with_peak(trial.variant, trial.memory),
                )
            )
        medians = [median(trial.batch_seconds) for trial in trials]
        self.paces[process] = (geometric_mean(medians), report.disturbance)

    def _outpaced(self) -> list[int]:
        """Processes in which every variant together was slower than in the quickest process.

        What slows all variants alike is the machine, whatever its counters say.
        """
        quickest = min(pace for pace, _ in self.paces.values())
        return [p for p, (pace, _) in self.paces.items() if pace > SLOW * quickest]

    def _drop(self, process: int) -> None:
        self.found.measurements = [m for m in self.found.measurements if m.process != process]
        self.redone.append(self.paces.pop(process)[1])

    def _disturbed(self, noise: SystemNoise) -> bool:
        preempted = noise.preemptions > PREEMPTIONS * self.threads
        return noise.steal > STEAL or noise.others > OTHERS or preempted

    def _time_for_another(self, cost: float) -> bool:
        """Whether one can be done again and the fewest processes still fit in the budget."""
        left = self.deadline - time.monotonic()
        missing = max(0, self.measure.processes - len(self.paces))
        return len(self.redone) < _REDONE_AT_MOST and left > cost * (missing + 1)

    def _with_peak(self, variant: str, memory: Any) -> Any:
        weighed = self.peaks.get(variant)
        fields = ("process_peak", "process_method", "device_allocated", "device_reserved")
        return memory.replace(**{f: getattr(weighed, f) for f in fields}) if weighed else memory

    def _note_failures(self, report: WorkerReport) -> None:
        """Leave out what failed; a config at fault ends the comparison."""
        for failure in report.failures:
            if failure.config_key is not None and len(self.variants) == 1:
                raise ConfigError(failure.error, failure.config_key)
            self.found.failures.append(failure)
        failed = {failure.variant for failure in report.failures}
        if "" in failed:  # it died before it came to any variant
            failed = {variant.name for variant in self.variants}
        self.variants = [variant for variant in self.variants if variant.name not in failed]

    def _enough(self, cost: float) -> bool:
        left, processes = self.deadline - time.monotonic(), len(self.paces)
        if processes < self.measure.processes:
            return left < cost and processes > 1
        return left < cost or all(self._settled(c) for c in self._comparisons())

    def _settled(self, found: Comparison) -> bool:
        """Whether more processes would add nothing to a verdict.

        A ratio near the edge of what counts as no difference takes half the width. To look at the
        verdict itself, and stop once it says something, would raise the rate of false alarms.
        """
        precision, width = self.measure.precision, found.relative_width
        clear = found.verdict == "no_difference" or abs(found.ratio - 1) >= 2 * precision
        return width <= (precision if clear else precision / 2)

    def _comparisons(self) -> list[Comparison]:
        return compare_measured(self.found.measurements, self.measure.precision)

    def finalize(self) -> SessionData:
        """What the processes so far amount to."""
        found, measure = self.found, self.measure
        found.comparisons = self._comparisons()
        widest = max((c.relative_width for c in found.comparisons), default=0.0)
        if widest > measure.precision:
            self._warn(
                "not_precise",
                f"the budget of {measure.budget:g} s was spent after "
                f"{pluralize(len(self.paces), 'process')}, before the intervals were as narrow as "
                f"{measure.precision:.1%}; raise measure.budget or quiet the machine",
            )
        if self.redone:
            others = max(noise.others for noise in self.redone)
            steal = max(noise.steal for noise in self.redone)
            switches = max(noise.preemptions for noise in self.redone)
            parts = {
                f"others used up to {others:.1f} processors": others >= 0.05,
                f"{steal:.0%} was stolen": steal >= 0.005,
                f"{switches:.0f} involuntary switches a second": switches > PREEMPTIONS,
            }
            seen = ", ".join(part for part, counts in parts.items() if counts)
            self._warn(
                "noisy_machine",
                f"{pluralize(len(self.redone), 'process')} measured again, because the machine "
                f"was slower or busier then{f' ({seen})' if seen else ''}",
            )
        for variant in dict.fromkeys(m.variant for m in found.measurements):
            memories = {
                (m.memory.forward_peak, m.memory.retained)
                for m in found.measurements
                if m.variant == variant
            }
            if len(memories) > 1:
                self._warn(
                    "memory_differs",
                    f"{variant}: tensor memory differs from process to process, so the model's "
                    "allocations are not deterministic; trust no single figure",
                )
        return found

    def _warn(self, code: str, text: str) -> None:
        self.found.warnings.append(Warning(code=code, text=text))


def sentence(failure: Failure) -> str:
    """A failure in words: which variant, at which batch, and why."""
    where = f"{failure.variant or 'a worker'}, batch {failure.batch}"
    return f"{where}: {failure.error}"
