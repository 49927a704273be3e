"""Tables over one or several files: their rows, ids and labels."""

from __future__ import annotations

import csv
import functools
import itertools
import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from gradrun.config.data import TableData
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.input_files import (
    compression,
    format_name,
    format_suffix,
    list_files,
)
from gradrun.core.suggest import suggest
from gradrun.core.units import list_names, pluralize
from gradrun.data.kept_columns import KeptColumns
from gradrun.data.rows import (
    BEGINNING,
    NUMBERS,
    PARQUET,
    SEPARATORS,
    TABLE_READERS,
    WHOLE_NUMBERS,
    LineFiles,
    Position,
    Reader,
    Record,
    column_kinds,
    describe_absence,
    parse_boolean,
)
from gradrun.data.source import BatchSource, OpeningFacts, class_number, missing_labels
from gradrun.results.result import Statement

_LABELS_CHUNK = 4096
_INT64 = range(-(2**63), 2**63)


class Table:
    """Rows that can be read from any position on."""

    suffix: str
    """The format of the files, as a suffix in lower case; "" without one."""
    has_columns: bool
    """Whether the rows have columns with names, unlike lines of text."""
    files: Sequence[Path]
    """The files with the rows."""

    def class_names(self, column: str) -> tuple[str, ...]:
        """Return the names of the classes in a column of labels, if the table has them."""
        return ()

    def read(self, start: Position = BEGINNING) -> Generator[Record]:
        """Yield the rows from `start` on, one at a time.

        Raises:
            ConfigError: they cannot be read, or the columns have no unique names.
        """
        raise NotImplementedError

    def describe(self, index: RowIndex) -> Iterator[Statement]:
        """Yield the statements of the files: how many, of which format, and those left out."""
        return iter(())

    def describe_order(self, ids: str) -> Statement:
        """Return the statement of the order of the samples and of their ids, as described."""
        raise NotImplementedError

    def check_kinds(self, columns: Iterable[tuple[str, str]]) -> None:
        """Check that the columns of a config have one kind in all Parquet files.

        Whole numbers in one file and fractions in another are read as numbers, and stated; not in
        an id, whose text would depend on it.

        Args:
            columns: pairs of config key and column.

        Raises:
            ConfigError: a column has several kinds.
        """

    def check_columns(self, record: Record, columns: Iterable[tuple[str, str]]) -> None:
        """Check that a row has the columns of a config, given as pairs of config key and column.

        Raises:
            ConfigError: it lacks one of them.
        """
        raise NotImplementedError


