"""Rows of .csv, .tsv, .jsonl and .parquet files with numeric columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch

from gradrun.config.data import RecordsData
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.units import pluralize
from gradrun.data.batch import Batch
from gradrun.data.dataset_rows import open_table
from gradrun.data.record_inputs import Columns, open_columns, short_number
from gradrun.data.rows import TABLE_READERS, Record, has_fixed_columns
from gradrun.data.source import InputBatcher, OpeningFacts, Preview, at_positions
from gradrun.data.tables import IndexedRows
from gradrun.results.result import Statement

_PREVIEW_COLUMNS = _PREVIEW_ITEMS = 6
_DECIDING_ROWS = 64
"""Number of readable rows that decide how many values a row has: that of most of them."""
_MAX_NOTED = 63
"""Filled columns, and columns with unknown categories, whose rows are counted."""


class Records(IndexedRows):
    """Rows with numeric columns, which are counted when the source is opened."""

    config: RecordsData
    has_previews = True

    def __init__(self, config: RecordsData, facts: OpeningFacts) -> None:
        super().__init__(config, open_table(config, TABLE_READERS, facts.model), facts)
        self._columns: dict[str, Columns] = {}
        with closing(self._table.read()) as records:
            self._scan(records)
        self.samples = self._index.rows
        self._kept.check()
        self._encodings = {
            name: encoding
            for columns in self._columns.values()
            for name, encoding in columns.encodings.items()
        }
        noted = [(name, test) for name, by in self._encodings.items() for test in by.noted()]
        self._noted = noted[:_MAX_NOTED]
        self.flags = np.zeros(self.samples, np.min_scalar_type(2 ** (len(self._noted) + 1) - 1))
        """Bit 0 for a row with NaN that was read, and one bit for each of `_noted`."""
        names = [name for columns in self._columns.values() for name in columns.names]
        self._check_unique(names)
        self._new_batch = InputBatcher(config.call, len(names))
        self.sample_bytes = sum(column.sample_bytes for column in self._columns.values())

    def _scan(self, records: Iterator[Record]) -> None:
        """Count the rows, and decide which form a row has."""
        first: Record | None = None
        checked = -1
        problem: SampleError | None = None
        inputs = [
            open_columns(name, spec, self.config.columns)
            for name, spec in self.config.inputs.items()
        ]
        absent = self._filled_columns() if not has_fixed_columns(self._table.files[0]) else set()
        forms: Counter[tuple[Any, ...]] = Counter()
        for record in records:
            self._observe(record)
            if absent:
                absent -= record.fields.keys()
            if not record.error and record.end.file != checked:
                first, checked = first or record, record.end.file
                if has_fixed_columns(record.path):
                    self._table.check_columns(record, self.config.column_keys())
            for columns in inputs:
                columns.observe(record)
            if forms.total() == _DECIDING_ROWS:
                continue
            try:
                self._check(record)
                forms[tuple(columns.values(record)[1] for columns in inputs)] += 1
            except SampleError as error:
                problem = problem or error
        if absent and first:  # otherwise a wrong name would be filled in every row
            missing = ((f"data.columns.{name}", name) for name in sorted(absent))
            self._table.check_columns(first, missing)
        if forms:
            ((usual, _),) = forms.most_common(1)  # the first rows may be the bad ones
            for columns, form in zip(inputs, usual, strict=True):
                columns.expect(form)
                self._columns[columns.name] = columns
            return
        if first:
            self._table.check_columns(first, self.config.column_keys())
        if problem:
            raise ConfigError(f"no row can be read, for example: {problem}", "data.path")

    def _check_unique(self, names: Sequence[str]) -> None:
        for name, spec in self.config.inputs.items():
            if spec.lengths is not None and names.count(spec.lengths) > 1:
                raise ConfigError(
                    f"there is another input {spec.lengths!r}; choose another name",
                    f"data.inputs.{name}.lengths",
                )

    def _filled_columns(self) -> set[str]:
        return {name for name, spec in self.config.columns.items() if spec.fill is not None}

    def _check(self, record: Record) -> None:
        if record.error:
            raise SampleError(f"{record.place}  {record.error}")

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        end = self.samples if stop is None else stop
        for first, rows in self._groups(self._table.read, start, end, self.batch_size):
            yield self._batch(rows, first)

    def previews(self, positions: Sequence[int]) -> Iterator[Preview]:
        columns = [column for spec in self.config.inputs.values() for column in spec.columns]
        shown, more = columns[:_PREVIEW_COLUMNS], ", ..." if columns[_PREVIEW_COLUMNS:] else ""
        with closing(self._table.read()) as records:
            for record in at_positions(records, positions):
                values = (f"{column} {_shorten(record.fields.get(column))}" for column in shown)
                name = f"{self._ids.of(record, 0)[0]}: " if self._ids else ""
                yield Preview(f"{name}{', '.join(values)}{more}")

    def statements(self) -> Iterator[Statement]:
        for name, columns in self._columns.items():
            yield Statement(topic=f"input {name}", text=columns.describe())
        yield from super().statements()
        yield from self._column_statements()
        others = " in the other columns" if self._filled_columns() else ""
        text = f"empty or null{others}: the row fails (run.on_error)"
        if nans := self._count(0):
            text += f"; NaN in {pluralize(nans, 'row')}: passed to the model"
        yield Statement(topic="missing values", text=text)

    def _column_statements(self) -> Iterator[Statement]:
        """Yield the steps of each column in `data.columns`, and the columns without any."""
        bit = 1
        for name, encoding in self._encodings.items():
            bits = range(bit, bit := bit + len(encoding.noted()))
            counts = [self._count(b) if b <= _MAX_NOTED else None for b in bits]
            yield Statement(topic=f"column {name}", text=encoding.describe(counts))
        used = [column for spec in self.config.inputs.values() for column in spec.columns]
        stored = [name for name in dict.fromkeys(used) if name not in self._encodings]
        if self._encodings and stored:
            more = ", ..." if len(stored) > _PREVIEW_COLUMNS else ""
            text = f"{', '.join(stored[:_PREVIEW_COLUMNS])}{more}: as stored"
            yield Statement(topic="other columns", text=text)

    def _count(self, bit: int) -> int:
        return int(np.count_nonzero(self.flags & self.flags.dtype.type(1 << bit)))

    def _batch(self, records: list[Record], first: int) -> Batch:
        errors: dict[int, SampleError] = {}
        flags = [0] * len(records)
        rows = {name: columns.buffer(len(records)) for name, columns in self._columns.items()}
        for row, record in enumerate(records):
            try:
                self._check(record)
                for name, columns in self._columns.items():
                    rows[name][row] = columns.row(record)
                for bit, (column, applies) in enumerate(self._noted, 1):
                    flags[row] |= applies(record.fields.get(column)) << bit
            except SampleError as error:
                errors[row] = error
        ids = self._row_ids(records, first, errors)
        nans = np.zeros(len(records), bool)
        tensors: dict[str, torch.Tensor] = {}
        lengths: dict[str, torch.Tensor] = {}
        for name, columns in self._columns.items():
            converted = columns.convert(rows[name])
            nans |= converted.nans
            tensors |= converted.tensors
            if converted.lengths is not None:
                lengths[name] = converted.lengths
            for row, problem in converted.problems.items():
                place = records[row].place
                errors.setdefault(row, SampleError(f"{place}  input {name!r}: {problem}"))
        self.flags[first : first + len(records)] = np.array(flags, self.flags.dtype) | nans
        for tensor in tensors.values():
            tensor[list(errors)] = 0
        kept = self._kept.batch(map(self._kept.of, records))
        return self._new_batch(tensors, ids, errors, kept, lengths)

    def _row_ids(
        self, records: list[Record], first: int, errors: dict[int, SampleError]
    ) -> range | list[int | str]:
        if self._ids is None:
            return range(first, first + len(records))
        ids: list[int | str] = []
        for row, record in enumerate(records):
            name, error = self._ids.of(record, first + row)
            ids.append(name)
            if error:
                errors.setdefault(row, error)
        return ids


def _shorten(value: Any) -> str:
    """Return a field for people, with the first items of a long list."""
    if isinstance(value, list):
        more = f", ... ({len(value):,})" if value[_PREVIEW_ITEMS:] else ""
        return f"[{', '.join(map(_shorten, value[:_PREVIEW_ITEMS]))}{more}]"
    try:
        return short_number(value)
    except (TypeError, ValueError):
        return str(value)
