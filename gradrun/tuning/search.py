"""Search for the fastest setting: gates, races between lanes, and backward elimination.

Times come from lanes, so that the logic can be tested with planted speeds and a clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch

from gradrun.comparison.lanes import Deviation, Lane, deviation, lane_workers
from gradrun.comparison.turns import OpenLane, Turn, common_samples, take_turns
from gradrun.config.schema import RunConfig
from gradrun.core.errors import GradrunError, RunFailed, first_line
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.results import stats
from gradrun.results.stats import Estimate
from gradrun.results.trials import Outcome, Trial, describe_changes
from gradrun.tuning.constraints import Constraints
from gradrun.tuning.facts import Facts, apply, gather_facts
from gradrun.tuning.moves import BUNDLED, MOVES, STEPS, Changes, Move, Step, applicable, bundles

MIN_GAIN = 0.01
"""A setting that gains less is not worth a changed key."""

CLIMB_GAIN = 0.05
"""Gain below which a climbing move is not repeated."""

CLOSE = 0.04
"""Ratios this close to 1 are measured again in fresh processes."""

ROUNDS = 5
CALIBRATION_SECONDS = 2.0
"""Time of the baseline for the calibration samples."""

_MAX_CALIBRATION = 4096
_SLOW = 3.0
_START_SHARE = 0.3
"""Share of the remaining time that a start may take."""
_CONFIRM_BLOCKS_SECONDS = 4.0
_MIN_PROCESSES = 5
_FRESH = 2
_FRESH_SHARE = 0.1
"""Share of the remaining time that one measurement in fresh processes may take."""

Gate = Callable[[RunConfig], str]
"""Another check of a config, such as its metrics: how it fails, or ""."""


@dataclass
class Candidate:
    """A setting with its lane."""

    changes: Changes
    config: RunConfig
    lane: Lane
    start: float
    """Seconds of the first start."""
    deviation: Deviation
    peak: int | None
    trial: int
    """Its place in the list of trials."""


@dataclass
class Search:
    """The state of a search."""

    base: RunConfig
    constraints: Constraints
    open_lane: OpenLane
    moves: Sequence[Move] = field(default_factory=lambda: MOVES)
    gate: Gate = lambda _: ""
    now: Callable[[], float] = time.monotonic
    progress: ProgressCallback = ignore
    trials: list[Trial] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Moves that were not tried, with the reason."""
    gains: dict[str, Estimate] = field(default_factory=dict)
    """What leaving a key out costs, by key."""
    out_of_time: bool = False

    def __post_init__(self) -> None:
        self.began = self.now()
        self.seen: dict[str, int] = {}
        self.lanes: list[Lane] = []
        self.facts: Facts
        self.leader: Candidate
        self.baseline: Candidate
        self.noise = 0.0

    # --- the story -----------------------------------------------------------------------------

    def run(self) -> Candidate:
        """Search all steps, then leave out keys that do not pay.

        Returns:
            The best setting found, or the baseline; its lane is closed.

        Raises:
            GradrunError: the baseline cannot run.
        """
        try:
            self._open_baseline()
            for step in STEPS:
                self._explore(step)
            self._eliminate()
            return self.leader
        finally:
            for lane in self.lanes:
                lane.close()

    @property
    def left(self) -> float:
        """Seconds of the budget that are left, without those for the confirmation."""
        return self.constraints.tune.budget - (self.now() - self.began) - self._confirm_cost()

    def _confirm_cost(self) -> float:
        """Return the seconds that a confirmation needs: starts from caches, and blocks."""
        starts = self.baseline.start + min(self.leader.start, 3 * self.baseline.start)
        return _MIN_PROCESSES * (starts + _CONFIRM_BLOCKS_SECONDS)

    def _open_baseline(self) -> None:
        self._report("baseline")
        lane = self._open(self.base, self.constraints.tune.budget)
        ready = lane.ready
        self.facts = gather_facts(self.base, lane, self.constraints)
        per_sample = max(lane.run(0, min(ready.unit, ready.samples)).seconds_per_sample, 1e-9)
        count = min(_MAX_CALIBRATION, int(CALIBRATION_SECONDS / per_sample), ready.samples // 2)
        first, last = common_samples([lane], max(1, count))
        self.calibration = (first, last)
        block = lane.run(first, last, rows=True)
        self.reference: tuple[dict[str, torch.Tensor], ...] = block.rows
        self.per_sample = block.seconds_per_sample
        same = self._deviation(self.reference)
        self.baseline = Candidate(
            {}, self.base, lane, lane.start_seconds, same, block.process_peak, -1
        )
        self.leader = self.baseline
        self.seen[_identity(self.base)] = -1

    def _explore(self, step: Step) -> None:
        moves = [move for move in self.moves if move.step == step]
        usable: list[Move] = []
        for move, reason in applicable(moves, self._current_facts()):
            if reason:
                self.skipped.setdefault(move.name, reason)
            else:
                usable.append(move)
        if step == BUNDLED:
            alternatives = [s for move in usable if (s := move.settings(self._current_facts()))]
            if alternatives:
                self._race(step, [*bundles(alternatives)])
            return
        for move in usable:
            while settings := move.settings(self._current_facts()):
                gain = self._race(step, settings)
                if not move.climbs or gain < CLIMB_GAIN:
                    break

    def _current_facts(self) -> Facts:
        return replace(self.facts, config=self.leader.config)

    # --- candidates ----------------------------------------------------------------------------

    def _race(self, step: Step, settings: Sequence[Changes]) -> float:
        """Try changes of the leader; the fastest becomes the leader.

        Returns:
            The gain over the former leader; 0 if none was faster.
        """
        former, total = self.leader, 1.0
        for changes in settings:
            candidate = self._admit(step, {**former.changes, **changes})
            if candidate is None:
                continue
            ratio = self._compare(self.leader, candidate)
            if ratio.value > 1 + MIN_GAIN:
                total *= ratio.value
                self._replace_leader(candidate)
            else:
                self._close(candidate.lane)
                self._drop(candidate, self._no_gain(ratio))
        return total - 1

    def _no_gain(self, ratio: Estimate) -> str:
        against = "the baseline"
        if self.leader.changes:
            against = describe_changes(self.leader.changes)
        return f"{ratio.value:.2f} x as fast as {against}"

    def _admit(self, step: str, changes: Changes) -> Candidate | None:
        """Open a setting and check it before it is timed; None if it is dropped."""
        try:
            config = apply(self.base, changes)
        except GradrunError as error:
            self._add(step, changes, "failed", first_line(error))
            return None
        identity = _identity(config)
        if identity in self.seen:
            return None
        self.seen[identity] = len(self.trials)
        if self.left < self.baseline.start:
            self.out_of_time = True
            self._add(step, changes, "not_tried", "the budget was spent")
            return None
        self._report(describe_changes(changes))
        try:
            lane = self._open(config, max(10.0, _START_SHARE * self.left))
        except GradrunError as error:
            self._add(step, changes, "failed", first_line(error))
            return None
        candidate = self._gate(step, changes, config, lane)
        if candidate is None:
            self._close(lane)
        return candidate

    def _gate(self, step: str, changes: Changes, config: RunConfig, lane: Lane) -> Candidate | None:
        """Check the speed of one batch, then outputs and memory."""
        start, place = lane.start_seconds, len(self.trials)
        seconds = lane.ready.batch_seconds / lane_workers(config)
        slow = seconds / lane.ready.batch_size / self.per_sample
        if slow > _SLOW and lane.ready.batch_seconds > 1e-3:
            self._add(step, changes, "no_gain", f"a batch takes {slow:.0f} x as long", start)
            return None
        first, last = self.calibration
        _, end = common_samples([lane], last - first, first)
        try:
            block = lane.run(first, end, rows=True)
            found = self._deviation(block.rows)
        except GradrunError as error:
            self._add(step, changes, "failed", first_line(error), start)
            return None
        limits = self.constraints
        wrong = limits.violation(found)
        over = limits.memory_violation(block.process_peak)
        over = over or limits.latency_violation([*block.batch_seconds])
        wrong = wrong or ("" if over else self.gate(config))
        outcome: Outcome = "differs" if wrong else "over_limit" if over else "faster"
        reason = wrong or over
        self._add(step, changes, outcome, reason, start, block.process_peak, found)
        if reason:
            return None
        return Candidate(changes, config, lane, start, found, block.process_peak, place)

    def _deviation(self, rows: Sequence[dict[str, torch.Tensor]]) -> Deviation:
        measure = self.constraints.measure
        count = len(self.reference)
        if len(rows) < count:
            raise RunFailed(f"{len(rows)} outputs instead of {count}")
        return deviation(self.reference, rows[:count], rtol=measure.rtol, atol=measure.atol)

    # --- times ---------------------------------------------------------------------------------

    def _compare(self, one: Candidate, two: Candidate) -> Estimate:
        """Estimate time of `one` / time of `two`, with the start if it counts.

        A close ratio is measured again in fresh processes, whose memory layout differs.
        """
        ratios, ratio = self._ratios(one, two)
        for _ in range(_FRESH):
            far = not 1 - CLOSE < ratio.value < 1 + CLOSE
            clear = far and not ratio.low < 1 < ratio.high
            if clear or self.left * _FRESH_SHARE < one.start + two.start:
                break
            for candidate in (one, two):
                self._close(candidate.lane)
                candidate.lane = self._open(candidate.config, self.constraints.measure.timeout)
            more, _ = self._ratios(one, two)
            ratios += more
            ratio = stats.mean_over_processes(ratios)
        return ratio

    def _ratios(self, one: Candidate, two: Candidate) -> tuple[list[float], Estimate]:
        """Race two lanes and the baseline; note the speed of the second against the baseline."""
        racers = [one, two] if one is self.baseline else [self.baseline, one, two]
        lanes = [racer.lane for racer in racers]
        window = common_samples(lanes, lanes[0].ready.samples)
        turns = take_turns(lanes, window, ROUNDS, seed=len(self.trials))
        jobs = [self._job_seconds(r, t) for r, t in zip(racers, turns, strict=True)]
        ratios = [a / b for a, b in zip(jobs[-2], jobs[-1], strict=True)]
        against = [a / b for a, b in zip(jobs[0], jobs[-1], strict=True)]
        self._note(two, stats.mean_over_processes(against), turns[-1])
        estimate = stats.mean_over_processes(ratios)
        # The median ignores a block that other programs disturbed.
        middle = Estimate(median(ratios), estimate.low, estimate.high)
        return [middle.value], middle

    def _job_seconds(self, candidate: Candidate, turn: Turn) -> list[float]:
        """Return the seconds of a job at the speed of each block."""
        tune = self.constraints.tune
        samples = tune.samples or self.facts.samples
        start = 0.0 if tune.steady else candidate.start
        return [start + samples * seconds for seconds in turn.seconds_per_sample]

    def _eliminate(self) -> None:
        """Leave out changed keys, last first, that do not pay."""
        for key in reversed([*self.leader.changes]):
            rest = {k: v for k, v in self.leader.changes.items() if k != key}
            if not rest or _needs(key, rest) or self.left < self.baseline.start:
                continue
            known = self.seen.get(_identity_or_none(self.base, rest) or "")
            if known is not None and known >= 0:
                measured, best = self.trials[known].ratio, self.trials[self.leader.trial].ratio
                if measured and best and best / measured > 1 + CLOSE:
                    self.gains[key] = Estimate(best / measured, 0.0, float("inf"))
                    continue
            without = self._readmit(rest)
            if without is None:
                continue
            cost = self._compare(without, self.leader)
            if cost.value <= 1 + MIN_GAIN:
                self._drop(self.leader, f"{key} gains {cost.value - 1:.1%}, too little to change")
                self._replace_leader(without)
            else:
                self.gains[key] = cost
                self._close(without.lane)
                self._drop(without, f"{1 / cost.value:.2f} x as fast as the best")

    def _readmit(self, changes: Changes) -> Candidate | None:
        """Open a setting that may have been tried before."""
        if identity := _identity_or_none(self.base, changes):
            self.seen.pop(identity, None)
        return self._admit("backward", changes)

    # --- bookkeeping ---------------------------------------------------------------------------

    def _open(self, config: RunConfig, timeout: float) -> Lane:
        lane = self.open_lane(config, timeout)
        self.lanes.append(lane)
        return lane

    def _close(self, lane: Lane) -> None:
        lane.close()
        self.lanes.remove(lane)

    def _replace_leader(self, candidate: Candidate) -> None:
        if self.leader is not self.baseline:
            self._close(self.leader.lane)
        self.leader = candidate

    def _add(
        self,
        step: str,
        changes: Changes,
        outcome: Outcome,
        reason: str = "",
        start: float | None = None,
        peak: int | None = None,
        found: Deviation | None = None,
    ) -> None:
        self.trials.append(
            Trial(
                step=step,
                changes=changes,
                outcome=outcome,
                reason=reason,
                start_seconds=start,
                process_peak=peak,
                bitwise=found.bitwise if found else None,
                max_abs=found.max_abs if found else None,
                max_rel=found.max_rel if found else None,
                cosine=found.cosine if found else None,
                top1=found.top1 if found else None,
            )
        )

    def _note(self, candidate: Candidate, ratio: Estimate, turn: Turn) -> None:
        """Record the speed of a candidate against the baseline."""
        self.trials[candidate.trial] = self.trials[candidate.trial].replace(
            ratio=ratio.value, low=ratio.low, high=ratio.high, process_peak=turn.peak
        )

    def _drop(self, candidate: Candidate, reason: str) -> None:
        self.trials[candidate.trial] = self.trials[candidate.trial].replace(
            outcome="no_gain", reason=reason
        )

    def _report(self, stage: str) -> None:
        spent = int(self.now() - self.began)
        budget = int(self.constraints.tune.budget)
        self.progress(Progress(f"trying {stage}"[:70], min(spent, budget), budget))


def _identity(config: RunConfig) -> str:
    return json.dumps(config.model_dump(mode="json", exclude={"tune"}), sort_keys=True)


def _identity_or_none(base: RunConfig, changes: Changes) -> str | None:
    try:
        return _identity(apply(base, changes))
    except GradrunError:
        return None


def _needs(key: str, rest: Changes) -> bool:
    """Whether another change is below the key, such as model.compile.mode below model.compile."""
    return any(other.startswith(f"{key}.") for other in rest)
