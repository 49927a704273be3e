"""Arrays in .npy, .npz and .safetensors files, read in chunks and never unpickled."""

from __future__ import annotations

import io
import itertools
import math
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np
import safetensors
import torch

from gradrun.config.data import ArrayInput, ArraysData
from gradrun.core.errors import ConfigError
from gradrun.core.input_files import (
    InputPaths,
    compression,
    format_name,
    format_suffix,
    list_files,
    open_input,
)
from gradrun.core.remote import RemoteError, local_copy
from gradrun.core.suggest import suggest
from gradrun.core.units import first_names
from gradrun.data.conversion import Conversion, Problems
from gradrun.data.source import BatchSource, ChunkedSource, OpeningFacts, Preview
from gradrun.data.thumbnails import thumbnail_of_array

_MAX_HEADER = 64 * 1024
_MAX_LISTED = 8
_MAX_EMPTY_ROWS = 1_000_000
"""Limit of rows without values, whose number the size of the file does not bound."""


def open_data(config: ArraysData, facts: OpeningFacts) -> BatchSource:
    """Open the arrays that a config names as inputs of the model."""
    inputs = config.inputs or {"input": ArrayInput()}
    readers = {
        name: _open_input(spec, config.path, f"data.inputs.{name}") for name, spec in inputs.items()
    }
    labels = None
    if config.labels:
        spec = ArrayInput(path=config.labels.path, key=config.labels.key)
        labels = _open_input(spec, config.path, "data.labels")
    return _Arrays(readers, config.batch_size, config.call, labels)


class _Arrays(ChunkedSource):
    has_previews = True
    readers: Mapping[str, _ConvertedReader]

    @property
    def files(self) -> list[Path]:
        return [file for reader in self.readers.values() for file in reader.listed]

    def previews(self, positions: Sequence[int]) -> Iterator[Preview]:
        reader = next(iter(self.readers.values()))
        for position in positions:
            rows, _ = reader.chunk(position, position + 1)
            yield Preview(f"row {position:,}", thumbnail_of_array(rows[0]))


def _open_input(spec: ArrayInput, default: InputPaths | None, key: str) -> _ConvertedReader:
    paths = spec.path or default
    if paths is None:
        raise ConfigError("no file is set; set data.path, or a path for each input", "data")
    path_key = f"{key}.path" if spec.path else "data.path"
    files = list_files(paths, path_key, _OPENERS).files
    try:
        arrays = [_open_array(file, spec.key, key) for file in files]
        array = arrays[0] if len(arrays) == 1 else _JoinedReader(arrays)
    except ConfigError as error:
        if error.key != "data.path":
            raise
        raise ConfigError(str(error), path_key) from error.__cause__
    return _ConvertedReader(array, spec, key, files)


def _open_array(path: Path, name: str | None, key: str) -> _ArrayReader:
    suffix = format_suffix(path)
    if suffix not in _OPENERS:
        raise ConfigError(
            f"{path.name} is not a .npy, .npz or .safetensors file; "
            "text files are read with source: records",
            "data.path",
        )
    if compression(path) and suffix != ".npy":
        raise ConfigError(
            f"{path.name}: {suffix} files cannot be read from a {path.suffix} file; decompress it",
            "data.path",
        )
    try:
        return _OPENERS[suffix](path, name, key)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{path} cannot be read: {reason}", "data.path") from error


