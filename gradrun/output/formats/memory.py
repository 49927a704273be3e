"""Predictions in memory: the rows that .npy files would have, without files."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradrun.output.formats.npy import ArraysWriter, RowLayout, mark_nonfinite
from gradrun.output.journal import CommittedRange

if TYPE_CHECKING:
    from gradrun.output.columns import Column
    from gradrun.output.transforms import Outputs

Array = np.ndarray[Any, Any]

_CHUNK_BYTES = 1024 * 1024


class PredictionArrays:
    """Receives the predictions of a run, which reads them back for metrics and reports."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        """Output name to its committed rows [samples, ...]."""

    def replace(self, arrays: Mapping[str, Array]) -> None:
        """Set the arrays."""
        self.arrays = dict(arrays)

    def read(self, skip: Container[str] = ()) -> Iterator[tuple[Array, dict[str, Array]]]:
        """Yield all rows, about a MiB at a time, as the reader of a format does."""
        row_bytes = sum(rows[:1].nbytes for rows in self.arrays.values())
        samples = max(map(len, self.arrays.values()), default=0)
        step = max(1, _CHUNK_BYTES // max(1, row_bytes))
        for begin in range(0, samples, step):
            rows = {name: rows[begin : begin + step] for name, rows in self.arrays.items()}
            yield np.arange(begin, min(begin + step, samples)), rows


class MemoryWriter(ArraysWriter):
    """Stores outputs in arrays. A run in memory is not resumed, so it starts with no rows."""

    def __init__(self, target: PredictionArrays, samples: int | None) -> None:
        super().__init__(samples)
        self._target = target

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        self._arrays = {name: _Rows(name, self.samples, out) for name, out in outputs.items()}

    def close(self) -> list[CommittedRange]:
        ranges = self.commit()
        self._target.replace({n: rows.first(self.written) for n, rows in self._arrays.items()})
        return ranges


class _Rows:
    """The rows of one output, in an array that grows if the number of samples is unknown."""

    def __init__(self, name: str, samples: int | None, first: Any) -> None:
        self.layout = RowLayout(f"output {name}", first)
        capacity = len(first) if samples is None else samples
        self.array = np.empty((capacity, *self.layout.shape), self.layout.dtype)

    def write(self, at: int, column: Column) -> None:
        rows = self.layout.rows_of(column)
        stop = at + len(rows)
        if stop > len(self.array):
            larger = np.empty((max(stop, 2 * len(self.array)), *rows.shape[1:]), rows.dtype)
            larger[:at] = self.array[:at]
            self.array = larger
        self.array[at:stop] = rows

    def sync(self, written: int) -> None:
        pass

    def checksum(self, start: int, stop: int, bad: Array) -> int:
        """Only set `bad`: nothing verifies rows in memory."""
        step = max(1, _CHUNK_BYTES // max(1, self.layout.row_bytes))
        for begin in range(start, stop, step):
            rows = self.array[begin : min(begin + step, stop)]
            mark_nonfinite(rows, bad[begin - start :][: len(rows)])
        return 0

    def first(self, count: int) -> Array:
        """Return the first rows, without spare memory behind them."""
        return self.array if count == len(self.array) else self.array[:count].copy()
