"""One row of comma-separated values per sample: its id and one column per number.

Several numbers of an output are in columns prediction.0, prediction.1, and so on. A float is
written with enough digits to read back the same bits. A missing prediction is empty cells, and a
missing class an empty cell.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradrun.output.formats.text_writer import Columns, TextWriter, numbered_chunks
from gradrun.output.missing import MISSING_CLASS

Array = np.ndarray[Any, Any]

_BOOLEANS = {"True", "False"}

_Index = tuple[int, ...]
_Layout = dict[str, tuple[list[int], list[int]]]


class CsvWriter(TextWriter):
    """Writes predictions.csv; every row has the columns of the first."""

    suffix = "csv"

    _cells: dict[str, list[str]]
    """Output name to the names of its columns; set by `header`."""

    def header(self, columns: Columns) -> str:
        self._cells = {
            name: [title for title, _ in _flatten(name, values[0])]
            for name, values in columns.items()
        }
        titles = [title for titles in self._cells.values() for title in titles]
        twice = {name for name, cells in self._cells.items() if cells != [name]} & {
            _split(name)[0] for name in columns if _split(name)[1]
        }
        if len({*titles}) < len(titles) or twice:
            listed = ", ".join(map(repr, columns))
            raise ValueError(
                f"the columns of the outputs {listed} are ambiguous; use format: jsonl, or another "
                "name"
            )
        return _to_csv([["id", *titles]])

    def lines(self, columns: Columns, ids: Sequence[int | str]) -> str:
        return _to_csv([name, *self._row(columns, row)] for row, name in enumerate(ids))

    def _row(self, columns: Columns, row: int) -> Iterator[Any]:
        for name, titles in self._cells.items():
            value = columns[name][row]
            if value is None:
                yield from [None] * len(titles)
                continue
            cells = _flatten(name, value)
            if [title for title, _ in cells] != titles:
                raise ValueError(
                    f"the first row of {name!r} has {len(titles)} numbers, but another has "
                    f"{len(cells)}; use format: jsonl for rows of any shape"
                )
            yield from (number for _, number in cells)


def read(folder: Path, skip: Container[str] = ()) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Yield the rows without the columns in `skip`, some lines at a time.

    A missing class is MISSING_CLASS.

    Rows of empty cells are omitted, unless they can be missing classes.
    """
    types: dict[str, set[type]] = {}
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        layout = _layout(next(rows)[1:], skip)
        cells = [1 + i for columns, _ in layout.values() for i in columns]
        for chunk in numbered_chunks(rows):
            for name, (columns, _) in layout.items():
                filled = (filter(None, [row[1 + i] for _, row in chunk]) for i in columns)
                types[name] = types.get(name, set()) | _types_of(filled)
            numbers = {name: _common_type(types[name]) for name in layout}
            numbers = {name: kind for name, kind in numbers.items() if kind is not str}
            classes = {*numbers.values()} <= {int}
            present = [
                (number, row) for number, row in chunk if classes or any(row[i] for i in cells)
            ]
            if present:
                outputs = {
                    name: _parse([[row[1 + i] for i in columns] for _, row in present], shape, kind)
                    for name, kind in numbers.items()
                    for columns, shape in [layout[name]]
                }
                yield np.array([number for number, _ in present]), outputs


def records(folder: Path) -> Iterator[Any]:
    """Yield the rows, with cells as numbers where they are."""
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield {title: _number_or_text(cell) for title, cell in row.items()}


def _number_or_text(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def joins_outputs(name: str) -> bool:
    """Whether an output may be read as a part of another, as h.0 and h.1 of one shape are as h."""
    return bool(_split(name)[1])


def _split(title: str) -> tuple[str, _Index]:
    """Split the numbers from the end of a title: h.0.2 becomes h and (0, 2)."""
    name, *numbers = re.split(r"\.(?=[0-9]+(?:\.[0-9]+)*$)", title)
    return name, tuple(map(int, numbers))


def _layout(titles: Sequence[str], skip: Container[str] = ()) -> _Layout:
    """Output name to its column numbers and the shape of a sample, without titles in `skip`.

    Columns that do not form one array are those of several outputs, such as h.0 and h.1.
    """
    cells = [(i, *_split(title)) for i, title in enumerate(titles) if title not in skip]
    layout: _Layout = {}
    for (name, _), group in itertools.groupby(cells, lambda cell: (cell[1], len(cell[2]))):
        layout |= _arrays(name, [(column, index) for column, _, index in group])
    return layout


def _arrays(name: str, cells: list[tuple[int, _Index]]) -> _Layout:
    shape = [part + 1 for part in cells[-1][1]]  # the last cell has the greatest index
    if [index for _, index in cells] == [*np.ndindex(*shape)]:
        return {name: ([column for column, _ in cells], shape)}
    layout: _Layout = {}
    for number, group in itertools.groupby(cells, lambda cell: cell[1][0]):
        layout |= _arrays(f"{name}.{number}", [(column, index[1:]) for column, index in group])
    return layout


def _types_of(columns: Iterable[Iterator[str]]) -> set[type]:
    """Return the types of the columns of an output: text if any cell of the first is text."""
    found: set[type] = set()
    for column, cells in enumerate(columns):
        found |= {_type_of(cell) for cell in (itertools.islice(cells, 1) if column else cells)}
    return found


def _type_of(cell: str) -> type:
    try:
        float(cell)
    except ValueError:
        return bool if cell in _BOOLEANS else str
    return int if cell.lstrip("-").isdecimal() else float


def _common_type(types: set[type]) -> type:
    """Return the type of an array; int for columns that were empty so far."""
    if str in types:
        return str
    return next(iter(types), int) if len(types) < 2 else float


def _parse(rows: list[list[str]], shape: list[int], kind: type) -> Array:
    """Parse cells as booleans, integers or float64; empty ones as the missing value."""
    values = np.array([[_PARSERS[kind](cell) for cell in row] for row in rows])
    return values.reshape(len(rows), *shape)


def _number(cell: str) -> float:
    return float(cell == "True") if cell in _BOOLEANS else float(cell or "nan")


_PARSERS: dict[type, Callable[[str], float]] = {
    bool: lambda cell: cell == "True",
    int: lambda cell: int(cell) if cell else MISSING_CLASS,
    float: _number,
}


def _flatten(name: str, value: Any) -> list[tuple[str, Any]]:
    """The numbers in a nested list, each with its column name (name.0.2)."""
    if not isinstance(value, list):
        return [(name, value)]
    return [cell for i, item in enumerate(value) for cell in _flatten(f"{name}.{i}", item)]


def _to_csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
