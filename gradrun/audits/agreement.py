"""Compare the outputs of the modes, and of one mode with itself."""

from __future__ import annotations

from collections.abc import Iterable

from gradrun.audits.target import AuditTarget, source_of
from gradrun.comparison.equivalence import equivalence
from gradrun.results.result import Equivalence, Finding

_FUSED = (
    "nn.TransformerEncoderLayer uses a fused implementation when gradients are off, which computes "
    "in another order, so the last bits differ; gradrun compare measures its speedup"
)
_FUSED_TYPES = ("TransformerEncoderLayer", "TransformerEncoder", "MultiheadAttention")


def across(
    base: AuditTarget, other: AuditTarget, *, steady: bool
) -> tuple[Equivalence, Iterable[Finding]]:
    """Compare another mode's outputs with the baseline's.

    Args:
        steady: whether repeated runs of the baseline give equal outputs; otherwise a difference
            is not a finding.
    """
    found = equivalence(base, other)
    if found.bitwise or not steady:
        return found, ()
    fused = (found.first_module or "").rstrip(")").endswith(_FUSED_TYPES)
    finding = Finding(
        severity="info" if found.equal else "error",
        code="outputs_differ",
        modes=(other.mode,),
        module=found.first_module or "",
        source=_source(base, found),
        text=f"Outputs differ from {base.mode} by up to {found.max_abs_diff:.2g}"
        + (", within tolerance" if found.equal else "")
        + (f": {_FUSED}" if fused else ""),
        advice=""
        if found.equal
        else "Check which outputs are intended; measure.rtol and measure.atol set the tolerance",
    )
    return found, (finding,)


def repeated(subject: AuditTarget) -> Iterable[Finding]:
    """Compare two runs of the same mode from the same seed."""
    found = equivalence(subject, subject)
    if found.bitwise:
        return
    yield Finding(
        severity="warning",
        code="not_deterministic",
        modes=(subject.mode,),
        module=found.first_module or "",
        source=_source(subject, found),
        text=f"Two runs of the same batch from the same seed differ by up to "
        f"{found.max_abs_diff:.2g}",
        advice="Set run.deterministic: true for deterministic algorithms; remove call counters or "
        "clock reads from the model",
    )


def _source(subject: AuditTarget, found: Equivalence) -> str | None:
    return source_of(subject.labelled(found.first_module)) if found.first_module else None
