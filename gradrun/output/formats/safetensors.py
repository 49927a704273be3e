"""Predictions in .safetensors parts, whose metadata say which samples they hold.

Knows the format; when a part is written stands in parts.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from gradrun.output.formats.sharded_writer import Columns, ShardedWriter
from gradrun.output.journal import CommittedRange

_WINDOW_BYTES = 1024 * 1024


class SafetensorsWriter(ShardedWriter):
    """One tensor an output in every part."""

    suffix = "safetensors"

    def open(self, outputs: Columns, kept: Sequence[CommittedRange] = ()) -> None:
        if "__metadata__" in outputs:
            raise ValueError(
                "an output is called '__metadata__', which the format keeps for itself"
            )
        save({name: tensor[:0].contiguous() for name, tensor in outputs.items()})
        super().open(outputs, kept)

    def encode(self, columns: Columns, ids: Sequence[int | str], start: int) -> bytes:
        stop = start + len(next(iter(columns.values())))
        # One entry: several would be written in an order that changes from file to file.
        return save(columns, {"samples": f"{start}:{stop}"})

    def decode(self, path: Path) -> tuple[Columns, Sequence[int | str]]:
        return load_file(path), ()


def read(folder: Path) -> Iterator[tuple[torch.Tensor, Columns]]:
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