class FileTable(Table):
    """The rows of one or several files of one format."""

    def __init__(self, config: TableData, readers: Mapping[str, Reader]) -> None:
        """Find the files of a config, and the reader of their format.

        Raises:
            ConfigError: there is no file, or no reader of the format.
        """
        assert config.path
        self._listed = list_files(config.path, "data.path", readers)
        self.files = self._listed.files
        first = self.files[0]
        self.suffix = format_suffix(first)
        if self.suffix not in readers:
            raise ConfigError(
                f"{first.name} is not a {', '.join(readers)} file; arrays are read with source: "
                "arrays",
                "data.path",
            )
        if self.suffix == PARQUET and (packed := [*filter(compression, self.files)]):
            raise ConfigError(
                f"{packed[0].name}: Parquet files are compressed inside, and cannot be read from "
                f"a {packed[0].suffix} file; decompress it",
                "data.path",
            )
        self.has_columns = self.suffix in TABLE_READERS
        self._reader, self._open_files = readers[self.suffix], LineFiles()
        self._separator = config.separator or SEPARATORS.get(self.suffix, "")
        if config.separator and self.suffix not in SEPARATORS:
            raise ConfigError(
                f"{first.name} has no separators between columns; remove the key",
                "data.separator",
            )
        self._versions: dict[int, tuple[int, int]] = {}
        self._mixed: list[Statement] = []

    def read(self, start: Position = BEGINNING) -> Generator[Record]:
        at = start
        for number in range(start.file, len(self.files)):
            path = self.files[number]
            if number > start.file:  # checksums continue over the files
                at = Position(file=number, checksum=at.checksum)
            try:
                if self.suffix == PARQUET:  # the checksums of other rows show a change
                    status = path.stat()
                    version = status.st_size, status.st_mtime_ns
                    if self._versions.setdefault(number, version) != version:
                        raise changed_file(path)
                for record in self._reader(self._open_files, path, at, self._separator):
                    yield record
                    at = record.end
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(f"{path} cannot be read: {reason}", "data.path") from error

    def check_kinds(self, columns: Iterable[tuple[str, str]]) -> None:
        if self.suffix != PARQUET or len(self.files) == 1:
            return
        keys = {column: key for key, column in columns}
        known: dict[str, dict[str, Path]] = {column: {} for column in keys}
        for path in self.files:
            for column, kind in column_kinds(path, [*keys]).items():
                known[column].setdefault(kind, path)
        for column, by_kind in known.items():
            by_kind.pop("", None)
            found = ", ".join(f"{kind} in {path.name}" for kind, path in by_kind.items())
            numbers = {kind.replace(WHOLE_NUMBERS, NUMBERS) for kind in by_kind}
            if len(by_kind) > 1 and (len(numbers) > 1 or keys[column] == "data.id"):
                raise ConfigError(
                    f"the column {column!r} has {found}; convert the column of one of the files",
                    keys[column],
                )
            if len(by_kind) > 1:
                text = f"column {column} has {found}: all are read as numbers"
                self._mixed.append(Statement(topic="files", text=text))

    def describe(self, index: RowIndex) -> Iterator[Statement]:
        if len(self.files) > 1:
            formats = " and ".join(dict.fromkeys(map(format_name, self.files)))
            empty = index.empty_files(len(self.files))
            rows = pluralize(index.rows, "row" if self.has_columns else "line")
            text = (
                f"{len(self.files):,} files{f' ({empty:,} empty)' if empty else ''}, {formats}, "
                f"{rows}, first {self.files[0].name}, last {self.files[-1].name}"
            )
            yield Statement(topic="files", text=text)
        if self._listed.left_out:
            yield Statement(topic="files", text=f"{self._listed.left_out} not read")
        yield from self._mixed

    def describe_order(self, ids: str) -> Statement:
        rows = "rows" if self.has_columns else "lines"
        files = self.files[0].name if len(self.files) == 1 else f"the files, {self._listed.order}"
        return Statement(topic="order", text=f"{rows} as in {files}; ids: {ids}")

    def check_columns(self, record: Record, columns: Iterable[tuple[str, str]]) -> None:
        for key, column in columns:
            if column in record.fields:
                continue
            names = [*record.fields]
            hint = suggest(column, names)
            for separator, name in {";": '";"', "\t": '"\\t"', "|": '"|"', ",": '","'}.items():
                if len(names) == 1 and column in names[0].split(separator):
                    hint = f"the columns seem to be separated by {name}; set data.separator: {name}"
            unlike = ""
            if record.path != self.files[0]:
                header = "; every file needs the header" if self.suffix in SEPARATORS else ""
                unlike = f", unlike {self.files[0].name}{header}"
            raise ConfigError(f"{record.path.name} has no column {column!r}{unlike}; {hint}", key)


def changed_file(path: Path) -> ConfigError:
    """Return the error for a file that changed after its rows were counted."""
    return ConfigError(
        f"{path} changed while it was read: its rows are not those that were counted at the start",
        "data.path",
    )


# --- ids, labels and checksums -----------------------------------------------------------------


class IdColumn:
    """The ids of a run, all of one type: whole numbers if the whole column has them, else text."""

    def __init__(self, table: Table, column: str) -> None:
        self.column, self.whole = column, True
        self._from_text = table.suffix in SEPARATORS
        self._hashes = array("q")

    def observe(self, record: Record) -> None:
        """Take a row into account for the type; call it for every row before the first `of`."""
        value = record.fields.get(self.column)
        if not _is_missing(value):
            self._hashes.append(hash(str(value)))
        self.whole = self.whole and value is not None and self._is_whole(value)

    def of(self, record: Record, number: int) -> tuple[int | str, SampleError | None]:
        """Return the id of a row, or one made of its number and the error if it is missing."""
        value: Any = record.fields.get(self.column)
        if _is_missing(value):
            absence = describe_absence(record, self.column)
            text = f"{record.place}  the id {self.column!r} is {absence}"
            return f"row {number}", SampleError(text)
        if self.whole:
            return int(value), None
        text = str(value)
        # JSON can contain one half of a surrogate pair, which no file of predictions can.
        return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode(), None

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


