"""The Engine protocol: how the driver of a run starts, uses and ends workers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from gradrun.config.schema import RunConfig
from gradrun.core.cpu import thread_count, thread_variable
from gradrun.core.errors import RunFailed
from gradrun.core.progress import ProgressCallback
from gradrun.engines.messages import Failed, Ready, Reply, Task


@dataclass(frozen=True)
class Lost:
    """The end of a worker that the driver did not ask for."""

    cause: str
    """What happened, as the end of a sentence about the worker."""
    output: str = ""
    """The last lines that it printed."""


Event = Reply | Lost


class Engine(Protocol):
    """Workers that run ranges of samples; each is known by a number, which is never reused."""

    name: str
    """What the engine is, for people: "2 processes"."""

    def start(self, count: int) -> None:
        """Request workers; each sends Ready or Failed when it has opened the run, or is lost."""

    def send(self, worker: int, task: Task) -> None:
        """Give a worker a task, which it runs after those that it has."""

    def next(self, timeout: float) -> tuple[int, Event] | None:
        """Wait for the next event of any worker; None after `timeout` seconds without one."""

    def stop(self, worker: int) -> None:
        """End a worker at once; it sends no more events."""

    def keep(self, count: int) -> Collection[int]:
        """End all but the first `count` workers, ready or not; return the numbers of these."""

    def close(self) -> None:
        """End all workers; closing twice has no effect."""


@dataclass(frozen=True)
class EngineRequest:
    """A run to spread."""

    config: RunConfig
    resumed_threads: int | None
    """Threads of the run that is resumed, which `run.threads: auto` then means."""
    trust_code: bool
    progress: ProgressCallback

    def threads(self, automatic: int) -> int:
        """Return the threads of each worker, given those of `run.threads: auto`."""
        asked = self.config.run.threads
        if asked != "auto":
            return asked
        return self.resumed_threads or (thread_count("auto") if thread_variable() else automatic)


@dataclass(frozen=True)
class StartedEngine:
    """An engine whose workers were requested."""

    engine: Engine | None
    """None if a single process is faster."""
    config: RunConfig
    """The config of driver and workers, with the resolved number of threads."""
    text: str
    """Which workers run the samples, for the statement about the engine."""
    workers: int = 1
    ready: tuple[tuple[int, Ready], ...] = ()
    """Workers that are ready already."""


def start_error(number: int, event: Event) -> RunFailed:
    """Return the error for a worker that ended before it was ready."""
    if isinstance(event, Failed):
        return RunFailed(f"worker {number} cannot start: {event.error}", resumable=True)
    cause, output = (event.cause, event.output) if isinstance(event, Lost) else ("failed", "")
    last = f"; its last output:\n{output}" if output else ""
    return RunFailed(f"worker {number} {cause} before its first batch{last}", resumable=True)
