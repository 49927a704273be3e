"""The record of a loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gradrun.results.result import Statement


@dataclass(frozen=True)
class LoadedModel:
    """A module, and the facts about its origin that change predictions."""

    module: nn.Module
    weights: str = ""
    """Origin of the weights; empty if they are drawn from run.seed."""
    classes: tuple[str, ...] = ()
    """Names of the classes in order; () if the source provides none."""
    notes: tuple[Statement, ...] = ()
    """Other interpretations of the source, such as a prefix removed from a checkpoint's keys."""

    def replace(self, **changes: Any) -> LoadedModel:
        """Return a copy with changed fields."""
        return replace(self, **changes)

    def statements(self, seed: int) -> Iterator[Statement]:
        """Yield the interpretations of the model, for weights drawn from `seed`."""
        yield Statement(topic="weights", text=self.weights or f"random (seed {seed})")
        yield from self.notes
