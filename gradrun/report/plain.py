"""Several results side by side in the terminal.

Knows Rich and tables of text; not what is in them.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gradrun.report import wording
from gradrun.report.escaping import escape_control_chars
from gradrun.report.side_by_side import Outputs, side_by_side
from gradrun.report.tables import Table
from gradrun.report.terminal import hanging


def show_side_by_side(results: Sequence[Outputs], console: Console) -> None:
    """Print results in columns, then the verdict of each."""
    for told in side_by_side(results):
        console.print()
        console.print(_table(told))
        if told.note:
            console.print()
            console.print(hanging("!", told.note))
    console.print()
    for name, result in results:
        said = Text.assemble(
            (escape_control_chars(f"{name}: "), "dim"),
            escape_control_chars(wording.verdict(result)),
        )
        console.print(said)


def _table(told: Table) -> RichTable:
    table = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold"
    )
    table.add_column(told.title, overflow="fold")
    for i, column in enumerate(told.columns):
        words_begin = len(told.columns) - told.words
        table.add_column(
            Text(escape_control_chars(column)),
            justify="right" if i < words_begin else "left",
            overflow="fold",
        )
    for row in told.rows:
        table.add_row(*(Text(escape_control_chars(cell)) for cell in row))
    return table
