"""Rows of .csv, .jsonl and .parquet files whose columns are numbers.

Knows the three formats; reads one batch of rows at a time.
"""

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

_PARQUET_ROWS = 1024
_BUFFER_BYTES = 256 * 1024

_LABELS = 4096
"""How many labels are read at once."""


_LONGEST = 16 * 1024 * 1024

Record = tuple[int, dict[str, Any]]
"""A line number and the fields of that line."""


def open_data(config: RecordsData, seed: int, model: ModelConfig | None) -> BatchSource:
    """The file's rows, counted once."""
    return _Records(config)


class _Records:
    def __init__(self, config: RecordsData) -> None:
        if config.path.suffix not in READERS:
            raise ConfigError(
                f"{config.path.name} is no .csv, .jsonl or .parquet file; arrays are read with "
                "source: arrays",
                "data.path",
            )
        self.path, self.id, self.inputs = config.path, config.id, config.inputs
        self.truth, self.classes = config.labels, config.classes
        self.read = READERS[config.path.suffix]
        self.batch_size = config.batch_size
        self.batch = InputBatcher(config.call, len(config.inputs))
        self.samples, self.sample_bytes = 0, 0
        self.widths: dict[str, int] = {}
        with closing(self._records()) as records:
            for first in records:
                self._check_columns(first[1])
                self.widths = {n: len(self._row(spec, first)) for n, spec in self.inputs.items()}
                sample = self._batch([first], range(1))
                self.sample_bytes = sum(tensor.nbytes for tensor in sample.tensors())
                self.samples = 1 + sum(1 for _ in records)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        with closing(self._records()) as records:
            rows = itertools.islice(records, start, None)
            for first in range(start, self.samples, self.batch_size):
                taken = list(itertools.islice(rows, self.batch_size))
                if len(taken) < min(self.batch_size, self.samples - first):
                    raise ConfigError(f"{self.path} lost rows while it was read", "data.path")
                yield self._batch(taken, range(first, first + len(taken)))

    def labels(self) -> Iterator[torch.Tensor]:
        with closing(self._records()) as records:
            yield from labels_in(records, self.path, self.truth, self.classes)

    def _records(self) -> Generator[Record]:
        try:
            yield from self.read(self.path)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{self.path} cannot be read: {error}", "data.path") from error

    def _check_columns(self, fields: dict[str, Any]) -> None:
        wanted = [
            (f"data.inputs.{name}.columns", column)
            for name, spec in self.inputs.items()
            for column in spec.columns
        ]
        named = [("data.id", self.id), ("data.labels", self.truth)]
        for key, column in [*wanted, *((key, column) for key, column in named if column)]:
            if column not in fields:
                hint = suggest(column, fields)
                raise ConfigError(f"{self.path.name} has no column {column!r}; {hint}", key)

    def _batch(self, records: list[Record], rows: range) -> Batch:
        tensors = {name: self._tensor(name, spec, records) for name, spec in self.inputs.items()}
        ids: Sequence[int | str] = rows
        if self.id:
            ids = [self._id(record) for record in records]
        return self.batch(tensors, ids)

    def _id(self, record: Record) -> str:
        line, fields = record
        if fields.get(str(self.id)) is None:
            raise ConfigError(f"{self.path}:{line}  the id {self.id!r} is missing")
        return str(fields[str(self.id)])

    def _tensor(self, name: str, spec: RecordInput, records: list[Record]) -> torch.Tensor:
        rows, width = [], self.widths[name]
        for record in records:
            row = self._row(spec, record)
            if len(row) != width:
                raise ConfigError(
                    f"{self.path}:{record[0]}  {len(row)} values, where the first row has {width}"
                )
            rows.append(row)
        kind = np.int64 if "int" in spec.dtype else np.float64
        return cast_rows(spec, (width,), f"data.inputs.{name}")(
            torch.from_numpy(np.array(rows, kind))
        )

    def _row(self, spec: RecordInput, record: Record) -> list[float]:
        """The columns of one record, lists laid flat, as one row of numbers."""
        line, fields = record
        number = _number(spec.dtype)
        row: list[float] = []
        for column in spec.columns:
            value = fields.get(column)
            try:
                if isinstance(value, list):
                    row += [number(item) for item in np.ravel(np.array(value, object)).tolist()]
                else:
                    row.append(number(value))
            except (ValueError, TypeError, OverflowError):
                what = f"{value!r:.60}, which is no {spec.dtype} number"
                raise ConfigError(
                    f"{self.path}:{line}  column {column!r} is "
                    f"{'missing' if value is None else what}"
                ) from None
        return row


