"""One .npy file per output, written some rows at a time.

It is allocated in full at the start, unless the number of samples is unknown.
"""

from __future__ import annotations

import errno
import io
import math
import os
import shutil
import zlib
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradrun.core import files
from gradrun.core.units import format_bytes
from gradrun.output.class_labels import DEFAULT_OUTPUT
from gradrun.output.columns import ValueColumn, layout_error, tensors_of
from gradrun.output.journal import CommittedRange
from gradrun.output.missing import MISSING_CLASS, fill_missing

if TYPE_CHECKING:
    import torch

    from gradrun.output.columns import Column
    from gradrun.output.transforms import Outputs

Array = np.ndarray[Any, Any]

BUFFER_BYTES = 128 * 1024
"""Size of a write: small enough to stay in the processor's cache."""

_CHUNK_BYTES = 1024 * 1024
_STEM = "predictions"


class ArraysWriter:
    """Stores the rows of each output in an array: the common part of .npy files and memory."""

    def __init__(self, samples: int | None) -> None:
        self.samples = samples
        self.written = self.nonfinite = self._committed = 0
        self._arrays: dict[str, Any] = {}
        """Output name to a `_NpyFile`, or to the same in memory."""
        self._invalid: list[int] = []
        """Rows without a prediction since the last commit."""

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        if outputs.keys() != self._arrays.keys():
            raise ValueError(f"the outputs were {[*self._arrays]} and now are {[*outputs]}")
        if valid is not None:
            outputs = fill_missing(outputs, valid)
            self._invalid += (self.written + np.flatnonzero(~valid.numpy())).tolist()
        for name, column in outputs.items():
            self._arrays[name].write(self.written, column)
        self.written += len(ids)

    def commit(self) -> list[CommittedRange]:
        start, stop = self._committed, self.written
        if start == stop:
            return []
        for array in self._arrays.values():
            array.sync(stop)
        bad = np.zeros(stop - start, bool)
        checksums = [array.checksum(start, stop, bad) for array in self._arrays.values()]
        bad[[row - start for row in self._invalid if row < stop]] = False
        nonfinite = int(bad.sum())
        self._committed, self.nonfinite, self._invalid = stop, self.nonfinite + nonfinite, []
        names = dict(zip(self.files(), checksums, strict=False))  # memory has no files
        return [CommittedRange(start=start, stop=stop, files=names, nonfinite=nonfinite)]

    def files(self) -> list[str]:
        return []


class NpyWriter(ArraysWriter):
    """Writes each output to predictions.npy or predictions.NAME.npy, or to another stem."""

    def __init__(self, folder: Path, samples: int | None, stem: str = _STEM) -> None:
        super().__init__(samples)
        self.folder, self.stem = folder, stem

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        self.written = self._committed = committed[-1].stop if committed else 0
        self.nonfinite = sum(part.nonfinite for part in committed)
        for name, tensor in tensors_of(outputs).items():
            file = f"{self.stem}{'' if name == DEFAULT_OUTPUT else f'.{name}'}.npy"
            array = _NpyFile(self.folder / file, self.samples, tensor)
            self._arrays[name] = array
            array.open(self.written)
        if not committed:
            files.sync_folder(self.folder)

    def close(self) -> list[CommittedRange]:
        try:
            return self.commit()
        except BaseException:
            self.written = self._committed  # later rows may be missing from some files
            raise
        finally:
            with ExitStack() as stack:  # closes every file, also after an error in one of them
                for array in self._arrays.values():
                    stack.callback(array.close, self.written)

    def files(self) -> list[str]:
        return [array.path.name for array in self._arrays.values()]


def output_name(file: str) -> str:
    """Name of the output in a file: predictions.logits.npy to logits."""
    return file.removeprefix("predictions").removesuffix(".npy")[1:] or DEFAULT_OUTPUT


