"""Rows of .csv, .tsv, .jsonl and .parquet files with numeric columns."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch

from gradrun.config.columns import ColumnSection
from gradrun.config.data import RecordInput, RecordsData
from gradrun.config.model import ModelConfig
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.units import pluralize
from gradrun.data.batch import Batch
from gradrun.data.column_encoding import ColumnEncoding
from gradrun.data.conversion import Conversion
from gradrun.data.rows import (
    TABLE_READERS,
    Record,
    describe_absence,
    has_fixed_columns,
    parse_number,
)
from gradrun.data.source import BatchSource, InputBatcher, Preview, at_positions, describe_labels
from gradrun.data.tables import (
    IdColumn,
    IndexedRows,
    RowIndex,
    Table,
    classes_of_labels,
    read_labels,
)
from gradrun.results.result import Statement

_PREVIEW_COLUMNS = 6
_DECIDING_ROWS = 64
"""Number of readable rows that decide how many values a row has: that of most of them."""
_DIGITS = re.compile(r"\s*[+-]?[0-9]+\s*")
_MAX_NOTED = 63
"""Filled columns, and columns with unknown categories, whose rows are counted."""
_EXACT = 2**53
"""Greatest whole number below which float64 has every whole number."""


def open_data(
    config: RecordsData, seed: int, model: ModelConfig | None, model_classes: Sequence[str] = ()
) -> BatchSource:
    """Open a file of records and count its rows."""
    return _Records(config, model_classes)


class _Records(IndexedRows):
    def __init__(self, config: RecordsData, model_classes: Sequence[str]) -> None:
        self.config, self._table = config, Table(config, TABLE_READERS)
        self.classes = config.classes or classes_of_labels(
            self._table, config.labels, model_classes
        )
        self.batch_size, self.has_ids = config.batch_size, config.id is not None
        self.samples, self.sample_bytes = 0, 0
        self._new_batch = InputBatcher(config.call, len(config.inputs))
        self._ids = IdColumn(self._table, config.id) if config.id is not None else None
        self._index = RowIndex(config.batch_size)
        self._columns: dict[str, _Columns] = {}
        with closing(self._table.read()) as records:
            self._scan(records)
        self._encodings = {
            name: encoding
            for columns in self._columns.values()
            for name, encoding in columns.encodings.items()
        }
        noted = [(name, test) for name, by in self._encodings.items() for test in by.noted()]
        self._noted = noted[:_MAX_NOTED]
        self.flags = np.zeros(self.samples, np.min_scalar_type(2 ** (len(self._noted) + 1) - 1))
        """Bit 0 for a row with NaN that was read, and one bit for each of `_noted`."""
        self.sample_bytes = sum(column.sample_bytes for column in self._columns.values())

    def _scan(self, records: Iterator[Record]) -> None:
        """Count the rows, and decide which shape a row has."""
        first: Record | None = None
        checked = -1
        problem: SampleError | None = None
        parsers = {
            name: _Parser(spec, self.config.columns) for name, spec in self.config.inputs.items()
        }
        absent = self._filled_columns() if not has_fixed_columns(self._table.files[0]) else set()
        shapes: Counter[tuple[tuple[int, ...], ...]] = Counter()
        for record in records:
            self.samples += 1
            self._index.add(record.end)
            if self._ids:
                self._ids.observe(record)
            if absent:
                absent -= record.fields.keys()
            if not record.error and record.end.file != checked:
                first, checked = first or record, record.end.file
                if has_fixed_columns(record.path):
                    self._table.check_columns(record, self._column_keys())
            if shapes.total() == _DECIDING_ROWS:
                continue
            try:
                self._check(record)
                for parser in parsers.values():
                    parser.values(record)
            except SampleError as error:
                problem = problem or error
            else:
                shapes[tuple(parser.stored_shape(record) for parser in parsers.values())] += 1
        if absent and first:  # otherwise a wrong name would be filled in every row
            missing = ((f"data.columns.{name}", name) for name in sorted(absent))
            self._table.check_columns(first, missing)
        if shapes:
            ((usual, _),) = shapes.most_common(1)  # the first rows may be the bad ones
            for (name, parser), shape in zip(parsers.items(), usual, strict=True):
                self._columns[name] = _Columns(name, parser, shape)
            return
        if first:
            self._table.check_columns(first, self._column_keys())
        if problem:
            raise ConfigError(f"no row can be read, for example: {problem}", "data.path")

    def _filled_columns(self) -> set[str]:
        return {name for name, spec in self.config.columns.items() if spec.fill is not None}

    def _check(self, record: Record) -> None:
        if record.error:
            raise SampleError(f"{record.place}  {record.error}")

    def _column_keys(self) -> Iterator[tuple[str, str]]:
        """Yield the config keys and the names of all columns."""
        for name, spec in self.config.inputs.items():
            yield from ((f"data.inputs.{name}.columns", column) for column in spec.columns)
        for key in ("id", "labels"):
            if (column := getattr(self.config, key)) is not None:
                yield f"data.{key}", column

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
                name = f"{self._row_ids([record], 0, {})[0]}: " if self._ids else ""
                yield Preview(f"{name}{', '.join(values)}{more}")

    def labels(self) -> Iterator[torch.Tensor]:
        with closing(self._table.read()) as records:
            yield from read_labels(records, self.config.labels, self.classes)

    def statements(self) -> Iterator[Statement]:
        for name, columns in self._columns.items():
            yield Statement(topic=f"input {name}", text=columns.describe())
        yield from self._table.describe(self._index)
        yield self._table.describe_order(self._ids)
        if self.config.labels:
            yield describe_labels(self.config, self.classes)
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
        rows = {name: columns.zeros(len(records)) for name, columns in self._columns.items()}
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
        tensors = {}
        for name, columns in self._columns.items():
            values = rows[name]
            nans |= np.isnan(values).any(axis=1) if values.dtype.kind == "f" else False
            tensors[name], problems = columns.convert(torch.from_numpy(values))
            for row, problem in problems.items():
                place = records[row].place
                errors.setdefault(row, SampleError(f"{place}  input {name!r}: {problem}"))
        self.flags[first : first + len(records)] = np.array(flags, self.flags.dtype) | nans
        for tensor in tensors.values():
            tensor[list(errors)] = 0
        return self._new_batch(tensors, ids, errors)

    def _row_ids(
        self, records: list[Record], first: int, errors: dict[int, SampleError]
    ) -> range | list[int | str]:
        if self._ids is None:
            return range(first, first + len(records))
        ids: list[int | str] = []
        for row, record in enumerate(records):
            try:
                ids.append(self._ids.of(record))
            except SampleError as error:
                ids.append(f"row {first + row}")
                errors.setdefault(row, error)
        return ids


class _Parser:
    """Reads the columns of one input as numbers."""

    def __init__(self, spec: RecordInput, columns: Mapping[str, ColumnSection]) -> None:
        self.spec = spec
        self.kind = np.int64 if "int" in spec.dtype else np.float64
        self._parse = _number_parser(spec.dtype)
        self.encodings = {
            name: ColumnEncoding(name, columns[name], self._parse, spec.dtype)
            for name in spec.columns
            if name in columns
        }

    def values(self, record: Record) -> list[float]:
        """Return the columns of a record as one row of numbers, with lists flattened.

        Raises:
            SampleError: a value is missing or not a number.
        """
        row: list[float] = []
        for column in self.spec.columns:
            value = record.fields.get(column)
            encoding = self.encodings.get(column)
            try:
                if encoding:
                    row += encoding.numbers(value)
                else:
                    row += self._flatten(value) if isinstance(value, list) else [self._parse(value)]
            except (ValueError, TypeError, OverflowError):
                problem = self._problem(record, column)
                raise SampleError(f"{record.place}  column {column!r} is {problem}") from None
        return row

    def stored_shape(self, record: Record) -> tuple[int, ...]:
        """Return the shape of a row of `values`: that of nested lists if the axes matter."""
        if len(self.spec.columns) == 1 and (self.spec.shape or self.spec.permute):
            nested = _nested_shape(record.fields.get(self.spec.columns[0]))
            if nested:
                return nested
        return (len(self.values(record)),)

    def _flatten(self, value: list[Any]) -> list[float]:
        nested = np.array(value, object).ravel().tolist()
        if self.kind is np.float64 and set(map(type, nested)) <= {float, int}:
            return np.array(nested, np.float64).tolist()  # type: ignore[no-any-return]
        return [self._parse(item) for item in nested]

    def _problem(self, record: Record, column: str) -> str:
        value = record.fields.get(column)
        if value is None or value == "":
            return describe_absence(record, column)
        if column in self.encodings and (problem := self.encodings[column].problem(value)):
            return problem
        if isinstance(value, list) and any(isinstance(item, list) for item in value):
            return "a list of lists of different lengths, or contains more than numbers"
        return f"{value!r:.60}, not a number of type {self.spec.dtype}"


class _Columns:
    """The columns of one input, as rows of one shape."""

    def __init__(self, name: str, parser: _Parser, stored: tuple[int, ...]) -> None:
        self.name, self.spec, self.encodings = name, parser.spec, parser.encodings
        self._parser, self._stored, self._width = parser, stored, math.prod(stored)
        self.convert = Conversion(parser.spec, stored, torch.float64, f"data.inputs.{name}")
        self.sample_bytes = self.convert.sample_bytes

    def zeros(self, rows: int) -> np.ndarray[Any, Any]:
        return np.zeros((rows, self._width), self._parser.kind)

    def describe(self) -> str:
        columns = ", ".join(self.spec.columns[:6])
        more = f" and {len(self.spec.columns) - 6} more" if len(self.spec.columns) > 6 else ""
        return f"{columns}{more}, {self.convert.describe(origin=False)}"

    def row(self, record: Record) -> list[float]:
        """Return the columns of a record as one row of numbers.

        Raises:
            SampleError: a value is missing or not a number, or the row has another shape.
        """
        row = self._parser.values(record)
        if len(row) != self._width:
            raise SampleError(
                f"{record.place}  {len(row)} values for input {self.name!r}, but most rows have "
                f"{self._width}; the rows of an input have one length, so pad or cut the lists in "
                "the file"
            )
        shape = self._parser.stored_shape(record) if self.spec.permute else self._stored
        if shape != self._stored:
            raise SampleError(
                f"{record.place}  input {self.name!r} has the shape {list(shape)}, but permute "
                f"needs that of most rows, {list(self._stored)}"
            )
        return row


def _nested_shape(value: Any) -> tuple[int, ...]:
    return np.shape(np.array(value, object))


def _shorten(value: Any) -> str:
    """Return a field for people, with 4 significant digits of its fractions."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shorten, value))}]"
    try:
        return str(value) if _is_digits(value) else f"{_parse_float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)


def _parse_float(item: Any) -> float:
    return parse_number(item) if isinstance(item, str) else float(item)


def _parse_boolean(item: Any) -> float:
    known = {"true": 1.0, "false": 0.0}.get(item.lower()) if isinstance(item, str) else None
    return _parse_float(item) if known is None else known


@functools.cache
def _number_parser(dtype: str) -> Callable[[Any], float]:
    """Return a parser of numbers that raises ValueError if the dtype cannot store one."""
    if "int" not in dtype:
        return _parse_boolean if dtype == "bool" else _parse_float
    limits = torch.iinfo(getattr(torch, dtype))

    def integer(item: Any) -> int:
        value = int(item) if _is_digits(item) else _parse_float(item)
        exact = isinstance(value, int) or (value == int(value) and abs(value) < _EXACT)
        if not (exact and limits.min <= value <= limits.max):
            raise ValueError(item)
        return int(value)

    return integer


def _is_digits(item: Any) -> bool:
    return isinstance(item, int) or (isinstance(item, str) and bool(_DIGITS.fullmatch(item)))
