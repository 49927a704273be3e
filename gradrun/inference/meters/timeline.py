"""What a forward pass took of memory, as a meter of any device tells it.

Knows bytes in the order in which they came and went; not who counted them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_MOST_POINTS = 200


class Forward(NamedTuple):
    """Bytes above what was live before the call."""

    peak: int
    retained: int
    timeline: tuple[int, ...] | None = None
    """What was live, from before the first allocation (0) to the end; its greatest is the peak."""
    peak_module: str | None = None
    """The module that was running at the peak, as "path (Type)"."""


def thinned(points: Sequence[int], most: int = _MOST_POINTS) -> tuple[int, ...]:
    """At most `most` points, the first and the last among them, with every stretch's extremes.

    A stretch gives its least and its greatest in the order in which they came, so the peak of the
    whole stays what it was.
    """
    if len(points) <= most:
        return tuple(points)
    kept: list[int] = [0]
    stretches = (most - 2) // 2
    for i in range(stretches):
        begin = 1 + i * (len(points) - 2) // stretches
        end = 1 + (i + 1) * (len(points) - 2) // stretches
        places = range(begin, end)
        low, high = min(places, key=points.__getitem__), max(places, key=points.__getitem__)
        kept += sorted({low, high})
    return tuple(points[place] for place in (*kept, len(points) - 1))
