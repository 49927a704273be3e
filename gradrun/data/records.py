"""Rows of .csv, .jsonl and .parquet files with numeric columns."""

from __future__ import annotations

import csv
import functools
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from gradrun.config.data import RecordInput, RecordsData
from gradrun.config.model import ModelConfig
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_optional
from gradrun.core.suggest import suggest
from gradrun.data.batch import Batch
from gradrun.data.source import (
    BatchSource,
    InputBatcher,
    cast_rows,
    class_number,
    missing_labels,
)
from gradrun.results.result import Statement

_PARQUET_ROWS = 1024
_PARQUET_BUFFER = 256 * 1024
_LABELS_CHUNK = 4096
_MAX_LINE = 16 * 1024 * 1024

Record = tuple[int, dict[str, Any]]
"""A line number, and the fields of that line."""


def open_data(config: RecordsData, seed: int, model: ModelConfig | None) -> BatchSource:
    """Open a file of records and count its rows."""
    return _Records(config)


class _Records:
    def __init__(self, config: RecordsData) -> None:
        if config.path.suffix not in READERS:
            raise ConfigError(
                f"{config.path.name} is not a .csv, .jsonl or .parquet file; arrays are read with "
                "source: arrays",
                "data.path",
            )
        self.config, self.path, self.classes = config, config.path, config.classes
        self.batch_size = config.batch_size
        self.samples, self.sample_bytes = 0, 0
        self._new_batch = InputBatcher(config.call, len(config.inputs))
        self._widths: dict[str, int] = {}
        with closing(self._records()) as records:
            for first in records:
                self._check_columns(first[1])
                self._widths = {n: len(self._row(s, first)) for n, s in config.inputs.items()}
                sample = self._batch([first], range(1))
                self.sample_bytes = sum(tensor.nbytes for tensor in sample.tensors())
                self.samples = 1 + sum(1 for _ in records)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        end = self.samples if stop is None else stop
        with closing(self._records()) as records:
            remaining = itertools.islice(records, start, None)
            for first in range(start, end, self.batch_size):
                rows = list(itertools.islice(remaining, self.batch_size))
                if len(rows) < min(self.batch_size, self.samples - first):
                    raise ConfigError(f"{self.path} became shorter while it was read", "data.path")
                yield self._batch(rows, range(first, first + len(rows)))

    def statements(self) -> Iterator[Statement]:
        yield from ()

    def labels(self) -> Iterator[torch.Tensor]:
        with closing(self._records()) as records:
            yield from read_labels(records, self.path, self.config.labels, self.classes)

    def _records(self) -> Generator[Record]:
        try:
            yield from READERS[self.path.suffix](self.path)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{self.path} cannot be read: {error}", "data.path") from error

    def _check_columns(self, fields: dict[str, Any]) -> None:
        columns = [
            (f"data.inputs.{name}.columns", column)
            for name, spec in self.config.inputs.items()
            for column in spec.columns
        ]
        columns += [
            (f"data.{key}", column)
            for key in ("id", "labels")
            if (column := getattr(self.config, key)) is not None
        ]
        for key, column in columns:
            if column not in fields:
                hint = suggest(column, fields)
                raise ConfigError(f"{self.path.name} has no column {column!r}; {hint}", key)

    def _batch(self, records: list[Record], rows: range) -> Batch:
        inputs = self.config.inputs
        tensors = {name: self._tensor(name, spec, records) for name, spec in inputs.items()}
        ids = [self._id(record) for record in records] if self.config.id else rows
        return self._new_batch(tensors, ids)

    def _id(self, record: Record) -> str:
        line, fields = record
        column = str(self.config.id)
        if fields.get(column) is None:
            raise ConfigError(f"{self.path}:{line}  the id {column!r} is missing")
        return str(fields[column])

    def _tensor(self, name: str, spec: RecordInput, records: list[Record]) -> torch.Tensor:
        rows, width = [], self._widths[name]
        for record in records:
            row = self._row(spec, record)
            if len(row) != width:
                raise ConfigError(
                    f"{self.path}:{record[0]}  {len(row)} values, but the first row has {width}"
                )
            rows.append(row)
        kind = np.int64 if "int" in spec.dtype else np.float64
        convert = cast_rows(spec, (width,), f"data.inputs.{name}")
        return convert(torch.from_numpy(np.array(rows, kind)))

    def _row(self, spec: RecordInput, record: Record) -> list[float]:
        """Return the columns of a record as one row of numbers, with lists flattened."""
        line, fields = record
        number = _number_parser(spec.dtype)
        row: list[float] = []
        for column in spec.columns:
            value = fields.get(column)
            try:
                if isinstance(value, list):
                    row += [number(item) for item in np.ravel(np.array(value, object)).tolist()]
                else:
                    row.append(number(value))
            except (ValueError, TypeError, OverflowError):
                problem = f"{value!r:.60}, not a number of type {spec.dtype}"
                raise ConfigError(
                    f"{self.path}:{line}  column {column!r} is "
                    f"{'missing' if value is None else problem}"
                ) from None
        return row


