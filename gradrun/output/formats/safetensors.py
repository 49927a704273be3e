"""Predictions in .safetensors shards, with the sample range of each in its metadata."""

from __future__ import annotations

import json
import struct
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from gradrun.core import files
from gradrun.output.columns import tensors_of
from gradrun.output.formats.npy import with_numpy_dtype
from gradrun.output.formats.sharded_writer import Shard, ShardedWriter
from gradrun.output.journal import CommittedRange

if TYPE_CHECKING:
    from gradrun.output.transforms import Outputs

Array = np.ndarray[Any, Any]

_CHUNK_BYTES = 1024 * 1024
_MAX_HEADER_BYTES = 100_000_000
"""Limit of the format."""


class SafetensorsWriter(ShardedWriter):
    """One tensor per output in each shard."""

    suffix = "safetensors"

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        from safetensors.torch import save

        if "__metadata__" in outputs:
            raise ValueError(
                "the output name '__metadata__' is reserved in safetensors; use format: npy"
            )
        # Fails now and not at the first shard if the format lacks a dtype.
        save({name: tensor[:0].contiguous() for name, tensor in tensors_of(outputs).items()})
        super().open(outputs, committed)

    def encode(self, columns: Outputs, ids: Sequence[int | str], start: int) -> bytes:
        from safetensors.torch import save

        stop = start + len(next(iter(columns.values())))
        # One entry only: the library writes several in an order that varies from file to file.
        return save(tensors_of(columns), {"samples": f"{start}:{stop}"})

    def decode(self, path: Path) -> Shard:
        from safetensors.torch import load_file

        return Shard({**load_file(path)})


def read(folder: Path, skip: Container[str] = ()) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Yield all rows, about a MiB at a time; bfloat16 and float8 as float32."""
    first = 0
    for path in sorted(folder.glob("predictions-*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            samples = next(iter(slices.values())).get_shape()[0]
            row_bytes = sum(rows[:1].nbytes for rows in slices.values())
            step = max(1, _CHUNK_BYTES // max(1, row_bytes))
            for begin in range(0, samples, step):
                stop = min(begin + step, samples)
                yield (
                    np.arange(first + begin, first + stop),
                    {
                        name: with_numpy_dtype(rows[begin:stop]).numpy()
                        for name, rows in slices.items()
                    },
                )
        first += samples


def checksum(path: Path, committed: CommittedRange, begin: int) -> int:
    """CRC-32 of the rows of a range: those of each tensor in turn, by name."""
    with files.open_binary(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MAX_HEADER_BYTES:
            raise ValueError("the header is too long")
        header = json.loads(file.read(length))
        first = int(header.pop("__metadata__")["samples"].partition(":")[0])
        start, stop = committed.start - first, committed.stop - first
        crc = 0
        for name in sorted(header):
            data, end = (8 + length + offset for offset in header[name]["data_offsets"])
            rows = header[name]["shape"][0]
            row_bytes = (end - data) // rows
            if stop > rows:
                raise ValueError("the shard has fewer rows")
            files.check_size(file.fileno(), data + stop * row_bytes, path)
            crc = files.checksum(
                file.fileno(), data + start * row_bytes, data + stop * row_bytes, crc
            )
        return crc
