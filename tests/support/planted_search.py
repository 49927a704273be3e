"""Searches over planted settings, without processes and in planted time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gradrun.comparison.lanes import Lane, NotReady
from gradrun.config.load import load_config
from gradrun.config.schema import RunConfig
from gradrun.core.errors import RunFailed
from gradrun.results.trials import Trial
from gradrun.tuning.confirm import Confirmation, confirm
from gradrun.tuning.constraints import Constraints
from gradrun.tuning.facts import Facts
from gradrun.tuning.moves import Changes, Move
from gradrun.tuning.search import Candidate, Search
from tests.support.lanes import Clock, Planted, PlantedLane, planted_ready

BASE: dict[str, Any] = {
    "model": {"source": "layers", "layers": [{"Linear": [8, 4]}]},
    "data": {
        "source": "synthetic", "inputs": {"x": {"shape": [8]}}, "samples": 16_384, "batch_size": 8,
    },
    "output": {"path": "out"},
    "tune": {"budget": 600, "steady": True},
}  # fmt: skip

Plan = Callable[[RunConfig], Planted]


@dataclass
class PlantedSearch:
    """A search whose settings behave as `plan` says."""

    plan: Plan
    moves: tuple[Move, ...]
    tune: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    clock: Clock = field(default_factory=Clock)
    opened: list[PlantedLane] = field(default_factory=list)
    known: dict[str, Trial] = field(default_factory=dict)
    """Trials of an earlier search."""
    saved: dict[str, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = load_config(BASE, {f"tune.{key}": value for key, value in self.tune.items()}).config
        self.random = random.Random(self.seed)
        self.search = Search(
            base,
            Constraints(base.tune, base.measure),
            self._open,
            moves=self.moves,
            now=self.clock,
            known=self.known,
            save=self.saved.update,
        )

    def _open(self, config: RunConfig, timeout: float) -> Lane:
        planted = self.plan(config)
        if planted.start > timeout:
            self.clock.now += timeout
            raise NotReady(f"not ready within {timeout:.0f} s")
        self.clock.now += planted.start
        if planted.fails:
            raise RunFailed(planted.fails)
        ready = planted_ready(config, batch_seconds=planted.seconds * config.data.batch_size)
        lane = PlantedLane(config, planted, ready, self.clock, self.random)
        self.opened.append(lane)
        return lane

    def run(self) -> tuple[Candidate, Confirmation | None]:
        """Search, and confirm the best setting if it changes a key."""
        best = self.search.run()
        assert all(lane.closed for lane in self.opened)
        return best, confirm(self.search, best) if best.changes else None


def planted_facts(*, data: dict[str, Any] | None = None, **changes: Any) -> Facts:
    """Return the facts of a linear model on the data of a section."""
    config = load_config(BASE | ({"data": data} if data else {})).config
    given: dict[str, Any] = {
        "config": config,
        "modules": {"Linear": 2},
        "varies": config.data.source == "text",
        "samples": 16_384,
        "device": "cpu",
        "constraints": Constraints(config.tune, config.measure),
        "cpus": 2,
        "cpu_flags": frozenset(),
        "has_compiler": True,
        "memory": 8 * 2**30,
    }
    return Facts(**given | changes)


def move(name: str, step: Any, *changes: Changes, **options: Any) -> Move:
    """Return a move of fixed settings."""

    def settings(facts: Facts) -> list[Changes]:
        dumped = facts.config.model_dump(mode="json")
        return [c for c in changes if any(_get(dumped, k) != v for k, v in c.items())]

    return Move(name, step, options.pop("effect", "rounding"), settings, **options)


def _get(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data
