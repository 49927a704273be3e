"""Ratios of the times of variants that were measured in the same processes."""

from __future__ import annotations

from collections.abc import Sequence

from gradrun.results import stats
from gradrun.results.result import (
    AnyResult,
    CheckResult,
    CompareResult,
    Comparison,
    Measurement,
    Metric,
    MetricChange,
    TuneResult,
)


def compare_measured(measurements: Sequence[Measurement], precision: float) -> list[Comparison]:
    """Compare each variant with the first, over the processes that measured both.

    `precision` is the relative difference below which two times count as equal.
    """
    baseline, *candidates = dict.fromkeys(m.variant for m in measurements) or [""]
    return [
        Comparison(
            baseline=baseline,
            candidate=name,
            ratio=ratio.value,
            low=ratio.low,
            high=ratio.high,
            verdict=stats.verdict(ratio, precision),
        )
        for name in candidates
        if (ratio := time_ratio(measurements, baseline, name))
    ]


def time_ratio(measurements: Sequence[Measurement], base: str, other: str) -> stats.Estimate | None:
    """Estimate time of `base` / time of `other`; None if no process measured both.

    Each process contributes the median over its paired rounds; the interval is over processes.
    """
    by_process = {m.process: m for m in measurements if m.variant == other}
    ratios = [
        stats.paired_ratio(m.seconds_per_sample, by_process[m.process].seconds_per_sample)
        for m in measurements
        if m.variant == base and m.process in by_process
    ]
    return stats.mean_over_processes(ratios) if ratios else None


def recompute(result: AnyResult) -> AnyResult:
    """Replace ratios and verdicts by those computed from the raw times."""
    if not isinstance(result, CompareResult | CheckResult | TuneResult) or not result.comparisons:
        return result
    comparisons = compare_measured(result.measurements, result.info.precision)
    return result.replace(comparisons=tuple(comparisons))


def metric_changes(
    baseline: str, before: Sequence[Metric], candidate: str, now: Sequence[Metric]
) -> tuple[MetricChange, ...]:
    """Pair the metrics of two runs over the same data by name."""
    values = {metric.name: metric.value for metric in before}
    return tuple(
        MetricChange(
            name=metric.name,
            baseline=baseline,
            candidate=candidate,
            before=values[metric.name],
            value=metric.value,
        )
        for metric in now
        if metric.name in values
    )
