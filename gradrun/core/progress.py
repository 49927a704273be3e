"""Progress of a command, passed to a callback in the caller's thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Finished and total units of a stage, such as samples predicted or processes timed."""

    stage: str
    done: int = 0
    total: int = 0
    """0 if unknown."""


ProgressCallback = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Discard progress; the default callback."""