class _ArrayReader:
    """Reads the rows of an array as stored."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if not shape:
            raise ConfigError(f"{path} contains a single number, not rows", "data.path")
        if 0 in shape[1:] and shape[0] > _MAX_EMPTY_ROWS:
            raise ConfigError(f"{path} has {shape[0]:,} rows without values", "data.path")
        self.path, self.samples, self.shape, self.dtype = path, shape[0], shape[1:], dtype

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        raise NotImplementedError

    def release(self) -> None:
        """Close what is kept open between two chunks."""


class _JoinedReader(_ArrayReader):
    """Reads the rows of several files one after the other; their rows have one shape and dtype."""

    def __init__(self, parts: Sequence[_ArrayReader]) -> None:
        first = parts[0]
        for part in parts:
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise ConfigError(
                    f"{part.path.name} has rows of {_describe_rows(part)}, but those of "
                    f"{first.path.name} are {_describe_rows(first)}; convert one of the files",
                    "data.path",
                )
        self._parts = parts
        self._starts = [0, *itertools.accumulate(part.samples for part in parts)]
        self._current = first
        super().__init__(first.path, (self._starts[-1], *first.shape), first.dtype)

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        number = max(0, bisect_right(self._starts, start) - 1)
        chunks = []
        while start < stop:
            part, begin, end = self._parts[number], self._starts[number], self._starts[number + 1]
            if part is not self._current:
                self._current.release()
                self._current = part
            if start < (last := min(stop, end)):
                chunks.append(part.chunk(start - begin, last - begin))
            start, number = last, number + 1
        return torch.cat(chunks) if len(chunks) > 1 else chunks[0]


def _describe_rows(array: _ArrayReader) -> str:
    return f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)}"


class _ConvertedReader:
    """Reads rows in the dtype, scale, axis order and shape of the config."""

    def __init__(
        self, array: _ArrayReader, spec: ArrayInput, key: str, files: Sequence[Path]
    ) -> None:
        self.array, self.samples = array, array.samples
        self.listed = files if len(files) > 1 else ()
        """The files, if there are several."""
        # A failed batch is read again while a thread may be prefetching from the same stream.
        self._lock = Lock()
        self.convert = Conversion(spec, array.shape, array.dtype, key)
        self.sample_bytes = self.convert.sample_bytes
        named = f" {spec.key}" if spec.key else ""
        self._origin = f"{array.path.name}{named}"
        if len(files) > 1:
            self._origin = (
                f"{len(files):,} files, {format_name(files[0])}{named}, {self.samples:,} rows, "
                f"first {files[0].name}, last {files[-1].name}"
            )

    def chunk(self, start: int, stop: int) -> tuple[torch.Tensor, Problems]:
        with self._lock:
            rows = self.array.chunk(start, stop)
        return self.convert(rows)

    def describe(self) -> str:
        return f"{self._origin}, {self.convert.describe()}"


class _NpyReader(_ArrayReader):
    def __init__(self, path: Path) -> None:
        with open_input(path) as file:
            self.header = _NpyHeader(file, path)
        super().__init__(path, self.header.shape, self.header.torch_dtype)
        self.header.check_size(path.stat().st_size, path)

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        # Read instead of mapped: the time of reading belongs to the data phase, not to the model's
        # first access, and a model may write to its input.
        header = self.header
        offset = header.offset + start * header.row_bytes
        rows = np.empty((stop - start, *self.shape), header.dtype)
        try:
            with open_input(self.path) as file:
                file.seek(offset)
                read = file.readinto(rows.data.cast("B")) if rows.size else 0  # type: ignore[attr-defined]
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"{self.path} cannot be read: {reason}", "data.path") from error
        if read < rows.nbytes:  # the file was truncated after it was opened
            header.check_size(offset + read, self.path)
        return torch.from_numpy(rows)


class _StreamReader(_ArrayReader):
    """Reads a compressed array as a stream, so that it is not expanded whole.

    The stream stays open between chunks; going back needs a new one.
    """

    def __init__(self, path: Path, name: str, open_stream: Callable[[], IO[bytes]]) -> None:
        self.path, self._name, self._open_stream = path, name, open_stream
        with self._open() as file:
            self.header = _NpyHeader(file, path)
        super().__init__(path, self.header.shape, self.header.torch_dtype)
        self._file: IO[bytes] | None = None
        self._position = 0

    def _open(self) -> IO[bytes]:
        try:
            return self._open_stream()
        except ConfigError:
            raise
        except Exception as error:  # encryption, unknown compression, damage
            raise ConfigError(f"{self._name} cannot be read: {error}", "data.path") from error

    def release(self) -> None:
        if self._file:
            self._file.close()
        self._file, self._position = None, 0

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        offset = self.header.offset + start * self.header.row_bytes
        if self._file is None or offset < self._position:
            self.release()
            self._file = self._open()
        rows = np.empty((stop - start, *self.shape), self.header.dtype)
        try:
            while self._position < offset:
                skipped = len(self._file.read(min(offset - self._position, 1024 * 1024)))
                if not skipped:
                    break
                self._position += skipped
            read = self._file.readinto(rows.data.cast("B")) if rows.size else 0  # type: ignore[attr-defined]
        except Exception as error:  # each compression has its own types of error
            raise _unreadable(self._name, error) from error
        if read != rows.nbytes:
            raise ConfigError(f"{self._name} is truncated", "data.path")
        self._position += read
        return torch.from_numpy(rows)


class _SafetensorsReader(_ArrayReader):
    """Reads a tensor of a .safetensors file, which is opened for each chunk."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        with safetensors.safe_open(path, framework="pt") as file:
            rows = file.get_slice(name)
            shape = tuple(rows.get_shape())
            dtype = rows[:0].dtype if shape else torch.float32
        super().__init__(path, shape, dtype)

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        with safetensors.safe_open(self.path, framework="pt") as file:
            rows: torch.Tensor = file.get_slice(self.name)[start:stop]
        return rows


