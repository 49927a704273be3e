"""What is looked for in a model: the contract of the shelf and its table.

A look runs the model in one mode and gives Findings. Knows no config file and no table to print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradrun.audits import mode_switches, retained_graphs, side_effects
from gradrun.audits.target import AuditTarget
from gradrun.results.result import Finding

AUDIT_PASSES: tuple[Callable[[AuditTarget], Iterable[Finding]], ...] = (
    side_effects.first_run,
    side_effects.disturbed,
    mode_switches.switches,
    retained_graphs.kept_graphs,
    retained_graphs.growth,
)
"""In order. The first gets the model as it was loaded; each leaves it as it found it."""
