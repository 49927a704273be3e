"""What a check came to, in the terminal: one line a check, the reasons, and the verdict.

Knows Rich and the result; imports no torch and judges nothing.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradrun.reports.terminal import hanging, model_name, nearest, printable
from gradrun.result import Outcome, RunResult

_STATUS = {
    "pass": ("pass", "green"),
    "fail": ("fail", "bold red"),
    "inconclusive": ("unclear", "bold yellow"),
}
_MARKS = {"fail": ("x", "bold red"), "inconclusive": ("?", "bold yellow")}


def show(result: RunResult, console: Console) -> None:
    """Print every outcome, and why it is not a pass."""
    machine = result.environment
    facts = f"  {result.config['run']['mode']}"
    place = f"  {machine.device_name or machine.device}"
    console.print()
    console.print(Text.assemble((model_name(result), "bold"), facts, (printable(place), "dim")))
    console.print()
    console.print(_table(result.outcomes))
    console.print()
    for outcome in result.outcomes:
        if outcome.reason:
            mark, style = _MARKS.get(outcome.status, ("!", "bold yellow"))
            console.print(hanging(mark, f"{outcome.check}: {outcome.reason}", style))
    for warning in result.warnings:
        console.print(hanging("!", warning.text))
    if result.warnings or any(outcome.reason for outcome in result.outcomes):
        console.print()
    style = {"pass": "bold green"}.get(result.status, _STATUS[result.status][1])
    console.print(Text(verdict(result), style))
    saved = f"{nearest(result.config['output']['path'])}/result.json"
    console.print(Text(f"every figure in {printable(saved)}", "dim"))


def verdict(result: RunResult) -> str:
    """`"7 passed, 1 failed"`."""
    count = [outcome.status for outcome in result.outcomes].count
    parts = [(count("pass"), "passed"), (count("fail"), "failed")]
    parts.append((count("inconclusive"), "inconclusive"))
    return ", ".join(f"{number} {word}" for number, word in parts if number) or "nothing to check"


def _table(outcomes: tuple[Outcome, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    table.add_column("Check")
    table.add_column("allowed", style="dim")
    table.add_column("found")
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        cells = (outcome.check, outcome.limit, outcome.value)
        table.add_row(*(Text(printable(cell)) for cell in cells), Text(*_STATUS[outcome.status]))
    return table
