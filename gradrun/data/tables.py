"""Rows of .csv, .tsv, .jsonl and .parquet files, their ids and their labels."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
import os
import re
import zlib
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.optional import import_optional
from gradrun.core.suggest import suggest
from gradrun.data.source import class_number, missing_labels
from gradrun.results.result import Statement

_PARQUET_ROWS = 1024
_PARQUET_BUFFER = 256 * 1024
_LABELS_CHUNK = 4096
_MAX_LINE = 16 * 1024 * 1024
_INT64 = range(-(2**63), 2**63)
_BOOLEANS = {"true": 1.0, "false": 0.0}


class Position(NamedTuple):
    """A place between two rows of a file, where reading can start."""

    rows: int = 0
    """Rows before it."""
    lines: int = 0
    """Lines before it; 0 for Parquet, like the other fields."""
    offset: int = 0
    """Bytes before it."""
    checksum: int = 0
    """CRC-32 of the text before it."""


BEGINNING = Position()


class Record(NamedTuple):
    """One row of a file, or the reason why it cannot be read."""

    line: int
    fields: Mapping[str, Any]
    error: str = ""
    """Empty if the row can be read."""
    end: Position | None = None
    """The place after this row, with unknown `rows`; None for Parquet."""


def table_suffix(path: Path) -> str:
    """Return the suffix of a table in lower case, or "" if the file is not a table."""
    suffix = path.suffix.lower()
    return suffix if suffix in _READERS else ""


def read_table(path: Path, start: Position = BEGINNING) -> Generator[Record]:
    """Yield the rows of a table from `start` on, one at a time.

    Raises:
        ConfigError: the file cannot be read, or its columns have no unique names.
    """
    try:
        yield from _READERS[table_suffix(path)](path, start)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "data.path") from error


def read_lines(path: Path, start: Position = BEGINNING) -> Generator[Record]:
    """Yield the lines of a text file from `start` on, as rows with the field "text".

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with _Lines(path, start) as lines:
            for line in lines:
                fields = {"text": _LINE_END.sub("", line)}
                yield Record(lines.count, fields, lines.take_error(), lines.position)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}", "data.path") from error


def has_fixed_columns(path: Path) -> bool:
    """Return whether all rows of a table have the same columns, which JSON lines need not have."""
    return table_suffix(path) not in _JSON_LINES


def describe_absence(path: Path, record: Record, column: str) -> str:
    """Return "empty", "null" or "missing" for a column of a row without a value."""
    if record.fields.get(column) == "":
        return "empty"
    # The reader of csv stores None for the last columns of a short row.
    null = column in record.fields and table_suffix(path) not in _DELIMITERS
    return "null" if null else "missing"


def check_columns(path: Path, record: Record, columns: Iterable[tuple[str, str]]) -> None:
    """Check that a row has the columns of a config, given as pairs of config key and column.

    Raises:
        ConfigError: it lacks one of them.
    """
    for key, column in columns:
        if column not in record.fields:
            names = [*record.fields]
            hint = suggest(column, names)
            for character, name in {";": "';'", "\t": "tabs"}.items():
                if len(names) == 1 and column in names[0].split(character):
                    hint = f"the file seems to be separated by {name}; use a .tsv or convert it"
            raise ConfigError(f"{path.name} has no column {column!r}; {hint}", key)


def parse_number(text: str) -> float:
    """Parse a number as tools for csv files do: without underscores, and as NaN or inf by name.

    Raises:
        ValueError: the text is not a number, or exceeds the range of float64.
    """
    if "_" in text or not text.isascii():  # float() accepts both
        raise ValueError(text)
    value = float(text)
    if math.isinf(value) and "inf" not in text.lower():
        raise ValueError(f"{text:.60} is out of range")
    return value


# --- ids, labels and checksums -----------------------------------------------------------------


