"""One file per sample and output in the folder `predictions`, and an index of them in files.jsonl.

The index has a line per sample with the name and the CRC-32 of its files. The journal has the
checksums of the index, so a range is verified by its lines and then by the files in them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradrun.core import files
from gradrun.core.errors import ConfigError
from gradrun.output.class_labels import ClassLabels
from gradrun.output.columns import ValueColumn, values_of
from gradrun.output.formats import text_writer
from gradrun.output.formats.jsonl import JsonlWriter
from gradrun.output.formats.sample_encoders import SampleEncoder, open_encoder
from gradrun.output.formats.target import WriterTarget
from gradrun.output.journal import SUBFOLDER, CommittedRange
from gradrun.output.kept_columns import is_kept
from gradrun.output.missing import count_nonfinite

if TYPE_CHECKING:
    import torch

    from gradrun.output.transforms import Outputs

Array = np.ndarray[Any, Any]

INDEX = "files.jsonl"
SUFFIXES = (".png", ".npy", ".txt", ".json")

_UNSAFE = re.compile(r"[^\w.+= -]")
_MEDIA = re.compile(
    r"\.(jpe?g|png|bmp|gif|webp|tiff?|wav|flac|mp3|ogg|txt|npy)(?=$|#)", re.IGNORECASE
)
"""Suffixes of inputs that the name of an output does not repeat."""
_MAX_NAME = 60
"""Characters of a name, which may take four bytes each of the 255 that file systems allow."""
_WIDTH = 9
"""Digits of a row number if the number of samples is unknown."""


class FilesWriter(JsonlWriter):
    """Writes predictions/ID.SUFFIX, or predictions/ID.OUTPUT.SUFFIX for several outputs."""

    def __init__(self, target: WriterTarget) -> None:
        # The lines of the index have no columns with class names.
        super().__init__(target._replace(labels=ClassLabels(target.labels.config)))
        self._classes = target.labels
        self.path, self.folder = target.folder / INDEX, target.folder / SUBFOLDER
        self._encoders: dict[str, SampleEncoder] = {}
        self._names: set[str] = set()
        """Names in use, in lower case, because some file systems ignore it."""
        self._unsynced: list[Path] = []

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        predicted = {name: column for name, column in outputs.items() if not is_kept(name)}
        self._encoders = {
            name: open_encoder(self._classes, name, column) for name, column in predicted.items()
        }
        rows = max(map(len, predicted.values()), default=0)
        size = self._encoded_size(predicted, rows)
        self.folder.mkdir(exist_ok=True)
        super().open(self._described(outputs, ["0"] * rows, None, write=False), committed)
        if self.samples is not None and rows:
            left = self.samples - self.written
            files.ensure_free_space(self.folder, size * left // rows, SUBFOLDER)
        ids = [json.loads(line)["id"] for line in self._committed_lines()]
        if ids != [*range(len(ids))]:
            for row, sample_id in enumerate(ids):
                self._new_name(sample_id, row)

    def _encoded_size(self, outputs: Outputs, rows: int) -> int:
        """Return the size of the files of some samples.

        Raises:
            ConfigError: the values do not fit the kind of file.
        """
        try:
            return sum(
                len(encoder.encode(value))
                for name, encoder in self._encoders.items()
                for value in values_of(outputs[name])
                if value is not None
            )
        except ValueError as error:
            raise ConfigError(str(error), "output.file_type") from error

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        if isinstance(ids, range):
            names = [self._number(row) for row in ids]
        else:
            names = [self._new_name(sample, self.written + row) for row, sample in enumerate(ids)]
        described = self._described(outputs, names, valid)
        lines = self.lines(self._columns(described, None), ids)
        self.append(lines, len(ids), count_nonfinite(outputs, valid))

    def commit(self) -> list[CommittedRange]:
        while self._unsynced:
            descriptor = os.open(self._unsynced[-1], os.O_RDONLY)
            try:
                files.sync(descriptor)
            finally:
                os.close(descriptor)
            self._unsynced.pop()
        if self.folder.is_dir():
            files.sync_folder(self.folder)
        return super().commit()

    def _described(
        self,
        outputs: Outputs,
        names: Sequence[str],
        valid: torch.Tensor | None,
        *,
        write: bool = True,
    ) -> Outputs:
        """Write the files of some samples, and return the columns of their lines in the index."""
        described: Outputs = {k: column for k, column in outputs.items() if is_kept(k)}
        for output, encoder in self._encoders.items():
            values = values_of(outputs[output])
            entries: list[dict[str, Any] | None] = []
            for row, (name, value) in enumerate(zip(names, values, strict=True)):
                if value is None or (valid is not None and not valid[row]):
                    entries.append(None)
                    continue
                # Without dots in the second part, two titles are equal only if both parts are.
                several = len(self._encoders) > 1
                title = f"{name}.{output.replace('.', '@')}" if several else name
                path = self.folder / f"{title}{encoder.suffix}"
                content = encoder.encode(value) if write else b""
                if write:
                    self._write_file(path, content)
                file = f"{SUBFOLDER}/{path.name}"
                entries.append({"file": file, "crc32": zlib.crc32(content)})
            described[output] = ValueColumn(entries)
        return described

    def _write_file(self, path: Path, content: bytes) -> None:
        # Only files after the last commit are written again, so a kill damages no committed one.
        descriptor = files.open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            files.write_all(descriptor, content)
        finally:
            os.close(descriptor)
        self._unsynced.append(path)

    def _number(self, number: int) -> str:
        """Return a number with the digits of the greatest row number."""
        width = _WIDTH if self.samples is None else len(str(max(0, self.samples - 1)))
        return f"{number:0{width}}"

    def _new_name(self, sample_id: int | str, row: int) -> str:
        """Return a name for a sample that is safe in every file system, and not used before."""
        name = self._number(sample_id) if isinstance(sample_id, int) else safe_name(sample_id)
        unique = name
        while unique.casefold() in self._names:
            unique = f"{name}-{row}" if unique == name else f"{unique}-"
        self._names.add(unique.casefold())
        return unique

    def _committed_lines(self) -> Iterator[bytes]:
        size = self._size
        for line in files.read_lines(self.path) if size else ():
            if size <= 0:
                return
            size -= len(line)
            yield line


def safe_name(sample_id: str) -> str:
    """Return an id as a file name without folders, hidden names and the suffix of an input."""
    name = _UNSAFE.sub("_", _MEDIA.sub("", sample_id)).strip(". ")
    return name[:_MAX_NAME].rstrip(". ") or "sample"


def read(folder: Path, skip: Container[str] = ()) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Yield nothing: the rows are not read back."""
    yield from ()


