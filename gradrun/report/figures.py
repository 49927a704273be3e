"""All figures of a result, computed from its raw samples: one per mode and metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from gradrun.results import stats
from gradrun.results.profile import Profile, ProfileFigures
from gradrun.results.result import (
    AnyResult,
    AuditResult,
    CheckResult,
    CompareResult,
    Comparison,
    Equivalence,
    Generation,
    InferResult,
    Measurement,
    ProfileResult,
    TuneResult,
)

Unit = Literal[
    "seconds", "bytes", "samples_per_second", "tokens_per_second", "ratio", "count", "absolute",
    "score", "words",
]  # fmt: skip

_BYTES = (
    "weights", "inputs", "forward_peak", "retained", "process_peak", "device_allocated",
    "device_reserved",
)  # fmt: skip
_PHASES = ("load_model", "open_data", "first_batch", "warm_up", "data", "forward", "output")
LARGE_SHARE = 0.05
"""Modules with at least this share of the forward pass are compared side by side."""

_QUANTILES = {"batch_median": 0.5, "batch_p90": 0.9, "batch_p95": 0.95, "batch_p99": 0.99}


@dataclass(frozen=True)
class Figure:
    """A figure; `value` is None if it was not measured, a bound if the interval is open."""

    mode: str
    """Mode or variant; empty if the figure does not belong to one."""
    metric: str
    unit: Unit
    value: float | None = None
    low: float | None = None
    high: float | None = None
    status: str = ""
    """Verdict, severity, or status of a check."""
    text: str = ""
    limit: str = ""
    """Limit of a check, in words."""


def figures(result: AnyResult) -> list[Figure]:
    """Compute all figures of a result, in the order of its variants."""
    found: list[Figure] = []
    if isinstance(result, ProfileResult):
        for profile, timed in zip(result.profiles, result.measurements, strict=True):
            mode = profile.variant or timed.mode.value
            found += [*_of_profile(mode, profile), *_memory(mode, timed)]
        return found
    comparisons: dict[str, Comparison] = {}
    equivalence: dict[str, Equivalence] = {}
    if isinstance(result, CompareResult | CheckResult | TuneResult):
        comparisons = {c.candidate: c for c in result.comparisons}
    if isinstance(result, CompareResult | AuditResult | CheckResult):
        equivalence = {e.candidate: e for e in result.equivalence}
    if isinstance(result, CheckResult):
        found += (
            Figure("", f"check {o.check}", "words", status=o.status, text=o.value, limit=o.limit)
            for o in result.outcomes
        )
    if isinstance(result, InferResult | CheckResult):
        found += (Figure("", m.name, "score", _finite(m.value)) for m in result.metrics)
    for name, measured in result.by_variant().items():
        first = measured[0]
        mode = name or first.mode.value
        found += _of_rounds(mode, measured) if name else _of_run(mode, first)
        if name in comparisons:
            found.append(_ratio(comparisons[name]))
        found += _memory(mode, first)
        if name in equivalence:
            found.append(_outputs(equivalence[name]))
    if isinstance(result, TuneResult):
        found += _of_trials(result)
    return found + list(_of_audit(result)) if isinstance(result, AuditResult) else found


def _of_run(mode: str, measured: Measurement) -> Iterator[Figure]:
    yield Figure(mode, "cold_start", "seconds", measured.cold_start)
    for name, q in _QUANTILES.items():
        yield _estimate(mode, name, measured.latency(q))
    yield Figure(mode, "throughput", "samples_per_second", measured.throughput or None)
    yield Figure(mode, "samples", "count", measured.samples)
    for name in _PHASES:
        yield Figure(mode, name, "seconds", getattr(measured.phases, name))
    yield from _generation(mode, [measured])
    bound, shares = measured.bound_by
    yield Figure(mode, "bound_by", "ratio", shares[bound], status=bound)


def _of_rounds(mode: str, measured: list[Measurement]) -> Iterable[Figure]:
    timed = [m for m in measured if m.batch_seconds]
    if not timed:
        return
    times = stats.mean_over_processes([median(m.batch_seconds) for m in timed])
    rates = stats.mean_over_processes([1 / median(m.seconds_per_sample) for m in timed])
    yield _estimate(mode, "batch_median", times)
    yield _estimate(mode, "throughput", rates, "samples_per_second")
    yield from _generation(mode, timed)
    yield Figure(mode, "processes", "count", len(timed))
    yield Figure(mode, "rounds", "count", sum(len(m.batch_seconds) for m in timed))


def _generation(mode: str, measured: list[Measurement]) -> Iterator[Figure]:
    """Yield the rate and times of new tokens, if the model generates text."""
    texts = sum((m.generation for m in measured if m.generation), Generation())
    if not texts.tokens:
        return
    yield Figure(mode, "tokens_per_second", "tokens_per_second", texts.tokens_per_second)
    yield Figure(mode, "new_tokens", "count", texts.tokens)
    times = {"first_token": texts.first_token_seconds, "later_token": texts.seconds_per_later_token}
    for name, seconds in times.items():
        if seconds:
            estimate = stats.quantile(seconds, 0.5)
            yield (
                _estimate(mode, name, estimate)
                if estimate
                else Figure(mode, name, "seconds", median(seconds))
            )


def _ratio(c: Comparison) -> Figure:
    figure = _estimate(c.candidate, "ratio", stats.Estimate(c.ratio, c.low, c.high), "ratio")
    return replace(figure, status=c.verdict, text=f"times as fast as {c.baseline}")


def _memory(mode: str, measured: Measurement) -> Iterator[Figure]:
    for name in _BYTES:
        module = measured.memory.peak_module if name == "forward_peak" else None
        yield Figure(mode, name, "bytes", getattr(measured.memory, name), text=module or "")


def _outputs(e: Equivalence) -> Figure:
    status = "bitwise equal" if e.bitwise else "within tolerance" if e.equal else "different"
    return Figure(
        e.candidate,
        "max_abs_diff",
        "absolute",
        _finite(e.max_abs_diff),
        status=status if e.compared else "no common sample",
        text=e.first_module or "",
    )


def _of_audit(result: AuditResult) -> Iterator[Figure]:
    for saved in result.saved_for_backward:
        yield Figure("grad", f"saved by {saved.module}", "bytes", saved.bytes)
    for f in result.findings:
        modes = ", ".join(f.modes) or "all modes"
        yield Figure(modes, f.code, "words", status=f.severity, text=f.text)


def _of_trials(result: TuneResult) -> Iterator[Figure]:
    yield Figure("", "tune", "words", status=result.status, text=result.tolerance)
    for trial in result.trials:
        estimate = None
        if trial.ratio is not None:
            low, high = trial.low or 0.0, math.inf if trial.high is None else trial.high
            estimate = stats.Estimate(trial.ratio, low, high)
        figure = _estimate(trial.name, "trial_ratio", estimate, "ratio")
        yield replace(figure, status=trial.outcome, text=trial.reason)
        if trial.max_abs is not None:
            yield Figure(trial.name, "trial_max_abs", "absolute", _finite(trial.max_abs))


def _of_profile(mode: str, profile: Profile) -> Iterator[Figure]:
    """Yield times, shares and work of each module, per batch; times exclude the cost of hooks."""
    figures = ProfileFigures(profile)
    yield _estimate(mode, "forward_pass", figures.forward)
    yield Figure(mode, "hooks", "seconds", figures.overhead, text="subtracted from the times")
    yield Figure(mode, "sum_of_self_times", "ratio", figures.sum_of_self_times)
    for module in figures.modules:
        name = " in ".join(figures.chain(module))
        large = "large" if module.share.value >= LARGE_SHARE else ""
        yield replace(_estimate(mode, f"time of {name}", module.time), status=large)
        yield _estimate(mode, f"self time of {name}", module.self_time)
        yield _estimate(mode, f"share of {name}", module.share, "ratio")
        yield Figure(mode, f"memory of {name}", "bytes", module.calls.peak)
        yield Figure(mode, f"parameters of {name}", "count", module.calls.parameters)
        if module.work is None:
            continue
        found = module.reach(profile.peaks)
        yield Figure(mode, f"operations of {name}", "count", module.work.total_flops)
        yield Figure(mode, f"bytes moved by {name}", "bytes", module.work.bytes)
        if found and (found.flops or found.bytes):
            yield Figure(mode, f"peak of {name}", "ratio", found.share, status=found.bound)


def _estimate(
    mode: str, metric: str, estimate: stats.Estimate | None, unit: Unit = "seconds"
) -> Figure:
    if estimate is None:
        return Figure(mode, metric, unit)
    low = estimate.low if estimate.low > 0 else None  # 0 is an open end
    return Figure(mode, metric, unit, estimate.value, low, _finite(estimate.high))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