class IdColumn:
    """The ids of a run, all of one type: whole numbers if the whole column has them, else text."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self.whole = True
        self._from_text = table_suffix(path) in _DELIMITERS
        self._hashes = array("q")

    def observe(self, record: Record) -> None:
        """Take a row into account for the type; call it for every row before the first `of`."""
        value = record.fields.get(self.column)
        if value is not None and value != "":
            self._hashes.append(hash(str(value)))
        self.whole = self.whole and value is not None and self._is_whole(value)

    def of(self, record: Record) -> int | str:
        """Return the id of a row.

        Raises:
            SampleError: the id is missing.
        """
        value = record.fields.get(self.column)
        if value is None or value == "":
            absence = describe_absence(self.path, record, self.column)
            raise SampleError(f"{self.path}:{record.line}  the id {self.column!r} is {absence}")
        if self.whole:
            return int(value)
        text = str(value)
        # JSON can contain one half of a surrogate pair, which no file of predictions can.
        return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()

    @property
    def type(self) -> str:
        """The type of all ids, in words."""
        return "whole numbers" if self.whole else "text"

    @functools.cached_property
    def distinct(self) -> int:
        """Number of different ids, counted by their hashes."""
        return len(np.unique(np.frombuffer(self._hashes, np.int64))) if self._hashes else 0

    @property
    def repeated(self) -> int:
        """Number of rows with the id of an earlier row."""
        return len(self._hashes) - self.distinct

    def describe(self) -> str:
        """Describe the ids in a few words."""
        return f"column {self.column} ({self.type}, {self.distinct:,} distinct)"

    def _is_whole(self, value: Any) -> bool:
        if self._from_text:
            digits = str(value).removeprefix("-")
            if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
                return False
            if str(int(value)) != value:
                return False  # 007 is text
            value = int(value)
        return type(value) is int and value in _INT64


def id_column(path: Path, column: str | None) -> IdColumn | None:
    """Read the id column of a table once, which decides on its type; None without a column."""
    if column is None or not table_suffix(path):
        return None
    ids = IdColumn(path, column)
    for record in read_table(path):
        ids.observe(record)
    return ids


def describe_order(path: Path, ids: IdColumn | None) -> Statement:
    """Return the statement of the order of the samples and of their ids."""
    rows = "rows" if table_suffix(path) else "lines"
    described = ids.describe() if ids else "row numbers, from 0"
    return Statement(topic="order", text=f"{rows} as in {path.name}; ids: {described}")


class RowIndex:
    """The position after each batch of a file, in 24 bytes each.

    Reading can start in the middle, and a resume can tell whether earlier rows changed.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size, self.rows = batch_size, 0
        self._lines, self._offsets, self._checksums = array("Q"), array("Q"), array("Q")
        self._last: int | None = 0

    def add(self, end: Position | None) -> None:
        """Add the position after the next row."""
        self.rows, self._last = self.rows + 1, end and end.checksum
        if self.rows % self._batch_size == 0 and end is not None:
            self._lines.append(end.lines)
            self._offsets.append(end.offset)
            self._checksums.append(end.checksum)

    def position(self, row: int) -> Position:
        """Return the last known position at or before a row."""
        if self._last is None:
            return Position(rows=row)  # a Parquet file has an index of its own
        batches = row // self._batch_size
        if not batches:
            return Position()
        at = batches - 1
        return Position(
            batches * self._batch_size, self._lines[at], self._offsets[at], self._checksums[at]
        )

    def checksum(self, stop: int) -> int | None:
        """Return the CRC-32 of the rows before `stop`; None for Parquet.

        `stop` is a multiple of the batch size or the number of rows.
        """
        if stop == self.rows or self._last is None:
            return self._last
        return self.position(stop).checksum


def classes_of_labels(
    path: Path, column: str | None, model_classes: Sequence[str]
) -> tuple[str, ...] | None:
    """Return the class names of the model if the first label of a column is one of them.

    Class names that are numbers do not count, because such labels may also be numbers of classes.
    """
    if column is None or not table_suffix(path) or all(map(_is_number, model_classes)):
        return None
    with closing(read_table(path)) as records:
        for record in itertools.islice(records, _LABELS_CHUNK):
            value = record.fields.get(column)
            label = value[0] if isinstance(value, list | tuple) and value else value
            if not record.error and label not in (None, "", []):
                named = not _is_number(label) and str(label) in model_classes
                return tuple(model_classes) if named else None
    return None


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


class IndexedRows:
    """The ids and checksums of a source over the rows of one file."""

    _ids: IdColumn | None
    _index: RowIndex

    @property
    def repeated_ids(self) -> int:
        return self._ids.repeated if self._ids else 0

    def checksum(self, stop: int) -> int | None:
        return self._index.checksum(stop)

    @property
    def id_type(self) -> str:
        return self._ids.type if self._ids else ""


