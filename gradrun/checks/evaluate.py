"""Limits and baselines held against what was measured: results -> Outcomes.

Knows the nouns only: no torch, no files and no terminal. A check says pass or fail where the
figures do, and inconclusive, with the reason, where they do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from gradrun.config.check import CheckSection
from gradrun.config.limits import Limit, Status, byte_limit, number_limit, percentage
from gradrun.core.grad_mode import GradMode
from gradrun.core.units import format_bytes, pluralize
from gradrun.results import stats
from gradrun.results.ratios import paired
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

SPEEDUP = "speedup_over_"
"""How limits on the time of another mode begin."""

_WIDE = 3.0
"""Times the value that an interval may reach before its ends say nothing."""

_MACHINE = ("cpu", "cpus", "threads", "device", "device_name", "torch")
"""What must be the same for times to be compared."""


# --- smoke -------------------------------------------------------------------------------------


def smoke(predicted: InferResult, agreement: Sequence[Equivalence]) -> list[Outcome]:
    """Whether a run was whole, finite and kept no graph, and the modes agree."""
    found = {warning.code: warning.text for warning in predicted.warnings}
    measured = predicted.measurements[0]
    batches = pluralize(len(measured.batch_sizes), "batch")
    rows, apart = predicted.predictions or 0, found.get("quarantined", "")
    short = "" if rows == measured.samples else f"the model ran on {measured.samples:,} samples"
    outcomes = [
        _smoke("runs", "no error", batches),
        _smoke("predictions", "one row a sample", pluralize(rows, "row"), apart or short),
        _clean("finite", "no NaN or infinity kept", found.get("nonfinite", "")),
    ]
    if measured.mode is not GradMode.GRAD:
        outcomes.append(_clean("no graph", "no output keeps one", found.get("graph_kept", "")))
    for other in agreement:
        reason = f"outputs differ from {other.baseline}'s by {_distance(other)}"
        name = f"{other.candidate} agrees"
        outcomes.append(_smoke(name, "same outputs", _agreed(other), "" if other.equal else reason))
    return outcomes


def failed_smoke(check: str, error: str) -> Outcome:
    """That the model, or one of its modes, did not run."""
    return _smoke(check, "no error", "failed", error)


def _clean(check: str, limit: str, reason: str) -> Outcome:
    return _smoke(check, limit, "some" if reason else "none", reason)


def _smoke(check: str, limit: str, value: str, reason: str = "") -> Outcome:
    return Outcome(
        check=check,
        limit=limit,
        value=value,
        status="fail" if reason else "pass",
        reason=reason,
        key="check.smoke",
    )


# --- limits ------------------------------------------------------------------------------------


def memory_limits(asked: CheckSection, memory: Memory) -> Iterator[Outcome]:
    """The absolute limits on memory."""
    for name, limit in _limits(asked):
        if name.startswith(SPEEDUP):
            continue
        bound, value = byte_limit(limit), getattr(memory, name)
        yield Outcome(
            check=_spoken(name),
            limit=f"at most {format_bytes(int(bound.value))}",
            key=f"check.limits.{name}",
            **_bytes_found(bound, value),
        )


def _bytes_found(bound: Limit, value: int | None) -> dict[str, Any]:
    if value is None:
        reason = "nothing measured it: there is no such device here, or measure.memory is off"
        return {"value": "–", "status": "inconclusive", "reason": reason}
    over = value - bound.value
    return {
        "value": format_bytes(value),
        "status": bound.status(value, value),
        "reason": f"{format_bytes(math.ceil(over))} too much ({value:,} bytes)" if over > 0 else "",
    }


def speedup_limits(
    asked: CheckSection, mode: GradMode, measurements: Sequence[Measurement]
) -> Iterator[Outcome]:
    """Limits on the time of another mode / the time of the one that is checked."""
    for name, limit in _limits(asked):
        if not name.startswith(SPEEDUP):
            continue
        found = paired(measurements, name.removeprefix(SPEEDUP), str(mode))
        yield Outcome(
            check=_spoken(name),
            limit=limit,
            key=f"check.limits.{name}",
            **_ratio_found(number_limit(limit), found),
        )


def metric_limits(asked: CheckSection, metrics: Sequence[Metric]) -> Iterator[Outcome]:
    """Limits on what was computed from labels."""
    found = {metric.name: metric.value for metric in metrics}
    for name, limit in (asked.limits.model_extra or {}).items():
        value = found.get(name, math.nan)
        status = "fail" if math.isnan(value) else number_limit(limit).status(value, value)
        reasons = {"fail": "the predictions are worse than the limit"}
        if math.isnan(value):
            reasons["fail"] = "the predictions gave no such figure"
        yield Outcome(
            check=_spoken(name),
            limit=limit,
            value="–" if math.isnan(value) else f"{value:.4f}",
            status=status,
            reason=reasons.get(status, ""),
            key=f"check.limits.{name}",
        )


def something(asked: CheckSection) -> bool:
    """Whether a check looks at anything by itself, with nothing to compare with."""
    return bool(asked.smoke or asked.expected or asked.limits.model_dump(exclude_none=True))


def modes_timed(asked: CheckSection) -> list[GradMode]:
    """The modes whose time a limit asks for."""
    names = [name.removeprefix(SPEEDUP) for name, _ in _limits(asked) if name.startswith(SPEEDUP)]
    return [mode for mode in GradMode if mode in names]


def _limits(asked: CheckSection) -> list[tuple[str, str]]:
    """Those that are not of metrics."""
    fields = ((name, getattr(asked.limits, name)) for name in type(asked.limits).model_fields)
    return [(name, limit) for name, limit in fields if limit is not None]


def _ratio_found(bound: Limit, found: Estimate | None) -> dict[str, Any]:
    if found is None:
        reason = "it could not be measured"
        return {"value": "–", "status": "inconclusive", "reason": reason}
    status = bound.status(found.low, found.high)
    return {"value": _interval(found), "status": status, "reason": _why(status)}


def _why(status: Status) -> str:
    if status == "inconclusive":
        return (
            "the interval lies on both sides of the limit; quiet the machine, or raise "
            "measure.budget or measure.processes"
        )
    return "the whole interval lies beyond the limit" if status == "fail" else ""


# --- regression --------------------------------------------------------------------------------


def apart(before: Sequence[Measurement], now: Sequence[Measurement]) -> Estimate | None:
    """Time now / time before, of processes that did not run side by side."""
    groups = [[median(m.seconds_per_sample) for m in ms if m.batch_seconds] for ms in (now, before)]
    return stats.unpaired_ratio(*groups) if all(g and min(g) > 0 for g in groups) else None


def inverse(ratio: Estimate | None) -> Estimate | None:
    """1 / ratio, where there is one."""
    if ratio is None:
        return None
    return Estimate(1 / ratio.value, 1 / ratio.high, 1 / ratio.low if ratio.low else math.inf)


def batches_differ(before: Sequence[Measurement], now: Sequence[Measurement]) -> list[str]:
    """In what the batches of two measurements differ: their figures are not of the same work."""
    old, new = (max(ms[0].batch_sizes, default=0) for ms in (before, now))
    return [f"batches of {old}, here {new}"] if old != new and old and new else []


def time_regression(
    asked: CheckSection, rival: str, slowdown: Estimate | None, differs: Sequence[str] = ()
) -> Iterator[Outcome]:
    """Whether time grew by more than it may.

    Args:
        asked: what is allowed.
        rival: what it is compared with, in a word or two.
        slowdown: time now / time of the rival.
        differs: what was otherwise where the rival was measured.
    """
    if asked.regression.time is None:
        return
    bound = Limit(1 + percentage(asked.regression.time), at_least=False)
    value: dict[str, Any] = {
        "value": "–",
        "status": "inconclusive",
        "reason": "time could not be measured",
    }
    if differs:
        value["reason"] = (
            f"measured otherwise ({'; '.join(differs)}), and such times say nothing of these; "
            "--against runs both sides here"
        )
    elif slowdown:
        status = bound.status(slowdown.low, slowdown.high)
        value = {"value": _change(slowdown), "status": status, "reason": _why(status)}
        if math.isinf(slowdown.high):
            value["reason"] = "one process supports no interval; --save-baseline takes several"
    yield Outcome(
        check=f"time vs {rival}",
        limit=f"at most +{asked.regression.time}",
        key="check.regression.time",
        **value,
    )


def memory_regression(
    asked: CheckSection, rival: str, before: Memory, now: Memory, differs: Sequence[str] = ()
) -> Iterator[Outcome]:
    """Whether memory grew by more than it may; to the byte, whatever the machine.

    `differs` says in what the two did not do the same work.
    """
    for name, limit in asked.regression.model_dump(exclude={"time", "outputs"}).items():
        if limit is None:
            continue
        old, new = getattr(before, name), getattr(now, name)
        found: dict[str, Any] = {"value": "–", "status": "inconclusive"}
        found["reason"] = "one side has no such figure"
        if differs:
            found["reason"] = f"measured with {'; '.join(differs)}; --save-baseline makes a new one"
        elif old is not None and new is not None and old >= 0:
            grown = (new / old - 1 if old else math.inf) if new != old else 0.0
            over = grown > percentage(limit)
            found = {
                "value": f"{grown:+.1%} ({format_bytes(new)})",
                "status": "fail" if over else "pass",
                "reason": f"it was {format_bytes(old)}" if over else "",
            }
        yield Outcome(
            check=f"{_spoken(name)} vs {rival}",
            limit=f"at most +{limit}",
            key=f"check.regression.{name}",
            **found,
        )


def outputs_regression(
    asked: CheckSection, rival: str, before: Sequence[Output], now: Sequence[Output]
) -> Iterator[Outcome]:
    """Whether outputs have the rival's names, types, shapes, means and spreads."""
    if not asked.regression.outputs:
        return
    if not before:
        reason = "the baseline holds none; --save-baseline writes one that does"
        yield _outputs(rival, "same types, shapes, means", reason, "–").replace(
            status="inconclusive", value="–"
        )
        return
    old, new = {o.name: o for o in before}, {o.name: o for o in now}
    reasons = [f"there is no {name} any more" for name in old.keys() - new.keys()]
    reasons += [f"{name} is new" for name in new.keys() - old.keys()]
    for name in old.keys() & new.keys():
        reasons += _difference(asked, old[name], new[name])
    yield _outputs(rival, "same types, shapes, means", "; ".join(reasons), "as they were")


