"""A comparison as tables in the terminal: time, then memory and outputs, then what to do.

Knows Rich and the result; imports no torch and measures nothing.
"""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gradrun.report import tables, wording
from gradrun.report.escaping import escape_control_chars
from gradrun.report.tables import Table
from gradrun.report.terminal import display_path, hanging, model_name
from gradrun.results.result import CompareResult
from gradrun.results.summary import summarize_comparison

_BOLD, _DIM = ("a batch", "a sample", "ratio"), ("95 %",)
_WORDS = {
    "baseline": "dim",
    "faster": "bold green",
    "slower": "bold red",
    "inconclusive": "bold yellow",
}


def show(result: CompareResult, console: Console) -> None:
    """Print everything that a person wants to know of a comparison."""
    console.print()
    if result.measurements:
        time = tables.ratios(result)
        console.print(_headline(result))
        console.print()
        console.print(_table(time))
        if time.note:
            console.print(Text(time.note, "dim"))
        console.print()
        console.print(_table(tables.memories(result)))
        console.print()
    for warning in result.warnings:
        console.print(hanging("!", warning.text))
    if result.warnings:
        console.print()
    console.print(Text(escape_control_chars(summarize_comparison(result)), "bold"))
    console.print(Text(f"every figure in {_saved_in(result)}", "dim"))


def _headline(result: CompareResult) -> Text:
    told = escape_control_chars(f"  {wording.facts(result)}")
    return Text.assemble((model_name(result), "bold"), (told, "dim"))


def _table(told: Table) -> RichTable:
    table = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold"
    )
    table.add_column(told.title, no_wrap=True, min_width=14)
    for column in told.columns[:-1]:
        table.add_column(column, justify="right", no_wrap=True, style=_style(column))
    table.add_column(told.columns[-1])
    for name, *figures, said in told.rows:
        table.add_row(
            Text(escape_control_chars(name)),
            *(Text(figure) for figure in figures),
            words_text(said),
        )
    return table


def _style(column: str) -> str:
    return "bold" if column in _BOLD else "dim" if column in _DIM else ""


def words_text(said: str) -> Text:
    """A verdict, or how far outputs are apart, in its colour."""
    differ = "bold yellow" if said.startswith("differ") else ""
    return Text(said, _WORDS.get(said, differ))


def _saved_in(result: CompareResult) -> str:
    return escape_control_chars(str(Path(display_path(result.info.output_path)) / "result.json"))
