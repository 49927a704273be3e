"""How fast each variant is beside the first, from the raw times of the rounds.

Knows measurements; not who made them, nor what their ratios mean.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradrun.results import stats
from gradrun.results.result import AnyResult, CheckResult, CompareResult, Comparison, Measurement


def compare_measured(measurements: Sequence[Measurement], precision: float) -> list[Comparison]:
    """Each variant against the first, over the processes that measured both.

    A process counts once, with the median of its paired rounds; the interval is over processes.
    """
    names = list(dict.fromkeys(m.variant for m in measurements))
    compared = []
    for name in names[1:]:
        ratio = paired(measurements, names[0], name)
        if ratio is None:
            continue
        compared.append(
            Comparison(
                baseline=names[0],
                candidate=name,
                ratio=ratio.value,
                low=ratio.low,
                high=ratio.high,
                verdict=stats.verdict(ratio, precision),
            )
        )
    return compared


def paired(measurements: Sequence[Measurement], base: str, other: str) -> stats.Estimate | None:
    """Time of variant `base` / time of variant `other`, which took turns in each process."""
    by_process = {m.process: m for m in measurements if m.variant == other}
    ratios = [
        stats.paired_ratio(m.seconds_per_sample, by_process[m.process].seconds_per_sample)
        for m in measurements
        if m.variant == base and m.process in by_process
    ]
    return stats.mean_over_processes(ratios) if ratios else None


def recomputed(result: AnyResult) -> AnyResult:
    """Replace ratios and verdicts by those computed from the raw times."""
    if not isinstance(result, CompareResult | CheckResult) or not result.comparisons:
        return result
    compared = compare_measured(result.measurements, result.info.precision)
    return result.replace(comparisons=tuple(compared))
