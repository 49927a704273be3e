"""Lanes without processes: planted speeds and outputs, or workers in the test's process."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from gradrun.comparison import lanes
from gradrun.comparison.lanes import Block
from gradrun.config.schema import RunConfig
from gradrun.engines.messages import Open, Ready
from gradrun.results.result import Memory
from tests.support.engines import InlineEngine
from tests.support.run_results import MACHINE


@dataclass
class Planted:
    """The behavior of a setting."""

    seconds: float = 0.001
    """Per sample."""
    start: float = 2.0
    peak: int = 100 * 2**20
    noise: float = 0.0
    """Standard deviation of the logarithm of a block's time."""
    process_noise: float = 0.0
    """The same, of the whole process."""
    disturbed: float = 0.0
    """Share of the processes that take ten times as long, and whose threads wait for a CPU."""
    output: Callable[[int], float] = lambda sample: 1.0 + sample % 7
    cost: Callable[[int], float] = lambda sample: 1.0
    """Factor of the time of the block that starts at a sample."""
    fails: str = ""
    """Error of its start."""
    check: Callable[[int, int], None] = lambda start, stop: None
    """Called with the samples of each block; may raise."""


@dataclass
class Clock:
    """The time of planted lanes."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class PlantedLane:
    """A lane of a planted setting."""

    config: RunConfig
    planted: Planted
    ready: Ready
    clock: Clock
    random: random.Random
    start_seconds: float = 0.0
    closed: bool = False
    factor: float = field(init=False)
    waited: float = field(init=False)

    def __post_init__(self) -> None:
        self.start_seconds = self.planted.start
        self.factor = self.random.lognormvariate(0, self.planted.process_noise)
        self.waited = 0.0
        if self.planted.disturbed and self.random.random() < self.planted.disturbed:
            self.factor *= 10
            self.waited = 0.5

    def run(self, start: int, stop: int, *, rows: bool = False) -> Block:
        assert not self.closed
        assert start % self.ready.unit == 0
        assert stop % self.ready.unit == 0 or stop == self.ready.samples
        self.planted.check(start, stop)
        factor = self.factor * self.random.lognormvariate(0, self.planted.noise)
        seconds = (stop - start) * self.planted.seconds * factor * self.planted.cost(start)
        self.clock.now += seconds
        batches = -(-(stop - start) // self.ready.batch_size)
        outputs = ({"y": torch.tensor([self.planted.output(i), 0.5])} for i in range(start, stop))
        return Block(
            samples=stop - start,
            seconds=seconds,
            waited=self.waited,
            batch_seconds=(seconds / batches,) * batches,
            process_peak=self.planted.peak,
            rows=tuple(outputs) if rows else (),
        )

    def close(self) -> None:
        self.closed = True


def planted_ready(config: RunConfig, **changes: Any) -> Ready:
    """Return the first message of a planted lane."""
    given: dict[str, Any] = {
        "node": "here",
        "environment": MACHINE,
        "files": {},
        "checksum": 0,
        "load_seconds": 0.1,
        "open_seconds": 0.1,
        "first_batch_seconds": 0.1,
        "batch_seconds": 0.001,
        "samples": config.data.samples,
        "batch_size": config.data.batch_size,
        "unit": config.data.batch_size,
        "memory": Memory(weights=1000, inputs=100),
        "modules": {"Linear": 2},
    }
    return Ready(**given | changes)


def inline_lanes(monkeypatch: pytest.MonkeyPatch) -> list[InlineEngine]:
    """Run the workers of lanes in the test's process; return their engines as they are started."""
    engines: list[InlineEngine] = []

    def start(opens: list[Open], threads: int, *, pin: bool) -> InlineEngine:
        engine = InlineEngine(opens[0], lambda *_: False, lambda _, ready: ready)
        engines.append(engine)
        return engine

    monkeypatch.setattr(lanes, "ProcessesEngine", start)
    return engines
