"""What a result says, as tables of plain text: the same figures for terminal, Markdown and HTML.

Knows results and units; not how a table is drawn, nor what any mark-up would make of a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from gradrun.core.grad_mode import GradMode
from gradrun.core.units import (
    format_bytes,
    format_number,
    format_seconds,
    pluralize,
    seconds_shown,
    seconds_within,
)
from gradrun.results import stats
from gradrun.results.result import (
    AuditResult,
    CheckResult,
    CompareResult,
    Comparison,
    Equivalence,
    InferResult,
    Measurement,
    Memory,
    Padding,
    RunResult,
)
from gradrun.results.safety import errors_in
from gradrun.results.summary import ratio_digits

DASH = "–"
_QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_VERDICTS = {"no_difference": "no difference"}
_MOST_MODULES = 12
_PEAKS = {
    "forward_peak": "forward peak",
    "retained": "retained",
    "process_peak": "process peak",
    "device_allocated": "device peak",
    "device_reserved": "reserved",
}


@dataclass(frozen=True)
class Table:
    """`title` heads the first column, whose cells are names; the cells of the others are figures.

    The last `words` columns hold words.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    note: str = ""


def tables(result: RunResult) -> list[Table]:
    """All that a result has to show in figures, in the order of reading."""
    return [table for make in _OF[result.kind] for table in [make(result)] if table.rows]


# --- a run -------------------------------------------------------------------------------------


def timing(result: RunResult) -> Table:
    """Cold start, latency, throughput and what the run is bound by."""
    measured = result.measurements[0]
    phases = measured.phases
    load, opened, first = map(
        format_seconds, (phases.load_model, phases.open_data, phases.first_batch)
    )
    bound, shares = measured.bound_by
    asked = measured.batch_limit
    rows = [
        *([("batch size", f"{asked}", "reduced: out of memory")] if asked else []),
        (
            "cold start",
            format_seconds(measured.cold_start),
            f"model {load}, data {opened}, first batch {first}",
        ),
        *_latencies(measured),
        *([_padding(measured.padding)] if measured.padding else []),
    ]
    if measured.samples:
        whole = f"{pluralize(measured.samples, 'sample')} in {format_seconds(measured.seconds)}"
        split = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        rows += [
            ("throughput", f"{format_number(measured.throughput)} /s", f"{whole}, read to written"),
            ("bound by", bound, split),
        ]
    return Table("Time", ("", ""), tuple(rows))


def _padding(padding: Padding) -> tuple[str, str, str]:
    """What was computed for nothing, and what grouping by length has saved of it."""
    share = 1 - padding.tokens / max(1, padding.run)
    if padding.run == padding.ungrouped:
        return "padding", f"{share:.0%}", f"of {padding.run:,} tokens"
    before = padding.ungrouped - padding.tokens
    less = 1 - (padding.run - padding.tokens) / max(1, before)
    fewer = 1 - padding.run / max(1, padding.ungrouped)
    return (
        "padding",
        f"{share:.0%}",
        f"of {padding.run:,} tokens; grouped by length: {less:.0%} less padding, "
        f"{fewer:.0%} fewer tokens",
    )


def _latencies(measured: Measurement) -> Iterator[tuple[str, str, str]]:
    shown = blur = 0.0
    for name, q in _QUANTILES.items():
        estimate = measured.latency(q)
        if estimate is None:
            yield f"batch {name}", DASH, f"takes {round(1 / (1 - q))} batches to tell"
            continue
        # Rounded more than the quantile before it, one may fall below that: then both alike.
        if seconds_shown(estimate.value, estimate.uncertainty) >= shown:
            blur = estimate.uncertainty
        shown = seconds_shown(estimate.value, blur)
        yield _latency(name, estimate, blur)


def _latency(name: str, estimate: stats.Estimate, blur: float) -> tuple[str, str, str]:
    value, low, high = (
        format_seconds(seconds, blur) for seconds in (estimate.value, estimate.low, estimate.high)
    )
    above, below = estimate.low > 0, math.isfinite(estimate.high)
    if above and below:
        bounds = f"{low} to {high} (95 %)"
    else:
        bounds = f"{low} or more (95 %)" if above else f"{high} or less (95 %)" if below else ""
    return f"batch {name}", value, bounds