def _unreadable(name: str, error: Exception) -> ConfigError:
    problem = "cannot be read" if isinstance(error, RemoteError) else "is damaged"
    return ConfigError(f"{name} {problem}: {error}", "data.path")


class _NpyHeader:
    """The header of a .npy file: shape, dtype and the offset of the first row."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        # The length field of a header may be up to 4 GiB; read no more than a real header needs.
        try:
            head = io.BytesIO(file.read(_MAX_HEADER))
        except Exception as error:  # each compression has its own types of error
            raise _unreadable(str(path), error) from error
        try:
            version = np.lib.format.read_magic(head)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            self.shape, fortran, dtype = read_header(head)
            if any(size < 0 for size in self.shape):
                raise ValueError(f"its shape is {self.shape}")
        except Exception as error:  # numpy raises many types of error for a damaged header
            raise ConfigError(f"{path} is not a NumPy array: {error}", "data.path") from error
        if max(self.shape, default=0) > 2**62 or len(self.shape) > 32:
            raise ConfigError(f"{path} has the impossible shape {self.shape}", "data.path")
        if dtype.hasobject:
            raise ConfigError(
                f"{path} contains pickled Python objects, and unpickling them could run code; "
                "save an array of numbers, or lists of different length as a column of Parquet or "
                "JSON lines file for source: records",
                "data.path",
            )
        if fortran and len(self.shape) > 1:
            raise ConfigError(
                f"{path} is stored in Fortran order, which cannot be read sample by sample; save "
                "numpy.ascontiguousarray(array)",
                "data.path",
            )
        self.dtype = dtype.newbyteorder("=")
        if not dtype.isnative:
            raise ConfigError(
                f"{path} has a foreign byte order; save array.astype({str(self.dtype)!r})",
                "data.path",
            )
        try:
            if not dtype.itemsize:  # torch 2.6 divides by it, which ends the process
                raise TypeError
            self.torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        except TypeError as error:
            raise ConfigError(
                f"{path} contains {dtype}, which torch does not support; save "
                "array.astype('float32') or another type of numbers",
                "data.path",
            ) from error
        self.offset = head.tell()
        self.row_bytes = math.prod(self.shape[1:]) * dtype.itemsize

    def check_size(self, size: int, path: Path) -> None:
        """Raise ConfigError if a file of `size` bytes is shorter than its header declares."""
        expected = self.row_bytes * (self.shape[0] if self.shape else 1)
        if size - self.offset < expected:
            raise ConfigError(
                f"{path} is truncated: its header declares {expected:,} bytes of data, and "
                f"{size - self.offset:,} follow",
                "data.path",
            )


def _open_npy(path: Path, name: str | None, key: str) -> _ArrayReader:
    if name is not None:
        raise ConfigError("a .npy file contains one array without a key", f"{key}.key")
    if compression(path):
        return _StreamReader(path, str(path), partial(open_input, path))
    return _NpyReader(path)


def _open_npz(path: Path, name: str | None, key: str) -> _ArrayReader:
    path = _local(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    except Exception as error:  # zipfile raises many types of error for a damaged archive
        raise ConfigError(f"{path} is not an .npz archive: {error}", "data.path") from error
    member = f"{_choose(name, names, path, key)}.npy"

    def open_member() -> IO[bytes]:
        return zipfile.ZipFile(path).open(member)

    array = _StreamReader(path, f"{path}: {member}", open_member)
    with zipfile.ZipFile(path) as archive:
        array.header.check_size(archive.getinfo(member).file_size, path)
    return array


def _local(path: Path) -> Path:
    """Return a local copy of a remote file, for readers that cannot read ranges of it."""
    try:
        return local_copy(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "data.path") from error


def _open_safetensors(path: Path, name: str | None, key: str) -> _ArrayReader:
    path = _local(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (safetensors.SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ConfigError(
            f"{path} is not a valid safetensors file: {error}", "data.path"
        ) from error
    chosen = _choose(name, names, path, key)
    try:
        return _SafetensorsReader(path, chosen)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ConfigError(
            f"{path}: torch cannot read the type of {chosen}", f"{key}.key"
        ) from error


def _choose(name: str | None, names: list[str], path: Path, key: str) -> str:
    """Return the array with the given key, or the only array of the file."""
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        example = ", ".join(f"{one}: {{key: {one}}}" for one in names[:2])
        raise ConfigError(
            f"{path.name} contains {len(names)} arrays ({first_names(names, _MAX_LISTED)}); select "
            f"one, for example data.inputs: {{{example}}}",
            "data.inputs" if key == "data.inputs.input" else f"{key}.key",
        )
    if name not in names:
        raise ConfigError(
            f"{path.name} has no array {name!r}; {suggest(name, names)}", f"{key}.key"
        )
    return name


_OPENERS = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}