def read_labels(
    records: Iterator[Record], path: Path, column: str | None, classes: Sequence[str] | None
) -> Iterator[torch.Tensor]:
    """Yield the class numbers or values of a column, in order, in float64 chunks [n, ...].

    Lists of numbers become a row of them, and lists of class names a row of 0 and 1, one per class.
    Rows that cannot be read have the label 0, which no metric counts: they get no prediction.

    Raises:
        ConfigError: no column is named, or a field is neither a number nor a class.
    """
    if column is None:
        raise missing_labels()
    width: int | None = None
    while chunk := list(itertools.islice(records, _LABELS_CHUNK)):
        labels = [_label(record, path, column, classes) for record in chunk]
        for label, record in zip(labels, chunk, strict=True):
            size = len(label) if isinstance(label, list) else 0
            width = size if width is None and not record.error else width
            if not record.error and size != width:
                raise ConfigError(
                    f"{path}:{record.line}  the label {column!r} has {size or 'no'} list items, "
                    f"and those before it have {width}; write the same number in every row",
                    "data.labels",
                )
        unread = [0.0] * width if width else 0.0
        rows = [unread if r.error else label for label, r in zip(labels, chunk, strict=True)]
        yield torch.tensor(rows, dtype=torch.float64)


def _label(
    record: Record, path: Path, column: str, classes: Sequence[str] | None
) -> float | list[float]:
    if record.error:
        return 0.0
    value = record.fields.get(column)
    if value is None or str(value).lower() in {"", "nan"}:
        raise ConfigError(
            f"{path}:{record.line}  the label {column!r} is missing; metrics need one for every "
            "row, so remove the rows without one",
            "data.labels",
        )
    try:
        if isinstance(value, list | tuple):
            return _label_list(value, classes)
        return class_number(str(value), classes) if classes else _label_number(value)
    except (ValueError, TypeError) as error:
        text = f"the label {value!r:.60} is not a number; list class names in data.classes"
        text = str(error) if classes else text
        key = "data.classes" if classes else "data.labels"
        raise ConfigError(f"{path}:{record.line}  {text}", key) from None


def _label_list(values: Sequence[Any], classes: Sequence[str] | None) -> list[float]:
    if not classes:
        return [_label_number(value) for value in values]
    present = {class_number(str(value), classes) for value in values}
    return [float(number in present) for number in range(len(classes))]


def _label_number(value: Any) -> float:
    if isinstance(value, str):
        known = _BOOLEANS.get(value.lower())
        return parse_number(value) if known is None else known
    return float(value)


# --- file formats ------------------------------------------------------------------------------


class _Lines:
    """The lines of a text file, of limited length: a file may be a single line of a terabyte.

    Bytes that are not UTF-8 do not end the iteration; they are in `error` until the next row.
    """

    def __init__(self, path: Path, start: Position = BEGINNING) -> None:
        """Open a file at a position."""
        self.path, self.error = path, ""
        self.count, self._offset, self._checksum = start.lines, start.offset, start.checksum
        self._taken: list[str] = []
        file = path.open("rb")
        self._size = os.fstat(file.fileno()).st_size
        if not start.offset and file.read(len(BOM_UTF8)) == BOM_UTF8:
            self._offset = len(BOM_UTF8)
        file.seek(self._offset)
        # Line ends as they are, because offsets count them.
        self._file = TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def position(self) -> Position:
        """The place after the lines that were read."""
        return Position(0, self.count, self._offset, self._checksum)

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(_MAX_LINE):
            if len(line) == _MAX_LINE:
                raise ConfigError(
                    f"{self.path} has a line of {_MAX_LINE:,} characters or more; store large "
                    "arrays in a file for source: arrays",
                    "data.path",
                )
            try:
                data = line.encode()
            except UnicodeEncodeError:
                data = line.encode("utf-8", "surrogateescape")
                self.error = "the row is not UTF-8 text; convert the file, for example with iconv"
            self.count, self._offset = self.count + 1, self._offset + len(data)
            self._checksum = zlib.crc32(data, self._checksum)
            self._taken.append(line)
            yield line

    @property
    def at_end(self) -> bool:
        """Whether the whole file was read."""
        return self._offset >= self._size

    def take(self) -> list[str]:
        """Return the lines since the last call."""
        lines, self._taken = self._taken, []
        return lines

    def take_error(self) -> str:
        """Return the error of the lines since the last call, and forget it and the lines."""
        error, self.error, self._taken = self.error, "", []
        return error


