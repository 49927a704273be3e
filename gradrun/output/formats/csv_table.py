"""A table of comma-separated values: a row a sample, a column for its id and for each number.

An output of several numbers a sample is laid flat: "prediction.0", "prediction.1". A float is
written so that reading it gives the same bits; a sample without a prediction has empty cells.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gradrun.output.formats.text_writer import Columns, TextWriter, numbered_lots

_TRUTHS = {"True", "False"}


class CsvWriter(TextWriter):
    """predictions.csv; every row has the columns of the first."""

    suffix = "csv"

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self._cells: dict[str, list[str]] = {}
        """Of each output, what its columns are called."""

    def header(self, columns: Columns) -> str:
        self._cells = {
            name: [called for called, _ in _flat(name, values[0])]
            for name, values in columns.items()
        }
        return _written([["id", *(called for cells in self._cells.values() for called in cells)]])

    def lines(self, columns: Columns, ids: Sequence[int | str]) -> str:
        return _written([name, *self._row(columns, row)] for row, name in enumerate(ids))

    def _row(self, columns: Columns, row: int) -> Iterator[Any]:
        for name, cells in self._cells.items():
            value = columns[name][row]
            if value is None:
                yield from [None] * len(cells)
                continue
            found = _flat(name, value)
            if [called for called, _ in found] != cells:
                raise ValueError(
                    f"the rows of {name!r} began with {len(cells)} numbers, and one has "
                    f"{len(found)}; format: jsonl takes any"
                )
            yield from (number for _, number in found)


def read(folder: Path) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The rows of every output, some lines at a time; those with empty cells are left out."""
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        places = _places(next(rows)[1:])
        for taken in numbered_lots(rows):
            # Of what was set apart every cell is empty; a class may be called nothing.
            whole = [(number, cells[1:]) for number, cells in taken if any(cells[1:])]
            if whole:
                outputs = {
                    name: _tensor([[cells[i] for i in columns] for _, cells in whole], shape)
                    for name, (columns, shape) in places.items()
                    if not any(_is_text(cells[columns[0]]) for _, cells in whole)
                }
                yield torch.tensor([number for number, _ in whole]), outputs


def _places(called: Sequence[str]) -> dict[str, tuple[list[int], list[int]]]:
    """Output name to its columns and to the shape of a sample, as _flat has laid it."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for column, title in enumerate(called):
        name, *place = re.split(r"\.(?=[0-9.]+$)", title, maxsplit=1)
        at = [int(part) for part in ".".join(place).split(".")] if place else []
        columns, _ = found.setdefault(name, ([], []))
        columns.append(column)
        found[name] = columns, [part + 1 for part in at]  # the last cell is the greatest
    return found


def _is_text(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell not in _TRUTHS
    return False


def _tensor(cells: list[list[str]], shape: list[int]) -> torch.Tensor:
    """As exact as the numbers are written."""
    first = cells[0][0]
    if first in _TRUTHS:
        made = torch.tensor([[cell == "True" for cell in row] for row in cells])
    elif first.lstrip("-").isdecimal():
        made = torch.tensor([[int(cell) for cell in row] for row in cells])
    else:
        made = torch.tensor([[float(cell) for cell in row] for row in cells], dtype=torch.float64)
    return made.reshape(len(cells), *shape)


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """The numbers in a nest of lists, each with its column: name.0.2."""
    if not isinstance(value, list):
        return [(name, value)]
    return [cell for i, item in enumerate(value) for cell in _flat(f"{name}.{i}", item)]


def _written(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
