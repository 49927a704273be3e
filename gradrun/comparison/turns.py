"""Time variants alternately, each in processes of its own, until their ratios are precise."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from gradrun.comparison.lanes import Block, Lane, deviation, lane_workers, open_lane
from gradrun.comparison.session import RoundSession, SessionData, Variant
from gradrun.config.run import MeasureSection
from gradrun.config.schema import RunConfig
from gradrun.core.errors import GradrunError
from gradrun.inference.meters import process_memory
from gradrun.results.result import Measurement, Phases, Warning

BLOCK_SECONDS = 0.2
"""Duration of a block; switching to another process costs a few milliseconds of cold caches."""

MAX_WAITED = 0.04
"""A block is repeated if a thread waited for a CPU for more than this share of it."""

ROUNDS = 7
"""Blocks of each variant in one process."""

_WORKER_UNITS = 4
"""Least units of a task for each of several workers, which then end at about the same time."""

_SPREAD = (math.sqrt(5) - 1) / 2
"""Part of the window between one task and the next. Multiples of the golden ratio,
modulo 1, leave no large gap, however many there are.
"""

_MAX_REPEATED = 2
_MAX_TASKS = 50
_MAX_COMPARED = 256

OpenLane = Callable[[RunConfig, float], Lane]
"""Opens a lane for a config within some seconds."""


@dataclass
class Turn:
    """A lane with its share of a window of samples, and the blocks that it ran."""

    lane: Lane
    window: tuple[int, int]
    count: int = 0
    """Samples of one task."""
    tasks: int = 1
    """Tasks of one block; several if the window is short."""
    blocks: list[Block] = field(default_factory=list)
    peak: int | None = None

    @property
    def seconds_per_sample(self) -> list[float]:
        """One entry per block."""
        return [block.seconds_per_sample for block in self.blocks]

    def run(self, number: int) -> Block:
        """Run the tasks of block `number`, each from its own place in the window.

        Any number of blocks is spread over the whole window: data may be sorted by length.
        """
        first, last = self.window
        places = max(1, (last - first) // self.count)
        tasks = range(number * self.tasks, (number + 1) * self.tasks)
        starts = [first + int(task * _SPREAD % 1 * places) * self.count for task in tasks]
        parts = [self.lane.run(start, min(last, start + self.count)) for start in starts]
        self.peak = parts[-1].process_peak
        if len(parts) == 1:
            return parts[0]
        return Block(
            samples=sum(part.samples for part in parts),
            seconds=sum(part.seconds for part in parts),
            waited=max(part.waited for part in parts),
            batch_seconds=tuple(s for part in parts for s in part.batch_seconds),
            process_peak=self.peak,
        )

    @property
    def least(self) -> int:
        """The least samples of a task, of which it has a multiple: work for all workers."""
        workers = lane_workers(self.lane.config)
        return self.lane.ready.unit * (workers * _WORKER_UNITS if workers > 1 else 1)

    def plan(self, count: int, seconds: float, per_sample: float) -> None:
        """Set the samples of a task, rounded up to a multiple of `least`, and those of a block."""
        first, last = self.window
        self.count = min(last - first, -(-count // self.least) * self.least)
        self.tasks = min(_MAX_TASKS, max(1, math.ceil(seconds / (self.count * per_sample) - 0.5)))


def take_turns(
    lanes: Sequence[Lane],
    window: tuple[int, int],
    rounds: int = ROUNDS,
    *,
    seed: int = 0,
    seconds: float | None = None,
    enough: Callable[[Sequence[Turn]], bool] = lambda _: False,
) -> list[Turn]:
    """Run blocks of all lanes in random order, after one that is not kept.

    Texts of unequal length: all lanes run the same samples. Others: each as many as fill a block.

    Args:
        window: the first sample and the end of the samples to use; every lane can start there.
        enough: whether the blocks so far decide, asked after each round.
    """
    seconds = BLOCK_SECONDS if seconds is None else seconds
    turns = [Turn(lane, window) for lane in lanes]
    for turn in turns:
        turn.count = min(window[1] - window[0], turn.least)
        # The first run after another process finds cold caches and sleeping threads.
        turn.run(0)
    speeds = [max(turn.run(0).seconds_per_sample, 1e-9) for turn in turns]
    counts = [math.ceil(seconds / speed) for speed in speeds]
    if any(lane.ready.varies for lane in lanes):
        unit = math.lcm(*(turn.least for turn in turns))
        counts = [-(-min(counts) // unit) * unit] * len(lanes)
        seconds = 0.0
    for turn, count, speed in zip(turns, counts, speeds, strict=True):
        turn.plan(count, seconds, speed)
    order = random.Random(seed)  # noqa: S311
    for number in range(rounds):
        for turn in order.sample(turns, len(turns)):
            turn.blocks.append(_quiet_block(turn, number))
        if enough(turns):
            break
    return turns


def is_disturbed(turns: Sequence[Turn]) -> bool:
    """Whether threads of a lane waited for a CPU in most of its blocks.

    Two threads that share a CPU wait for each other at every small operator, and may do so for the
    life of a process.
    """
    return any(median(block.waited for block in turn.blocks) > MAX_WAITED for turn in turns)


def _quiet_block(turn: Turn, number: int) -> Block:
    """Run a block; repeat one whose threads waited for a CPU, and return the quietest."""
    best = turn.run(number)
    for _ in range(_MAX_REPEATED):
        if best.waited <= MAX_WAITED:
            break
        best = min(best, turn.run(number), key=lambda block: block.waited)
    return best


def common_samples(lanes: Sequence[Lane], wanted: int, start: int = 0) -> tuple[int, int]:
    """Return a window of about `wanted` samples from `start` that all lanes can cut.

    Its length is a multiple of every lane's unit, or it ends with the data.
    """
    samples = lanes[0].ready.samples
    unit = math.lcm(*(lane.ready.unit for lane in lanes))
    first = min(start // unit * unit, max(0, samples - 1) // unit * unit)
    return first, min(samples, first + -(-wanted // unit) * unit)


class TurnSession(RoundSession):
    """Starts all variants again in each round, and times them alternately."""

    stage, noun = "timing processes alternately", "process"

    def __init__(
        self, variants: Sequence[Variant], measure: MeasureSection, open_variant: OpenLane
    ) -> None:
        super().__init__(variants, measure)
        self.open_variant = open_variant
        self.waited: list[float] = []
        self.repeated = 0

    def run_round(self) -> None:
        count = len(self.variants)
        with self._lanes() as lanes:
            if len(lanes) == count:
                self._measure(lanes)

    @contextmanager
    def _lanes(self) -> Iterator[list[Lane]]:
        """Open the lanes of all variants; one that fails is dropped from the session."""
        lanes: list[Lane] = []
        try:
            for variant in list(self.variants):
                try:
                    lanes.append(self.open_variant(variant.config, self.measure.timeout))
                except GradrunError as error:
                    self.drop(variant, error)
            yield lanes
        finally:
            for lane in lanes:
                lane.close()

    def _measure(self, lanes: Sequence[Lane]) -> None:
        window = common_samples(lanes, lanes[0].ready.samples)
        try:
            if not self.rounds:
                self._compare_outputs(lanes)
            turns = take_turns(lanes, window, seed=self.rounds)
        except GradrunError as error:  # the model failed on a later batch, in every variant
            for variant in self.variants[1:]:
                self.drop(variant, error)
            return
        in_time = time.monotonic() < self.deadline
        if in_time and is_disturbed(turns) and self.repeated < self.measure.processes:
            self.repeated += 1
            return
        self.data.environment = self.data.environment or lanes[0].ready.environment
        self.waited += (block.waited for turn in turns for block in turn.blocks)
        for variant, turn in zip(self.variants, turns, strict=True):
            self.data.measurements.append(lane_measurement(variant.name, self.rounds, turn))
        self.rounds += 1

    def _compare_outputs(self, lanes: Sequence[Lane]) -> None:
        start, stop = common_samples(lanes, min(_MAX_COMPARED, lanes[0].ready.samples))
        base, *others = (lane.run(start, stop, rows=True).rows for lane in lanes)
        for variant, rows in zip(self.variants[1:], others, strict=True):
            found = deviation(base, rows, rtol=self.measure.rtol, atol=self.measure.atol)
            equal = found.bitwise or found.close
            self.add_equivalence(
                variant, bitwise=found.bitwise, max_abs_diff=found.max_abs, equal=equal
            )

    def finalize(self, *, interrupted: bool = False) -> SessionData:
        data = super().finalize(interrupted=interrupted)
        if self.waited and median(self.waited) > MAX_WAITED:
            text = f"threads waited for a CPU for {median(self.waited):.0%} of half of the blocks "
            text += "or more; close other programs"
            data.warnings.append(Warning(code="noisy_machine", text=text))
        return data


def lane_measurement(variant: str, process: int, turn: Turn) -> Measurement:
    """Return the blocks of a lane as the rounds of a measurement."""
    lane, ready = turn.lane, turn.lane.ready
    before = ready.load_seconds + ready.open_seconds + ready.first_batch_seconds
    size, (_, method) = ready.batch_size, process_memory.peak_resident()
    return Measurement(
        mode=lane.config.run.mode,
        variant=variant,
        process=process,
        batch_seconds=tuple(size * seconds for seconds in turn.seconds_per_sample),
        batch_sizes=(size,) * len(turn.blocks),
        phases=Phases(
            load_model=ready.load_seconds,
            open_data=ready.open_seconds,
            first_batch=ready.first_batch_seconds,
            warm_up=max(0.0, lane.start_seconds - before),
            forward=sum(block.seconds for block in turn.blocks),
        ),
        memory=ready.memory.replace(process_peak=turn.peak, process_method=method),
    )


def turn_session(
    variants: Sequence[Variant], config: RunConfig, *, trust_code: bool
) -> TurnSession:
    """Return a session whose lanes are processes."""
    return TurnSession(
        variants,
        config.measure,
        lambda variant, timeout: open_lane(variant, trust_code=trust_code, timeout=timeout),
    )
