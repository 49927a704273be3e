"""A line of text a sample, appended to one file: what jsonl and csv share.

Knows the file and what classes are called; not how a line is written.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from gradrun.core import files
from gradrun.output.journal import CommittedRange
from gradrun.output.transforms import ClassLabels, nonfinite_rows

T = TypeVar("T")

_READ_AT_ONCE = 1024

Columns = dict[str, list[Any]]
"""Output name to a number, a nest of lists, a text or None for each sample."""


class TextWriter:
    """Appends whole lines; the one that a full disk cuts off is taken back."""

    suffix = ""
    spelling = ClassLabels()
    """What the numbers of classes are called, in a column of their own."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.path, self.samples = folder / f"predictions.{self.suffix}", samples
        self.written = 0
        self.nonfinite = self._bad = 0
        self._descriptor = -1
        self._size = 0
        self._committed, self._checksum = 0, 0

    def open(self, outputs: dict[str, torch.Tensor], kept: Sequence[CommittedRange] = ()) -> None:
        if "id" in outputs:
            raise ValueError("an output is called 'id', as the sample is; format: npy keeps both")
        if any(tensor.is_complex() for tensor in outputs.values()):
            raise ValueError(f"{self.suffix} has no complex numbers; format: npy has")
        columns = self._columns(outputs, ())
        header = self.header(columns).encode()
        rows = max((len(values) for values in columns.values()), default=0)
        row_bytes = len(self.lines(columns, range(rows))) / max(1, rows)
        left = self.samples - (kept[-1].stop if kept else 0)
        files.ensure_free_space(self.path.parent, int(row_bytes * left), self.path.name)
        # Unbuffered: what write() returned from is with the kernel, so a crash of ours keeps it.
        flags = os.O_RDWR if kept else os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._descriptor = files.open_regular(self.path, flags | os.O_APPEND)
        if kept:
            self.written = self._committed = kept[-1].stop
            self._size = kept[-1].end or 0
            self.nonfinite = self._bad = sum(committed.nonfinite for committed in kept)
            files.check_size(self._descriptor, self._size, self.path)
        else:
            files.sync_folder(self.path.parent)
        os.ftruncate(self._descriptor, self._size)
        if header and not kept:
            files.write_all(self._descriptor, header)
            self._size, self._checksum = len(header), zlib.crc32(header)

    def write(
        self,
        outputs: dict[str, torch.Tensor],
        ids: Sequence[int | str],
        missing: Collection[int] = (),
    ) -> None:
        # A name may come from a file, whose name may be any bytes.
        data = self.lines(self._columns(outputs, missing), ids).encode("utf-8", "backslashreplace")
        checksum = zlib.crc32(data, self._checksum)
        bad, size = self._bad + nonfinite_rows(outputs.values()), self._size + len(data)
        written = self.written + len(ids)
        files.write_all(self._descriptor, data)
        # Nothing is called from here on, so that Ctrl-C leaves all of these or none.
        self._size, self._checksum, self._bad, self.written = size, checksum, bad, written

    def _columns(self, outputs: dict[str, torch.Tensor], missing: Collection[int]) -> Columns:
        columns: Columns = {name: tensor.tolist() for name, tensor in outputs.items()}
        for name, called in self.spelling.columns(outputs).items():
            columns[called] = self.spelling.names_of(columns[name])
        for values in columns.values():
            for row in missing:
                values[row] = None
        return columns

    def header(self, columns: Columns) -> str:
        """The line above all, if there is one, given the columns of some samples.

        Raises:
            ValueError: the format cannot hold them.
        """
        return ""

    def lines(self, columns: Columns, ids: Sequence[int | str]) -> str:
        """The lines of some samples, each with its end."""
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
            nonfinite=self._bad - self.nonfinite,
        )
        self.nonfinite, self._committed, self._checksum = self._bad, self.written, 0
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


def numbered_lots(rows: Iterable[T]) -> Iterator[list[tuple[int, T]]]:
    """Rows that are read back, each with its number, some at a time."""
    numbered = enumerate(rows)
    while taken := list(itertools.islice(numbered, _READ_AT_ONCE)):
        yield taken
