"""Predictions in .safetensors parts of about 64 MiB, each whole or not there.

Knows the part's size and names; a part's metadata says which samples it holds.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save, save_file

PART_BYTES = 64 * 1024 * 1024


class SafetensorsSink:
    """Fills one buffer an output, and writes them out together when they are full."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples, self.written = folder, samples, 0
        self._buffers: dict[str, torch.Tensor] = {}
        self._rows = 0
        self._filled = 0
        self._parts: list[str] = []

    def open(self, outputs: dict[str, torch.Tensor]) -> None:
        if "__metadata__" in outputs:
            raise ValueError(
                "an output is called '__metadata__', which the format keeps for itself"
            )
        # A type that the format cannot hold is refused now, and not with the first part.
        save({name: tensor[:0].contiguous() for name, tensor in outputs.items()})
        row_bytes = sum(tensor[:1].nbytes for tensor in outputs.values())
        size = max(len(tensor) for tensor in outputs.values())
        self._rows = max(size, min(self.samples, PART_BYTES // max(1, row_bytes)))
        self._buffers = {
            name: torch.empty((self._rows, *tensor.shape[1:]), dtype=tensor.dtype)
            for name, tensor in outputs.items()
        }

    def write(self, outputs: dict[str, torch.Tensor], ids: Sequence[int | str]) -> None:
        if outputs.keys() != self._buffers.keys():
            raise ValueError(f"the outputs were {[*self._buffers]} and now are {[*outputs]}")
        size = len(ids)
        if self._filled + size > self._rows:
            self._write_part()
        for name, tensor in outputs.items():
            buffer = self._buffers[name]
            if tensor.shape[1:] != buffer.shape[1:] or tensor.dtype != buffer.dtype:
                raise ValueError(
                    f"output {name!r} has {buffer.dtype} rows of shape {list(buffer.shape[1:])} "
                    f"and now gives {tensor.dtype} of {list(tensor.shape[1:])}; format: jsonl "
                    "takes any"
                )
            buffer[self._filled : self._filled + size] = tensor
        self._filled += size

    def _write_part(self) -> None:
        if not self._filled:
            return
        name = f"predictions-{len(self._parts):05}.safetensors"
        draft = self.folder / f"{name}.tmp"
        last = self.written + self._filled
        tensors = {key: buffer[: self._filled] for key, buffer in self._buffers.items()}
        try:
            save_file(tensors, draft, {"start": str(self.written), "stop": str(last)})
            draft.replace(self.folder / name)
        except Exception as error:  # safetensors raises its own error for a full disk
            draft.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise
            raise OSError(errno.EIO, f"{name}: {error}") from error
        # In this order, Ctrl-C in between loses nothing and writes nothing twice.
        self.written, self._filled = last, 0
        self._parts.append(name)

    def close(self) -> None:
        self._write_part()

    def files(self) -> list[str]:
        return self._parts
