"""Confirm a setting against the baseline in fresh processes, on other samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from statistics import median

from gradrun.comparison.lanes import Deviation, Lane, deviation
from gradrun.comparison.session import is_precise
from gradrun.comparison.turns import (
    ROUNDS,
    Turn,
    common_samples,
    is_disturbed,
    lane_measurement,
    take_turns,
)
from gradrun.core.errors import GradrunError
from gradrun.core.progress import Progress
from gradrun.core.units import format_seconds
from gradrun.results import stats
from gradrun.results.ratios import compare_measured
from gradrun.results.result import Measurement
from gradrun.results.stats import Estimate
from gradrun.tuning.constraints import P99_BATCHES
from gradrun.tuning.search import LATER_START, LEAST_ROUNDS, Candidate, Search

BASELINE, TUNED = "baseline", "tuned"

_CHECKED = 2000
"""Samples whose outputs are compared, if they take at most this share of the budget.

More where the share `top1` needs them.
"""
_CHECKED_SHARE = 0.05
_MIN_CHECKED_SECONDS = 5.0
_WINDOWS = 8
_LEAST_PROCESSES = 3
"""Fewer processes decide nothing; up to these, the budget may be exceeded a little."""

_MOST_OVER = 0.5
"""Share of the budget by which the least processes may exceed it."""

_MAX_P99_BLOCKS = 200


@dataclass
class Confirmation:
    """The outcome for one setting."""

    candidate: Candidate
    measurements: list[Measurement] = field(default_factory=list)
    deviation: Deviation | None = None
    starts: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of the baseline's and the candidate's start in each process."""
    repeated: int = 0
    """Processes that were disturbed and not used."""
    batch_seconds: list[float] = field(default_factory=list)
    ratio: Estimate = field(default_factory=lambda: Estimate(1.0, 0.0, math.inf))
    refused: str = ""
    """Why the setting cannot be used."""
    undecided: str = ""
    """Why the measurement cannot tell."""

    @property
    def accepted(self) -> bool:
        """Whether the setting is faster and keeps all limits."""
        return not (self.refused or self.undecided)

    @property
    def break_even(self) -> int | None:
        """Samples after which the longer start from caches has paid; None if it never does."""
        base, tuned = (
            median(median(m.seconds_per_sample) for m in group) for group in self._groups()
        )
        later = median(two - one for one, two in self.starts)
        if later <= LATER_START * median(one for one, _ in self.starts):
            return 0
        return math.ceil(later / (base - tuned)) if tuned < base else None

    def _groups(self) -> tuple[list[Measurement], list[Measurement]]:
        return (
            [m for m in self.measurements if m.variant == BASELINE],
            [m for m in self.measurements if m.variant == TUNED],
        )


def confirm(search: Search, candidate: Candidate, *, strict: bool = False) -> Confirmation:
    """Measure a setting against the baseline in `measure.processes` fresh processes or more.

    If the budget ends before, fewer processes are enough for an interval that excludes small gains.

    Args:
        strict: use half the error rate, for a second attempt.
    """
    found = Confirmation(candidate)
    measure, tune = search.constraints.measure, search.constraints.tune
    done, cost = 0, 0.0
    while not found.refused:
        search.progress(Progress("confirming", done, max(done + 1, measure.processes)))
        began = search.now()
        left = tune.budget - (began - search.began)
        missing = max(0, _LEAST_PROCESSES - done)
        too_long = missing * cost - left > _MOST_OVER * tune.budget
        if done and left < cost and (not missing or too_long):
            break
        try:
            with search.timed("confirmation"):
                _measure_process(search, found, done, max(0.0, left))
        except GradrunError as error:
            found.refused = f"failed in a fresh process: {error}"
            break
        if found.refused:
            break
        cost = search.now() - began
        done = len(found.starts)
        if not done:
            continue
        found.ratio = _ratio(found, strict=strict)
        if done >= measure.processes and all(
            is_precise(c, measure.precision)
            for c in compare_measured(found.measurements, measure.precision)
        ):
            break
    if not found.refused:
        _judge(search, found, done)
    return found


