"""Whether the modes agree, and whether one agrees with itself: equivalence in words.

Knows divergence.py's answers; not how they come about.
"""

from __future__ import annotations

from collections.abc import Iterable

from gradrun.audits.target import AuditTarget, source_of
from gradrun.comparison.equivalence import equivalence
from gradrun.results.result import Equivalence, Finding

_FUSED = (
    "nn.TransformerEncoderLayer takes a fused path when gradients are off: the same mathematics in "
    "another order, so the last bits differ; gradrun compare says what it gains"
)
_FUSED_TYPES = ("TransformerEncoderLayer", "TransformerEncoder", "MultiheadAttention")


def across(
    base: AuditTarget, other: AuditTarget, *, steady: bool
) -> tuple[Equivalence, Iterable[Finding]]:
    """The other mode's outputs against the baseline's; `steady`: that agrees with itself."""
    found = equivalence(base, other)
    if found.bitwise or not steady:  # what differs by itself says nothing of modes
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
        else "Find out which of the two is meant; measure.rtol and measure.atol say what counts",
    )
    return found, (finding,)


def repeated(subject: AuditTarget) -> Iterable[Finding]:
    """The same mode twice, from the same seed."""
    found = equivalence(subject, subject)
    if found.bitwise:
        return
    yield Finding(
        severity="warning",
        code="not_deterministic",
        modes=(subject.mode,),
        module=found.first_module or "",
        source=_source(subject, found),
        text=f"The same batch from the same seed gives other outputs, by up to "
        f"{found.max_abs_diff:.2g}",
        advice="With run.deterministic: true torch chooses repeatable algorithms; a model that "
        "counts its calls or reads a clock must be mended",
    )


def _source(subject: AuditTarget, found: Equivalence) -> str | None:
    return source_of(subject.labelled(found.first_module)) if found.first_module else None
