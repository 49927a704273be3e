"""Search for the fastest setting: gates, races between lanes, and backward elimination.

Times come from lanes, so that the logic can be tested with planted speeds and a clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf
from statistics import median

import torch

from gradrun.comparison.lanes import Deviation, Lane, NotReady, deviation, lane_workers
from gradrun.comparison.turns import (
    BLOCK_SECONDS,
    MAX_WAITED,
    OpenLane,
    Turn,
    common_samples,
    is_disturbed,
    take_turns,
)
from gradrun.config.schema import RunConfig
from gradrun.core.errors import GradrunError, RunFailed, first_line
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.core.units import format_seconds
from gradrun.results import stats
from gradrun.results.stats import Estimate
from gradrun.results.trials import Outcome, Trial, TunePhases, describe_changes
from gradrun.tuning.constraints import P99_BATCHES, Constraints
from gradrun.tuning.facts import Facts, apply, gather_facts
from gradrun.tuning.moves import BUNDLED, MOVES, STEPS, Changes, Move, Step, applicable, merged

MIN_GAIN = 0.01
"""A setting that gains less is not worth a changed key."""

CLIMB_GAIN = 0.05
"""Gain below which a climbing move is not repeated."""

CLOSE = 0.04
"""Ratios this close to 1 are measured again in fresh processes."""

ROUNDS = 7
LEAST_ROUNDS = 3
"""Rounds before a race may end because its interval decides."""

CALIBRATION_SECONDS = 2.0
"""Time of the baseline for the calibration samples."""

_MAX_CALIBRATION = 4096
_SLOW = 3.0
_START_SHARE = 0.5
"""Share of the remaining time that a start may take; later starts find compiled code in caches."""
_CONFIRM_BLOCKS_SECONDS = 4.0
_CONFIRM_SHARE = 0.5
"""Greatest share of the budget that is kept for the confirmation."""

LATER_START = 0.25
"""A start that is longer by less than this share is as long; starts vary."""
_REFUSED: set[Outcome] = {"differs", "over_limit", "failed"}
_FRESH = 2
_FRESH_SHARE = 0.1
"""Share of the remaining time that one measurement in fresh processes may take."""

Gate = Callable[[RunConfig], str]
"""Another check of a config, that runs all data, such as its metrics: how it fails, or ""."""

SaveTrials = Callable[[Mapping[str, Trial]], None]
"""Saves the trials so far, by the identity of their configs."""


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
    """Its place in the list of trials; -1: the baseline."""
    speed: float = 1.0
    """Times as fast as the baseline."""


@dataclass
class Search:
    """The state of a search."""

    base: RunConfig
    constraints: Constraints
    open_lane: OpenLane
    moves: Sequence[Move] = field(default_factory=lambda: MOVES)
    gate: Gate | None = None
    now: Callable[[], float] = time.monotonic
    progress: ProgressCallback = ignore
    known: dict[str, Trial] = field(default_factory=dict)
    """Trials of an earlier run, by the identity of their configs. Those that failed or gained
    nothing are not repeated, but by the backward elimination, which has another rival."""
    save: SaveTrials = lambda _: None
    trials: list[Trial] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Moves that were not tried, with the reason."""
    gains: dict[str, Estimate] = field(default_factory=dict)
    """What leaving a key out costs, by key."""
    out_of_time: bool = False

    interrupted: bool = False
    """Whether Ctrl-C ended it; the leader is then the best of the settings that were measured."""

    def __post_init__(self) -> None:
        self.began = self.now()
        self.seen: dict[str, int] = {}
        self.lanes: list[Lane] = []
        self.gated = False
        """Whether `gate` ran, which runs the baseline at its first call."""
        self.facts: Facts
        self.leader: Candidate
        self.baseline: Candidate
        self.baseline_over = ""
        """How the baseline exceeds a limit of memory or latency, or ""."""
        self.spent = TunePhases()

    # --- the story -----------------------------------------------------------------------------

    def run(self) -> Candidate:
        """Search all steps, then leave out keys that do not pay.

        Returns:
            The best setting found, or the baseline; its lane is closed. After Ctrl-C, the best
            so far.

        Raises:
            GradrunError: the baseline cannot run.
            KeyboardInterrupt: before the baseline ran.
        """
        try:
            self._open_baseline()
            try:
                for step in STEPS:
                    self._explore(step)
                self._eliminate()
            except KeyboardInterrupt:
                self.interrupted = True
            return self.leader
        finally:
            for lane in self.lanes:
                lane.close()

    @property
    def left(self) -> float:
        """Seconds of the budget that are left, without those for the confirmation."""
        return self.constraints.tune.budget - (self.now() - self.began) - self._confirm_cost()

    def _confirm_cost(self) -> float:
        """Return the seconds to keep for a confirmation: starts from caches, and blocks."""
        starts = self.baseline.start + min(self.leader.start, 3 * self.baseline.start)
        blocks = max(_CONFIRM_BLOCKS_SECONDS, self._least_race())
        cost = self.constraints.measure.processes * (starts + blocks)
        if self.constraints.tune.p99_limit is not None:
            cost += P99_BATCHES * self.leader.lane.ready.batch_seconds
        return min(cost, _CONFIRM_SHARE * self.constraints.tune.budget)

    def _least_race(self) -> float:
        """Return the seconds of the shortest race, if a batch is as long as a block or longer."""
        batch = self.baseline.lane.ready.unit * self.per_sample
        return 2 * (2 + LEAST_ROUNDS) * batch if batch > BLOCK_SECONDS else 0.0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        began = self.now()
        try:
            yield
        finally:
            seconds: float = getattr(self.spent, phase) + self.now() - began
            self.spent = self.spent.replace(**{phase: seconds})

    def _open_baseline(self) -> None:
        self._report("baseline")
        lane = self._open(self.base, self.constraints.tune.budget)
        ready = lane.ready
        self.facts = gather_facts(self.base, lane, self.constraints)
        with self.timed("gates"):
            per_sample = max(lane.run(0, min(ready.unit, ready.samples)).seconds_per_sample, 1e-9)
            count = min(_MAX_CALIBRATION, int(CALIBRATION_SECONDS / per_sample), ready.samples // 2)
            first, last = common_samples([lane], max(1, count))
            self.calibration = (first, last)
            block = lane.run(first, last, rows=True)
            self.reference: tuple[dict[str, torch.Tensor], ...] = block.rows
        self.per_sample = block.seconds_per_sample
        limits = self.constraints
        self.baseline_over = limits.memory_violation(block.process_peak)
        self.baseline_over = self.baseline_over or limits.latency_violation([*block.batch_seconds])
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
            self._explore_bundle(step, usable)
            return
        for move in usable:
            while settings := move.settings(self._current_facts()):
                gain = self._race(step, settings)
                if not move.climbs or gain < CLIMB_GAIN:
                    break

    def _explore_bundle(self, step: Step, moves: Sequence[Move]) -> None:
        """Try the first settings of all moves together, then each exchanged, then each left out.

        Single moves mislead where they need each other: compiling an encoder may pay only without
        its fast path.
        """
        rows = [(m, s) for m in moves if (s := m.settings(self._current_facts()))]
        if not rows:
            return
        former = self.leader.changes
        picks: list[Changes] = [settings[0] for _, settings in rows]
        outcome = self._try(step, former | merged(picks))

        def exchange(place: int, setting: Changes) -> bool:
            """Try other picks, and keep them if they lead, or pass a check that these did not."""
            nonlocal picks, outcome
            changed = [*picks[:place], setting, *picks[place + 1 :]]
            found = self._try(step, former | merged(changed))
            kept = found == "faster" or (outcome in _REFUSED and found == "no_gain")
            if kept:
                picks, outcome = changed, found
            return kept

        for place, (move, settings) in enumerate(rows):
            for setting in settings[1:]:
                if not (move.ranked and outcome not in _REFUSED):
                    exchange(place, setting)
        for place in range(len(rows)):
            if sum(map(bool, picks)) < 2:
                break
            number = len(self.trials)
            if exchange(place, {}):
                self.gains.clear()  # they were those of other settings
            elif number < len(self.trials) and self.leader.changes == former | merged(picks):
                self._note_gain(picks[place], self.trials[number])

    def _current_facts(self) -> Facts:
        return replace(self.facts, config=self.leader.config, peak=self.leader.peak)

    # --- candidates ----------------------------------------------------------------------------

    def _race(self, step: Step, settings: Sequence[Changes]) -> float:
        """Try changes of the leader; the fastest becomes the leader.

        Returns:
            The gain over the former leader; 0 if none was faster.
        """
        former = self.leader
        for changes in settings:
            self._try(step, {**former.changes, **changes})
        return self.leader.speed / former.speed - 1

    def _try(self, step: Step, changes: Changes) -> Outcome:
        """Race a setting against the leader; if it is faster, it becomes the leader."""
        try:
            return self._race_leader(step, changes)
        finally:
            # Ctrl-C may have ended the start of a setting that has no trial yet.
            tried = {name: n for name, n in self.seen.items() if 0 <= n < len(self.trials)}
            self.save({name: self.trials[n] for name, n in tried.items()})

    def _race_leader(self, step: Step, changes: Changes) -> Outcome:
        count = len(self.trials)
        candidate = self._admit(step, changes)
        if candidate is None:
            return self.trials[-1].outcome if len(self.trials) > count else "no_gain"
        ratio = self._compare_with_leader(candidate)
        if ratio is None:
            return "failed"
        if ratio.value > 1 + MIN_GAIN and ratio.low > 1 - MIN_GAIN:
            self._replace_leader(candidate)
            return "faster"
        self._close(candidate.lane)
        self._drop(candidate, self._no_gain(ratio))
        return "no_gain"

    def _compare_with_leader(self, candidate: Candidate) -> Estimate | None:
        """Race a setting against the leader; None if it failed on samples after the calibration.

        Raises:
            GradrunError: the baseline fails too.
        """
        try:
            return self._compare(self.leader, candidate)
        except GradrunError as error:
            self._close(candidate.lane)
            self._mark(candidate, "failed", first_line(error))
        try:
            self._restart_leader()
        except GradrunError as error:
            if self.leader is self.baseline:
                raise
            self._mark(self.leader, "failed", first_line(error))
            self.leader = self.baseline
            self._restart_leader()
        return None

    def _restart_leader(self) -> None:
        """Start the leader again, which may be in the middle of a block, and check that it runs."""
        leader = self.leader
        self._close(leader.lane)
        leader.lane = self._open(leader.config, self.constraints.measure.timeout)
        with self.timed("races"):
            take_turns([leader.lane], common_samples([leader.lane], self.facts.samples))

    def _no_gain(self, ratio: Estimate) -> str:
        against = "the baseline"
        if self.leader.changes:
            against = describe_changes(self.leader.changes)
        text = f"{ratio.value:.2f} x as fast as {against}"
        if ratio.value <= 1 + MIN_GAIN:
            return text
        return f"{text}, but uncertain ({ratio.low:.2g} to {ratio.high:.2g})"

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
        known = self.known.get(identity)
        if known and known.outcome not in {"faster", "not_tried"}:
            self.trials.append(known.replace(step=step))
            return None
        if self.left < self.baseline.start + self._least_race():
            self.out_of_time = True
            self._add(step, changes, "not_tried", "the budget was spent")
            return None
        self._report(describe_changes(changes))
        try:
            lane = self._open(config, max(10.0, _START_SHARE * self.left))
        except NotReady as error:
            self._add(step, changes, "not_tried", f"{error}; a larger budget allows more")
            return None
        except GradrunError as error:
            self._add(step, changes, "failed", first_line(error))
            return None
        candidate = None
        try:
            with self.timed("gates"):
                candidate = self._gate(step, changes, config, lane)
        except RunFailed as error:
            self._add(step, changes, "failed", first_line(error), lane.start_seconds)
        if candidate is None:
            self._close(lane)
        return candidate

    def _gate(self, step: str, changes: Changes, config: RunConfig, lane: Lane) -> Candidate | None:
        """Check the speed of one batch, then outputs and memory."""
        start, place = lane.start_seconds, len(self.trials)
        seconds = lane.ready.batch_seconds / lane_workers(config)
        slow = seconds / lane.ready.batch_size / self.per_sample
        if slow > _SLOW and lane.ready.batch_seconds > 1e-3:  # unless it was disturbed
            again = lane.run(0, min(lane.ready.unit, lane.ready.samples))
            slow = min(slow, again.seconds_per_sample / self.per_sample)
            slow = 1.0 if again.waited > MAX_WAITED else slow
        if slow > _SLOW and lane.ready.batch_seconds > 1e-3:
            self._add(step, changes, "no_gain", f"a batch takes {slow:.0f} x as long", start)
            return None
        first, last = self.calibration
        _, end = common_samples([lane], last - first, first)
        block = lane.run(first, end, rows=True)
        found = self._deviation(block.rows)
        limits = self.constraints
        wrong = limits.violation(found)
        over = limits.memory_violation(block.process_peak)
        over = over or limits.latency_violation([*block.batch_seconds])
        late = ""
        if self.gate and not (wrong or over):
            late = self._late_gate()
            wrong = "" if late else self.gate(config)
        outcome: Outcome = "differs" if wrong else "over_limit" if over else "not_tried"
        reason = wrong or over or late or "its race did not end"
        self._add(step, changes, outcome, reason, start, block.process_peak, found)
        if wrong or over or late:
            return None
        return Candidate(changes, config, lane, start, found, block.process_peak, place)

    def _late_gate(self) -> str:
        """Return that the budget does not allow a run over all data, or ""; the first needs two."""
        seconds = self.facts.samples * self.per_sample * (1 if self.gated else 2)
        self.gated = self.gated or seconds <= self.left
        if seconds <= self.left:
            return ""
        self.out_of_time = True
        return (
            f"the metric takes {format_seconds(seconds)} over all data; a larger budget allows it"
        )

    def _deviation(self, rows: Sequence[dict[str, torch.Tensor]]) -> Deviation:
        measure = self.constraints.measure
        count = len(self.reference)
        if len(rows) < count:
            raise RunFailed(f"{len(rows)} outputs instead of {count}")
        return deviation(self.reference, rows[:count], rtol=measure.rtol, atol=measure.atol)

    # --- times ---------------------------------------------------------------------------------

    def _compare(self, one: Candidate, two: Candidate) -> Estimate:
        """Estimate time of `one` / time of `two`, with the start if it counts.

        A ratio close to 1, or one that is not clearly a gain, is measured again in fresh processes,
        whose memory layout differs. The ratio of a disturbed process is not used then.
        """
        began = self.now()
        ratio, disturbed = self._ratio(one, two)
        cost = one.start + two.start + self.now() - began
        values = [ratio.value]
        for _ in range(_FRESH):
            small = 1 - CLOSE < ratio.value < 1 + CLOSE
            unclear = ratio.low < 1 and ratio.value > 1 + MIN_GAIN
            costly = self.left * _FRESH_SHARE < cost
            if not (small or unclear or disturbed) or costly:
                break
            for candidate in (one, two):
                self._close(candidate.lane)
                candidate.lane = self._open(candidate.config, self.constraints.measure.timeout)
            again, still = self._ratio(one, two)
            values = [again.value] if disturbed else [*values, again.value]
            disturbed = still
            ratio = stats.mean_over_processes(values) if len(values) > 1 else again
        if two.trial >= 0:
            two.speed = one.speed * ratio.value
            self._note(two, one.speed, ratio)
        return ratio

    def _ratio(self, one: Candidate, two: Candidate) -> tuple[Estimate, bool]:
        """Race two lanes until the interval decides.

        Returns:
            The median of the ratios, and whether a lane was disturbed.
        """
        lanes = [one.lane, two.lane]
        window = common_samples(lanes, lanes[0].ready.samples)

        def ratios(turns: Sequence[Turn]) -> list[float]:
            jobs = [self._job_seconds(c, t) for c, t in zip((one, two), turns, strict=True)]
            return [a / b for a, b in zip(*jobs, strict=True)]

        def is_decided(turns: Sequence[Turn]) -> bool:
            if len(turns[0].blocks) < LEAST_ROUNDS:
                return False
            found = stats.mean_over_processes(ratios(turns))
            return found.high < 1 or found.low > 1 + CLOSE or self.left < 0

        with self.timed("races"):
            turns = take_turns(
                lanes, window, ROUNDS, seed=len(self.trials), enough=is_decided
            )  # fmt: skip
        two.peak = turns[1].peak or two.peak
        found = ratios(turns)
        # The median ignores a block that other programs disturbed.
        estimate = stats.mean_over_processes(found)
        return Estimate(median(found), estimate.low, estimate.high), is_disturbed(turns)

    def _job_seconds(self, candidate: Candidate, turn: Turn) -> list[float]:
        """Return the seconds of a job at the speed of each block.

        The start counts as far as it is longer than that of the baseline.
        """
        tune = self.constraints.tune
        samples = tune.samples or self.facts.samples
        usual = self.baseline.start
        later = candidate.start - usual
        start = 0.0 if tune.steady or later < LATER_START * usual else later
        return [start + samples * seconds for seconds in turn.seconds_per_sample]

    def _eliminate(self) -> None:
        """Leave out changed keys, last first, that do not pay."""
        for key in reversed([*self.leader.changes]):
            rest = {k: v for k, v in self.leader.changes.items() if k != key}
            if _needs(key, rest) or key in self.gains:
                continue
            known = self._known_gain(rest)
            if known and (known > 1 + CLOSE or not rest):
                self.gains[key] = Estimate(known, 0.0, inf)
                continue
            if not rest or self.left < self.baseline.start + self._least_race():
                continue
            without = self._readmit(rest)
            ratio = self._compare_with_leader(without) if without else None
            if without is None or ratio is None:
                continue
            gain = Estimate(1 / ratio.value, 1 / ratio.high, 1 / ratio.low if ratio.low else inf)
            if gain.value <= 1 + MIN_GAIN:
                self._drop(self.leader, f"{key} gains {gain.value - 1:.1%}, too little to change")
                self._replace_leader(without)
            else:
                self.gains[key] = gain
                self._close(without.lane)
                self._drop(without, f"{ratio.value:.2f} x as fast as the best")

    def _note_gain(self, keys: Iterable[str], without: Trial) -> None:
        """Note what leaving out some keys costs, from the race of the leader with that setting."""
        if not (without.ratio and without.low and without.high):
            return
        value, low, high = (
            self.leader.speed / r for r in (without.ratio, without.high, without.low)
        )
        if value > 1 + CLOSE:
            self.gains |= dict.fromkeys(keys, Estimate(value, low, high))

    def _known_gain(self, rest: Changes) -> float | None:
        """Return how much faster the leader was than a setting that was tried; None if untried."""
        known = self.seen.get(_identity_or_none(self.base, rest) or "")
        if known is None:
            return None
        measured = self.trials[known].ratio if known >= 0 else 1.0
        return self.leader.speed / measured if measured else None

    def _readmit(self, changes: Changes) -> Candidate | None:
        """Open a setting that may have been tried before."""
        if identity := _identity_or_none(self.base, changes):
            self.seen.pop(identity, None)
            self.known.pop(identity, None)
        return self._admit("backward", changes)

    # --- bookkeeping ---------------------------------------------------------------------------

    def _open(self, config: RunConfig, timeout: float) -> Lane:
        with self.timed("starts"):
            lane = self.open_lane(config, timeout)
        self.lanes.append(lane)
        return lane

    def _close(self, lane: Lane) -> None:
        lane.close()
        if lane in self.lanes:
            self.lanes.remove(lane)

    def _replace_leader(self, candidate: Candidate) -> None:
        self._close(self.leader.lane)
        self.leader = candidate
        self._mark(candidate, "faster")

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

    def _note(self, candidate: Candidate, speed: float, ratio: Estimate) -> None:
        """Record the speed of a candidate against the baseline, from that of its rival."""
        self.trials[candidate.trial] = self.trials[candidate.trial].replace(
            ratio=candidate.speed,
            low=speed * ratio.low,
            high=speed * ratio.high,
            process_peak=candidate.peak,
        )

    def _mark(self, candidate: Candidate, outcome: Outcome, reason: str = "") -> None:
        self.trials[candidate.trial] = self.trials[candidate.trial].replace(
            outcome=outcome, reason=reason
        )

    def _drop(self, candidate: Candidate, reason: str) -> None:
        self._mark(candidate, "no_gain", reason)

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
