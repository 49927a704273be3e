"""A table of comma-separated values: a row a sample, a column for its id and for each number.

An output of several numbers a sample is laid flat: "prediction.0", "prediction.1". A float is
written so that reading it gives the same bits; a sample without a prediction has empty cells.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gradrun.sinks.lines import Columns, LineSink


class CsvSink(LineSink):
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


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """The numbers in a nest of lists, each with its column: name.0.2."""
    if not isinstance(value, list):
        return [(name, value)]
    return [cell for i, item in enumerate(value) for cell in _flat(f"{name}.{i}", item)]


def _written(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