def _measure_process(search: Search, found: Confirmation, process: int, left: float) -> None:
    """Start both again, check the candidate's outputs once, and race them.

    Args:
        left: seconds for this process and those after it; long blocks are fewer.
    """
    measure = search.constraints.measure
    deadline = search.now() + left / max(1, measure.processes - process)

    def is_late(turns: Sequence[Turn]) -> bool:
        return len(turns[0].blocks) >= LEAST_ROUNDS and search.now() > deadline

    timeout = measure.timeout
    with ExitStack() as stack:
        base, tuned = lanes = [
            stack.enter_context(closing(search.open_lane(config, timeout)))
            for config in (search.base, found.candidate.config)
        ]
        if not found.deviation:
            _check_outputs(search, found, lanes)
            if found.refused:
                return
        window = common_samples(lanes, base.ready.samples, search.calibration[1])
        turns = take_turns(lanes, window, ROUNDS, seed=process, enough=is_late)
        spent = search.now() - search.began > search.constraints.tune.budget
        again = not spent and found.repeated < measure.processes
        if is_disturbed(turns) and again:
            found.repeated += 1
            return
        found.starts.append((base.start_seconds, tuned.start_seconds))
        for name, turn in zip((BASELINE, TUNED), turns, strict=True):
            found.measurements.append(lane_measurement(name, process, turn))
        found.batch_seconds += (s for block in turns[1].blocks for s in block.batch_seconds)
        _check_limits(search, found, turns[1], deadline)


def _check_outputs(search: Search, found: Confirmation, lanes: Sequence[Lane]) -> None:
    seconds = max(_MIN_CHECKED_SECONDS, _CHECKED_SHARE * search.constraints.tune.budget)
    needed = 2 * search.constraints.least_samples
    count = min(max(_CHECKED, needed), max(1, int(seconds / search.per_sample)))
    windows = _spread(lanes, count, search.calibration[1])
    base, tuned = (
        [row for window in windows for row in lane.run(*window, rows=True).rows] for lane in lanes
    )
    measure = search.constraints.measure
    found.deviation = deviation(base, tuned, rtol=measure.rtol, atol=measure.atol)
    found.refused = search.constraints.violation(found.deviation)


def _spread(lanes: Sequence[Lane], count: int, start: int) -> list[tuple[int, int]]:
    """Return windows of about `count` samples together, spread over the data from `start` on.

    A failure may concern one part of data that are sorted.
    """
    samples = lanes[0].ready.samples
    start = start if start < samples else 0
    step = (samples - start) / _WINDOWS
    windows: list[tuple[int, int]] = []
    for part in range(_WINDOWS):
        window = common_samples(lanes, max(1, count // _WINDOWS), start + int(part * step))
        if not windows or window[0] >= windows[-1][1]:
            windows.append(window)
    return windows


def _check_limits(search: Search, found: Confirmation, turn: Turn, deadline: float) -> None:
    constraints = search.constraints
    if constraints.tune.p99_limit is not None:
        for number in range(_MAX_P99_BLOCKS):
            if search.now() > deadline or len(found.batch_seconds) >= P99_BATCHES:
                break
            found.batch_seconds += turn.run(number).batch_seconds
    found.refused = constraints.memory_violation(turn.peak)
    if not found.refused and len(found.batch_seconds) >= P99_BATCHES:
        found.refused = constraints.latency_violation(found.batch_seconds)


def _ratio(found: Confirmation, *, strict: bool) -> Estimate:
    base, tuned = found._groups()
    ratios = [
        stats.paired_ratio(one.seconds_per_sample, two.seconds_per_sample)
        for one, two in zip(base, tuned, strict=True)
    ]
    return stats.mean_over_processes(ratios, strict=strict)


def _judge(search: Search, found: Confirmation, done: int) -> None:
    """Decide from the interval, and from the start if it counts."""
    measure, tune = search.constraints.measure, search.constraints.tune
    assert found.deviation
    verdict = stats.verdict(found.ratio, measure.precision)
    if verdict in {"slower", "no_difference"}:
        found.refused = f"{found.ratio.value:.3f} x as fast as the baseline in fresh processes"
    elif done < measure.processes and found.ratio.low <= 1 + measure.precision:
        found.undecided = f"the budget was spent after {done} of {measure.processes} processes"
    elif found.ratio.low <= 1 + measure.precision:
        low, high = found.ratio.low, found.ratio.high
        found.refused = (
            f"{low:.2f} to {high:.2f} x as fast in fresh processes, which does not exclude a gain "
            f"below {measure.precision:.1%}"
        )
    elif reason := search.constraints.undecided(found.deviation):
        found.undecided = reason
    elif tune.p99_limit is not None and len(found.batch_seconds) < P99_BATCHES:
        found.undecided = (
            f"{len(found.batch_seconds)} batches do not bound the 99th percentile; "
            f"{P99_BATCHES} are needed"
        )
    elif not tune.steady:
        samples = tune.samples or search.facts.samples
        needed = found.break_even
        if needed is None or needed > samples:
            later = median(two - one for one, two in found.starts)
            pays = f"pays after {needed:,} samples" if needed else "never pays"
            found.refused = (
                f"{found.ratio.value:.2f} x as fast, but it starts {format_seconds(later)} later, "
                f"which {pays}; the job has {samples:,} (--steady ignores the start, --samples "
                "sets the size of a job)"
            )