def peak_memory(result: RunResult) -> Table:
    """What is held, and the peaks; exact bytes beside the readable figure."""
    memory = result.measurements[0].memory
    rows = [
        _bytes("weights", memory.weights),
        _bytes("inputs", memory.inputs, "one batch"),
        _bytes("forward peak", memory.forward_peak, _where(memory)),
        _bytes("retained", memory.retained, "outputs, and in grad their graph"),
        _bytes("process peak", memory.process_peak, f"whole process ({memory.process_method})"),
    ]
    if memory.device_allocated is None and memory.device_reserved is None:
        rows.append(("device peak", DASH, "no accelerator in use"))
    else:
        rows.append(_bytes("device peak", memory.device_allocated, "allocated"))
        rows.append(_bytes("device pool", memory.device_reserved, "reserved, at its peak"))
    return Table("Peak memory", ("", ""), tuple(rows))


def _where(memory: Memory) -> str:
    return f"in {memory.peak_module}" if memory.peak_module else "above what was live before"


def _bytes(name: str, count: int | None, note: str = "") -> tuple[str, str, str]:
    if count is None:
        return name, DASH, "not measured"
    return name, format_bytes(count), ", ".join(part for part in (f"{count:,} bytes", note) if part)


def against_labels(result: InferResult | CheckResult) -> Table:
    """How well predictions agree with the labels."""
    rows = [
        (m.name, _share(m.value), f"of {pluralize(m.samples, 'sample')}") for m in result.metrics
    ]
    return Table("Against labels", ("", ""), tuple(rows))


def _share(value: float) -> str:
    if not math.isfinite(value):
        return DASH
    return f"{value:.4f}" if 0.001 <= abs(value) <= 1 else f"{value:.4g}"


# --- a comparison ------------------------------------------------------------------------------


def by_variant(result: RunResult) -> dict[str, list[Measurement]]:
    """The measurements of each variant, the baseline's first."""
    found: dict[str, list[Measurement]] = {}
    for measured in result.measurements:
        found.setdefault(measured.variant, []).append(measured)
    return found


def batch_sizes(result: RunResult) -> set[int]:
    """Of all variants' batches."""
    firsts = (measured[0].batch_sizes[:1] for measured in by_variant(result).values())
    return {size for sizes in firsts for size in sizes}


def ratios(result: CompareResult) -> Table:
    """The time of each variant, its ratio to the baseline, and what that says."""
    # A ratio is of samples; beside batches of several sizes, a batch's time would contradict it.
    alike = len(batch_sizes(result)) == 1
    compared = {c.candidate: c for c in result.comparisons}
    rows = []
    for name, measured in by_variant(result).items():
        size = measured[0].batch_sizes[0] if alike else 1
        values = [median(m.batch_seconds if alike else m.seconds_per_sample) for m in measured]
        time = stats.mean_over_processes(values)
        rate = format_number(size / time.value, size / time.value * time.relative)
        found = compared.get(name)
        rows.append((name, _seconds(time), *_ratio(found), rate, _verdict(found)))
    return Table(
        "Time",
        ("a batch" if alike else "a sample", "ratio", "95 %", "samples/s", ""),
        tuple(rows),
        note="± and 95 % are over processes; ratios are within each" if compared else "",
    )


def _seconds(time: stats.Estimate) -> str:
    if time.uncertainty < time.value:
        return seconds_within(time.value, time.uncertainty)
    return f"about {format_seconds(time.value, time.value)}"


def _ratio(comparison: Comparison | None) -> tuple[str, str]:
    if comparison is None:
        return "1", ""
    digits = ratio_digits(comparison)
    interval = DASH  # one process supports none
    if math.isfinite(comparison.high) and comparison.relative_width < 1:
        interval = f"{comparison.low:.{digits}f}–{comparison.high:.{digits}f}"
    return f"{comparison.ratio:.{digits}f}", interval