def _difference(asked: CheckSection, old: Output, new: Output) -> Iterator[str]:
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        was, now = (f"{o.dtype} {list(o.shape)}" for o in (old, new))
        yield f"{new.name} was {was} and is {now}"
        return
    for what in ("mean", "spread"):
        was, now = getattr(old, what), getattr(new, what)
        same = was == now or (math.isnan(was) and math.isnan(now))
        if not (same or math.isclose(was, now, rel_tol=asked.rtol, abs_tol=asked.atol)):
            yield f"{new.name}'s {what} was {was:.6g} and is {now:.6g}"


def same_outputs(
    asked: CheckSection, rival: str, differences: Mapping[str, str], module: str | None
) -> Iterator[Outcome]:
    """Whether what is kept of every sample is what the rival keeps.

    Args:
        asked: what is allowed.
        rival: what it is compared with, in a word or two.
        differences: of each output that is not the same, how.
        module: the first whose output differs, where one was found.
    """
    reason = "; ".join(f"{name} {text}" for name, text in differences.items())
    where = f", first in {module}" if reason and module else ""
    yield _outputs(rival, "the same for every sample", f"{reason}{where}", "the same")


def _outputs(rival: str, limit: str, reason: str, value: str) -> Outcome:
    return Outcome(
        check=f"outputs vs {rival}",
        limit=limit,
        value="changed" if reason else value,
        status="fail" if reason else "pass",
        reason=reason,
        key="check.regression.outputs",
    )