def _is_missing(value: Any) -> bool:
    """Whether a row has no id; pandas writes NaN for one that is missing among numbers."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


class RowIndex:
    """The position after each batch of some files, in 24 bytes each, and the rows of each file.

    Reading can start in the middle, and a resume can tell whether earlier rows changed.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size, self.rows = batch_size, 0
        self._lines, self._offsets, self._checksums = array("Q"), array("Q"), array("Q")
        self._firsts = array("Q")
        """Number of the first row of each file up to the last one with rows."""
        self._last: int | None = 0

    def add(self, end: Position) -> None:
        """Add the position after the next row."""
        while len(self._firsts) <= end.file:
            self._firsts.append(self.rows)
        self.rows, self._last = self.rows + 1, end.checksum
        if self.rows % self._batch_size == 0 and end.checksum is not None:
            self._lines.append(end.lines)
            self._offsets.append(end.offset)
            self._checksums.append(end.checksum)

    def position(self, row: int) -> Position:
        """Return the last known position at or before a row."""
        if self._last is None:
            file = self._file_of(row)
            return Position(row, file, row - self._firsts[file], checksum=None)
        batches = row // self._batch_size
        if not batches:
            return BEGINNING
        rows, at = batches * self._batch_size, batches - 1
        return Position(
            rows, self._file_of(rows - 1), self._lines[at], self._offsets[at], self._checksums[at]
        )

    def checksum(self, stop: int) -> int | None:
        """Return the CRC-32 of the rows before `stop`; None for Parquet.

        `stop` is a multiple of the batch size or the number of rows.
        """
        if stop == self.rows or self._last is None:
            return self._last
        return self.position(stop).checksum

    def matches(self, rows: int, end: Position) -> bool:
        """Return whether the text of the first rows, which ends at `end`, is that of the count."""
        known = rows == self.rows or rows % self._batch_size == 0
        return not known or self.checksum(rows) == end.checksum

    def empty_files(self, files: int) -> int:
        """Return how many of the files have no rows."""
        return files - len(set(self._firsts))

    def _file_of(self, row: int) -> int:
        """Return the file of a row; the last file with rows if there are fewer."""
        return bisect_right(self._firsts, row) - 1


class _HasEnd(Protocol):
    @property
    def end(self) -> Position: ...


_Row = TypeVar("_Row", bound=_HasEnd)


def classes_of_labels(
    table: Table, column: str | None, model_classes: Sequence[str]
) -> tuple[str, ...]:
    """Return the class names of a column of labels, in the order of the model if it has them all.

    They are the names in the table, or those of the model if the first label is one of them. Class
    names that are numbers do not count, because such labels may also be numbers of classes.
    """
    if column is None or not table.has_columns:
        return ()
    if own := table.class_names(column):
        return tuple(model_classes) if {*own} <= {*model_classes} else own
    if all(map(_is_number, model_classes)):
        return ()
    with closing(table.read()) as records:
        for record in itertools.islice(records, _LABELS_CHUNK):
            value = record.fields.get(column)
            label = value[0] if isinstance(value, list | tuple) and value else value
            if not record.error and label not in (None, "", []):
                named = not _is_number(label) and str(label) in model_classes
                return tuple(model_classes) if named else ()
    return ()


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