def _verdict(comparison: Comparison | None) -> str:
    if comparison is None:
        return "baseline"
    return _VERDICTS.get(comparison.verdict, comparison.verdict)


def memories(result: CompareResult) -> Table:
    """The peaks of each variant, and how far its outputs are from the baseline's."""
    fields = list(_PEAKS)
    seen = {f for f in fields for m in result.measurements if getattr(m.memory, f) is not None}
    on_device = "device_allocated" in seen
    # A terminal has room for either the tensors that we count or those that a device counts.
    off = {"forward_peak", "retained"} - seen if on_device else set(fields[3:])
    shown = [f for f in fields if f not in off]
    agreed = {e.candidate: e for e in result.equivalence}
    rows = [
        (name, *_peaks(measured[0], shown), outputs_text(agreed.get(name)))
        for name, measured in by_variant(result).items()
    ]
    return Table("Memory", (*(_PEAKS[f] for f in shown), "outputs"), tuple(rows))


def _peaks(measured: Measurement, fields: Sequence[str]) -> list[str]:
    counts = [getattr(measured.memory, f) for f in fields]
    return [DASH if count is None else format_bytes(count) for count in counts]


def outputs_text(found: Equivalence | None) -> str:
    """How far a variant's outputs are from the baseline's."""
    if found is None:
        return "baseline"
    if not found.compared:
        return "no common sample"
    if found.bitwise:
        return "same to the bit"
    if found.equal:
        return f"within tolerance (±{found.max_abs_diff:.1g})"
    return f"differ by {found.max_abs_diff:.2g}"


# --- an audit ----------------------------------------------------------------------------------


def modes(result: AuditResult) -> Table:
    """Whether each mode is safe, and what it takes of memory."""
    agreed = {e.candidate: e for e in result.equivalence}
    measured = {m.mode: m for m in result.measurements}
    rows = []
    for mode, found in measured.items():
        errors = errors_in(result, mode)
        safe = pluralize(len(errors), "error") if errors else "yes"
        peaks = _peaks(found, ("forward_peak", "retained"))
        rows.append((mode.value, safe, *peaks, outputs_text(agreed.get(mode.value))))
    missing = [mode.value for mode in GradMode if mode not in measured]
    rows += [(mode, "cannot run", DASH, DASH, DASH) for mode in missing]
    return Table("Mode", ("safe", "forward peak", "retained", "outputs"), tuple(rows))


def kept(result: AuditResult) -> Table:
    """The modules that keep most for backward, and what the memory meter found on its own."""
    grad = next((m for m in result.measurements if m.mode is GradMode.GRAD), None)
    total = sum(kept.bytes for kept in result.saved_for_backward)
    retained = grad.memory.retained if grad else None
    whole = total if retained is None else retained
    saved = result.saved_for_backward
    shown, rest = saved[:_MOST_MODULES], saved[_MOST_MODULES:]
    parts = [(kept.module, kept.bytes) for kept in shown]
    if rest:
        parts.append((f"{len(rest)} more", sum(kept.bytes for kept in rest)))
    if parts and whole != total:
        parts.append(("(elsewhere)", whole - total))
    rows = [(name, format_bytes(n), f"{n / whole:.0%}" if whole else DASH) for name, n in parts]
    if rows:
        title = "together" if retained is None else "together, as retained above"
        rows.append((title, format_bytes(whole), ""))
    return Table("Kept after a batch in grad", ("one batch", "share"), tuple(rows), words=0)


# --- a check -----------------------------------------------------------------------------------


def outcomes(result: CheckResult) -> Table:
    """Each check with its limit, what was found, and how that went."""
    rows = ((o.check, o.limit, o.value, o.status) for o in result.outcomes)
    return Table("Check", ("limit", "found", "status"), tuple(rows), words=3)


_OF: dict[str, tuple[Callable[[Any], Table], ...]] = {
    "infer": (timing, peak_memory, against_labels),
    "compare": (ratios, memories),
    "audit": (modes, kept),
    "check": (outcomes, against_labels),
}
