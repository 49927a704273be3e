"""Rows of one .csv, .tsv, .jsonl, .parquet or .txt file, from any position on."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

from gradrun.core.errors import ConfigError
from gradrun.core.input_files import format_suffix, open_input
from gradrun.core.optional import import_optional

_PARQUET_ROWS = 1024
_PARQUET_BUFFER = 256 * 1024
_MAX_LINE = 16 * 1024 * 1024
_BOM = "\ufeff"
_KEPT_FILES = 2
WHOLE_NUMBERS, NUMBERS = "whole numbers", "numbers with fractions"


class Position(NamedTuple):
    """A place between two rows of some files, where reading can start."""

    rows: int = 0
    """Rows before it, in all files."""
    file: int = 0
    """Number of the file."""
    lines: int = 0
    """Lines before it in the file; rows of Parquet."""
    offset: int = 0
    """Bytes before it in the file, without compression; 0 for Parquet."""
    checksum: int | None = 0
    """CRC-32 of the text before it, in all files; None for Parquet."""


BEGINNING = Position()


class Record(NamedTuple):
    """One row of a file, or the reason why it cannot be read."""

    path: Path
    line: int
    """From 1; the row of a Parquet file."""
    fields: Mapping[str, Any]
    end: Position
    """The place after this row, with unknown `rows`."""
    error: str = ""
    """Empty if the row can be read."""

    @property
    def place(self) -> str:
        """The file and line, for messages."""
        return f"{self.path}:{self.line}"


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


def parse_boolean(value: Any) -> float:
    """Return a number, also of a text, or true and false as 1 and 0.

    Raises:
        ValueError: the value is not a number.
        TypeError: the value has another type.
    """
    if not isinstance(value, str):
        return float(value)
    known = {"true": 1.0, "false": 0.0}.get(value.lower())
    return parse_number(value) if known is None else known


class LineFiles:
    """Opens files of lines, and keeps compressed ones open between two ranges.

    A compressed file is read forward only, so starting again would cost its whole first part.
    """

    def __init__(self) -> None:
        self._kept: list[_Lines] = []

    @contextmanager
    def open(self, path: Path, start: Position) -> Iterator[_Lines]:
        """Open a file, which is at `start` or before it; its user calls `advance(start)`."""
        lines = self._take(path, start) or _Lines(path, start.file, start.checksum or 0)
        try:
            yield lines
        except GeneratorExit:
            self._keep(lines)
            raise
        except BaseException:
            lines.close()
            raise
        lines.close()

    def _take(self, path: Path, start: Position) -> _Lines | None:
        kept, self._kept = self._kept, []
        fitting = [
            lines for lines in kept if lines.path == path and lines.position.offset <= start.offset
        ]
        best = max(fitting, key=lambda lines: lines.position.offset, default=None)
        self._kept = [lines for lines in kept if lines is not best]
        return best

    def _keep(self, lines: _Lines) -> None:
        if lines.seekable:
            lines.close()
            return
        self._kept.append(lines)
        while len(self._kept) > _KEPT_FILES:
            self._kept.pop(0).close()


class _Lines:
    """The lines of a text file, of limited length: a file may be a single line of a terabyte.

    Bytes that are not UTF-8 do not end the iteration; they are in `error` until the next row.
    """

    def __init__(self, path: Path, number: int, checksum: int) -> None:
        """Open a file at its beginning, with the checksum of the files before it."""
        self.path, self.error = path, ""
        self.at_end = False
        self.names: list[str] | None = None
        """The header of a csv file, once read."""
        self._number, self._count, self._offset, self._checksum = number, 0, 0, checksum
        self._taken: list[str] = []
        file = open_input(path)
        self.seekable = file.seekable()
        self._file = self._decode(file)

    def close(self) -> None:
        self._file.close()

    @property
    def position(self) -> Position:
        """The place after the lines that were read."""
        return Position(0, self._number, self._count, self._offset, self._checksum)

    def advance(self, start: Position) -> None:
        """Continue at a place in the file, or at the current place if it is behind it.

        Raises:
            OSError: the file cannot be read, or ends before the place.
        """
        if start.offset <= self._offset:
            return
        if self.seekable:
            file: Any = self._file.detach()
            file.seek(start.offset)
            self._file = self._decode(file)
        else:
            for _ in self:
                self._taken.clear()
                if self._offset >= start.offset:
                    break
        self._count, self._offset, self._checksum = start.lines, start.offset, start.checksum or 0
        self.take_error()

    def read_names(self, delimiter: str) -> list[str]:
        """Return the first row of a csv file, which is its header."""
        if self.names is None:
            self.names = next(csv.reader(iter(self), delimiter=delimiter), [])
            if error := self.take_error():
                raise ConfigError(f"{self.path}:1  {error}", "data.path")
            _check_unique(self.names, f"{self.path}:1")
        return self.names

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(_MAX_LINE):
            if len(line) == _MAX_LINE:
                raise ConfigError(
                    f"{self.path} has a line of {_MAX_LINE:,} characters or more; store large "
                    "arrays in a file for source: arrays",
                    "data.path",
                )
            if not self._offset and line.startswith(_BOM):
                line = line.removeprefix(_BOM)
                self._offset = len(_BOM.encode())
            try:
                data = line.encode()
            except UnicodeEncodeError:
                data = line.encode("utf-8", "surrogateescape")
                self.error = "the row is not UTF-8 text; convert the file, for example with iconv"
            self._count, self._offset = self._count + 1, self._offset + len(data)
            self._checksum = zlib.crc32(data, self._checksum)
            self._taken.append(line)
            yield line
        self.at_end = True

    def take(self) -> list[str]:
        """Return the lines since the last call."""
        lines, self._taken = self._taken, []
        return lines

    def take_error(self) -> str:
        """Return the error of the lines since the last call, and forget it and the lines."""
        error, self.error, self._taken = self.error, "", []
        return error

    @staticmethod
    def _decode(file: Any) -> TextIOWrapper:
        # Line ends as they are, because offsets count them.
        return TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")


Reader = Callable[[LineFiles, Path, Position, str], Generator[Record]]
"""(open files, path, position, separator of csv) -> the rows from the position on."""

_HUGE = re.compile(r"[0-9][eE]\+?[0-9]{3}")
_LINE_END = re.compile(r"(\r\n|\r|\n)\Z")


def _read_csv(files: LineFiles, path: Path, start: Position, separator: str) -> Generator[Record]:
    csv.field_size_limit(_MAX_LINE)  # the default of 128 KiB is less than a long text
    with files.open(path, start) as lines:
        names = lines.read_names(separator)
        lines.advance(start)
        for fields in csv.DictReader(iter(lines), names, delimiter=separator):
            unclosed = lines.at_end and _has_open_quote(lines.take(), separator)
            error = lines.take_error() or ("a quote is not closed" if unclosed else "")
            # DictReader stores the values beyond the last column under None.
            if surplus := fields.pop(None, None):
                error = error or (
                    f"{len(names) + len(surplus)} values, but the header has {len(names)} columns"
                )
            end = lines.position
            yield Record(path, end.lines, fields, end, error)


def _has_open_quote(lines: list[str], delimiter: str) -> bool:
    """Whether the row in some lines ends within quotes, which csv takes for the end of a field."""
    try:
        next(csv.reader(lines, delimiter=delimiter, strict=True), None)
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False


def _read_jsonl(files: LineFiles, path: Path, start: Position, _: str) -> Generator[Record]:
    with files.open(path, start) as lines:
        lines.advance(start)
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
            end = lines.position
            yield Record(path, end.lines, fields, end, error)


def _read_lines(files: LineFiles, path: Path, start: Position, _: str) -> Generator[Record]:
    """Yield the lines of a text file, as rows with the field "text"."""
    with files.open(path, start) as lines:
        lines.advance(start)
        for line in lines:
            end = lines.position
            fields = {"text": _LINE_END.sub("", line)}
            yield Record(path, end.lines, fields, end, lines.take_error())


def _read_parquet(_: LineFiles, path: Path, start: Position, __: str) -> Generator[Record]:
    with _parquet_file(path) as file:
        _check_unique(file.schema_arrow.names, str(path))
        groups, first = list(range(file.num_row_groups)), 0
        while groups and first + (rows := file.metadata.row_group(groups[0]).num_rows) <= (
            start.lines
        ):
            groups, first = groups[1:], first + rows
        numbers = itertools.count(start.lines + 1)
        for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups):
            skipped = min(max(0, start.lines - first), batch.num_rows)
            first += batch.num_rows
            columns = [column.to_pylist() for column in batch.slice(skipped).columns]
            for row in zip(*columns, strict=True):
                number = next(numbers)
                end = Position(file=start.file, lines=number, checksum=None)
                yield Record(path, number, dict(zip(batch.schema.names, row, strict=True)), end)


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    parquet = import_optional("pyarrow", "data.path", "parquet")
    try:
        # Pre-buffering would load a whole row group, which may be the whole file.
        with (
            open_input(path) as opened,
            parquet.ParquetFile(opened, pre_buffer=False, buffer_size=_PARQUET_BUFFER) as file,
        ):
            yield file
    except ConfigError:
        raise
    except Exception as error:  # pyarrow raises many types of error for a damaged file
        raise ConfigError(f"{path} cannot be read as Parquet: {error}", "data.path") from error


def column_kinds(path: Path, columns: Sequence[str]) -> dict[str, str]:
    """Return what the columns of a Parquet file contain: "text", "whole numbers", "lists of ...".

    A column whose values are all null has the kind "".

    Raises:
        ConfigError: the file cannot be read.
    """
    with _parquet_file(path) as file:
        schema = file.schema_arrow
    return {name: _kind(schema.field(name).type) for name in columns if name in schema.names}


def _kind(kind: Any) -> str:
    types = import_optional("pyarrow", "data.path", "types")
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return f"lists of {_kind(kind.value_type)}"
    kinds = {
        "": types.is_null,
        WHOLE_NUMBERS: types.is_integer,
        NUMBERS: lambda kind: types.is_floating(kind) or types.is_decimal(kind),
        "text": lambda kind: types.is_string(kind) or types.is_large_string(kind),
        "booleans": types.is_boolean,
    }
    return next((name for name, test in kinds.items() if test(kind)), str(kind))


def _check_unique(names: Sequence[str], place: str) -> None:
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{place}  two columns have the name {duplicate!r}", "data.path")


SEPARATORS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
LINES = ".txt"
PARQUET = ".parquet"
TABLE_READERS: dict[str, Reader] = {
    **dict.fromkeys(SEPARATORS, _read_csv),
    **dict.fromkeys(_JSON_LINES, _read_jsonl),
    PARQUET: _read_parquet,
}
"""File suffix in lower case -> reader of its rows."""
READERS = {**TABLE_READERS, LINES: _read_lines}


def has_fixed_columns(path: Path) -> bool:
    """Return whether all rows of a file have the same columns, which JSON lines need not have."""
    return format_suffix(path) not in _JSON_LINES


def describe_absence(record: Record, column: str) -> str:
    """Return "empty", "null" or "missing" for a column of a row without a value."""
    if record.fields.get(column) == "":
        return "empty"
    # The reader of csv stores None for the last columns of a short row.
    null = column in record.fields and format_suffix(record.path) not in SEPARATORS
    return "null" if null else "missing"
