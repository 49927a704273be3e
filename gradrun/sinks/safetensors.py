"""Predictions in .safetensors parts of about 64 MiB, each whole or not there.

Knows the part's size and names; a part's metadata says which samples it holds. What is committed of
a part that is not full yet lies beside it as plain rows, one commit after the other.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from gradrun import disk
from gradrun.journal import Committed
from gradrun.outputs import nonfinite_rows

PART_BYTES = 64 * 1024 * 1024
_WINDOW_BYTES = 1024 * 1024


class SafetensorsSink:
    """Fills one buffer an output, and writes them out together when they are full.

    A part holds the same samples whatever the batches are and whenever the run is resumed.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples, self.written = folder, samples, 0
        self.nonfinite = 0
        self._buffers: dict[str, torch.Tensor] = {}
        self._rows = 1
        self._ended = self._committed = 0
        self._told: list[Committed] = []
        self._parts: list[str] = []

    # --- places --------------------------------------------------------------------------------

    def _name(self, part: int) -> str:
        return f"predictions-{part:05}.safetensors"

    def _rest(self, part: int) -> Path:
        """Where the committed rows of a part lie that is not full yet."""
        return self.folder / f"{self._name(part)}.rest"

    # --- the contract --------------------------------------------------------------------------

    def open(self, outputs: dict[str, torch.Tensor], kept: Sequence[Committed] = ()) -> None:
        if "__metadata__" in outputs:
            raise ValueError(
                "an output is called '__metadata__', which the format keeps for itself"
            )
        # A type that the format cannot hold is refused now, and not with the first part.
        save({name: tensor[:0].contiguous() for name, tensor in outputs.items()})
        row_bytes = sum(tensor[:1].nbytes for tensor in outputs.values())
        self._rows = max(1, min(self.samples, PART_BYTES // max(1, row_bytes)))
        left = self.samples - (kept[-1].stop if kept else 0)
        # While a part is written its plain rows still lie beside it.
        disk.check_room(self.folder, (left + min(left, self._rows)) * row_bytes, "predictions")
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
            self.written = self._committed = stop

    def write(
        self,
        outputs: dict[str, torch.Tensor],
        ids: Sequence[int | str],
        missing: Collection[int] = (),
    ) -> None:
        if outputs.keys() != self._buffers.keys():
            raise ValueError(f"the outputs were {[*self._buffers]} and now are {[*outputs]}")
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
            done += count
            self.written += count
            if at + count == self._rows:
                self._end_part()

    def commit(self) -> list[Committed]:
        if self._committed < self.written:
            part = self._committed // self._rows
            committed, data = self._range(self._committed, self.written)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            descriptor = disk.open_plain(self._rest(part), flags)
            size = os.fstat(descriptor).st_size
            try:
                disk.write_all(descriptor, data)
                disk.sync(descriptor)
            except BaseException:  # Ctrl-C too: what comes next is added behind it
                os.ftruncate(descriptor, size)
                raise
            finally:
                os.close(descriptor)
            disk.sync_folder(self.folder)
            self._tell(committed)
        told, self._told = self._told, []
        return told

    def close(self) -> list[Committed]:
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
        # One entry: several would be written in an order that changes from file to file.
        data = save(tensors, {"samples": f"{start}:{stop}"})
        draft = self.folder / f"{name}.tmp"
        descriptor = disk.open_plain(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            try:
                disk.write_all(descriptor, data)
                disk.sync(descriptor)
            finally:
                os.close(descriptor)
            draft.replace(self.folder / name)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        disk.sync_folder(self.folder)
        if committed:
            self._tell(committed)
        self._rest(part).unlink(missing_ok=True)
        self._parts += [] if name in self._parts else [name]
        self._ended = stop

    def _range(self, start: int, stop: int) -> tuple[Committed, bytes]:
        """Samples of the part in the buffers, and their rows, one output after the other."""
        begin = start % self._rows
        end = begin + stop - start
        data = b"".join(_raw(buffer[begin:end]) for buffer in self._buffers.values())
        files = {self._name(start // self._rows): zlib.crc32(data)}
        row_bytes = sum(buffer[:1].nbytes for buffer in self._buffers.values())
        committed = Committed(
            start=start,
            stop=stop,
            files=files,
            end=end * row_bytes,  # in the plain rows
            nonfinite=nonfinite_rows(buffer[begin:end] for buffer in self._buffers.values()),
        )
        return committed, data

    def _tell(self, committed: Committed) -> None:
        self.nonfinite += committed.nonfinite
        self._committed = committed.stop
        self._told.append(committed)

    def _load(self, part: int, rows: int, kept: Sequence[Committed]) -> None:
        """See that whole parts are there, and fill the buffers with the rows of the next."""
        for before in range(part):
            (self.folder / self._name(before)).stat()
        if rows:
            self._load_rows(part, rows, kept)
        # Behind the last commit nothing counts, and a part's rows would be added to a rest's.
        beyond = self._name(part + 1 if rows else part)
        for later in self.folder.glob(f"predictions-{'[0-9]' * 5}.safetensors*"):
            if later.name >= beyond:
                later.unlink()

    def _load_rows(self, part: int, rows: int, kept: Sequence[Committed]) -> None:
        ended = self.folder / self._name(part)
        if ended.exists():
            # It was ended early, or ended and not told of: it becomes rows again.
            try:
                for name, tensor in load_file(ended).items():
                    self._buffers[name][:rows] = tensor[:rows]
            except (SafetensorError, KeyError, RuntimeError) as error:
                text = "the file does not hold what the journal says"
                raise OSError(errno.EIO, text, ended) from error
            self._write_rest(part, rows, kept)
            ended.unlink()
            return
        row_bytes = sum(buffer[:1].nbytes for buffer in self._buffers.values())
        data, at = self._read_rest(part, rows * row_bytes), 0
        for committed in self._of_part(part, kept):
            first = committed.start % self._rows
            last = first + committed.stop - committed.start
            for buffer in self._buffers.values():
                size = buffer[first:last].nbytes
                _fill(buffer[first:last], data[at : at + size])
                at += size

    def _read_rest(self, part: int, end: int) -> bytes:
        """The committed rows, of so many bytes; what follows them is cut off."""
        descriptor = disk.open_plain(self._rest(part), os.O_RDWR)
        try:
            disk.check_size(descriptor, end, self._rest(part))
            os.ftruncate(descriptor, end)
            return b"".join(disk.pieces(descriptor, 0, end))
        finally:
            os.close(descriptor)

    def _write_rest(self, part: int, rows: int, kept: Sequence[Committed]) -> None:
        ranges = self._of_part(part, kept)
        data = b"".join(self._range(c.start, c.stop)[1] for c in ranges)
        descriptor = disk.open_plain(self._rest(part), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            disk.write_all(descriptor, data)
            disk.sync(descriptor)
        finally:
            os.close(descriptor)
        disk.sync_folder(self.folder)

    def _of_part(self, part: int, kept: Sequence[Committed]) -> list[Committed]:
        return [committed for committed in kept if committed.start // self._rows == part]


def read(folder: Path) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The rows of every output, a window at a time, part after part."""
    start = 0
    for path in sorted(folder.glob("predictions-*.safetensors")):
        with safe_open(path, framework="pt") as part:
            rows = {name: part.get_slice(name) for name in part.keys()}  # noqa: SIM118
            samples = next(iter(rows.values())).get_shape()[0]
            row_bytes = sum(slices[:1].nbytes for slices in rows.values())
            step = max(1, _WINDOW_BYTES // max(1, row_bytes))
            for begin in range(0, samples, step):
                stop = min(begin + step, samples)
                yield (
                    torch.arange(start + begin, start + stop),
                    {name: slices[begin:stop] for name, slices in rows.items()},
                )
        start += samples


def _raw(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _fill(tensor: torch.Tensor, data: bytes) -> None:
    if tensor.numel():
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))