class IndexedRows(BatchSource):
    """What sources of rows share: ids, labels, kept columns, checksums and files of a table."""

    config: TableData
    samples: int

    def __init__(self, config: TableData, table: Table, facts: OpeningFacts) -> None:
        """Check the kinds of the columns; `_observe` takes the rows into account.

        Raises:
            ConfigError: the files have columns of several kinds, or cannot be read.
        """
        self.config, self._table = config, table
        self.classes = config.classes or classes_of_labels(table, config.labels, facts.classes)
        self.batch_size, self.has_ids = config.batch_size, config.id is not None
        self._ids = IdColumn(table, config.id) if config.id is not None else None
        self._kept, self._index = KeptColumns(facts.keep), RowIndex(config.batch_size)
        self.kept_types = self._kept.types
        table.check_kinds(config.column_keys())

    def _observe(self, record: Record) -> None:
        """Take the next row into account when the source is opened."""
        self._index.add(record.end)
        if self._ids:
            self._ids.observe(record)
        self._kept.observe(record)

    def labels(self) -> Iterator[torch.Tensor]:
        with closing(self._table.read()) as records:
            yield from read_labels(records, self.config.labels, self.classes)

    def statements(self) -> Iterator[Statement]:
        yield from self._table.describe(self._index)
        ids = self._ids.describe() if self._ids else "row numbers, from 0"
        yield self._table.describe_order(ids)
        yield from self._kept.statements()
        if self.config.labels is not None:
            yield Statement(topic="labels", text=self._describe_labels(self.config.labels))

    def _describe_labels(self, column: str) -> str:
        """Describe the labels in a column, with their names and the origin of these."""
        classes = self.classes
        if not classes:
            return f"column {column}, as numbers"
        others = "the dataset" if self._table.class_names(column) == tuple(classes) else "the model"
        origin = "data.classes" if self.config.classes else others
        names = list_names(classes)
        return f"column {column}, by name: {names} ({len(classes)} classes, from {origin})"

    @property
    def files(self) -> Sequence[Path]:
        return self._table.files

    @property
    def repeated_ids(self) -> int:
        return self._ids.repeated if self._ids else 0

    def checksum(self, stop: int) -> int | None:
        return self._index.checksum(stop)

    @property
    def id_type(self) -> str:
        return self._ids.type if self._ids else ""

    def _groups(
        self, read: Callable[[Position], Generator[_Row]], start: int, stop: int, size: int
    ) -> Iterator[tuple[int, list[_Row]]]:
        """Yield rows `start` to `stop` in groups of `size`, with the number of the first.

        The last group may end behind `stop`.

        Raises:
            ConfigError: the files changed after their rows were counted.
        """
        at = self._index.position(start)
        with closing(read(at)) as rows:
            remaining = itertools.islice(rows, start - at.rows, None)
            for first in range(start, stop, size):
                end = min(first + size, self.samples)
                group = list(itertools.islice(remaining, end - first))
                if len(group) < end - first or not self._index.matches(end, group[-1].end):
                    file = group[-1].end.file if group else at.file
                    raise changed_file(self.files[file])
                yield first, group


def read_labels(
    records: Iterator[Record], column: str | None, classes: Sequence[str]
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
        labels = [_label(record, column, classes) for record in chunk]
        for label, record in zip(labels, chunk, strict=True):
            size = len(label) if isinstance(label, list) else 0
            width = size if width is None and not record.error else width
            if not record.error and size != width:
                raise ConfigError(
                    f"{record.place}  the label {column!r} has {size or 'no'} list items, "
                    f"and those before it have {width}; write the same number in every row",
                    "data.labels",
                )
        unread = [0.0] * width if width else 0.0
        rows = [unread if r.error else label for label, r in zip(labels, chunk, strict=True)]
        yield torch.tensor(rows, dtype=torch.float64)


def _label(record: Record, column: str, classes: Sequence[str]) -> float | list[float]:
    if record.error:
        return 0.0
    value = record.fields.get(column)
    if value is None or str(value).lower() in {"", "nan"}:
        raise ConfigError(
            f"{record.place}  the label {column!r} is missing; metrics need one for every "
            "row, so remove the rows without one",
            "data.labels",
        )
    try:
        if isinstance(value, list | tuple):
            return _label_list(value, classes)
        return class_number(str(value), classes) if classes else parse_boolean(value)
    except (ValueError, TypeError) as error:
        text = f"the label {value!r:.60} is not a number; list class names in data.classes"
        text = str(error) if classes else text
        key = "data.classes" if classes else "data.labels"
        raise ConfigError(f"{record.place}  {text}", key) from None


def _label_list(values: Sequence[Any], classes: Sequence[str]) -> list[float]:
    if not classes:
        return [parse_boolean(value) for value in values]
    present = {class_number(str(value), classes) for value in values}
    return [float(number in present) for number in range(len(classes))]
