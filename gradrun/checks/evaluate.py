"""Evaluate measurements against limits and references: results -> Outcomes.

A check passes or fails where the data decide it. Otherwise it is inconclusive, with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from gradrun.config.check import CheckSection
from gradrun.config.limits import Limit, Status, byte_limit, number_limit, percentage
from gradrun.config.run import MetricSection
from gradrun.core.grad_mode import GradMode
from gradrun.core.options import option
from gradrun.core.units import format_bytes, format_score, pluralize
from gradrun.results import stats
from gradrun.results.ratios import time_ratio
from gradrun.results.result import (
    Environment,
    Equivalence,
    InferResult,
    Measurement,
    Memory,
    Metric,
    Outcome,
    Output,
)
from gradrun.results.stats import Estimate

_SPEEDUP = "speedup_over_"
"""Prefix of limits on the speedup over another mode."""

_WIDE = 3.0
"""Above this ratio of its upper end to its value, an interval is not shown."""

_MACHINE = ("cpu", "cpus", "threads", "device", "device_name", "torch")
"""Environment fields that must be equal for times to be comparable."""


class _Verdict(NamedTuple):
    value: str
    status: Status
    reason: str = ""


def _outcome(check: str, limit: str, key: str, verdict: _Verdict) -> Outcome:
    value, status, reason = verdict
    return Outcome(
        check=check, limit=limit, value=value, status=status, reason=reason, key=f"check.{key}"
    )


def _passed_unless(reason: str, passed: str, failed: str) -> _Verdict:
    """Fail with `reason` if there is one."""
    return _Verdict(failed, "fail", reason) if reason else _Verdict(passed, "pass")


def _inconclusive(reason: str) -> _Verdict:
    return _Verdict("–", "inconclusive", reason)


# --- smoke ---------------------------------------------------------------------------------------


def smoke(
    predicted: InferResult, equivalence: Sequence[Equivalence], *, batch_independence: bool = True
) -> list[Outcome]:
    """Check that a run is complete, finite and without graphs, and that modes and batches agree.

    `batch_independence` tells whether the run tested it.
    """
    problems = {warning.code: warning.text for warning in predicted.warnings}
    measured = predicted.measurements[0]
    batches = pluralize(len(measured.batch_sizes), "batch")
    rows, incomplete = predicted.predictions or 0, problems.get("quarantined", "")
    if rows != measured.samples and not incomplete:
        incomplete = f"the model ran on {measured.samples:,} samples"
    count = pluralize(rows, "row")
    outcomes = [
        _smoke("model runs", "no error", "", batches),
        _smoke("predictions complete", "one row per sample", incomplete, count, count),
        _smoke("predictions finite", "no NaN or infinity", problems.get("nonfinite", "")),
    ]
    if measured.mode is not GradMode.GRAD:
        retained = problems.get("graph_kept", "")
        outcomes.append(_smoke("no retained graph", "no graph in outputs", retained))
    if batch_independence and max(measured.batch_sizes, default=1) > 1:
        mixed = problems.get("batch_dependent", "")
        limit = "equal in any batch"
        outcomes.append(_smoke("independent of batch", limit, mixed, "equal", "dependent"))
    for other in equivalence:
        value = "bitwise equal" if other.bitwise else f"within ±{other.max_abs_diff:.1g}"
        where = f", first in {other.first_module}" if other.first_module else ""
        reason = f"outputs differ from {other.baseline} by {other.max_abs_diff:.2g}{where}"
        reason = "" if other.equal else reason
        outcomes.append(
            _smoke(f"outputs match {other.candidate}", "equal outputs", reason, value, value)
        )
    return outcomes


def model_failed(check: str, error: str) -> Outcome:
    """Return the failed smoke check of a model, or of one of its modes, that did not run."""
    return _smoke(check, "no error", error, failed="failed")


def _smoke(
    check: str, limit: str, reason: str, passed: str = "none", failed: str = "some"
) -> Outcome:
    return _outcome(check, limit, "smoke", _passed_unless(reason, passed, failed))


# --- limits --------------------------------------------------------------------------------------


def has_checks(section: CheckSection) -> bool:
    """Report whether a section checks anything without a reference."""
    limits = section.limits.model_dump(exclude_none=True)
    return bool(section.smoke or section.expected or limits)


def timed_modes(section: CheckSection) -> list[GradMode]:
    """Return the modes that speedup limits refer to."""
    modes = _speedup_limits(section)
    return [mode for mode in GradMode if mode in modes]


def memory_limits(section: CheckSection, memory: Memory) -> Iterator[Outcome]:
    """Evaluate the limits on memory, exact to the byte."""
    for name, text in _fields(section.limits):
        if name.startswith(_SPEEDUP):
            continue
        limit, value = byte_limit(text), getattr(memory, name)
        if value is None:
            verdict = _inconclusive("not measured: no such device, or measure.memory is off")
        else:
            over = math.ceil(value - limit.value)
            reason = f"{format_bytes(over)} above the limit ({value:,} bytes)" if over > 0 else ""
            verdict = _Verdict(format_bytes(value), limit.status(value, value), reason)
        allowed = f"at most {format_bytes(int(limit.value))}"
        yield _outcome(_label(name), allowed, f"limits.{name}", verdict)


def speedup_limits(
    section: CheckSection, mode: GradMode, measurements: Sequence[Measurement]
) -> Iterator[Outcome]:
    """Evaluate the limits on the time of another mode / the time of the checked mode."""
    for other, text in _speedup_limits(section).items():
        speedup = time_ratio(measurements, other, str(mode))
        if speedup is None:
            verdict = _inconclusive("the speedup could not be measured")
        else:
            verdict = _interval_verdict(number_limit(text), speedup, *_format_ratio(speedup))
        yield _outcome(f"speedup over {other}", text, f"limits.{_SPEEDUP}{other}", verdict)


def metric_limits(section: CheckSection, metrics: Sequence[Metric]) -> Iterator[Outcome]:
    """Evaluate the limits on metrics."""
    values = {metric.name: metric.value for metric in metrics}
    for name, text in section.limits.of_metrics().items():
        value = values.get(name, math.nan)
        if math.isnan(value):
            verdict = _Verdict("–", "fail", "the metric has no value for these predictions")
        else:
            status = number_limit(text).status(value, value)
            reason = "the metric is outside the limit" if status == "fail" else ""
            verdict = _Verdict(format_score(value), status, reason)
        yield _outcome(_label(name), text, f"limits.{name}", verdict)


def _speedup_limits(section: CheckSection) -> dict[str, str]:
    """Map each mode to its limit."""
    return {
        name.removeprefix(_SPEEDUP): limit
        for name, limit in _fields(section.limits)
        if name.startswith(_SPEEDUP)
    }


def _fields(section: object) -> Iterator[tuple[str, str]]:
    """Yield the declared fields of a section that are set; metrics are extra fields."""
    for name in type(section).model_fields:  # type: ignore[attr-defined]
        if (value := getattr(section, name)) is not None:
            yield name, value


def _interval_verdict(limit: Limit, interval: Estimate, value: str, ends: str) -> _Verdict:
    status = limit.status(interval.low, interval.high)
    more = "reduce load on the machine or raise measure.budget or measure.processes"
    ends = f", {ends}," if _is_wide(interval) else ""  # its value is shown without the interval
    reasons = {
        "inconclusive": f"the confidence interval{ends} includes the limit; {more}"
        if math.isfinite(interval.high)
        else f"one process gives no confidence interval; {more}",
        "fail": f"the whole confidence interval{ends} is outside the limit",
    }
    return _Verdict(value, status, reasons.get(status, ""))


def _is_wide(interval: Estimate) -> bool:
    return interval.high > _WIDE * interval.value


# --- regression ----------------------------------------------------------------------------------


def unpaired_slowdown(before: Sequence[Measurement], now: Sequence[Measurement]) -> Estimate | None:
    """Return time now / time before, for processes that did not run side by side."""
    groups = [[median(m.seconds_per_sample) for m in ms if m.batch_seconds] for ms in (now, before)]
    return stats.unpaired_ratio(*groups) if all(g and min(g) > 0 for g in groups) else None


def batch_size_difference(before: Sequence[Measurement], now: Sequence[Measurement]) -> list[str]:
    """Describe a difference in batch size, which makes time and memory incomparable."""
    old, new = (max(ms[0].batch_sizes, default=0) for ms in (before, now))
    return [f"batch size {old}, here {new}"] if old != new and old and new else []


def machine_differences(before: Environment, now: Environment) -> list[str]:
    """Describe the differences between two machines that affect time."""
    return [
        f"{name.replace('_', ' ')} {getattr(before, name)}, here {getattr(now, name)}"
        for name in _MACHINE
        if getattr(before, name) != getattr(now, name)
    ]


def time_regression(
    section: CheckSection,
    reference: str,
    slowdown: Estimate | None,
    differences: Sequence[str] = (),
) -> Iterator[Outcome]:
    """Evaluate the growth in time: `slowdown` is time now / time of the reference.

    `differences` describes conditions of the reference that make its times incomparable.
    """
    allowed = section.regression.time
    if allowed is None:
        return
    if differences:
        verdict = _inconclusive(
            f"the reference was measured under other conditions ({'; '.join(differences)}), so "
            f"times cannot be compared; {option('against', 'REFERENCE')} measures both here"
        )
    elif slowdown is None:
        verdict = _inconclusive("time could not be measured")
    else:
        limit = Limit(1 + percentage(allowed), at_least=False)
        verdict = _interval_verdict(limit, slowdown, *_format_change(slowdown))
        if math.isinf(slowdown.high):
            reason = (
                "one process gives no confidence interval; "
                f"{option('save_baseline', 'PATH')} measures several"
            )
            verdict = verdict._replace(reason=reason)
    yield _outcome(f"time vs {reference}", f"at most +{allowed}", "regression.time", verdict)


def memory_regression(
    section: CheckSection,
    reference: str,
    before: Memory,
    now: Memory,
    differences: Sequence[str] = (),
) -> Iterator[Outcome]:
    """Evaluate the growth in memory, exact to the byte on any machine.

    `differences` describes differences in the work that was measured.
    """
    for name, allowed in _fields(section.regression):
        if name in {"time", "outputs"}:
            continue
        old, new = getattr(before, name), getattr(now, name)
        if differences:
            verdict = _inconclusive(
                f"measured with {'; '.join(differences)}; create a new baseline with "
                f"{option('save_baseline', 'PATH')}"
            )
        elif old is None or new is None or old < 0:
            verdict = _inconclusive("not measured on both sides")
        else:
            growth = (new / old - 1 if old else math.inf) if new != old else 0.0
            value = f"{growth:+.1%} ({format_bytes(new)})" if old or not new else format_bytes(new)
            reason = f"was {format_bytes(old)}" if growth > percentage(allowed) else ""
            verdict = _passed_unless(reason, value, value)
        check = f"{_label(name)} vs {reference}"
        yield _outcome(check, f"at most +{allowed}", f"regression.{name}", verdict)


def metric_regression(
    section: CheckSection,
    reference: str,
    before: Sequence[Metric],
    now: Sequence[Metric],
    metrics: Sequence[MetricSection],
) -> Iterator[Outcome]:
    """Evaluate how much worse metrics became, as a share of the reference's value."""
    old, new = ({m.name: m.value for m in values} for values in (before, now))
    errors = {metric.title for metric in metrics if metric.lower_is_better}
    for name, allowed in section.regression.of_metrics().items():
        was, value = old.get(name, math.nan), new.get(name, math.nan)
        if math.isnan(was) or math.isnan(value):
            side = "the reference" if math.isnan(was) else "this run"
            verdict = _inconclusive(f"the metric has no value in {side}")
        else:
            worse = value - was if name in errors else was - value
            share = worse / abs(was) if was else math.copysign(math.inf, worse) if worse else 0.0
            change = f"{format_score(value)}, was {format_score(was)}"
            worse_by = f"worse by {share:.1%}" if math.isfinite(share) else "worse"
            reason = worse_by if share > percentage(allowed) else ""
            verdict = _passed_unless(reason, change, change)
        check = f"{_label(name)} vs {reference}"
        yield _outcome(check, f"at most {allowed} worse", f"regression.{name}", verdict)


