"""Messages between a session and its workers, and the marker that survives a worker's crash."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, Literal

from gradrun.core.record import Record
from gradrun.results.result import (
    Environment,
    Equivalence,
    Measurement,
    Statement,
    SystemNoise,
)

JobKind = Literal["time", "measure_memory", "predict"]


class VariantTask(Record, frozen=True, kw_only=True):
    """A variant to run: its name and its complete config."""

    name: str
    config: dict[str, Any]
    worktree: tuple[str, str] | None = None
    """(repository, worktree): imports from the repository are redirected to the worktree."""


class Job(Record, frozen=True, kw_only=True):
    """Work for one worker process.

    `time` runs variants in interleaved blocks and compares their outputs, `measure_memory` runs one
    variant to find its process peak, and `predict` writes one variant's predictions for all data.
    """

    kind: JobKind
    variants: tuple[VariantTask, ...]
    """The first is the baseline."""
    seed: int
    seconds: float = 1.0
    """Measuring time of all variants together."""
    trust_code: bool = False
    memory_batch: int | None = None
    """Number of the batch whose memory is measured; None: the largest that is timed."""
    marker: str = ""
    """Path of the Marker file."""


class Failure(Record, frozen=True, kw_only=True):
    """A variant that failed: the exception raised or the way its process ended."""

    variant: str
    """Empty if the process ended before it reached a variant."""
    batch: int
    error: str
    config_key: str | None = None
    """The invalid config key; None if the config is not the cause."""

    @property
    def message(self) -> str:
        """The failure in one sentence: variant, batch and cause."""
        return f"{self.variant or 'a worker'}, batch {self.batch}: {self.error}"


class WorkerReport(Record, frozen=True, kw_only=True):
    """The reply of one worker process."""

    measurements: tuple[Measurement, ...] = ()
    """One per variant, with one entry of `batch_seconds` per round."""
    equivalence: tuple[Equivalence, ...] = ()
    failures: tuple[Failure, ...] = ()
    noise: SystemNoise = SystemNoise()
    environment: Environment | None = None
    interpretation: tuple[Statement, ...] = ()
    """Of the baseline, and what other variants interpret otherwise."""


class Marker:
    """The variant and batch that a worker is running, readable after the worker has died.

    The file is memory-mapped, so an update is one store and does not disturb the measurement.
    """

    _LAYOUT = struct.Struct("qq")
    SIZE = _LAYOUT.size

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), self.SIZE)
        self.batch = 0
        self.set(-1, 0)

    def set(self, variant: int, batch: int) -> None:
        """Record the variant and batch that run next."""
        self.batch = batch
        self._LAYOUT.pack_into(self._page, 0, variant, batch)

    @classmethod
    def read(cls, path: Path) -> tuple[int, int]:
        """Return the last recorded (variant, batch), or (-1, 0) if none was recorded."""
        variant, batch = cls._LAYOUT.unpack(path.read_bytes())
        return variant, batch
