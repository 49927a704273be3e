"""What an audit's findings mean: which modes are safe, and which of them is the leanest.

Knows the result alone; no torch.
"""

from __future__ import annotations

from gradrun.core.grad_mode import GradMode
from gradrun.core.units import format_bytes, pluralize
from gradrun.results.result import AuditResult, Finding, Measurement

_LEAST_OVERHEAD = [GradMode.INFERENCE_MODE, GradMode.NO_GRAD, GradMode.GRAD]
"""Where memory is equal: inference_mode also saves version counters and view tracking."""


def errors_in(result: AuditResult, mode: GradMode) -> list[Finding]:
    """The error-level findings that make a mode unsafe; one that names no mode counts for all."""
    return [
        finding
        for finding in result.findings
        if finding.severity == "error" and (mode in finding.modes or not finding.modes)
    ]


def has_errors(result: AuditResult) -> bool:
    """Whether any finding is an error."""
    return any(finding.severity == "error" for finding in result.findings)


def lowest_memory_safe_mode(result: AuditResult) -> Measurement | None:
    """The safe mode with the least peak memory in its forward; None where no mode is safe."""
    safe = [m for m in result.measurements if not errors_in(result, m.mode)]
    return min(safe, key=_leanness, default=None)


def _leanness(measured: Measurement) -> tuple[int, int, int]:
    memory = measured.memory
    return (
        memory.forward_peak or 0,
        memory.retained or 0,
        _LEAST_OVERHEAD.index(measured.mode),
    )


def verdict(result: AuditResult) -> str:
    """Which mode to run in and why, in a sentence or two."""
    best = lowest_memory_safe_mode(result)
    errors = sum(finding.severity == "error" for finding in result.findings)
    if best is None:
        return f"No mode is safe: mend the {pluralize(errors, 'error')} first."
    parts = [f"Run it in {best.mode}: the leanest safe mode{_saving(result, best)}."]
    unsafe = [mode for mode in GradMode if errors_in(result, mode)]
    if unsafe:
        parts.append(f"Not in {' or '.join(unsafe)}: {pluralize(errors, 'error')}.")
    return " ".join(parts)


def _saving(result: AuditResult, best: Measurement) -> str:
    peaks = {m.mode: m.memory.forward_peak for m in result.measurements}
    lean, grad = peaks[best.mode], peaks.get(GradMode.GRAD)
    if lean is None or grad is None or best.mode is GradMode.GRAD:
        return ""
    if lean == grad:
        return f", though grad's forward peak is the same {format_bytes(lean)}"
    return f", with a forward peak of {format_bytes(lean)} where grad takes {format_bytes(grad)}"
