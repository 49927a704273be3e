"""Statistics of plain floats: quantiles and ratios with 95 % intervals, and verdicts."""

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
    """A positive value with its 95 % interval, in the unit of the samples.

    An interval that is open above has an infinite `high`; one that is open below has a `low` of 0.
    """

    value: float
    low: float
    high: float

    @property
    def uncertainty(self) -> float:
        """Half the width of the interval; for an open one, the distance to the other end."""
        if math.isinf(self.high):
            return self.value - self.low
        if self.low == 0:
            return self.high - self.value
        return (self.high - self.low) / 2

    @property
    def relative(self) -> float:
        """Uncertainty relative to the value."""
        return self.uncertainty / self.value if self.value else math.inf


def quantile(samples: Sequence[float], q: float) -> Estimate | None:
    """Estimate the q-quantile with its 95 % interval; None if there are too few samples.

    At least 1 / (1 - q) samples are needed, so that one is expected beyond the quantile.
    Interpolates linearly between order statistics (definition 7 of Hyndman and Fan, "Sample
    quantiles in statistical packages", 1996). The interval ends are order statistics too: the
    number of samples below the true quantile is binomial whatever the distribution (Conover,
    "Practical Nonparametric Statistics", section 3.2).
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
    """Return the ranks (from 0) of the order statistics that bound the q-quantile.

    -1 and `count` denote open ends.
    """
    if count > _EXACT_COUNT:
        spread = NormalDist().inv_cdf(1 - _TAIL) * math.sqrt(count * q * (1 - q))
        # One rank further out compensates for the normal approximation.
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
    """Whether the median of the last five samples is within 5 % of that of the five before.

    Times decrease while caches fill and clock rates rise.
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

# The 98.75 % quantiles, for a second test at half the error rate.
_T_STRICT = (
    25.452, 6.205, 4.177, 3.495, 3.163, 2.969, 2.841, 2.752, 2.685, 2.634,
    2.593, 2.560, 2.533, 2.510, 2.490, 2.473, 2.458, 2.445, 2.433, 2.423,
    2.414, 2.405, 2.398, 2.391, 2.385, 2.379, 2.373, 2.368, 2.364, 2.360,
)  # fmt: skip


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of base / other over paired rounds.

    Pairing cancels the state of the machine at that moment; the median ignores outliers.
    """
    return median(one / two for one, two in zip(base, other, strict=False))


def mean_over_processes(values: Sequence[float], *, strict: bool = False) -> Estimate:
    """Estimate the geometric mean with its 95 % interval, from one positive value per process.

    With `strict`, the interval is that of 97.5 %, for a second attempt.

    Student's t on the logs. Rounds of one process share its memory layout, so only processes are
    independent samples. The interval of a single process is open.
    """
    logs = [math.log(value) for value in values]
    count = len(logs)
    middle = math.fsum(logs) / count
    if count < 2:
        return _of_logs(middle)
    variance = math.fsum((value - middle) ** 2 for value in logs) / (count - 1)
    table = _T_STRICT if strict else _T
    return _of_logs(middle, table[min(count - 1, len(table)) - 1] * math.sqrt(variance / count))


def _of_logs(middle: float, width: float = math.inf) -> Estimate:
    return Estimate(math.exp(middle), math.exp(middle - width), math.exp(middle + width))


def unpaired_ratio(base: Sequence[float], other: Sequence[float]) -> Estimate:
    """Estimate the ratio base / other of two groups of processes that did not run interleaved.

    Welch's t on the logs, one positive value per process ("The generalization of Student's problem
    when several different population variances are involved", Biometrika 1947). The interval is
    open if a group has one process. It does not cover changes of the machine between the groups.
    """
    groups = [[math.log(value) for value in values] for values in (base, other)]
    middles = [math.fsum(logs) / len(logs) for logs in groups]
    middle = middles[0] - middles[1]
    if min(map(len, groups)) < 2:
        return _of_logs(middle)
    parts = [
        math.fsum((value - m) ** 2 for value in logs) / (len(logs) - 1) / len(logs)
        for logs, m in zip(groups, middles, strict=True)
    ]
    total = math.fsum(parts)
    spread = math.fsum(part**2 / (len(g) - 1) for part, g in zip(parts, groups, strict=True))
    freedom = int(total**2 / spread) if spread else len(_T)
    return _of_logs(middle, _T[min(max(freedom, 1), len(_T)) - 1] * math.sqrt(total))


def verdict(ratio: Estimate, precision: float) -> Verdict:
    """Judge a ratio (base time / other time).

    An interval within `precision` of 1 means no difference, even if it excludes 1. Otherwise the
    other is faster or slower if the interval excludes 1.
    """
    if 1 - precision <= ratio.low and ratio.high <= 1 + precision:
        return "no_difference"
    if ratio.low > 1:
        return "faster"
    if ratio.high < 1:
        return "slower"
    return "inconclusive"