def records(folder: Path) -> Iterator[Any]:
    """Yield the lines of the index, whose checksums stand for the files."""
    with (folder / INDEX).open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            yield {
                name: str(entry["crc32"]) if _is_file(entry) else entry
                for name, entry in line.items()
            }


def _is_file(entry: Any) -> bool:
    return isinstance(entry, dict) and {*entry} == {"file", "crc32"}


def checksum(path: Path, committed: CommittedRange, begin: int) -> int:
    """CRC-32 of the lines of a range in the index, after a check of the files in them.

    Raises:
        OSError: a file is missing, or its content changed.
    """
    crc = text_writer.checksum(path, committed, begin)
    with files.open_binary(path) as file:
        file.seek(begin)
        lines = file.read((committed.end or 0) - begin).splitlines()
    for line in lines:
        for entry in json.loads(line).values():
            if _is_file(entry):
                _check_file(path.parent / SUBFOLDER / Path(entry["file"]).name, entry["crc32"])
    return crc


def _check_file(path: Path, expected: int) -> None:
    name = f"{SUBFOLDER}/{path.name}"
    try:
        with files.open_binary(path) as file:
            found = files.checksum(file.fileno(), 0, files.size(file.fileno()))
    except OSError as error:
        raise OSError(error.errno, f"{name}: {error.strerror}") from error
    if found != expected:
        raise OSError(errno.EIO, f"{name}: the checksum differs")


def describe(labels: ClassLabels, outputs: Outputs) -> Iterator[tuple[str, str]]:
    """Yield the name of each output, and how it is written."""
    for name, column in outputs.items():
        if not is_kept(name):
            yield name, open_encoder(labels, name, column).text
