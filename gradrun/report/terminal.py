"""Reports in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from gradrun.report.document import Document, describe
from gradrun.report.escaping import escape_control_chars
from gradrun.report.side_by_side import Named, side_by_side
from gradrun.report.tables import DIFFERS, Cell, Column, Status, Table, Tone
from gradrun.report.wording import Note

TABLE_WIDTH = 79
_MAX_CELL = 32
"""Width of a cell of a table whose rows are on one line each, except for the names."""
_STYLES: dict[str, str] = {
    "good": "bold green",
    "bad": "bold red",
    "unsure": "bold yellow",
    "strong": "bold",
    "quiet": "dim",
}
_MARKS: dict[Tone, str] = {"bad": DIFFERS, "unsure": "!", "good": "", "": "", "quiet": ""}


def show(document: Document, console: Console) -> None:
    """Print a report."""
    if document.title:
        title = _text(Status(document.title), "strong")
        console.print(
            "", Text.assemble(title, "  ", _text(document.subject, "quiet")), "", sep="\n"
        )
    for table in (*document.tables, *document.predictions, *document.interpretation):
        console.print(_table(table, min(console.width, TABLE_WIDTH)))
        if table.note:
            console.print(_text(table.note, "quiet"))
        console.print()
    for finding in document.findings:
        _print_finding(finding, console)
    for note in document.notes:
        console.print(_hanging(_MARKS[note.tone], note))
    if document.notes:
        console.print()
    # The tables of a run have all figures of its verdict.
    if document.verdict and document.kind != "infer":
        console.print(_text(document.verdict, document.tone or "strong"))
    if document.files:
        grid = RichTable.grid(padding=(0, 3))
        grid.add_column(overflow="fold")
        grid.add_column(overflow="fold")
        for name, paths in document.files:
            grid.add_row(_text(name), _text(paths))
        console.print(grid)


def show_side_by_side(results: Sequence[Named], console: Console) -> None:
    """Print several results in columns, then the verdict of each."""
    for table in side_by_side(results):
        console.print()
        console.print(_table(table, console.width))
        if table.note:
            console.print("", _hanging("!", Note(table.note)), sep="\n")
    console.print()
    for name, result in results:
        verdict = describe(result).verdict
        console.print(Text.assemble(_text(f"{name}: ", "quiet"), _text(verdict)))


def _text(cell: Cell, style: str = "") -> Text:
    tone = cell.tone if isinstance(cell, Status) else ""
    return Text(escape_control_chars(str(cell)), _STYLES.get(tone or style, ""))


def _table(table: Table, width: int) -> RichTable:
    rich = RichTable(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        header_style="bold",
        width=width if table.full_width else None,
    )
    columns = [Column(table.title, "text", min_width=12), *table.columns]
    # The last column without a minimum takes the space that is left.
    widest = max(i for i, column in enumerate(columns) if not i or not column.min_width)
    limits = _line_widths(table, width) if table.brief else [None] * len(columns)
    for i, (column, limit) in enumerate(zip(columns, limits, strict=True)):
        rich.add_column(
            _text(column.title),
            justify="right" if column.kind == "figure" else "left",
            style=_STYLES.get(column.emphasis, ""),
            min_width=column.min_width or None,
            max_width=limit,
            overflow="ellipsis" if limit else "fold",
            no_wrap=bool(limit),
            ratio=1 if table.full_width and i == widest else None,
        )
    for row in table.rows[: table.brief or None]:
        rich.add_row(*map(_text, row))
    return rich


def _line_widths(table: Table, width: int) -> list[int]:
    """Limit each column so that rows fit on one line; the names get the space that is left."""
    titles = ["", *(column.title for column in table.columns)]
    columns = zip(titles, *table.rows, strict=True)
    longest = [max(cell_len(str(cell)) for cell in cells) for cells in columns]
    others = [min(cells, _MAX_CELL) for cells in longest[1:]]
    return [max(12, width - sum(others) - 2 * len(others)), *others]


def _print_finding(finding: Note, console: Console) -> None:
    if not finding.label:
        console.print(_text(Status(finding.text, finding.tone)))
        console.print()
        return
    label = _text(Status(finding.label, finding.tone))
    console.print(Text.assemble(label, "  ", _text(finding.location, "strong")))
    console.print(Padding(_text(finding.text), (0, 0, 1, 2)))


def _hanging(mark: str, note: Note) -> RichTable:
    """Lay out a note with its mark to the left of all lines."""
    grid = RichTable.grid(padding=(0, 1))
    grid.add_row(_text(Status(mark, note.tone)), _text(note.text))
    return grid
