"""Predictions in parts of about 64 MiB, each a file that is whole or not there.

Knows the part's size and names, and not the format that it is written in. What is committed of a
part that is not full yet lies beside it as plain rows (and ids), one commit after the other.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from gradrun.core import files
from gradrun.output.journal import CommittedRange
from gradrun.output.transforms import ClassLabels, nonfinite_rows

PART_BYTES = 64 * 1024 * 1024
ID_BYTES = 256
"""What an id is counted as, so that as many as a part holds fit in memory."""

Columns = dict[str, torch.Tensor]
"""Output name to a tensor [n, ...]."""


class ShardedWriter(ABC):
    """Fills one buffer an output, and writes them out together when they are full.

    A part holds the same samples whatever the batches are and whenever the run is resumed.
    """

    suffix: str
    keeps_ids = False
    spelling = ClassLabels()

    def prepared(self, outputs: Columns) -> Columns:
        """The outputs in types that the format holds; ValueError where it holds none such."""
        return outputs

    @abstractmethod
    def encode(self, columns: Columns, ids: Sequence[int | str], start: int) -> bytes:
        """A part, with the rows from sample `start` on."""

    @abstractmethod
    def decode(self, path: Path) -> tuple[Columns, Sequence[int | str]]:
        """What a part holds; raises whatever, where that is not what was written."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples, self.written = folder, samples, 0
        self.nonfinite = 0
        self._buffers: Columns = {}
        self._ids: list[int | str] = []
        """Of the rows in the buffers, where the format keeps them."""
        self._rows = 1
        self._ended = self._committed = 0
        self._rest_end = 0
        """Bytes of the file beside the part that the commits tell of."""
        self._told: list[CommittedRange] = []
        self._parts: list[str] = []

    # --- places --------------------------------------------------------------------------------

    def _name(self, part: int) -> str:
        return f"predictions-{part:05}.{self.suffix}"

    def _rest(self, part: int) -> Path:
        """Where the committed rows of a part lie that is not full yet."""
        return self.folder / f"{self._name(part)}.rest"

    # --- the contract --------------------------------------------------------------------------

    def open(self, outputs: dict[str, torch.Tensor], kept: Sequence[CommittedRange] = ()) -> None:
        # A type that the format cannot hold is refused now, and not with the first part.
        outputs = self.prepared(outputs)
        row_bytes = sum(tensor[:1].nbytes for tensor in outputs.values())
        row_bytes += ID_BYTES if self.keeps_ids else 0
        self._rows = max(1, min(self.samples, PART_BYTES // max(1, row_bytes)))
        left = self.samples - (kept[-1].stop if kept else 0)
        # While a part is written its plain rows still lie beside it.
        files.ensure_free_space(
            self.folder, (left + min(left, self._rows)) * row_bytes, "predictions"
        )
        self._buffers = {
            name: torch.empty((self._rows, *tensor.shape[1:]), dtype=tensor.dtype)
            for name, tensor in sorted(outputs.items())
        }
        if kept:
            stop = kept[-1].stop
            self._load(stop // self._rows, stop % self._rows, kept)
            # Not before: what is closed without its rows must not be ended as a part.
            self._parts = [self._name(part) for part in range(stop // self._rows)]
            self.nonfinite = sum(committed.nonfinite for committed in kept)
            self._ended = stop - stop % self._rows
            self._rest_end = kept[-1].end or 0
            self.written = self._committed = stop

    def write(
        self,
        outputs: dict[str, torch.Tensor],
        ids: Sequence[int | str],
        missing: Collection[int] = (),
    ) -> None:
        if outputs.keys() != self._buffers.keys():
            raise ValueError(f"the outputs were {[*self._buffers]} and now are {[*outputs]}")
        outputs = self.prepared(outputs)
        for name, tensor in outputs.items():
            buffer = self._buffers[name]
            if tensor.shape[1:] != buffer.shape[1:] or tensor.dtype != buffer.dtype:
                raise ValueError(
                    f"output {name!r} has {buffer.dtype} rows of shape {list(buffer.shape[1:])} "
                    f"and now gives {tensor.dtype} of {list(tensor.shape[1:])}; format: jsonl "
                    "takes any"
                )
        done = 0
        while done < len(ids):
            at = self.written % self._rows
            count = min(len(ids) - done, self._rows - at)
            for name, tensor in outputs.items():
                self._buffers[name][at : at + count] = tensor[done : done + count]
            if self.keeps_ids:
                self._ids[at:] = ids[done : done + count]  # twice does no harm: Ctrl-C may come
            done += count
            self.written += count
            if at + count == self._rows:
                self._end_part()

    def commit(self) -> list[CommittedRange]:
        if self._committed < self.written:
            part = self._committed // self._rows
            committed, data = self._range(self._committed, self.written)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            descriptor = files.open_regular(self._rest(part), flags)
            size = os.fstat(descriptor).st_size
            try:
                files.write_all(descriptor, data)
                files.sync(descriptor)
            except BaseException:  # Ctrl-C too: what comes next is added behind it
                os.ftruncate(descriptor, size)
                raise
            finally:
                os.close(descriptor)
            files.sync_folder(self.folder)
            self._tell(committed)
        told, self._told = self._told, []
        return told

    def close(self) -> list[CommittedRange]:
        try:
            if self._ended < self.written:
                self._end_part()
        except BaseException:
            self.written = self._committed
            raise
        told, self._told = self._told, []
        return told

    def files(self) -> list[str]:
        return self._parts

    # --- parts ---------------------------------------------------------------------------------

    def _end_part(self) -> None:
        """Write the part that is in the buffers; what of it was not committed is from now on.

        Done twice it does no harm: Ctrl-C may come anywhere.
        """
        start, stop = self._ended, self.written
        part, rows = start // self._rows, stop - start
        name = self._name(part)
        committed = self._range(self._committed, stop)[0] if self._committed < stop else None
        tensors = {key: buffer[:rows] for key, buffer in self._buffers.items()}
        data = self.encode(tensors, self._ids[:rows], start)
        draft = self.folder / f"{name}.tmp"
        descriptor = files.open_regular(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            try:
                files.write_all(descriptor, data)
                files.sync(descriptor)
            finally:
                os.close(descriptor)
            draft.replace(self.folder / name)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        files.sync_folder(self.folder)
        if committed:
            self._tell(committed)
        self._rest(part).unlink(missing_ok=True)
        self._parts += [] if name in self._parts else [name]
        self._ended = stop

    def _range(self, start: int, stop: int) -> tuple[CommittedRange, bytes]:
        """Samples of the part in the buffers; their rows, one output after the other, and ids."""
        begin = start % self._rows
        end = begin + stop - start
        rows = [_raw(buffer[begin:end]) for buffer in self._buffers.values()]
        data = b"".join([*rows, id_lines(self._ids[begin:end])])
        committed = CommittedRange(
            start=start,
            stop=stop,
            files={self._name(start // self._rows): zlib.crc32(data)},
            end=(self._rest_end if begin else 0) + len(data),
            nonfinite=nonfinite_rows(buffer[begin:end] for buffer in self._buffers.values()),
        )
        return committed, data

    def _tell(self, committed: CommittedRange) -> None:
        self.nonfinite += committed.nonfinite
        self._committed, self._rest_end = committed.stop, committed.end or 0
        self._told.append(committed)

    def _load(self, part: int, rows: int, kept: Sequence[CommittedRange]) -> None:
        """See that whole parts are there, and fill the buffers with the rows of the next."""
        for before in range(part):
            (self.folder / self._name(before)).stat()
        if rows:
            self._load_rows(part, rows, kept)
        # Behind the last commit nothing counts, and a part's rows would be added to a rest's.
        beyond = self._name(part + 1 if rows else part)
        for later in self.folder.glob(f"predictions-{'[0-9]' * 5}.{self.suffix}*"):
            if later.name >= beyond:
                later.unlink()

    def _load_rows(self, part: int, rows: int, kept: Sequence[CommittedRange]) -> None:
        ended = self.folder / self._name(part)
        if ended.exists():
            # It was ended early, or ended and not told of: it becomes rows again.
            try:
                columns, ids = self.decode(ended)
                for name, tensor in columns.items():
                    self._buffers[name][:rows] = tensor[:rows]
                self._ids = list(ids[:rows])
            except OSError:
                raise
            except Exception as error:  # a damaged file fails in any of a dozen ways
                text = "the file does not hold what the journal says"
                raise OSError(errno.EIO, text, ended) from error
            self._write_rest(part, rows, kept)
            ended.unlink()
            return
        data, at = self._read_rest(part, kept[-1].end or 0), 0
        for committed in self._of_part(part, kept):
            first = committed.start % self._rows
            last = first + committed.stop - committed.start
            for buffer in self._buffers.values():
                size = buffer[first:last].nbytes
                _fill(buffer[first:last], data[at : at + size])
                at += size
            self._ids += map(json.loads, data[at : committed.end].splitlines())
            at = committed.end or at

    def _read_rest(self, part: int, end: int) -> bytes:
        """The committed rows, of so many bytes; what follows them is cut off."""
        descriptor = files.open_regular(self._rest(part), os.O_RDWR)
        try:
            files.check_size(descriptor, end, self._rest(part))
            os.ftruncate(descriptor, end)
            return b"".join(files.read_chunks(descriptor, 0, end))
        finally:
            os.close(descriptor)

    def _write_rest(self, part: int, rows: int, kept: Sequence[CommittedRange]) -> None:
        ranges = self._of_part(part, kept)
        data = b"".join(self._range(c.start, c.stop)[1] for c in ranges)
        descriptor = files.open_regular(self._rest(part), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            files.write_all(descriptor, data)
            files.sync(descriptor)
        finally:
            os.close(descriptor)
        files.sync_folder(self.folder)

    def _of_part(self, part: int, kept: Sequence[CommittedRange]) -> list[CommittedRange]:
        return [committed for committed in kept if committed.start // self._rows == part]


def id_lines(ids: Sequence[int | str]) -> bytes:
    """Ids as the checksum sees them; JSON escapes every end of a line but its own."""
    return b"".join(json.dumps(name).encode() + b"\n" for name in ids)


def _raw(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _fill(tensor: torch.Tensor, data: bytes) -> None:
    if tensor.numel():
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))