def read_labels(
    records: Iterator[Record], path: Path, column: str | None, classes: Sequence[str] | None
) -> Iterator[torch.Tensor]:
    """Yield the class numbers or values of a column, in order, in float64 chunks [n].

    Raises:
        ConfigError: no column is named, or a field is neither a number nor a class.
    """
    if column is None:
        raise missing_labels()
    while chunk := list(itertools.islice(records, _LABELS_CHUNK)):
        labels = [_label(record, path, column, classes) for record in chunk]
        yield torch.tensor(labels, dtype=torch.float64)


def _label(record: Record, path: Path, column: str, classes: Sequence[str] | None) -> float:
    line, fields = record
    value = fields.get(column)
    if value is None:
        raise ConfigError(f"{path}:{line}  the label {column!r} is missing", "data.labels")
    try:
        return class_number(str(value), classes) if classes else float(value)
    except (ValueError, TypeError) as error:
        text = f"the label {value!r:.60} is not a number; list class names in data.classes"
        text = str(error) if classes else text
        key = "data.classes" if classes else "data.labels"
        raise ConfigError(f"{path}:{line}  {text}", key) from None


@functools.cache
def _number_parser(dtype: str) -> Callable[[Any], float]:
    """Return a parser of numbers that raises ValueError if the dtype cannot store one."""
    if "int" not in dtype:
        return float
    limits = torch.iinfo(getattr(torch, dtype))

    def integer(item: Any) -> int:
        value = int(item)
        if not limits.min <= value <= limits.max or (isinstance(item, float) and value != item):
            raise ValueError(item)
        return value

    return integer


# --- file formats ------------------------------------------------------------------------------


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Yield the lines of a file, of limited length: a file may be a single line of a terabyte."""
    while line := file.readline(_MAX_LINE):
        if len(line) == _MAX_LINE:
            raise ConfigError(
                f"{path} has a line of {_MAX_LINE:,} characters or more; store large arrays in a "
                "file for source: arrays",
                "data.path",
            )
        yield line


def _read_csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(_lines(file, path))
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            duplicate = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{path}:1  two columns have the name {duplicate!r}", "data.path")
        for fields in reader:
            # DictReader stores the values beyond the last column under None.
            if surplus := fields.pop(None, None):
                raise ConfigError(
                    f"{path}:{reader.line_num}  {len(names) + len(surplus)} values, but the "
                    f"header has {len(names)} columns"
                )
            yield reader.line_num, fields


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(file, path), 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}:{number}  invalid JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ConfigError(f"{path}:{number}  a line must be one object, {{...}}")
            yield number, fields


def _read_parquet(path: Path) -> Iterator[Record]:
    parquet = import_optional("pyarrow", "data.path", "parquet")
    try:
        # Pre-buffering would load a whole row group, which may be the whole file.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_PARQUET_BUFFER) as file:
            numbers = itertools.count(1)
            for batch in file.iter_batches(_PARQUET_ROWS):
                columns = [column.to_pylist() for column in batch.columns]
                for row in zip(*columns, strict=True):
                    yield next(numbers), dict(zip(batch.schema.names, row, strict=True))
    except Exception as error:  # pyarrow raises many types of error for a damaged file
        raise ConfigError(f"{path} cannot be read as Parquet: {error}", "data.path") from error


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
"""File suffix -> reader of its records."""
