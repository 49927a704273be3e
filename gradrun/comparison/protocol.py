"""What gradrun and its workers say to each other, and the marker that outlives a worker.

Knows plain data only; nothing of processes or torch.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, Literal

from gradrun.core.record import Record
from gradrun.results.result import Environment, Equivalence, Memory, Phases, SystemNoise


class Variant(Record, frozen=True, kw_only=True):
    """One side of a comparison: its name and its whole config."""

    name: str
    config: dict[str, Any]
    moved: tuple[str, str] | None = None
    """A folder, and the one in whose place its code is imported from."""


class Job(Record, frozen=True, kw_only=True):
    """What a worker is asked: time variants against each other, run one and be weighed, or let one
    predict all of its data into its folder."""

    kind: Literal["time", "weigh", "predict"]
    variants: tuple[Variant, ...]
    """The first is the baseline."""
    seed: int
    seconds: float = 1.0
    """How long to measure, all variants together."""
    trust_code: bool = False
    marker: str = ""
    """The file of a Marker."""


class Failure(Record, frozen=True, kw_only=True):
    """A variant that could not be run: what was raised, or how its process ended."""

    variant: str
    batch: int
    error: str
    details: str = ""
    """The traceback, or the last lines that the process printed."""
    config_key: str | None = None
    """Set where the config is at fault: the key, or empty."""


class VariantMeasurement(Record, frozen=True, kw_only=True):
    """What one process found of one variant; `batch_seconds` has one entry a round."""

    variant: str
    batch_seconds: tuple[float, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    phases: Phases
    memory: Memory


class WorkerReport(Record, frozen=True, kw_only=True):
    """What one process sends back."""

    trials: tuple[VariantMeasurement, ...] = ()
    equivalence: tuple[Equivalence, ...] = ()
    failures: tuple[Failure, ...] = ()
    disturbance: SystemNoise = SystemNoise()
    environment: Environment | None = None


class Marker:
    """Which variant and batch a worker is at, kept in a file so that it outlives the worker.

    Writing costs a store into mapped memory, so that it can stand next to a measurement.
    """

    _LAYOUT = struct.Struct("qq")
    SIZE = _LAYOUT.size

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), self.SIZE)
        self.batch = 0
        self.at(-1, 0)

    def at(self, variant: int, batch: int) -> None:
        """Note what comes next."""
        self.batch = batch
        self._LAYOUT.pack_into(self._page, 0, variant, batch)

    @classmethod
    def read(cls, path: Path) -> tuple[int, int]:
        """(variant, batch) last noted; (-1, 0) before any."""
        variant, batch = cls._LAYOUT.unpack(path.read_bytes())
        return variant, batch
