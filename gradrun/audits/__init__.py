"""What is looked for in a model: the contract of the shelf and its table.

A look runs the model in one mode and gives Findings. Knows no config file and no table to print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradrun.audits import graphs, state, switches
from gradrun.audits.subject import Subject
from gradrun.results.result import Finding

LOOKS: tuple[Callable[[Subject], Iterable[Finding]], ...] = (
    state.first_run,
    state.disturbed,
    switches.switches,
    graphs.kept_graphs,
    graphs.growth,
)
"""In order. The first gets the model as it was loaded; each leaves it as it found it."""
