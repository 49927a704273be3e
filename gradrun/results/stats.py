"""Statistics of samples, in plain floats: quantiles with honest intervals, and steadiness.

Knows numbers; not what they measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Literal

STEADY_WITHIN = 0.05
_STEADY_BATCHES = 5
_TAIL = 0.025
_EXACT_COUNT = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, in the unit of the samples.

    `high` is infinite where nothing bounds the value from above, `low` 0 where nothing does from
    below.
    """

    value: float
    low: float
    high: float

    @property
    def uncertainty(self) -> float:
        """Half the interval's width; with an open end, the distance to the other."""
        if math.isinf(self.high):
            return self.value - self.low
        if self.low == 0:
            return self.high - self.value
        return (self.high - self.low) / 2

    @property
    def relative(self) -> float:
        """The uncertainty as a share of the value."""
        return self.uncertainty / self.value if self.value else math.inf


def quantile(samples: Sequence[float], q: float) -> Estimate | None:
    """The q-quantile with its 95 % interval; None where too few samples lie beyond it.

    Interpolates linearly between order statistics (definition 7 of Hyndman and Fan, "Sample
    quantiles in statistical packages", 1996). The interval is from order statistics too: the
    number of samples below the true quantile is binomial whatever the distribution (Conover,
    "Practical Nonparametric Statistics", section 3.2).
    One sample in 1 / (1 - q) lies beyond the quantile: fewer samples than that cannot show it.
    """
    count = len(samples)
    if count == 0 or count * (1 - q) < 1 - 1e-9:
        return None
    ordered = sorted(samples)
    low, high = _ranks(count, q)
    position = q * (count - 1)
    below = math.floor(position)
    above = min(below + 1, count - 1)
    value = ordered[below] + (ordered[above] - ordered[below]) * (position - below)
    return Estimate(
        value,
        ordered[low] if low >= 0 else 0.0,
        ordered[high] if high < count else math.inf,
    )


def _ranks(count: int, q: float) -> tuple[int, int]:
    """The order statistics (from 0) that bound the q-quantile in 95 of 100 cases.

    -1 and `count` where there is none that does.
    """
    if count > _EXACT_COUNT:
        spread = NormalDist().inv_cdf(1 - _TAIL) * math.sqrt(count * q * (1 - q))
        # One rank further out makes up for the approximation.
        return math.floor(count * q - spread) - 1, math.ceil(count * q + spread)
    low, below = -1, 0.0
    for k in range(count):
        ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        below += math.exp(ways + k * math.log(q) + (count - k) * math.log1p(-q))
        if below <= _TAIL:
            low = k
        elif below >= 1 - _TAIL:
            return low, k
    return low, count


def is_steady(samples: Sequence[float]) -> bool:
    """Whether the last five samples' median lies within 5 % of that of the five before.

    Times fall while caches fill and clocks rise; they are steady when they stop falling.
    """
    if len(samples) < 2 * _STEADY_BATCHES:
        return False
    before = median(samples[-2 * _STEADY_BATCHES : -_STEADY_BATCHES])
    last = median(samples[-_STEADY_BATCHES:])
    return abs(last - before) <= STEADY_WITHIN * before


# --- ratios ------------------------------------------------------------------------------------

Verdict = Literal["faster", "slower", "no_difference", "inconclusive"]

# The 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """The median of base / other over rounds that ran side by side.

    Pairs share what the machine did at that moment; the median forgets rounds it spoiled.
    """
    return median(one / two for one, two in zip(base, other, strict=False))


def mean_over_processes(values: Sequence[float]) -> Estimate:
    """The geometric mean with its 95 % interval, from one positive value a process.

    Student's t on the logs: rounds of one process share its memory layout, so only processes are
    independent samples. One process alone supports no interval.
    """
    logs = [math.log(value) for value in values]
    count = len(logs)
    middle = math.fsum(logs) / count
    if count < 2:
        return Estimate(math.exp(middle), 0.0, math.inf)
    variance = math.fsum((value - middle) ** 2 for value in logs) / (count - 1)
    width = _T[min(count - 1, len(_T)) - 1] * math.sqrt(variance / count)
    return Estimate(math.exp(middle), math.exp(middle - width), math.exp(middle + width))


def unpaired_ratio(base: Sequence[float], other: Sequence[float]) -> Estimate:
    """The ratio base / other of two groups of processes that did not run side by side.

    Welch's t on the logs, one positive value a process ("The generalization of Student's problem
    when several different population variances are involved", Biometrika 1947). A group of one
    supports no interval. What changed on the machine between the groups is not in the interval.
    """
    groups = [[math.log(value) for value in values] for values in (base, other)]
    middles = [math.fsum(logs) / len(logs) for logs in groups]
    middle = middles[0] - middles[1]
    if min(map(len, groups)) < 2:
        return Estimate(math.exp(middle), 0.0, math.inf)
    parts = [
        math.fsum((value - m) ** 2 for value in logs) / (len(logs) - 1) / len(logs)
        for logs, m in zip(groups, middles, strict=True)
    ]
    total = math.fsum(parts)
    spread = math.fsum(part**2 / (len(g) - 1) for part, g in zip(parts, groups, strict=True))
    freedom = int(total**2 / spread) if spread else len(_T)
    width = _T[min(max(freedom, 1), len(_T)) - 1] * math.sqrt(total)
    return Estimate(math.exp(middle), math.exp(middle - width), math.exp(middle + width))


def verdict(ratio: Estimate, precision: float) -> Verdict:
    """What a ratio (base time / other time) says of the other.

    Within the precision asked for there is no difference, even where the interval is so narrow
    that it leaves 1 out; beyond it a difference counts when the interval leaves 1 out.
    """
    if 1 - precision <= ratio.low and ratio.high <= 1 + precision:
        return "no_difference"
    if ratio.low > 1:
        return "faster"
    if ratio.high < 1:
        return "slower"
    return "inconclusive"
