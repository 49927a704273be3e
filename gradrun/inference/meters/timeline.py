"""The memory of one forward pass over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_MAX_POINTS = 200


class Forward(NamedTuple):
    """Bytes allocated by a forward pass, above the level before the call."""

    peak: int
    retained: int
    """Live after the call, including its output."""
    timeline: tuple[int, ...] | None = None
    """Live bytes from before the first allocation (0) to the end; its maximum is the peak."""
    peak_module: str | None = None
    """The module that was running at the peak, as "path (Type)"."""


def downsample(points: Sequence[int], max_points: int = _MAX_POINTS) -> tuple[int, ...]:
    """Reduce a series to at most `max_points` points, with its first, last and extreme values.

    Each interval contributes its minimum and its maximum in their order of occurrence, so the peak
    of the series does not change.
    """
    if len(points) <= max_points:
        return tuple(points)
    chosen: list[int] = [0]
    intervals = (max_points - 2) // 2
    for i in range(intervals):
        begin = 1 + i * (len(points) - 2) // intervals
        end = 1 + (i + 1) * (len(points) - 2) // intervals
        indices = range(begin, end)
        low, high = min(indices, key=points.__getitem__), max(indices, key=points.__getitem__)
        chosen += sorted({low, high})
    return tuple(points[index] for index in (*chosen, len(points) - 1))
