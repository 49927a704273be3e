"""Arithmetic and memory traffic of a forward pass, and the limits that the machine sets to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from gradrun.core.record import Record
from gradrun.core.units import format_number
from gradrun.results.bounds import Count, Rate

Bound = Literal["compute", "memory", "cache", "overhead"]

_OVERHEAD = 0.1
"""Below this share of both roofs, neither of them limits the time."""

_CACHE = 1.05
"""Above this share of the copy bandwidth, the tensors come from caches."""

_IMPOSSIBLE = 1.05
"""Above this share of the compute peak, the peak was measured too low."""

_SHORTEST = 1e-12


class Flops(Record, frozen=True, kw_only=True):
    """Floating-point operations on one type; a multiplication with its addition counts as two."""

    dtype: str
    count: Count


class Work(Record, frozen=True, kw_only=True):
    """The work of one batch, counted operator by operator."""

    flops: tuple[Flops, ...] = ()
    """Of matrix products, convolutions, attention and recurrent layers."""
    bytes: Count = 0
    """Read and written by the operators, as if no tensor stayed in a cache."""
    operators: Count = 0
    """Calls of operators, without views."""
    uncounted: tuple[str, ...] = ()
    """Operators without a formula for their operations; their bytes count."""
    batch_size: Count = 0
    elements: Count = 0
    """Elements of the batch's inputs."""

    @property
    def total_flops(self) -> int:
        """Operations of all types."""
        return sum(one.count for one in self.flops)

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.total_flops / self.bytes if self.bytes else 0.0

    def divided(self, count: int) -> Work:
        """Return the mean over a number of batches, in whole operations and bytes."""
        return self.replace(
            flops=tuple(one.replace(count=round(one.count / count)) for one in self.flops),
            bytes=round(self.bytes / count),
            operators=round(self.operators / count),
        )

    def __add__(self, other: Work) -> Work:
        counts: dict[str, int] = {}
        for one in (*self.flops, *other.flops):
            counts[one.dtype] = counts.get(one.dtype, 0) + one.count
        return Work(
            flops=tuple(Flops(dtype=dtype, count=count) for dtype, count in counts.items()),
            bytes=self.bytes + other.bytes,
            operators=self.operators + other.operators,
            uncounted=tuple(dict.fromkeys((*self.uncounted, *other.uncounted))),
            batch_size=self.batch_size + other.batch_size,
            elements=self.elements + other.elements,
        )


class Peak(Record, frozen=True, kw_only=True):
    """The highest rate of a matrix product of one type, in operations per second."""

    dtype: str
    rate: Rate
    size: Count
    """Rows and columns of the matrices."""


class MachinePeaks(Record, frozen=True, kw_only=True):
    """Peaks of one device with one number of threads."""

    device: str
    threads: Annotated[int, Meta(ge=1, le=4096)]
    products: tuple[Peak, ...]
    copy: Rate
    """Bytes read and written per second by a copy that no cache can keep."""
    measured_at: str = ""

    def rate(self, dtype: str) -> float | None:
        """Return the peak of a type; None if it was not measured."""
        return next((peak.rate for peak in self.products if peak.dtype == dtype), None)


@dataclass(frozen=True)
class Reach:
    """The rates that some work reached, and the roof of the machine that is nearest."""

    flops: float
    """Operations per second."""
    bytes: float
    """Bytes per second."""
    compute: float
    """Share of the peak of the types in use."""
    memory: float
    """Share of the copy bandwidth."""

    @property
    def bound(self) -> Bound:
        """The roof that is nearest; overhead if both are far away."""
        if max(self.compute, self.memory) < _OVERHEAD:
            return "overhead"
        if self.memory <= self.compute:
            return "compute"
        return "memory" if self.memory <= _CACHE else "cache"

    @property
    def share(self) -> float:
        """Share of the nearest roof; of the compute peak if caches provide the tensors."""
        if self.bound == "overhead":
            return max(self.compute, self.memory)
        return self.memory if self.bound == "memory" else self.compute


def reach(work: Work, seconds: float, peaks: MachinePeaks) -> Reach | None:
    """Return the rates of `work` done in `seconds`; None if a type has no measured peak."""
    if seconds < _SHORTEST:
        return None
    least = 0.0
    """Seconds that the operations would take at their peaks."""
    for one in work.flops:
        rate = peaks.rate(one.dtype)
        if rate is None:
            return None
        least += one.count / rate
    return Reach(
        work.total_flops / seconds,
        work.bytes / seconds,
        least / seconds,
        work.bytes / peaks.copy / seconds,
    )


def describe_reach(work: Work, seconds: float, peaks: MachinePeaks) -> str:
    """Return the distance of a forward pass to the machine's peak, and the advice that follows.

    Empty if the work has no counted operations, types without a measured peak, or more than that.
    """
    found = reach(work, seconds, peaks)
    if found is None or not 0 < found.compute <= _IMPOSSIBLE:
        return ""
    main = max(work.flops, key=lambda one: one.count).dtype
    mixed = "" if len(work.flops) == 1 else " and other types'"
    peak = found.flops / found.compute
    rates = f"{format_number(found.flops / 1e9)} of {format_number(peak / 1e9)} GFLOP/s"
    text = f"forward reaches {found.compute:.0%} of this machine's {main}{mixed} peak ({rates})"
    return f"{text}; {advice(found, main, peaks)}"


def advice(found: Reach, dtype: str, peaks: MachinePeaks) -> str:
    """Name the roof that limits the time, and the changes that can move it."""
    lower = _lower_precision(dtype, peaks)
    match found.bound:
        case "compute":
            remedy = lower or "a smaller model or fewer tokens or pixels are the remaining options"
            return f"its nearest limit is compute: {remedy}"
        case "memory":
            limit = f"its nearest limit is memory ({found.memory:.0%} of the copy bandwidth)"
            return f"{limit}: a larger batch, model.channels_last or lower precision can help"
        case "cache":
            remedies = "fewer and larger operators (model.compile) can help"
            return f"its tensors are in caches: {remedies}"
        case _:
            return "far from both limits: a larger batch or model.compile can reduce the overhead"


def _lower_precision(dtype: str, peaks: MachinePeaks) -> str:
    """Suggest bfloat16 where the machine multiplies it faster."""
    rate, lower = peaks.rate(dtype), peaks.rate("bfloat16")
    if dtype == "bfloat16" or rate is None or lower is None or lower < 1.2 * rate:
        return ""
    return f"run.autocast: bfloat16 can help, whose peak here is {lower / rate:.1f} times as high"
