"""Progress of a command, passed to a callback in the caller's thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerProgress:
    """The part of one worker in a stage."""

    name: str
    done: int
    """Units that it finished."""
    rate: float
    """Units per second of the time in which it was busy; 0 if it finished none."""
    busy: float | None
    """Seconds since it began its current range; None if it waits for one."""


@dataclass(frozen=True)
class Progress:
    """Finished and total units of a stage, such as samples predicted or processes timed."""

    stage: str
    done: int = 0
    total: int = 0
    """0 if unknown."""
    workers: tuple[WorkerProgress, ...] = ()
    """Those that run."""
    other_workers: str = ""
    """Those that do not run, such as "1 lost, 1 starting"."""


ProgressCallback = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Discard progress; the default callback."""
