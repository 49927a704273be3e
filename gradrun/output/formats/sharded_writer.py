"""Predictions in numbered files, each of which is complete or does not exist.

A shard is committed when it is sealed, so a kill costs at most one shard. It has at most 1/64 of
the run's samples (but at least 1,024) and at most 64 MiB, rounded down to whole batches. If the
number of samples is unknown, shards of 1,024 samples double in size after every 64 shards. The size
depends on the run only and not on the clock, so a resumed run writes the same files.
"""

from __future__ import annotations

import errno
import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradrun.core import files
from gradrun.output.columns import blank, layout, layout_error, row_bytes
from gradrun.output.formats.target import WriterTarget
from gradrun.output.journal import CommittedRange
from gradrun.output.missing import count_nonfinite, fill_missing

if TYPE_CHECKING:
    import torch

    from gradrun.output.columns import Column
    from gradrun.output.transforms import Outputs

SHARD_BYTES = 64 * 1024 * 1024
SHARDS = 64
LEAST_ROWS = 1024
ID_BYTES = 256
"""Estimated size of an id in memory."""


class Shard(NamedTuple):
    """Content of a shard file."""

    columns: Outputs
    ids: Sequence[int | str] = ()
    """Empty if the format does not store them."""
    valid: torch.Tensor | None = None
    """Mask [n] of the rows with a prediction; None if the format does not store it."""


class ShardPlace(NamedTuple):
    """The shard of a sample."""

    number: int
    start: int
    """Its first sample."""
    rows: int
    """Its samples if it is complete."""