def outputs_regression(
    section: CheckSection, reference: str, before: Sequence[Output], now: Sequence[Output]
) -> Iterator[Outcome]:
    """Check that outputs have the reference's names, dtypes, shapes, means and spreads."""
    if not section.regression.outputs:
        return
    old, new = {o.name: o for o in before}, {o.name: o for o in now}
    reasons = [f"{name} is missing" for name in sorted(old.keys() - new.keys())]
    reasons += [f"{name} is new" for name in sorted(new.keys() - old.keys())]
    for name in sorted(old.keys() & new.keys()):
        reasons += _output_differences(section, old[name], new[name])
    verdict = _passed_unless("; ".join(reasons), "unchanged", "changed")
    if not before:
        verdict = _inconclusive(
            f"the baseline has no outputs; create one with {option('save_baseline', 'PATH')}"
        )
    check, limit = f"outputs vs {reference}", "same dtypes, shapes, means"
    yield _outcome(check, limit, "regression.outputs", verdict)


def _output_differences(section: CheckSection, old: Output, new: Output) -> Iterator[str]:
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        was, now = (f"{o.dtype} {list(o.shape)}" for o in (old, new))
        yield f"{new.name} was {was} and is {now}"
        return
    for statistic in ("mean", "spread"):
        was, now = getattr(old, statistic), getattr(new, statistic)
        same = was == now or (math.isnan(was) and math.isnan(now))
        if not (same or math.isclose(was, now, rel_tol=section.rtol, abs_tol=section.atol)):
            yield f"{new.name}: {statistic} was {was:.6g} and is {now:.6g}"


