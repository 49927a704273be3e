"""Arrays in .npy, .npz and .safetensors files, read a window at a time.

Knows the three formats; the first dimension counts the samples. Never unpickles.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import torch

from gradrun.config.data import ArrayInput, ArraysData
from gradrun.config.model import ModelConfig
from gradrun.core.errors import ConfigError
from gradrun.core.suggest import suggest
from gradrun.data.source import BatchSource, ChunkedSource, RowReader, cast_rows

_MOST_HEADER = 64 * 1024
_LISTED = 8
_MOST_EMPTY = 1_000_000
"""Rows without values, which no file's size bounds."""


def open_data(config: ArraysData, seed: int, model: ModelConfig | None) -> BatchSource:
    """The arrays that a config names, as inputs of the model."""
    inputs = config.inputs or {"input": ArrayInput()}
    rows = {
        name: _open_input(spec, spec.path or config.path, f"data.inputs.{name}")
        for name, spec in inputs.items()
    }
    truth = None
    if config.labels:
        spec = ArrayInput(path=config.labels.path, key=config.labels.key)
        truth = _open_input(spec, spec.path or config.path, "data.labels")
    return ChunkedSource(rows, config.batch_size, config.call, truth)


def _open_input(spec: ArrayInput, path: Path | None, key: str) -> RowReader:
    if path is None:
        raise ConfigError("no file: set data.path, or a path for each input", "data")
    if path.suffix not in _OPENERS:
        raise ConfigError(
            f"{path.name} is no .npy, .npz or .safetensors file; "
            "text files are read with source: records",
            f"{key}.path" if spec.path else "data.path",
        )
    try:
        stored = _OPENERS[path.suffix](path, spec.key, key)
    except ConfigError as error:
        if spec.path and error.key == "data.path":
            raise ConfigError(str(error), f"{key}.path") from error.__cause__
        raise
    return _ConvertedRows(stored, spec, key)


class _Stored:
    """Rows as a file holds them, before conversion."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if not shape:
            raise ConfigError(f"{path} holds a single number, not a row a sample", "data.path")
        if 0 in shape[1:] and shape[0] > _MOST_EMPTY:
            raise ConfigError(f"{path} claims {shape[0]:,} rows of no values", "data.path")
        self.path, self.samples, self.shape, self.dtype = path, shape[0], shape[1:], dtype

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        raise NotImplementedError


class _ConvertedRows:
    """Stored rows in the type, scale and shape that the config asks for."""

    def __init__(self, stored: _Stored, spec: ArrayInput, key: str) -> None:
        self.stored, self.samples = stored, stored.samples
        self.convert = cast_rows(spec, stored.shape, key)
        dtype = getattr(torch, spec.dtype) if spec.dtype else stored.dtype
        self.sample_bytes = math.prod(stored.shape) * dtype.itemsize

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        return self.convert(self.stored.chunk(start, stop))


class _NpyRows(_Stored):
    """A .npy file, read a window at a time."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.header = _Header(file, path)
            self.offset = file.tell()
        super().__init__(path, self.header.shape, self.header.torch_dtype)
        self.header.check(path.stat().st_size - self.offset, path)

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        # Read and not mapped, so that the disk is waited for here and not in the model's first
        # touch of a page, and so that a model may write to its input.
        header, begin = self.header, start * self.header.row_bytes
        count = (stop - start) * math.prod(self.shape)
        rows = np.fromfile(self.path, header.dtype, count, offset=self.offset + begin)
        if rows.size < count:  # it was cut off while it was read
            header.check(begin + rows.nbytes, self.path)
        return torch.from_numpy(rows.reshape(stop - start, *self.shape))


class _NpzRows(_Stored):
    """A member of an .npz archive, streamed, so that a packed one is never unpacked whole."""

    def __init__(self, path: Path, member: str) -> None:
        self.member = member
        self.file, self.header = self._open(path)
        self.at = 0
        super().__init__(path, self.header.shape, self.header.torch_dtype)
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(member).file_size
        self.header.check(size - self.file.tell(), path)

    def _open(self, path: Path) -> tuple[IO[bytes], _Header]:
        # Left open from window to window: a stream cannot be entered in its middle.
        try:
            file = zipfile.ZipFile(path).open(self.member)  # noqa: SIM115
        except Exception as error:  # encrypted, odd compression, damage
            raise ConfigError(
                f"{path}: {self.member} cannot be read: {error}", "data.path"
            ) from error
        return file, _Header(file, path)

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        if start < self.at:
            self.file.close()
            (self.file, _), self.at = self._open(self.path), 0
        rows = np.empty((stop - start, *self.shape), self.header.dtype)
        try:
            self._skip((start - self.at) * self.header.row_bytes)
            read = self.file.readinto(rows.data.cast("B")) if rows.size else 0  # type: ignore[attr-defined]
        except Exception as error:  # as many kinds as there are ways to compress
            raise ConfigError(
                f"{self.path}: {self.member} is damaged: {error}", "data.path"
            ) from error
        if read != rows.nbytes:
            raise ConfigError(f"{self.path}: {self.member} is cut off", "data.path")
        self.at = stop
        return torch.from_numpy(rows)

    def _skip(self, count: int) -> None:
        while count > 0:
            skipped = len(self.file.read(min(count, 1024 * 1024)))
            if not skipped:
                return
            count -= skipped


