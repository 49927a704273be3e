"""The constraints of a tuning: tolerance of the outputs, memory and latency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from gradrun.comparison.lanes import Deviation
from gradrun.config.run import MeasureSection
from gradrun.config.tune import TuneSection, WithinSection
from gradrun.core.units import format_bytes, format_seconds
from gradrun.results import stats

_PRECISION_TOLERANCE = 1e-3
"""Least max_rel for which settings that change the precision are worth trying."""

P99_BATCHES = 367
"""Batches whose 99th percentile has an upper end of the 95 % interval."""


@dataclass(frozen=True)
class Constraints:
    """The limits that a setting must keep."""

    tune: TuneSection
    measure: MeasureSection

    @property
    def within(self) -> WithinSection | None:
        """The tolerance; None: that of compare."""
        return self.tune.within

    @property
    def allows_rounding(self) -> bool:
        """Whether outputs may differ at all."""
        return not (self.within and self.within.bitwise)

    @property
    def allows_precision(self) -> bool:
        """Whether settings that compute with fewer digits can keep the tolerance."""
        within = self.within
        if within is None or within.bitwise:
            return False
        return within.max_rel is None or within.max_rel >= _PRECISION_TOLERANCE

    def violation(self, found: Deviation) -> str:
        """Return how outputs exceed the tolerance, or ""."""
        within = self.within
        if within is None:
            if found.bitwise or found.close:
                return ""
            measure = self.measure
            return (
                f"outputs differ by {found.max_abs:.2g}, over measure.rtol {measure.rtol:g} and "
                f"measure.atol {measure.atol:g}"
            )
        if within.bitwise and not found.bitwise:
            return f"outputs differ by {found.max_abs:.2g}"
        if within.max_abs is not None and not found.max_abs <= within.max_abs:
            return f"outputs differ by {found.max_abs:.2g}"
        if within.max_rel is not None and not found.max_rel <= within.max_rel:
            return f"outputs differ by {found.max_rel:.2g} of the greatest"
        if within.cosine is not None and not found.cosine >= within.cosine:
            return f"cosine similarity {found.cosine:.6f}"
        if within.top1 is not None and not found.top1 >= within.top1:
            return f"{1 - found.top1:.2%} of the samples have another greatest output"
        return ""

    @property
    def least_samples(self) -> int:
        """Samples that bound the share `top1` if none of them has another greatest output."""
        within = self.within
        if within is None or within.top1 is None or within.top1 == 1:
            return 0
        return math.ceil(math.log(0.05) / math.log(within.top1))

    def undecided(self, found: Deviation) -> str:
        """Return why samples are too few to decide the share `top1`, or ""."""
        within = self.within
        if within is None or within.top1 is None or within.top1 == 1:
            return ""
        changed = round((1 - found.top1) * found.samples)
        low = share_bound(changed, found.samples)
        if low <= 1 - within.top1:
            return ""
        text = (
            f"{changed} of {found.samples:,} samples have another greatest output, so up to "
            f"{low:.2%} may (95 %)"
        )
        needed = self.least_samples
        return f"{text}; at least {needed:,} samples are needed" if found.samples < needed else text

    def memory_violation(self, peak: int | None) -> str:
        """Return how a process peak exceeds the limit, or ""."""
        limit = self.tune.memory_limit
        if limit is None or (peak is not None and peak <= limit):
            return ""
        if peak is None:
            return "the process peak was not measured"
        return f"process peak {format_bytes(peak)}"

    def latency_violation(self, batch_seconds: list[float]) -> str:
        """Return how batches exceed the limit of the 99th percentile, or "".

        With enough batches, the upper end of its interval counts; with few, the median.
        """
        limit = self.tune.p99_limit
        if limit is None or not batch_seconds:
            return ""
        name, value = "median batch", median(batch_seconds)
        if len(batch_seconds) >= P99_BATCHES and (p99 := stats.quantile(batch_seconds, 0.99)):
            name, value = "99th percentile up to", p99.high
        return f"{name} {format_seconds(value)}" if value > limit else ""

    def describe(self) -> str:
        """Return the constraints as text."""
        within = self.within
        parts = []
        if within is None:
            parts.append(f"rtol {self.measure.rtol:g}, atol {self.measure.atol:g}")
        else:
            if within.bitwise:
                parts.append("bitwise equal")
            parts += (
                f"{name} {sign} {value:g}"
                for name, sign, value in (
                    ("max_abs", "<=", within.max_abs),
                    ("max_rel", "<=", within.max_rel),
                    ("cosine", ">=", within.cosine),
                    ("top1", ">=", within.top1),
                )
                if value is not None
            )
            if within.metric:
                parts.append(f"{within.metric} drops by at most {within.drop:g}")
        if self.tune.memory:
            parts.append(f"process peak <= {self.tune.memory}")
        if self.tune.p99:
            parts.append(f"p99 <= {self.tune.p99}")
        return ", ".join(parts)


def share_bound(count: int, total: int) -> float:
    """Return the upper end of the one-sided 95 % interval of a share (Clopper and Pearson)."""
    if count >= total:
        return 1.0
    low, high = count / total, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(count, total, middle) > 0.05:
            low = middle
        else:
            high = middle
    return high


def _at_most(count: int, total: int, share: float) -> float:
    """Return the probability of at most `count` of `total` at this share."""
    if share >= 1:
        return 0.0
    logs = math.lgamma(total + 1)
    return math.fsum(
        math.exp(
            logs
            - math.lgamma(k + 1)
            - math.lgamma(total - k + 1)
            + (k * math.log(share) if k else 0.0)
            + (total - k) * math.log1p(-share)
        )
        for k in range(count + 1)
    )
