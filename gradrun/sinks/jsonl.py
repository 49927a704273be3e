"""One JSON object a sample and line: its id and its outputs as numbers or lists.

Knows JSON; a float is written so that reading it gives the same bits. NaN and infinities are
written as Python reads them (NaN, Infinity), for which JSON proper has no word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch


class JsonlSink:
    """Appends whole lines; the one that a full disk cuts off is taken back."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.path, self.written = folder / "predictions.jsonl", 0
        self._file: BinaryIO | None = None
        self._size = 0

    def open(self, outputs: dict[str, torch.Tensor]) -> None:
        if "id" in outputs:
            raise ValueError("an output is called 'id', as the sample is; format: npy keeps both")
        if any(tensor.is_complex() for tensor in outputs.values()):
            raise ValueError("JSON has no complex numbers; format: npy has")
        # Unbuffered: what write() returned from is with the kernel, so a crash of ours keeps it.
        self._file = self.path.open("xb", buffering=0)

    def write(self, outputs: dict[str, torch.Tensor], ids: Sequence[int | str]) -> None:
        columns = {name: tensor.tolist() for name, tensor in outputs.items()}
        lines = [
            json.dumps({"id": name, **{key: values[row] for key, values in columns.items()}})
            for row, name in enumerate(ids)
        ]
        data = memoryview(("\n".join(lines) + "\n").encode())
        assert self._file is not None
        while data:
            data = data[self._file.write(data) :]
        self._size += sum(len(line.encode()) + 1 for line in lines)
        self.written += len(ids)

    def close(self) -> None:
        if self._file:
            self._file.truncate(self._size)
            self._file.close()
            self._file = None

    def files(self) -> list[str]:
        return [self.path.name] if self.written else []