class _SafetensorsRows(_Stored):
    """A tensor of a .safetensors file, which is opened anew for each window, as an .npy is."""

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


class _HeaderReader:
    """Reads no more at once than a header takes: its length is only claimed, and may be 4 GiB."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def read(self, count: int) -> bytes:
        """As a stream's."""
        if count > _MOST_HEADER:
            raise ValueError(f"its header claims to have {count:,} bytes")
        return self.file.read(count)


class _Header:
    """The header of an .npy stream, which is left standing at the first row."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        try:
            head: Any = _HeaderReader(file)
            version = np.lib.format.read_magic(head)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            self.shape, fortran, dtype = read(head)
            if any(size < 0 for size in self.shape):
                raise ValueError(f"its shape is {self.shape}")
        except Exception as error:  # a damaged header fails in any of a dozen ways
            raise ConfigError(f"{path} is no array of numpy's: {error}", "data.path") from error
        if max(self.shape, default=0) > 2**62 or len(self.shape) > 32:
            raise ConfigError(f"{path} claims to have the shape {self.shape}", "data.path")
        if dtype.hasobject:
            raise ConfigError(
                f"{path} holds pickled Python objects, and unpickling them could run code; "
                "save an array of numbers",
                "data.path",
            )
        if fortran and len(self.shape) > 1:
            raise ConfigError(
                f"{path} is stored column by column (Fortran order), which cannot be read sample "
                "by sample; save numpy.ascontiguousarray(array)",
                "data.path",
            )
        self.dtype = dtype.newbyteorder("=")
        if not dtype.isnative:
            raise ConfigError(
                f"{path} has the byte order of another machine; save array.astype({self.dtype})",
                "data.path",
            )
        try:
            self.torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        except TypeError as error:
            raise ConfigError(
                f"{path} holds {dtype}, which torch has no type for", "data.path"
            ) from error
        self.row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        self.nbytes = self.row_bytes * (self.shape[0] if self.shape else 1)

    def check(self, held: int, path: Path) -> None:
        """Raise ConfigError where fewer bytes follow than the header promises."""
        if held < self.nbytes:
            raise ConfigError(
                f"{path} is cut off: its header promises {self.nbytes:,} bytes and {held:,} are "
                "there",
                "data.path",
            )


def _open_npy(path: Path, name: str | None, key: str) -> _Stored:
    if name is not None:
        raise ConfigError("a .npy file holds one array, which has no key", f"{key}.key")
    return _NpyRows(path)


def _open_npz(path: Path, name: str | None, key: str) -> _Stored:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    except Exception as error:  # a damaged archive fails in any of a dozen ways
        raise ConfigError(f"{path} is no .npz archive: {error}", "data.path") from error
    return _NpzRows(path, f"{_chosen(name, names, path, key)}.npy")


def _open_safetensors(path: Path, name: str | None, key: str) -> _Stored:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (safetensors.SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ConfigError(
            f"{path} is not a valid safetensors file: {error}", "data.path"
        ) from error
    chosen = _chosen(name, names, path, key)
    try:
        return _SafetensorsRows(path, chosen)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ConfigError(
            f"{path}: {chosen} is of a type torch cannot read", f"{key}.key"
        ) from error


def _chosen(name: str | None, names: list[str], path: Path, key: str) -> str:
    """The array that an input means: by its key, or the only one there is."""
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        listed = ", ".join(names[:_LISTED]) + more
        example = ", ".join(f"{one}: {{key: {one}}}" for one in names[:2])
        raise ConfigError(
            f"{path.name} holds {len(names)} arrays ({listed}); say which, as in "
            f"data.inputs: {{{example}}}",
            "data.inputs" if key == "data.inputs.input" else f"{key}.key",
        )
    if name not in names:
        raise ConfigError(
            f"{path.name} has no array {name!r}; {suggest(name, names)}", f"{key}.key"
        )
    return name


_OPENERS = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}
