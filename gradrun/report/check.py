"""What a check came to, in the terminal: one line a check, the reasons, and the verdict.

Knows Rich and the result; imports no torch and judges nothing.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gradrun.report import tables, wording
from gradrun.report.escaping import escape_control_chars
from gradrun.report.tables import Table
from gradrun.report.terminal import display_path, hanging
from gradrun.results.result import CheckResult

_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "bold yellow"}
_MARKS = {"pass": "!", "fail": "x", "inconclusive": "?"}


def show(result: CheckResult, console: Console) -> None:
    """Print every outcome, and why it is not a pass."""
    mode = f"  {wording.mode(result)}"
    name, facts = (
        escape_control_chars(wording.model_name(result)),
        escape_control_chars(f"  {wording.facts(result)}"),
    )
    console.print()
    console.print(Text.assemble((name, "bold"), mode, (facts, "dim")))
    console.print()
    console.print(_table(tables.outcomes(result)))
    console.print()
    for outcome in result.outcomes:
        if outcome.reason:
            told = f"{outcome.check}: {outcome.reason}"
            console.print(hanging(_MARKS[outcome.status], told, _STYLES[outcome.status]))
    for warning in result.warnings:
        console.print(hanging("!", warning.text))
    if result.warnings or any(outcome.reason for outcome in result.outcomes):
        console.print()
    style = {"pass": "bold green"}.get(result.status, _STYLES[result.status])
    console.print(Text(wording.verdict(result), style))
    saved = f"{display_path(result.info.output_path)}/result.json"
    console.print(Text(f"every figure in {escape_control_chars(saved)}", "dim"))


def _table(told: Table) -> RichTable:
    table = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, header_style="bold"
    )
    table.add_column(told.title)
    for column, style in zip(told.columns, ("dim", "", ""), strict=True):
        table.add_column(column, style=style, no_wrap=column == "status")
    for *cells, status in told.rows:
        table.add_row(
            *(Text(escape_control_chars(cell)) for cell in cells), Text(status, _STYLES[status])
        )
    return table
