"""One .npy file an output, its whole size set aside at the start and filled some rows at a time.

Knows numpy's file format.
"""

from __future__ import annotations

import errno
import io
import math
import os
import shutil
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradrun.core import files
from gradrun.core.units import format_bytes
from gradrun.output.journal import CommittedRange
from gradrun.output.transforms import DEFAULT_OUTPUT, MISSING_CLASS

BUFFER_BYTES = 128 * 1024
"""How much is gathered for one write: a call for every few rows would cost more, and what is much
larger has left the processor's cache when it is written."""

_WINDOW_BYTES = 1024 * 1024

_NUMPY_FLOATS = {torch.float16, torch.float32, torch.float64}


class NpyWriter:
    """Rows of every output, each in a file of its own."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples, self.written = folder, samples, 0
        self.nonfinite = self._committed = 0
        self._arrays: dict[str, _NpyFile] = {}

    def open(self, outputs: dict[str, torch.Tensor], kept: Sequence[CommittedRange] = ()) -> None:
        self.written = self._committed = kept[-1].stop if kept else 0
        self.nonfinite = sum(committed.nonfinite for committed in kept)
        for name, tensor in outputs.items():
            file = f"predictions{'' if name == DEFAULT_OUTPUT else f'.{name}'}.npy"
            array = _NpyFile(self.folder / file, self.samples, tensor)
            self._arrays[name] = array
            array.open(self.written)
        if not kept:
            files.sync_folder(self.folder)

    def write(
        self,
        outputs: dict[str, torch.Tensor],
        ids: Sequence[int | str],
        missing: Collection[int] = (),
    ) -> None:
        if outputs.keys() != self._arrays.keys():
            raise ValueError(f"the outputs were {[*self._arrays]} and now are {[*outputs]}")
        for name, tensor in outputs.items():
            self._arrays[name].write(self.written, tensor)
        self.written += len(ids)

    def commit(self) -> list[CommittedRange]:
        start, stop = self._committed, self.written
        if start == stop:
            return []
        for array in self._arrays.values():
            array.sync(stop)
        bad = np.zeros(stop - start, bool)
        checksums = {a.path.name: a.checksum(start, stop, bad) for a in self._arrays.values()}
        nonfinite = int(bad.sum())
        self._committed, self.nonfinite = stop, self.nonfinite + nonfinite
        return [CommittedRange(start=start, stop=stop, files=checksums, nonfinite=nonfinite)]

    def close(self) -> list[CommittedRange]:
        with ExitStack() as stack:  # each is closed, whatever befalls the others
            for array in self._arrays.values():
                stack.callback(self._end, array)
            try:
                return self.commit()
            except BaseException:
                self.written = self._committed  # the others may be in no file
                raise

    def _end(self, array: _NpyFile) -> None:
        array.close(self.written)

    def files(self) -> list[str]:
        return [array.path.name for array in self._arrays.values()]


def read(folder: Path) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The rows of every output, a window at a time."""
    files = {
        path.name.removeprefix("predictions").removesuffix(".npy")[1:] or DEFAULT_OUTPUT: path
        for path in sorted(folder.glob("predictions*.npy"))
    }
    first = [np.load(path, mmap_mode="r") for path in files.values()]
    row_bytes = sum(array[:1].nbytes for array in first)
    samples, step = len(first[0]), max(1, _WINDOW_BYTES // max(1, row_bytes))
    del first
    for begin in range(0, samples, step):
        # Mapped anew, so that pages already read are given back.
        rows = {
            name: torch.from_numpy(np.array(np.load(path, mmap_mode="r")[begin : begin + step]))
            for name, path in files.items()
        }
        yield torch.arange(begin, min(begin + step, samples)), rows


class _NpyFile:
    def __init__(self, path: Path, samples: int, first: torch.Tensor) -> None:
        self.path, self.samples = path, samples
        # numpy has no bfloat16 and no float8; float32 holds each of their values exactly.
        unknown = first.dtype.is_floating_point and first.dtype not in _NUMPY_FLOATS
        self.cast = torch.float32 if unknown else None
        like = first[:0].to(self.cast or first.dtype).numpy()
        self.row_shape, self.dtype = like.shape[1:], like.dtype
        self.row_bytes = math.prod(self.row_shape) * self.dtype.itemsize
        self.step = max(1, BUFFER_BYTES // max(1, self.row_bytes))
        self.buffer = np.empty((min(self.step, samples), *self.row_shape), self.dtype)
        self.begin = 0
        """The row that the buffer's first is; those before it are in the file."""
        self.header = self._header(samples)
        self.descriptor = -1

    def _offset(self, row: int) -> int:
        return len(self.header) + row * self.row_bytes

    def open(self, kept: int) -> None:
        """Make the file, or take one with so many rows; then set the whole size aside."""
        self.begin = kept
        flags = os.O_RDWR if kept else os.O_RDWR | os.O_CREAT | os.O_EXCL
        self.descriptor = files.open_regular(self.path, flags)
        try:
            if kept:
                files.check_size(self.descriptor, self._offset(kept), self.path)
            else:
                # Of no samples yet: what a kill leaves must not be zeros that look like results.
                files.write_all(self.descriptor, self._header(0))
            self._reserve(self._offset(self.samples))
        except OSError:
            os.close(self.descriptor)
            self.descriptor = -1
            if not kept:
                self.path.unlink()
            raise

    def _header(self, samples: int) -> bytes:
        """The file's header, as long for few samples as for many: numpy leaves room in it."""
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

    def write(self, at: int, tensor: torch.Tensor) -> None:
        rows = (tensor if self.cast is None else tensor.to(self.cast)).numpy()
        if rows.shape[1:] != self.row_shape or rows.dtype != self.dtype:
            raise ValueError(
                f"{self.path.name} has {self.dtype} rows of shape {list(self.row_shape)} and now "
                f"gets {rows.dtype} of {list(rows.shape[1:])}; format: jsonl takes any, and "
                "output.transform: mean_pool or cls makes one row of a sequence"
            )
        stop = at + len(rows)
        if stop - self.begin > self.step:
            self.flush(at)
        if len(rows) > self.step:
            self._write_rows(at, rows)
            self.begin = stop
        else:
            self.buffer[at - self.begin : stop - self.begin] = rows

    def flush(self, written: int) -> None:
        """Bring the rows up to `written` from the buffer to the file; twice does no harm."""
        if written > self.begin:
            self._write_rows(self.begin, self.buffer[: written - self.begin])
            self.begin = written

    def _write_rows(self, at: int, rows: np.ndarray[Any, Any]) -> None:
        if rows.nbytes:
            data = np.ascontiguousarray(rows).view(np.uint8).data
            files.write_at(self.descriptor, data, self._offset(at))

    def sync(self, written: int) -> None:
        """Say in the header how many rows are there, and bring both to the disk."""
        self.flush(written)
        self._count(written)
        files.sync(self.descriptor)

    def checksum(self, start: int, stop: int, bad: np.ndarray[Any, Any]) -> int:
        """CRC-32 of the rows start to stop; marks in `bad` those that hold a NaN or the like."""
        begin, end = self._offset(start), self._offset(stop)
        floats, found, row = self.dtype.kind in "fc", 0, 0
        for piece in files.read_chunks(
            self.descriptor, begin, end, self.step * max(1, self.row_bytes)
        ):
            found = zlib.crc32(piece, found)
            if floats or self.dtype == np.int64:
                values = np.frombuffer(piece, self.dtype)
                good = np.isfinite(values) if floats else values != MISSING_CLASS
                rows = len(piece) // self.row_bytes
                if not good.all():
                    bad[row : row + rows] |= ~good.reshape(rows, -1).all(axis=1)
                row += rows
        return found

    def _count(self, written: int) -> None:
        files.write_at(self.descriptor, self._header(written), 0)

    def close(self, written: int) -> None:
        if self.descriptor < 0:
            return
        try:
            self._count(written)
            if written < self.samples:
                os.ftruncate(self.descriptor, self._offset(written))
        finally:
            os.close(self.descriptor)
            self.descriptor = -1

    def _reserve(self, size: int) -> None:
        """Set `size` bytes aside: a full disk under a memory map would kill the process."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.descriptor, 0, size)
            else:
                files.ensure_free_space(self.path.parent, size, self.path.name)
                os.ftruncate(self.descriptor, size)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}:
                raise
            free = format_bytes(shutil.disk_usage(self.path.parent).free)
            raise OSError(
                error.errno,
                f"{self.path.name} needs {format_bytes(size)}, and {free} of disk are free",
            ) from error
