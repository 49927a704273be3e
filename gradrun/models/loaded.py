"""The record of a loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gradrun.models.weights import describe_file
from gradrun.results.result import Statement

_MAX_LISTED = 3


@dataclass(frozen=True)
class LoadedModel:
    """A module, and the facts about its origin that change predictions."""

    module: nn.Module
    weights: str = ""
    """Origin of the weights, besides `files`."""
    files: tuple[Path, ...] = ()
    """The files with the weights."""
    random: str = ""
    """Description of the weights that are drawn from the seed, such as "random (seed 0)"."""
    classes: tuple[str, ...] = ()
    """Names of the classes in order; () if the source provides none."""
    embedding: nn.Module | None = None
    """Pooling and the other modules of a sentence-transformers folder, for sentence_embedding."""
    probabilities: Literal["", "softmax", "sigmoid", "none"] = ""
    """How the logits of a classifier become probabilities; "": unknown."""
    notes: tuple[Statement, ...] = ()
    """Other interpretations of the source, such as a prefix removed from a checkpoint's keys."""

    def replace(self, **changes: Any) -> LoadedModel:
        """Return a copy with changed fields."""
        return replace(self, **changes)

    def statements(self) -> Iterator[Statement]:
        """Yield the interpretations of the model; reads the files of the weights for their hash."""
        files = [describe_file(path) for path in self.files[:_MAX_LISTED]]
        if (more := len(self.files) - _MAX_LISTED) > 0:
            files.append(f"{more} more files")
        origin = ": ".join(part for part in (self.weights, ", ".join(files)) if part)
        if text := "; ".join(part for part in (origin, self.random) if part):
            yield Statement(topic="weights", text=text)
        yield from self.notes
