"""A result as plain numbers: one row for each mode and metric, with unit and interval.

Every statistic is computed here from the raw samples. Knows results; not how a number is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from gradrun.report.tables import by_variant
from gradrun.results import stats
from gradrun.results.result import (
    AnyResult,
    AuditResult,
    CheckResult,
    CompareResult,
    Comparison,
    Equivalence,
    InferResult,
    Measurement,
)

Unit = Literal[
    "seconds", "bytes", "samples_per_second", "ratio", "count", "output_units", "score", "words"
]  # fmt: skip

_BYTES = (
    "weights", "inputs", "forward_peak", "retained", "process_peak", "device_allocated",
    "device_reserved",
)  # fmt: skip
_PHASES = ("load_model", "open_data", "first_batch", "warm_up", "data", "forward", "output")
_QUANTILES = {"batch_median": 0.5, "batch_p90": 0.9, "batch_p95": 0.95, "batch_p99": 0.99}


@dataclass(frozen=True)
class Row:
    """A figure; `value` is None where nothing was measured, a bound where nothing bounds it."""

    mode: str
    """The mode or variant; empty where the figure has none."""
    metric: str
    unit: Unit
    value: float | None = None
    low: float | None = None
    high: float | None = None
    status: str = ""
    """What the figure says: a verdict, or how a check ended."""
    text: str = ""
    """The figure in words, where it is no number."""
    limit: str = ""
    """What is allowed, in words; of a check alone."""


def rows(result: AnyResult) -> list[Row]:
    """All figures of a result, in the order of its variants."""
    compared: dict[str, Comparison] = {}
    agreed: dict[str, Equivalence] = {}
    found: list[Row] = []
    if isinstance(result, CompareResult | CheckResult):
        compared = {c.candidate: c for c in result.comparisons}
    if not isinstance(result, InferResult):
        agreed = {e.candidate: e for e in result.equivalence}
    if isinstance(result, CheckResult):
        found += (
            Row("", f"check {o.check}", "words", status=o.status, text=o.value, limit=o.limit)
            for o in result.outcomes
        )
    if isinstance(result, InferResult | CheckResult):
        found += (Row("", m.name, "score", _finite(m.value)) for m in result.metrics)
    for name, measured in by_variant(result).items():
        first = measured[0]
        mode = name or first.mode.value
        found += _of_rounds(mode, measured) if name else _of_a_run(mode, first)
        found += [_ratio(c) for c in [compared.get(name)] if c]
        found += _memory(mode, first)
        found += [_outputs(e) for e in [agreed.get(name)] if e]
    if isinstance(result, AuditResult):
        saved = result.saved_for_backward
        found += (Row("grad", f"kept by {k.module}", "bytes", k.bytes) for k in saved)
        found += (
            Row(", ".join(f.modes) or "all modes", f.code, "words", status=f.severity, text=f.text)
            for f in result.findings
        )
    return found


def _of_a_run(mode: str, measured: Measurement) -> Iterable[Row]:
    yield Row(mode, "cold_start", "seconds", measured.cold_start)
    for name, q in _QUANTILES.items():
        yield _estimate(mode, name, measured.latency(q))
    yield Row(mode, "throughput", "samples_per_second", measured.throughput or None)
    yield Row(mode, "samples", "count", measured.samples)
    for name in _PHASES:
        yield Row(mode, name, "seconds", getattr(measured.phases, name))
    bound, shares = measured.bound_by
    yield Row(mode, "bound_by", "ratio", shares[bound], status=bound)


def _of_rounds(mode: str, measured: list[Measurement]) -> Iterable[Row]:
    """Of a variant that fresh processes took turns to time; none where it was not timed."""
    timed = [m for m in measured if m.batch_seconds]
    if not timed:
        return
    times = stats.mean_over_processes([median(m.batch_seconds) for m in timed])
    rates = stats.mean_over_processes([1 / median(m.seconds_per_sample) for m in timed])
    yield _estimate(mode, "batch_median", times)
    yield _estimate(mode, "throughput", rates, "samples_per_second")
    yield Row(mode, "processes", "count", len(timed))
    yield Row(mode, "rounds", "count", sum(len(m.batch_seconds) for m in timed))


def _ratio(c: Comparison) -> Row:
    found = _estimate(c.candidate, "ratio", stats.Estimate(c.ratio, c.low, c.high), "ratio")
    return replace(found, status=c.verdict, text=f"times as fast as {c.baseline}")


def _memory(mode: str, measured: Measurement) -> Iterable[Row]:
    where = measured.memory.peak_module or ""
    for name in _BYTES:
        count = getattr(measured.memory, name)
        yield Row(mode, name, "bytes", count, text=where if name == "forward_peak" else "")


def _outputs(e: Equivalence) -> Row:
    status = "same to the bit" if e.bitwise else "within tolerance" if e.equal else "different"
    status = status if e.compared else "no common sample"
    difference, where = _finite(e.max_abs_diff), e.first_module or ""
    return Row(
        e.candidate, "greatest_difference", "output_units", difference, status=status, text=where
    )


def _estimate(mode: str, metric: str, found: stats.Estimate | None, unit: Unit = "seconds") -> Row:
    if found is None:
        return Row(mode, metric, unit)
    # An open end is no number; below, 0 is one that nobody measured.
    low = found.low if found.low > 0 else None
    return Row(mode, metric, unit, found.value, low, _finite(found.high))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