def same_outputs(
    section: CheckSection, reference: str, differences: Mapping[str, str], module: str | None
) -> Iterator[Outcome]:
    """Check that the predictions of every sample equal the reference's.

    `differences` maps output names to descriptions; `module` is the first that differs, if known.
    """
    if not section.regression.outputs:
        return
    reason = _format_differences(differences)
    where = f", first in {module}" if reason and module else ""
    verdict = _passed_unless(f"{reason}{where}", "equal", "changed")
    yield _outcome(
        f"outputs vs {reference}", "equal for every sample", "regression.outputs", verdict
    )


def golden(file: str, differences: Mapping[str, str] | None) -> Outcome:
    """Check that outputs equal those of the expected file; None if it was written instead."""
    if differences is None:
        limit, verdict = f"written to {file}", _Verdict("written", "pass")
    else:
        reason = _format_differences(differences)
        hint = f"; if this is intended, run with {option('update_expected')}" if reason else ""
        limit = f"equal to {file}"
        verdict = _passed_unless(f"{reason}{hint}", "equal", "different")
    return _outcome("expected outputs", limit, "expected", verdict)


# --- text ----------------------------------------------------------------------------------------


def _label(name: str) -> str:
    return name.replace("_", " ")


def _format_differences(differences: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {text}" for name, text in differences.items())


def _format_ratio(ratio: Estimate) -> tuple[str, str]:
    """Return the value, with its interval unless that is wide, and the interval."""
    if _is_wide(ratio):
        return f"about {ratio.value:.1f}", f"{ratio.low:.1f} to {ratio.high:.1f}"
    ends = f"{ratio.low:.2f} to {ratio.high:.2f}"
    return f"{ratio.value:.2f} ({ends})", ends


def _format_change(slowdown: Estimate) -> tuple[str, str]:
    """Return the same for a change in percent."""
    low, high = slowdown.low - 1, slowdown.high - 1
    if _is_wide(slowdown):
        return f"about {slowdown.value - 1:+.0%}", f"{low:+.0%} to {high:+.0%}"
    ends = f"{low:+.1%} to {high:+.1%}"
    return f"{slowdown.value - 1:+.1%} ({ends})", ends
