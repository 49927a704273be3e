"""Predictions in memory: the rows that .npy files would have, without files."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradrun.output.formats.npy import RowLayout, mark_nonfinite
from gradrun.output.journal import CommittedRange
from gradrun.output.missing import fill_missing

if TYPE_CHECKING:
    import torch

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


class MemoryWriter:
    """Stores outputs in arrays. A run in memory is not resumed, so it starts with no rows."""

    def __init__(self, target: PredictionArrays, samples: int | None) -> None:
        self.written = self.nonfinite = self._committed = 0
        self._target, self._samples = target, samples
        self._rows: dict[str, _Rows] = {}
        self._invalid: list[int] = []
        """Rows without a prediction since the last commit."""

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        self._rows = {name: _Rows(name, self._samples, out) for name, out in outputs.items()}

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        if outputs.keys() != self._rows.keys():
            raise ValueError(f"the outputs were {[*self._rows]} and now are {[*outputs]}")
        if valid is not None:
            outputs = fill_missing(outputs, valid)
            self._invalid += (self.written + np.flatnonzero(~valid.numpy())).tolist()
        start = self.written
        for name, tensor in outputs.items():
            self._rows[name].write(start, tensor)
        self.written = start + len(ids)

    def commit(self) -> list[CommittedRange]:
        start, stop = self._committed, self.written
        if start == stop:
            return []
        bad = np.zeros(stop - start, bool)
        for rows in self._rows.values():
            rows.mark_nonfinite(start, stop, bad)
        bad[[row - start for row in self._invalid]] = False
        found = int(bad.sum())
        self._committed, self.nonfinite, self._invalid = stop, self.nonfinite + found, []
        return [CommittedRange(start=start, stop=stop, files={}, nonfinite=found)]

    def close(self) -> list[CommittedRange]:
        ranges = self.commit()
        self._target.replace({n: rows.first(self.written) for n, rows in self._rows.items()})
        return ranges

    def files(self) -> list[str]:
        return []


class _Rows:
    """The rows of one output, in an array that grows if the number of samples is unknown."""

    def __init__(self, name: str, samples: int | None, first: Any) -> None:
        self.layout = RowLayout(f"output {name}", first)
        capacity = len(first) if samples is None else samples
        self.array = np.empty((capacity, *self.layout.shape), self.layout.dtype)

    def write(self, at: int, tensor: Any) -> None:
        rows = self.layout.rows_of(tensor)
        stop = at + len(rows)
        if stop > len(self.array):
            larger = np.empty((max(stop, 2 * len(self.array)), *rows.shape[1:]), rows.dtype)
            larger[:at] = self.array[:at]
            self.array = larger
        self.array[at:stop] = rows

    def first(self, count: int) -> Array:
        """Return the first rows, without spare memory behind them."""
        return self.array if count == len(self.array) else self.array[:count].copy()

    def mark_nonfinite(self, start: int, stop: int, bad: Array) -> None:
        step = max(1, _CHUNK_BYTES // max(1, self.layout.row_bytes))
        for begin in range(start, stop, step):
            rows = self.array[begin : min(begin + step, stop)]
            mark_nonfinite(rows, bad[begin - start :][: len(rows)])
