"""Statistics of samples, in plain floats: quantiles with honest intervals, and steadiness.

Knows numbers; not what they measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

STEADY_WITHIN = 0.05
_STEADY_BATCHES = 5


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, in the unit of the samples.

    `high` is infinite where nothing bounds the value from above.
    """

    value: float
    low: float
    high: float

    @property
    def uncertainty(self) -> float:
        """Half the interval's width; with an open end, the distance to the other."""
        if math.isinf(self.high):
            return self.value - self.low
        return (self.high - self.low) / 2


def quantile(samples: Sequence[float], q: float) -> Estimate | None:
    """The q-quantile with its 95 % interval; None where too few samples lie beyond it.

    Interpolates linearly between order statistics (definition 7 of Hyndman and Fan, "Sample
    quantiles in statistical packages", 1996). The interval is from order statistics too: the
    number of samples below the true quantile is binomial, here by its normal approximation
    (Conover, "Practical Nonparametric Statistics", section 3.2), so it assumes no distribution.
    One sample in 1 / (1 - q) lies beyond the quantile: fewer samples than that cannot show it.
    """
    count = len(samples)
    if count == 0 or count * (1 - q) < 1 - 1e-9:
        return None
    ordered = sorted(samples)
    spread = NormalDist().inv_cdf(0.975) * math.sqrt(count * q * (1 - q))
    low = max(0, math.floor(count * q - spread))
    high = math.ceil(count * q + spread)
    # Where even the slowest sample may lie below the quantile, nothing bounds it from above.
    open_end = high >= count and q**count > 0.025
    position = q * (count - 1)
    below = math.floor(position)
    above = min(below + 1, count - 1)
    value = ordered[below] + (ordered[above] - ordered[below]) * (position - below)
    return Estimate(value, ordered[low], math.inf if open_end else ordered[min(high, count - 1)])


def is_steady(samples: Sequence[float]) -> bool:
    """Whether the last five samples' median lies within 5 % of that of the five before.

    Times fall while caches fill and clocks rise; they are steady when they stop falling.
    """
    if len(samples) < 2 * _STEADY_BATCHES:
        return False
    before = median(samples[-2 * _STEADY_BATCHES : -_STEADY_BATCHES])
    last = median(samples[-_STEADY_BATCHES:])
    return abs(last - before) <= STEADY_WITHIN * before
