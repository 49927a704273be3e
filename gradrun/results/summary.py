"""What a comparison means, in one sentence that a person can act on.

Knows the result alone; its figures are recomputed from raw samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradrun.core.units import format_bytes
from gradrun.results.result import CompareResult, Comparison, Equivalence, Memory

_WORTH_BYTES = 1024
_WORTH_SHARE = 0.01
_NOT_MUCH = 0.05


def summarize_comparison(result: CompareResult) -> str:
    """Which variant to use and why, or what could not be told and what to do about it."""
    memory = {m.variant: m.memory for m in result.measurements}
    agree = {e.candidate: e for e in result.equivalence}
    safe = [c for c in result.comparisons if c.candidate not in agree or agree[c.candidate].equal]
    differ = [e for e in result.equivalence if not e.equal]
    if not result.comparisons:
        return "There is nothing to compare: fewer than two variants could be run."
    base = result.comparisons[0].baseline
    return " ".join(
        filter(None, (_advice(base, result.comparisons, safe, memory), *map(_difference, differ)))
    )


def _advice(
    base: str,
    compared: Sequence[Comparison],
    safe: list[Comparison],
    memory: dict[str, Memory],
) -> str:
    faster = [c for c in safe if c.verdict == "faster"]
    if faster:
        best = max(faster, key=lambda c: c.low)
        return (
            f"Use {best.candidate}: {best.ratio:.{ratio_digits(best)}f} times as fast as {base} "
            f"({_interval(best)}){_saving(memory, base, best.candidate)}."
        )
    level = [c for c in safe if c.verdict == "no_difference" or _narrow(c)]
    lean = [c for c in level if _saved(memory, base, c.candidate)]
    if lean:
        best = max(lean, key=lambda c: _saved(memory, base, c.candidate))
        return (
            f"Use {best.candidate}: no difference in time above {_seen(best)} to {base}"
            f"{_saving(memory, base, best.candidate)}."
        )
    if level:
        widest = max(level, key=lambda c: max(c.high - 1, 1 - c.low))
        if len(level) == len(compared):
            return f"No difference in time above {_seen(widest)} could be seen: any will do."
        names = " and ".join(c.candidate for c in level)
        return f"{names}: no difference in time to {base} above {_seen(widest)}; either will do."
    if safe and all(c.verdict == "slower" for c in safe):
        fastest = "the fastest" if len(safe) == len(compared) else "the fastest with these outputs"
        return f"Stay with {base}: it is {fastest}."
    if safe and any(math.isinf(c.high) for c in safe):
        return "Only one process measured both sides, which supports no verdict: ask again."
    if safe and any(c.relative_width > 1 for c in safe):
        return (
            "Too few processes could measure to tell anything: quiet the machine, or raise "
            "measure.budget (--set measure.budget=120)."
        )
    if safe:
        widest = max(safe, key=lambda c: c.high - c.low)
        return (
            f"This machine was too noisy to tell: {widest.candidate} / {base} lies anywhere in "
            f"{_interval(widest)}. Close what else runs, lower run.threads, or raise "
            "measure.budget (--set measure.budget=120), and ask again."
        )
    return ""


def _narrow(comparison: Comparison) -> bool:
    """Whether an interval that decides nothing still says that not much is at stake."""
    inconclusive = comparison.verdict == "inconclusive"
    return inconclusive and comparison.low >= 1 - _NOT_MUCH and comparison.high <= 1 + _NOT_MUCH


def _difference(found: Equivalence) -> str:
    if not found.compared:
        return (
            f"{found.candidate} ran no sample that {found.baseline} ran, so nothing is known of "
            "whether their outputs are the same."
        )
    where = f", first in {found.first_module}" if found.first_module else ""
    return (
        f"{found.candidate} gives other outputs than {found.baseline} (by up to "
        f"{found.max_abs_diff:.2g}{where}): use it only if that is what you want."
    )


def _saved(memory: dict[str, Memory], base: str, other: str) -> int:
    """Bytes of the forward's peak that `other` saves, where that is worth a word."""
    before, after = memory[base].forward_peak, memory[other].forward_peak
    if before is None or after is None:
        return 0
    saved = before - after
    return saved if saved >= max(_WORTH_BYTES, _WORTH_SHARE * before) else 0


def _saving(memory: dict[str, Memory], base: str, other: str) -> str:
    if not _saved(memory, base, other):
        return ""
    before, after = memory[base].forward_peak or 0, memory[other].forward_peak or 0
    return f", and its forward peak is {format_bytes(after)}, not {format_bytes(before)}"


def _seen(comparison: Comparison) -> str:
    # Rounded up: what lies above it could be seen, and 0.0 % is a claim that nobody can make.
    widest = max(comparison.high - 1, 1 - comparison.low, 0.001)
    return f"{math.ceil(widest * 1000 - 1e-6) / 10:.1f}%"


def _interval(comparison: Comparison) -> str:
    digits = ratio_digits(comparison)
    return f"{comparison.low:.{digits}f} to {comparison.high:.{digits}f}"


def ratio_digits(comparison: Comparison) -> int:
    """Decimals of a ratio that its interval supports: 1 to 3."""
    return decimals((comparison.high - comparison.low) / 2)


def decimals(uncertainty: float) -> int:
    """Decimals of a ratio that is this uncertain: 1 to 3."""
    return 3 if uncertainty < 0.005 else 2 if uncertainty < 0.05 else 1
