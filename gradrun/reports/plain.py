"""Results as plain tables in the terminal: several side by side, or one that has no own table.

Knows Rich and the tables of a result; not what is in them.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gradrun.reports import words
from gradrun.reports.printable import printable
from gradrun.reports.side_by_side import Named, side_by_side
from gradrun.reports.tables import Table, tables
from gradrun.reports.terminal import hanging
from gradrun.result import RunResult


def show(result: RunResult, console: Console) -> None:
    """Print a result of any kind."""
    console.print()
    console.print(
        Text.assemble(
            (printable(words.model_name(result)), "bold"),
            (printable(f"  {words.facts(result)}"), "dim"),
        )
    )
    for told in tables(result):
        console.print()
        console.print(_table(told))
    console.print()
    if notices := words.notices(result):
        for notice in notices:
            console.print(hanging("!", notice))
        console.print()
    console.print(Text(printable(words.verdict(result)), "bold"))


def show_side_by_side(results: Sequence[Named], console: Console) -> None:
    """Print results in columns, then the verdict of each."""
    for told in side_by_side(results):
        console.print()
        console.print(_table(told))
        if told.note:
            console.print()
            console.print(hanging("!", told.note))
    console.print()
    for name, result in results:
        said = Text.assemble((printable(f"{name}: "), "dim"), printable(words.verdict(result)))
        console.print(said)


def _table(told: Table) -> RichTable:
    table = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold"
    )
    table.add_column(told.title, overflow="fold")
    for i, column in enumerate(told.columns):
        words_begin = len(told.columns) - told.words
        table.add_column(
            Text(printable(column)), justify="right" if i < words_begin else "left", overflow="fold"
        )
    for row in told.rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