def read(folder: Path, skip: Container[str] = ()) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Yield all rows, about a MiB at a time."""
    paths = {output_name(path.name): path for path in sorted(folder.glob("predictions*.npy"))}
    first = [np.load(path, mmap_mode="r") for path in paths.values()]
    row_bytes = sum(array[:1].nbytes for array in first)
    samples, step = len(first[0]), max(1, _CHUNK_BYTES // max(1, row_bytes))
    del first
    for begin in range(0, samples, step):
        # Map the files again for each chunk, which releases the pages of the one before.
        rows = {
            name: np.array(np.load(path, mmap_mode="r")[begin : begin + step])
            for name, path in paths.items()
        }
        yield np.arange(begin, min(begin + step, samples)), rows


def checksum(path: Path, committed: CommittedRange, begin: int) -> int:
    """CRC-32 of the rows of a range, as they are in the file."""
    with files.open_binary(path) as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        row_bytes, data = dtype.itemsize * math.prod(shape[1:]), file.tell()
        start, stop = (data + row * row_bytes for row in (committed.start, committed.stop))
        files.check_size(file.fileno(), stop, path)
        return files.checksum(file.fileno(), start, stop)


class RowLayout:
    """The shape and dtype of the rows of an output in NumPy."""

    def __init__(self, name: str, first: torch.Tensor) -> None:
        """Take the layout of a batch; the name is for errors."""
        self._name, self._first, self._dtype = name, first[:0], first.dtype
        self._widen = not has_numpy_dtype(first)
        like = with_numpy_dtype(self._first).numpy()
        self.shape, self.dtype = like.shape[1:], like.dtype
        self.row_bytes = math.prod(self.shape) * self.dtype.itemsize

    def rows_of(self, column: Column) -> Array:
        """Return a batch [n, ...] as an array that may share its memory.

        Raises:
            ValueError: it has another layout.
        """
        if not isinstance(column, ValueColumn) and column.dtype == self._dtype:
            rows: Array = (column.float() if self._widen else column).numpy()
            if rows.shape[1:] == self.shape:  # that of a tensor takes three times as long
                return rows
        raise layout_error(self._name, self._first, column)


class _NpyFile:
    def __init__(self, path: Path, samples: int | None, first: torch.Tensor) -> None:
        self.path, self.samples = path, samples
        self.layout = layout = RowLayout(path.name, first)
        self.row_shape, self.dtype, self.row_bytes = layout.shape, layout.dtype, layout.row_bytes
        self.step = max(1, BUFFER_BYTES // max(1, self.row_bytes))
        buffered = self.step if samples is None else min(self.step, samples)
        self.buffer = np.empty((buffered, *self.row_shape), self.dtype)
        self.begin = 0
        """Row number of the first row in the buffer; earlier rows are in the file."""
        self.header = self._header(samples or 0)
        self.descriptor = -1

    def _offset(self, row: int) -> int:
        return len(self.header) + row * self.row_bytes

    def open(self, written: int) -> None:
        """Create the file, or open one with some rows, and allocate its full size if known."""
        self.begin = written
        flags = os.O_RDWR if written else os.O_RDWR | os.O_CREAT | os.O_EXCL
        self.descriptor = files.open_regular(self.path, flags)
        try:
            if written:
                files.check_size(self.descriptor, self._offset(written), self.path)
            else:
                # With a count of 0, so that after a kill no allocated zeros look like predictions.
                files.write_all(self.descriptor, self._header(0))
            if self.samples is not None:
                self._allocate(self._offset(self.samples))
        except OSError:
            os.close(self.descriptor)
            self.descriptor = -1
            if not written:
                self.path.unlink()
            raise

    def _header(self, samples: int) -> bytes:
        """The file header; its length does not depend on the number of samples."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (samples, *self.row_shape),
            },
        )
        return header.getvalue()

    def write(self, at: int, column: Column) -> None:
        rows = self.layout.rows_of(column)
        stop = at + len(rows)
        if stop - self.begin > self.step:
            self.flush(at)
        if len(rows) > self.step:
            self._write_rows(at, rows)
            self.begin = stop
        else:
            self.buffer[at - self.begin : stop - self.begin] = rows

    def flush(self, written: int) -> None:
        """Write the buffered rows before `written` to the file; repeating it is harmless."""
        if written > self.begin:
            self._write_rows(self.begin, self.buffer[: written - self.begin])
            self.begin = written

    def _write_rows(self, at: int, rows: Array) -> None:
        if rows.nbytes:
            data = np.ascontiguousarray(rows).view(np.uint8).data
            files.write_at(self.descriptor, data, self._offset(at))

    def sync(self, written: int) -> None:
        """Write the buffer and the number of rows, and sync the file."""
        self.flush(written)
        files.write_at(self.descriptor, self._header(written), 0)
        files.sync(self.descriptor)

    def checksum(self, start: int, stop: int, bad: Array) -> int:
        """CRC-32 of the rows start to stop; sets `bad` for rows that are not finite."""
        crc, row = 0, 0
        step = self.step * max(1, self.row_bytes)
        for chunk in files.read_chunks(
            self.descriptor, self._offset(start), self._offset(stop), step
        ):
            crc = zlib.crc32(chunk, crc)
            count = len(chunk) // self.row_bytes
            rows = np.frombuffer(chunk, self.dtype).reshape(count, -1)
            mark_nonfinite(rows, bad[row : row + count])
            row += count
        return crc

    def close(self, written: int) -> None:
        if self.descriptor < 0:
            return
        try:
            files.write_at(self.descriptor, self._header(written), 0)
            os.ftruncate(self.descriptor, self._offset(written))
        finally:
            os.close(self.descriptor)
            self.descriptor = -1

    def _allocate(self, size: int) -> None:
        """Allocate `size` bytes, so that a full disk is reported at the start."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.descriptor, 0, size)
            else:  # macOS
                files.ensure_free_space(self.path.parent, size, self.path.name)
                os.ftruncate(self.descriptor, size)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}:
                raise
            free = format_bytes(shutil.disk_usage(self.path.parent).free)
            raise OSError(
                error.errno,
                f"{self.path.name} needs {format_bytes(size)}; the disk has {free} free",
            ) from error


def with_numpy_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or its values as float32, which represents them exactly."""
    return tensor if has_numpy_dtype(tensor) else tensor.float()


def mark_nonfinite(rows: Array, bad: Array) -> None:
    """Set `bad` [n] for rows [n, ...] with NaN, infinity or MISSING_CLASS."""
    if rows.dtype.kind in "fc":
        finite = np.isfinite(rows)
    elif rows.dtype == np.int64:
        finite = rows != MISSING_CLASS
    else:
        return
    if not finite.all():
        bad |= ~finite.reshape(len(rows), -1).all(axis=1)


def has_numpy_dtype(tensor: torch.Tensor) -> bool:
    """False for bfloat16 and float8, whose values float32 represents exactly."""
    if not tensor.dtype.is_floating_point:
        return True
    try:
        tensor.new_empty(0).numpy()
    except TypeError:
        return False
    return True