def golden_written(file: str) -> Outcome:
    """That the expected file has been written, and nothing was compared with it."""
    key = "check.expected"
    return Outcome(
        check="expected outputs",
        limit=f"written to {file}",
        value="written",
        status="pass",
        key=key,
    )


def golden(differences: Mapping[str, str], file: str) -> Outcome:
    """Whether outputs are those of the expected file; a difference for each that is not."""
    reason = "; ".join(f"{name} {text}" for name, text in differences.items())
    return Outcome(
        check="expected outputs",
        limit=f"those in {file}",
        value="other" if reason else "the same",
        status="fail" if reason else "pass",
        reason=f"{reason}; where that is meant, --update-expected" if reason else "",
        key="check.expected",
    )


def machines_differ(before: Environment, now: Environment) -> list[str]:
    """What differs between two machines that matters for time, each in a few words."""
    return [
        f"{name.replace('_', ' ')} {getattr(before, name)}, here {getattr(now, name)}"
        for name in _MACHINE
        if getattr(before, name) != getattr(now, name)
    ]


def placed(outcomes: Sequence[Outcome], place: Callable[[str], str | None]) -> tuple[Outcome, ...]:
    """The outcomes with the places of their keys."""
    return tuple(o.replace(source=place(o.key)) for o in outcomes)


# --- words -------------------------------------------------------------------------------------


def _spoken(name: str) -> str:
    over = name.removeprefix(SPEEDUP)
    return name.replace("_", " ") if over == name else f"speedup over {over}"


def _agreed(found: Equivalence) -> str:
    return "same to the bit" if found.bitwise else f"within ±{found.max_abs_diff:.1g}"


def _distance(found: Equivalence) -> str:
    where = f", first in {found.first_module}" if found.first_module else ""
    return f"{found.max_abs_diff:.2g}{where}"


def _interval(found: Estimate) -> str:
    if found.high > _WIDE * found.value:
        return f"about {found.value:.1f}"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def _change(slowdown: Estimate) -> str:
    if slowdown.high > _WIDE * slowdown.value:
        return f"about {slowdown.value - 1:+.0%}"
    return f"{slowdown.value - 1:+.1%} ({slowdown.low - 1:+.1%} to {slowdown.high - 1:+.1%})"
