"""The passes of an audit: each runs the model in one mode and yields Findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradrun.audits import mode_switches, retained_graphs, side_effects
from gradrun.audits.target import AuditTarget
from gradrun.results.result import Finding

AUDIT_PASSES: tuple[Callable[[AuditTarget], Iterable[Finding]], ...] = (
    side_effects.first_run,
    side_effects.side_effects,
    mode_switches.mode_switches,
    retained_graphs.retained_graphs,
    retained_graphs.memory_growth,
)
"""In order. The first pass gets the newly loaded model; each pass restores the model's state."""