_HUGE = re.compile(r"[0-9][eE]\+?[0-9]{3}")


_LINE_END = re.compile(r"(\r\n|\r|\n)\Z")


def _read_csv(path: Path, start: Position) -> Iterator[Record]:
    csv.field_size_limit(_MAX_LINE)  # the default of 128 KiB is less than a long text
    delimiter = _DELIMITERS[path.suffix.lower()]
    with _Lines(path) as lines:
        names = next(csv.reader(iter(lines), delimiter=delimiter), [])
        if error := lines.take_error():
            raise ConfigError(f"{path}:1  {error}", "data.path")
        _check_unique(names, f"{path}:1")
        start = start if start.rows else lines.position
    with _Lines(path, start) as lines:
        for fields in csv.DictReader(iter(lines), names, delimiter=delimiter):
            unclosed = lines.at_end and _has_open_quote(lines.take(), delimiter)
            error = lines.take_error() or ("a quote is not closed" if unclosed else "")
            # DictReader stores the values beyond the last column under None.
            if surplus := fields.pop(None, None):
                error = error or (
                    f"{len(names) + len(surplus)} values, but the header has {len(names)} columns"
                )
            yield Record(lines.count, fields, error, lines.position)


def _has_open_quote(lines: list[str], delimiter: str) -> bool:
    """Whether the row in some lines ends within quotes, which csv takes for the end of a field."""
    try:
        next(csv.reader(lines, delimiter=delimiter, strict=True), None)
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False


def _read_jsonl(path: Path, start: Position) -> Iterator[Record]:
    with _Lines(path, start) as lines:
        for line in lines:
            if not line.strip():
                continue
            fields, error = {}, lines.take_error()
            try:
                huge = _HUGE.search(line)  # 1e400, which json reads as infinity
                fields = json.loads(line, parse_float=parse_number if huge else None)
            except json.JSONDecodeError as problem:
                error = error or f"invalid JSON: {problem.msg} (column {problem.pos + 1})"
            except (ValueError, RecursionError) as problem:
                error = error or f"invalid JSON: {problem}"
            if not isinstance(fields, dict):
                fields, error = {}, error or "a line must be one object, {...}"
            yield Record(lines.count, fields, error, lines.position)


def _read_parquet(path: Path, start: Position) -> Iterator[Record]:
    parquet = import_optional("pyarrow", "data.path", "parquet")
    try:
        # Pre-buffering would load a whole row group, which may be the whole file.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_PARQUET_BUFFER) as file:
            _check_unique(file.schema_arrow.names, str(path))
            groups, first = list(range(file.num_row_groups)), 0
            while groups and first + (rows := file.metadata.row_group(groups[0]).num_rows) <= (
                start.rows
            ):
                groups, first = groups[1:], first + rows
            numbers = itertools.count(start.rows + 1)
            for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups):
                skipped = min(max(0, start.rows - first), batch.num_rows)
                first += batch.num_rows
                columns = [column.to_pylist() for column in batch.slice(skipped).columns]
                for row in zip(*columns, strict=True):
                    yield Record(next(numbers), dict(zip(batch.schema.names, row, strict=True)))
    except ConfigError:
        raise
    except Exception as error:  # pyarrow raises many types of error for a damaged file
        raise ConfigError(f"{path} cannot be read as Parquet: {error}", "data.path") from error


def _check_unique(names: Sequence[str], place: str) -> None:
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{place}  two columns have the name {duplicate!r}", "data.path")


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_READERS: dict[str, Callable[[Path, Position], Iterator[Record]]] = {
    **dict.fromkeys(_DELIMITERS, _read_csv),
    **dict.fromkeys(_JSON_LINES, _read_jsonl),
    ".parquet": _read_parquet,
}
"""File suffix in lower case -> reader of its rows."""

TABLE_SUFFIXES = tuple(_READERS)
