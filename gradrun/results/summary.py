"""Conclusions from comparisons and audits, in one or two sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from gradrun.core.grad_mode import GradMode
from gradrun.core.units import format_bytes, format_seconds, pluralize
from gradrun.results.result import (
    AuditResult,
    CompareResult,
    Comparison,
    Equivalence,
    Finding,
    Measurement,
    Memory,
)

_MIN_SAVED_BYTES = 1024
_MIN_SAVED_SHARE = 0.01
_SMALL_DIFFERENCE = 0.05
_MAX_DIGITS = 4
_MORE_TIME = "raise measure.budget"


# --- compare -----------------------------------------------------------------------------------


def summarize_comparison(result: CompareResult) -> str:
    """Recommend a variant, or say why the comparison is inconclusive and what to do."""
    if not result.comparisons:
        return "Nothing to compare: fewer than two variants ran."
    memory = {m.variant: m.memory for m in result.measurements}
    differing = [e for e in result.equivalence if not e.equal]
    unequal = {e.candidate for e in differing}
    equal = [c for c in result.comparisons if c.candidate not in unequal]
    faster = [c for c in equal if c.verdict == "faster"]
    if faster and len(result.batch_sizes) > 1:
        advice = _recommend_batch_size(result, faster)
    else:
        advice = _recommend(result.comparisons, equal, memory) if equal else ""
    return " ".join(filter(None, (advice, *map(_describe_difference, differing))))


def _recommend(
    comparisons: Sequence[Comparison], equal: Sequence[Comparison], memory: Mapping[str, Memory]
) -> str:
    """Recommend one of the variants with equal outputs, or the baseline."""
    base = equal[0].baseline
    if faster := [c for c in equal if c.verdict == "faster"]:
        best = max(faster, key=lambda c: c.low)
        return (
            f"Use {best.candidate}: {best.ratio:.{ratio_digits(best)}f} times as fast as {base} "
            f"({_interval(best)}){_saving(memory, best)}."
        )
    level = [c for c in equal if c.verdict == "no_difference" or _is_small(c)]
    if smaller := [c for c in level if _saved_bytes(memory, c)]:
        best = max(smaller, key=lambda c: _saved_bytes(memory, c))
        return (
            f"Use {best.candidate}: no difference in time to {base} above {_bound(best)}"
            f"{_saving(memory, best)}."
        )
    if level:
        widest = max(level, key=lambda c: max(c.high - 1, 1 - c.low))
        if len(level) == len(comparisons):
            return f"Use any variant: no difference in time above {_bound(widest)}."
        names = " or ".join([base, *(c.candidate for c in level)])
        return f"Use {names}: no difference in time above {_bound(widest)}."
    if all(c.verdict == "slower" for c in equal):
        outputs = "" if len(equal) == len(comparisons) else " variant with these outputs"
        return f"Keep {base}: it is the fastest{outputs}."
    return _explain_inconclusive(equal)


def _recommend_batch_size(result: CompareResult, faster: Sequence[Comparison]) -> str:
    """Recommend the variant with the lowest memory of the fastest, with its cost per batch.

    Larger batches are rarely slower per sample, but need more memory and keep each sample waiting.
    """
    variants = result.by_variant()
    best = max(faster, key=lambda c: c.low)
    alike = [c for c in faster if c.high >= best.low]
    best = min(alike, key=lambda c: _known_peak(variants[c.candidate][0].memory))
    seconds, peaks = (
        [figure(variants[name]) for name in (best.candidate, best.baseline)]
        for figure in (_median_batch, _forward_peak)
    )
    return (
        f"Use {best.candidate}: {best.ratio:.{ratio_digits(best)}f} times as fast per sample as "
        f"{best.baseline} ({_interval(best)}). One batch takes {seconds[0]} instead of "
        f"{seconds[1]}, with a forward peak of {peaks[0]} instead of {peaks[1]}."
    )


def _known_peak(memory: Memory) -> float:
    """Return the forward peak in bytes; infinity if it was not measured."""
    return math.inf if memory.forward_peak is None else memory.forward_peak


def _median_batch(measured: Sequence[Measurement]) -> str:
    return format_seconds(median(s for m in measured for s in m.batch_seconds))


def _forward_peak(measured: Sequence[Measurement]) -> str:
    peak = measured[0].memory.forward_peak
    return "an unknown size" if peak is None else format_bytes(peak)


def _explain_inconclusive(equal: Sequence[Comparison]) -> str:
    undecided = [c for c in equal if c.verdict == "inconclusive"]
    if any(c.relative_width > 1 for c in undecided):  # infinite for a single process
        return (
            "Inconclusive: too few processes measured both variants. Reduce load on the machine "
            f"or {_MORE_TIME}."
        )
    widest = max(undecided, key=lambda c: c.high - c.low)
    return (
        f"Inconclusive: {widest.candidate} is {_interval(widest)} times as fast as "
        f"{widest.baseline} (95 %). Close other programs, lower run.threads or {_MORE_TIME}, then "
        "repeat the comparison."
    )


def _is_small(comparison: Comparison) -> bool:
    """Whether an inconclusive interval excludes a difference that matters."""
    low, high = 1 - _SMALL_DIFFERENCE, 1 + _SMALL_DIFFERENCE
    return comparison.verdict == "inconclusive" and low <= comparison.low <= comparison.high <= high


def _describe_difference(equivalence: Equivalence) -> str:
    candidate, baseline = equivalence.candidate, equivalence.baseline
    if not equivalence.compared:
        return f"Outputs of {candidate} and {baseline} were not compared: no sample ran in both."
    where = f", first in {equivalence.first_module}" if equivalence.first_module else ""
    return (
        f"Outputs of {candidate} differ from {baseline} (by up to {equivalence.max_abs_diff:.2g}"
        f"{where}): use it only if this is intended."
    )


def _saved_bytes(memory: Mapping[str, Memory], comparison: Comparison) -> int:
    """Return the saving in forward peak memory, or 0 if it is negligible or unknown."""
    before = memory[comparison.baseline].forward_peak
    after = memory[comparison.candidate].forward_peak
    if before is None or after is None:
        return 0
    saved = before - after
    return saved if saved >= max(_MIN_SAVED_BYTES, _MIN_SAVED_SHARE * before) else 0


def _saving(memory: Mapping[str, Memory], comparison: Comparison) -> str:
    if not _saved_bytes(memory, comparison):
        return ""
    before = memory[comparison.baseline].forward_peak or 0
    after = memory[comparison.candidate].forward_peak or 0
    return f", with a forward peak of {format_bytes(after)} instead of {format_bytes(before)}"


def _bound(comparison: Comparison) -> str:
    # Rounded up, because a larger difference would have been detected; never to 0.0 %.
    widest = max(comparison.high - 1, 1 - comparison.low, 0.001)
    return f"{math.ceil(widest * 1000 - 1e-6) / 10:.1f}%"


def _interval(comparison: Comparison) -> str:
    digits = ratio_digits(comparison)
    return f"{comparison.low:.{digits}f} to {comparison.high:.{digits}f}"


def ratio_digits(comparison: Comparison) -> int:
    """Return the number of decimals of a ratio that its interval supports: 1 to 3.

    An interval that excludes 1 gets as many as show it, up to 4.
    """
    digits = decimals((comparison.high - comparison.low) / 2)
    bound = {"faster": comparison.low, "slower": comparison.high}.get(comparison.verdict, 0.0)
    while digits < _MAX_DIGITS and round(bound, digits) == 1:
        digits += 1  # "1.0 to 2.8" would look like an interval that includes 1
    return digits


def decimals(uncertainty: float) -> int:
    """Return the number of decimals of a ratio that its uncertainty supports: 1 to 3."""
    return 3 if uncertainty < 0.005 else 2 if uncertainty < 0.05 else 1


# --- audit -------------------------------------------------------------------------------------

_LEAST_OVERHEAD = [GradMode.INFERENCE_MODE, GradMode.NO_GRAD, GradMode.GRAD]
"""inference_mode also saves version counters and view tracking."""


def errors_in(result: AuditResult, mode: GradMode) -> list[Finding]:
    """Return the errors that make a mode unsafe; an error without modes counts for all."""
    return [
        finding
        for finding in result.findings
        if finding.severity == "error" and (mode in finding.modes or not finding.modes)
    ]


def has_errors(result: AuditResult) -> bool:
    """Whether any finding is an error."""
    return any(finding.severity == "error" for finding in result.findings)


def lowest_memory_safe_mode(result: AuditResult) -> Measurement | None:
    """Return the safe mode with the lowest forward peak; None if no mode is safe."""
    safe = [m for m in result.measurements if not errors_in(result, m.mode)]
    return min(safe, key=_memory_rank, default=None)


def _memory_rank(measured: Measurement) -> tuple[float, int, int]:
    memory = measured.memory
    overhead = _LEAST_OVERHEAD.index(measured.mode)
    return (_known_peak(memory), memory.retained or 0, overhead)


def summarize_audit(result: AuditResult) -> str:
    """Recommend a gradient mode, and name the unsafe ones."""
    best = lowest_memory_safe_mode(result)
    errors = pluralize(sum(f.severity == "error" for f in result.findings), "error")
    if best is None:
        return f"No mode is safe. Fix the {errors} first."
    text = f"Use {best.mode}, the safe mode with the lowest memory{_peaks(result, best)}."
    if best.memory.forward_peak is None:
        text = f"Use {best.mode}, the safe mode with the least overhead; memory was not measured."
    if unsafe := [mode for mode in GradMode if errors_in(result, mode)]:
        text += f" Do not use {' or '.join(unsafe)}: {errors}."
    return text


def _peaks(result: AuditResult, best: Measurement) -> str:
    peaks = {m.mode: m.memory.forward_peak for m in result.measurements}
    lowest, grad = peaks[best.mode], peaks.get(GradMode.GRAD)
    if lowest is None or grad is None or best.mode is GradMode.GRAD:
        return ""
    if lowest == grad:
        return f" (forward peak {format_bytes(lowest)}, as in grad)"
    return f" (forward peak {format_bytes(lowest)}, {format_bytes(grad)} in grad)"