def labels_in(
    records: Iterator[Record], path: Path, column: str | None, classes: Sequence[str] | None
) -> Iterator[torch.Tensor]:
    """A column's classes or values in order, some at a time: [n], float64.

    Raises:
        ConfigError: no column is named, or one of its fields is neither a number nor a class.
    """
    if column is None:
        raise missing_labels()
    while taken := list(itertools.islice(records, _LABELS)):
        found = [_label(record, path, column, classes) for record in taken]
        yield torch.tensor(found, dtype=torch.float64)


def _label(record: Record, path: Path, column: str, classes: Sequence[str] | None) -> float:
    line, fields = record
    value = fields.get(column)
    if value is None:
        raise ConfigError(f"{path}:{line}  the label {column!r} is missing", "data.labels")
    try:
        return class_number(str(value), classes) if classes else float(value)
    except (ValueError, TypeError) as error:
        text = f"the label {value!r:.60} is no number; data.classes: [...] counts names"
        text = str(error) if classes else text
        key = "data.classes" if classes else "data.labels"
        raise ConfigError(f"{path}:{line}  {text}", key) from None


@functools.cache
def _number(dtype: str) -> Callable[[Any], float]:
    """What reads one number of a type; it raises ValueError where the type cannot hold it."""
    if "int" not in dtype:
        return float
    limits = torch.iinfo(getattr(torch, dtype))

    def whole(item: Any) -> int:
        value = int(item)
        if not limits.min <= value <= limits.max or (isinstance(item, float) and value != item):
            raise ValueError(item)
        return value

    return whole


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """The file's lines, none of them without end: a file may be one line of a terabyte."""
    while line := file.readline(_LONGEST):
        if len(line) == _LONGEST:
            raise ConfigError(
                f"{path} has a line of {_LONGEST:,} characters or more, which is no record; "
                "arrays of such size are read with source: arrays",
                "data.path",
            )
        yield line


def _read_csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(_lines(file, path))
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{path}:1  two columns are called {twice!r}", "data.path")
        for fields in reader:
            # DictReader keeps the values beyond the last column under None.
            if surplus := fields.pop(None, None):
                raise ConfigError(
                    f"{path}:{reader.line_num}  {len(names) + len(surplus)} values, where the "
                    f"header names {len(names)}"
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
                raise ConfigError(f"{path}:{number}  not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ConfigError(f"{path}:{number}  a line is one object, {{...}}")
            yield number, fields


def _read_parquet(path: Path) -> Iterator[Record]:
    parquet = import_optional("pyarrow", "data.path", "parquet")
    try:
        # Not read ahead: that would hold a row group, which may be the file, in memory.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            numbers = itertools.count(1)
            for batch in file.iter_batches(_PARQUET_ROWS):
                names = batch.schema.names
                columns = [column.to_pylist() for column in batch.columns]
                for row in zip(*columns, strict=True):
                    yield next(numbers), dict(zip(names, row, strict=True))
    except Exception as error:  # a damaged file fails in any of a dozen ways
        raise ConfigError(f"{path} cannot be read as Parquet: {error}", "data.path") from error


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
"""File suffix to what reads its records."""
