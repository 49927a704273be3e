"""Compare the outputs of the modes, and of one mode with itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gradrun.audits.target import AuditTarget, source_of
from gradrun.comparison.equivalence import equivalence
from gradrun.inference.device import seed_generators
from gradrun.results.result import Equivalence, Finding, Severity

_FUSED = (
    "nn.TransformerEncoderLayer uses a fused implementation when gradients are off, which computes "
    "in another order, so the last bits differ; gradrun compare measures its speedup"
)
_PADDED = "without gradients, nn.TransformerEncoder skips padded positions and returns zeros there"
_FUSED_TYPES = ("TransformerEncoderLayer", "TransformerEncoder", "MultiheadAttention")


def across(
    base: AuditTarget, other: AuditTarget, *, steady: bool
) -> tuple[Equivalence, Iterable[Finding]]:
    """Compare another mode's outputs with the baseline's.

    A difference is a finding only if the baseline is `steady`: its outputs do not change if it is
    run again.
    """
    found = equivalence(base, other)
    if found.bitwise or not steady:
        return found, ()
    severity: Severity
    fused = (found.first_module or "").rstrip(")").endswith(_FUSED_TYPES)
    if found.equal:
        severity, reason, advice = "info", f", within tolerance{f': {_FUSED}' if fused else ''}", ""
    elif fused:
        severity, reason = "error", f": {_PADDED}"
        advice = (
            "Leave padded positions out of means and other sums over positions, or pass "
            "enable_nested_tensor=False"
        )
    else:
        severity, reason = "error", ""
        advice = "Check which outputs are intended; measure.rtol and measure.atol set the tolerance"
    finding = Finding(
        severity=severity,
        code="outputs_differ",
        modes=(other.mode,),
        module=found.first_module or "",
        source=_source(base, found),
        text=f"Outputs differ from {base.mode} by up to {found.max_abs_diff:.2g}{reason}",
        advice=advice,
    )
    return found, (finding,)


def repeated(subject: AuditTarget) -> Iterable[Finding]:
    """Compare two runs of the same mode from the same seed, and from the same state or not."""
    found = equivalence(subject, subject)
    if found.bitwise:
        yield from _carried_state(subject)
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


class _AfterABatch(AuditTarget):
    """A target that has run a batch before it runs the same batch again."""

    def run_batch(self, number: int) -> Any:
        earlier = self.copy(number)
        self.model(*earlier.args, **earlier.kwargs)
        seed_generators(self.config.run.seed, self.device)
        return super().run_batch(number)


def _carried_state(subject: AuditTarget) -> Iterable[Finding]:
    """Report outputs that depend on the batches before, in a model without random results."""
    again = _AfterABatch(
        subject.name, subject.config, subject.device, subject.model, subject.batches
    )
    found = equivalence(subject, again)
    if found.bitwise:
        return
    yield Finding(
        severity="warning",
        code="carries_state",
        modes=(subject.mode,),
        module=found.first_module or "",
        source=_source(subject, found),
        text="Keeps state from one batch to the next: predictions depend on earlier batches, and "
        "those of a resumed run differ",
        advice="Start from the same state in every forward",
    )


def _source(subject: AuditTarget, found: Equivalence) -> str | None:
    return source_of(subject.labelled(found.first_module)) if found.first_module else None
