"""A result as tables in the terminal: time, peak memory, and the warnings below.

Knows Rich and the result; imports no torch and measures nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gradrun.core.units import pluralize
from gradrun.report import tables, wording
from gradrun.report.escaping import escape_control_chars
from gradrun.report.tables import Table
from gradrun.results.result import InferResult, Measurement, RunResult

TABLE_WIDTH = 79
_SHOWN_FILES = 3


def show(result: InferResult, console: Console) -> None:
    """Print everything that a person wants to know of a run."""
    measured = result.measurements[0]
    console.print()
    console.print(_headline(result))
    console.print()
    width = min(console.width, TABLE_WIDTH)
    console.print(_table(tables.timing(result), width))
    console.print()
    console.print(_table(tables.peak_memory(result), width))
    console.print()
    if result.metrics:
        console.print(_table(tables.against_labels(result), width))
        console.print()
    for warning in result.warnings:
        console.print(hanging("!", warning.text))
    if result.warnings:
        console.print()
    console.print(_closing(result, measured))


def _table(told: Table, width: int) -> RichTable:
    table = RichTable(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", width=width
    )
    table.add_column(told.title, no_wrap=True, min_width=12)
    table.add_column(justify="right", style="bold", no_wrap=True, min_width=11)
    table.add_column(style="dim", ratio=1)
    for row in told.rows:
        table.add_row(*(Text(escape_control_chars(cell)) for cell in row))
    return table


def _headline(result: InferResult) -> Text:
    return Text.assemble(
        (model_name(result), "bold"),
        f"  {wording.mode(result)}",
        (escape_control_chars(f"  {wording.facts(result)}"), "dim"),
    )


def model_name(result: RunResult) -> str:
    """What the model is called: by its config, without folders."""
    return escape_control_chars(wording.model_name(result))


def hanging(mark: str, text: str, style: str = "bold yellow") -> RichTable:
    """A marked paragraph whose further lines stand under its first word."""
    grid = RichTable.grid(padding=(0, 1))
    grid.add_row(Text(mark, style), Text(escape_control_chars(text)))
    return grid


def _closing(result: InferResult, measured: Measurement) -> RichTable:
    folder = Path(display_path(result.info.output_path))
    files = [str(folder / file) for file in result.files[:_SHOWN_FILES]]
    more = len(result.files) - len(files)
    grid = RichTable.grid(padding=(0, 3))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    count = measured.samples if result.predictions is None else result.predictions
    grid.add_row(
        Text(pluralize(count - result.quarantined, "prediction"), "bold green"),
        Text(escape_control_chars("\n".join(files) + (f"\nand {more} more" if more else ""))),
    )
    if result.quarantined:
        apart = f"{pluralize(result.quarantined, 'sample')} apart"
        grid.add_row(
            Text(apart, "bold yellow"), Text(escape_control_chars(str(folder / "quarantine.jsonl")))
        )
    if result.resumed_at:
        earlier = f"the first {result.resumed_at:,} by the run before"
        grid.add_row("resumed", Text(earlier))
    grid.add_row("every figure", Text(escape_control_chars(str(folder / "result.json"))))
    return grid


def display_path(path: str | Path) -> str:
    """A path as one would type it here: relative where that is shorter."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive
        return str(path)
    return min(relative, str(path), key=len)