class ShardLayout(NamedTuple):
    """How samples are divided into shards."""

    rows: int
    """Samples of the first shard."""
    doublings: int = 0
    """How often the size doubles, each time after SHARDS shards; 0 if all have the same size."""

    def locate(self, sample: int) -> ShardPlace:
        """Return the shard of a sample."""
        first_group = SHARDS * self.rows
        group = min(self.doublings, (sample // first_group + 1).bit_length() - 1)
        rows, begin = self.rows << group, first_group * ((1 << group) - 1)
        number, before = divmod(sample - begin, rows)
        return ShardPlace(SHARDS * group + number, sample - before, rows)


def shard_layout(samples: int | None, row_bytes: int, batch_size: int) -> ShardLayout:
    """Divide `samples` into shards; None if their number is unknown."""
    rows = shard_rows(samples or 1, row_bytes, batch_size)
    if samples is not None:
        return ShardLayout(rows)
    most = max(1, SHARD_BYTES // max(1, row_bytes) // rows)
    return ShardLayout(rows, most.bit_length() - 1)


def shard_rows(samples: int, row_bytes: int, batch_size: int) -> int:
    """Number of samples per shard: a multiple of the batch size."""
    rows = min(max(LEAST_ROWS, math.ceil(samples / SHARDS)), SHARD_BYTES // max(1, row_bytes))
    return max(1, rows // batch_size) * batch_size


class ShardedWriter(ABC):
    """Collects the rows of a shard in memory and writes them when it is complete.

    `close` seals an incomplete shard, which a resume reads back and continues.
    """

    suffix: str
    subfolder = ""
    """Folder of the shards in the run folder; empty for the run folder itself."""
    stores_ids = False

    def __init__(self, target: WriterTarget) -> None:
        self.folder = target.folder / self.subfolder
        self.samples, self.batch_size, self.labels = target[1:]
        self.written = 0
        self._layout = ShardLayout(1)
        self._buffers: Outputs = {}
        self._valid: torch.Tensor
        self._ids: Sequence[int | str] = []
        """Ids of the rows in the buffers, if the format stores them; row numbers are a range, which
        takes no memory."""
        self._ranges: list[CommittedRange] = []
        self._reported = 0
        """Number of ranges that commit() has returned."""

    def convert(self, outputs: Outputs) -> Outputs:
        """The outputs in dtypes of the format.

        Raises:
            ValueError: the format lacks a dtype.
        """
        return outputs

    def content(self, name: str, column: Column) -> bytes | memoryview:
        """The content of some rows, for their checksum."""
        import torch

        assert isinstance(column, torch.Tensor)
        if not column.numel():
            return b""
        return column.contiguous().view(-1).view(torch.uint8).numpy().data

    @abstractmethod
    def encode(self, columns: Outputs, ids: Sequence[int | str], start: int) -> bytes:
        """Bytes of the shard with the rows from sample `start` on."""

    @abstractmethod
    def decode(self, path: Path) -> Shard:
        """Read a shard; raises any exception if the file is damaged."""

    @property
    def nonfinite(self) -> int:
        """Committed samples with a NaN or an infinity."""
        return sum(committed.nonfinite for committed in self._ranges)

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        outputs = self.convert(outputs)
        size = row_bytes(outputs) + (ID_BYTES if self.stores_ids else 0)
        self._layout = shard_layout(self.samples, size, self.batch_size)
        if self.subfolder:
            self.folder.mkdir(exist_ok=True)
            files.sync_folder(self.folder.parent)
        stop = committed[-1].stop if committed else 0
        rows = self._layout.locate(stop).rows
        if self.samples is not None:
            files.ensure_free_space(self.folder, (self.samples - stop) * size, "predictions")
            rows = min(rows, self.samples)
        self._allocate(outputs, rows)
        if committed:
            self._resume(committed)

    def _allocate(self, outputs: Outputs, rows: int) -> None:
        import torch

        self._buffers = {name: blank(column, rows) for name, column in sorted(outputs.items())}
        self._valid = torch.zeros(rows, dtype=torch.bool)

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        if outputs.keys() != self._buffers.keys():
            raise ValueError(f"the outputs were {[*self._buffers]} and now are {[*outputs]}")
        outputs = self.convert(fill_missing(outputs, valid))
        for name, column in outputs.items():
            if layout(column) != layout(first := self._buffers[name]):
                raise layout_error(f"output {name!r}", first, column)
        done = 0
        while done < len(ids):
            shard = self._layout.locate(self.written)
            at = self.written - shard.start
            if at == 0 and self.samples is None and len(self._valid) < shard.rows:
                self._allocate(self._buffers, shard.rows)
            count = min(len(ids) - done, shard.rows - at)
            buffers: Any = self._buffers
            for name, column in outputs.items():
                buffers[name][at : at + count] = column[done : done + count]
            self._valid[at : at + count] = True if valid is None else valid[done : done + count]
            if self.stores_ids:
                self._add_ids(at, ids[done : done + count])
            done += count
            self.written += count
            if at + count == shard.rows:
                self._seal()

    def _add_ids(self, at: int, ids: Sequence[int | str]) -> None:
        before = self._ids[:at] if isinstance(self._ids, range) else self._ids
        if isinstance(ids, range) and at == 0:
            self._ids = ids
        elif isinstance(ids, range) and isinstance(before, range) and before.stop == ids.start:
            self._ids = range(before.start, ids.stop)
        else:
            self._ids = before if isinstance(before, list) else [*before]
            self._ids[at:] = ids

    def commit(self) -> list[CommittedRange]:
        """Ranges sealed since the last call; rows in the buffers are not committed."""
        new, self._reported = self._ranges[self._reported :], len(self._ranges)
        return new

    def close(self) -> list[CommittedRange]:
        try:
            if self._committed < self.written:
                self._seal()
        except BaseException:
            self.written = self._committed
            raise
        return self.commit()

    def files(self) -> list[str]:
        committed = self._committed
        shards = self._layout.locate(committed - 1).number + 1 if committed else 0
        return [self._relative(self._name(shard)) for shard in range(shards)]

    # --- shards --------------------------------------------------------------------------------

    @property
    def _committed(self) -> int:
        return self._ranges[-1].stop if self._ranges else 0

    def _name(self, shard: int) -> str:
        return f"predictions-{shard:05}.{self.suffix}"

    def _relative(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def _seal(self) -> None:
        """Write the shard in the buffers.

        All state follows from `_ranges`, so repeating it after Ctrl-C is harmless.
        """
        number, start, _ = self._layout.locate(self._committed)
        begin, rows = self._committed - start, self.written - start
        columns = {name: buffer[:rows] for name, buffer in self._buffers.items()}
        new = {name: column[begin:] for name, column in columns.items()}
        file = self._name(number)
        committed = CommittedRange(
            start=self._committed,
            stop=self.written,
            files={
                self._relative(file): row_checksum(
                    (self.content(name, column) for name, column in new.items()),
                    self._ids[begin:rows],
                )
            },
            nonfinite=count_nonfinite(new, self._valid[begin:rows]),
        )
        files.replace_file(self.folder / file, self.encode(columns, self._ids[:rows], start))
        files.sync_folder(self.folder)
        self._ranges.append(committed)

    def _resume(self, committed: Sequence[CommittedRange]) -> None:
        """Check that the sealed shards exist, and read an incomplete last one."""
        stop = committed[-1].stop
        shards, start, _ = self._layout.locate(stop)
        for shard in range(shards):
            (self.folder / self._name(shard)).stat()
        if rows := stop - start:
            self._load(self.folder / self._name(shards), rows)
        # Later shards were not committed.
        for path in self.folder.glob(f"predictions-{'[0-9]' * 5}.{self.suffix}*"):
            if path.name >= self._name(shards + (rows > 0)):
                path.unlink()
        self._ranges, self._reported, self.written = [*committed], len(committed), stop

    def _load(self, path: Path, rows: int) -> None:
        try:
            shard = self.decode(path)
            complete = all(len(shard.columns[name]) >= rows for name in self._buffers)
            buffers: Any = self._buffers
            for name, buffer in buffers.items():
                buffer[:rows] = shard.columns[name][:rows]
            self._valid[:rows] = True if shard.valid is None else shard.valid[:rows]
            self._ids = list(shard.ids[:rows])
        except OSError:
            raise
        except Exception as error:  # a damaged file causes any of a dozen exceptions
            raise OSError(errno.EIO, "the file is damaged", path) from error
        if not complete:
            raise OSError(errno.EIO, "the file is shorter than its committed range", path)


def row_checksum(columns: Iterable[bytes | memoryview], ids: Sequence[int | str]) -> int:
    """CRC-32 of some rows: the values of each column in turn, then a line of JSON per id."""
    crc = 0
    for column in columns:
        crc = zlib.crc32(column, crc)
    for sample_id in ids:
        crc = zlib.crc32(json.dumps(sample_id).encode() + b"\n", crc)
    return crc
