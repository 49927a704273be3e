"""One line of text per sample, appended to one file: the common part of jsonl and csv."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gradrun.core import files
from gradrun.output.columns import ValueColumn, check_storable
from gradrun.output.formats.target import WriterTarget
from gradrun.output.journal import CommittedRange
from gradrun.output.kept_columns import is_kept, title_of
from gradrun.output.missing import MISSING_CLASS, count_nonfinite, finite_rows

if TYPE_CHECKING:
    import torch

    from gradrun.output.transforms import Outputs

T = TypeVar("T")

_CHUNK_LINES = 1024

Columns = dict[str, list[Any]]
"""Column name to a JSON value for each sample: a number, a nested list, a text or None."""


class TextWriter:
    """Appends whole lines, and removes a line that a full disk cut off."""

    suffix = ""

    def __init__(self, target: WriterTarget) -> None:
        self.path = target.folder / f"predictions.{self.suffix}"
        self.samples, self.labels = target.samples, target.labels
        self.written = 0
        self.nonfinite = self._nonfinite_written = 0
        self._labelled: dict[str, str] = {}
        """Output of class numbers to the column with their names."""
        self._descriptor = -1
        self._size = 0
        self._committed, self._checksum = 0, 0

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        check_storable(outputs, self.suffix)
        self._labelled = self.labels.columns(outputs)
        columns = self._columns(outputs, None)
        header = self.header(columns).encode()
        rows = max((len(values) for values in columns.values()), default=0)
        row_bytes = len(self.lines(columns, range(rows))) / max(1, rows)
        if self.samples is not None:
            left = self.samples - (committed[-1].stop if committed else 0)
            files.ensure_free_space(self.path.parent, int(row_bytes * left), self.path.name)
        # Unbuffered: after write() the lines are in the kernel, and survive the process.
        flags = os.O_RDWR if committed else os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._descriptor = files.open_regular(self.path, flags | os.O_APPEND)
        if committed:
            self.written = self._committed = committed[-1].stop
            self._size = committed[-1].end or 0
            self.nonfinite = self._nonfinite_written = sum(part.nonfinite for part in committed)
            files.check_size(self._descriptor, self._size, self.path)
        else:
            files.sync_folder(self.path.parent)
        os.ftruncate(self._descriptor, self._size)
        if header and not committed:
            files.write_all(self._descriptor, header)
            self._size, self._checksum = len(header), zlib.crc32(header)

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        lines = self.lines(self._columns(outputs, valid), ids)
        self.append(lines, len(ids), count_nonfinite(outputs, valid))

    def append(self, lines: str, count: int, nonfinite: int) -> None:
        """Append the lines of `count` samples, `nonfinite` of which have NaN or infinity."""
        # An id may be a file name, and so contain any bytes.
        data = lines.encode("utf-8", "backslashreplace")
        checksum, size = zlib.crc32(data, self._checksum), self._size + len(data)
        nonfinite += self._nonfinite_written
        written = self.written + count
        files.write_all(self._descriptor, data)
        # One statement without calls, which Ctrl-C does not interrupt halfway.
        self._size, self._checksum, self._nonfinite_written, self.written = (
            size, checksum, nonfinite, written,
        )  # fmt: skip

    def _columns(self, outputs: Outputs, valid: torch.Tensor | None) -> Columns:
        columns: Columns = {title_of(name): column.tolist() for name, column in outputs.items()}
        for name, label in self._labelled.items():
            columns[label] = self.labels.names_of(columns[name])
        for name, column in outputs.items():
            integers = not (isinstance(column, ValueColumn) or column.is_floating_point())
            if integers and not finite_rows([column]).all():
                columns[name] = _without_missing(columns[name])
        if valid is not None:
            kept = {title_of(name) for name in outputs if is_kept(name)}
            predicted = [values for name, values in columns.items() if name not in kept]
            for row in (~valid).nonzero().flatten().tolist():
                for values in predicted:
                    values[row] = None
        return columns

    def header(self, columns: Columns) -> str:
        """First line of the file, given the columns of some samples; empty if it has none.

        Raises:
            ValueError: the format cannot represent the columns.
        """
        return ""

    def lines(self, columns: Columns, ids: Sequence[int | str]) -> str:
        """Lines of some samples, each with a line break."""
        raise NotImplementedError

    def commit(self) -> list[CommittedRange]:
        if self.written == self._committed:
            return []
        files.sync(self._descriptor)
        committed = CommittedRange(
            start=self._committed,
            stop=self.written,
            files={self.path.name: self._checksum},
            end=self._size,
            nonfinite=self._nonfinite_written - self.nonfinite,
        )
        self.nonfinite, self._committed, self._checksum = (
            self._nonfinite_written, self.written, 0,
        )  # fmt: skip
        return [committed]

    def close(self) -> list[CommittedRange]:
        if self._descriptor < 0:
            return []
        try:
            os.ftruncate(self._descriptor, self._size)
            return self.commit()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def files(self) -> list[str]:
        return [self.path.name] if self.written else []


def _without_missing(value: Any) -> Any:
    """Return a number or nested list with None for MISSING_CLASS."""
    if isinstance(value, list):
        return [_without_missing(item) for item in value]
    return None if value == MISSING_CLASS else value


def checksum(path: Path, committed: CommittedRange, begin: int) -> int:
    """CRC-32 of the bytes from offset `begin` to the end of a range."""
    end = committed.end or 0
    with files.open_binary(path) as file:
        files.check_size(file.fileno(), end, path)
        return files.checksum(file.fileno(), begin, end)


def numbered_chunks(rows: Iterable[T]) -> Iterator[list[tuple[int, T]]]:
    """Yield rows with their numbers, some at a time."""
    numbered = enumerate(rows)
    while chunk := list(itertools.islice(numbered, _CHUNK_LINES)):
        yield chunk
