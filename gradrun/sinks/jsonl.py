"""One JSON object a sample and line: its id and its outputs as numbers or lists.

Knows JSON; a float is written so that reading it gives the same bits. NaN and infinities are
written as Python reads them (NaN, Infinity), for which JSON proper has no word.
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gradrun import disk
from gradrun.journal import Committed
from gradrun.outputs import nonfinite_rows

_LINES = 1024
"""How many are read back at once."""


class JsonlSink:
    """Appends whole lines; the one that a full disk cuts off is taken back."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.path, self.samples, self.written = folder / "predictions.jsonl", samples, 0
        self.nonfinite = self._bad = 0
        self._descriptor = -1
        self._size = 0
        self._committed, self._checksum = 0, 0

    def open(self, outputs: dict[str, torch.Tensor], kept: Sequence[Committed] = ()) -> None:
        if "id" in outputs:
            raise ValueError("an output is called 'id', as the sample is; format: npy keeps both")
        if any(tensor.is_complex() for tensor in outputs.values()):
            raise ValueError("JSON has no complex numbers; format: npy has")
        done = kept[-1].stop if kept else 0
        row_bytes = len(_lines(outputs, range(_rows(outputs)))) / max(1, _rows(outputs))
        disk.check_room(self.path.parent, int(row_bytes * (self.samples - done)), self.path.name)
        # Unbuffered: what write() returned from is with the kernel, so a crash of ours keeps it.
        flags = os.O_RDWR if kept else os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._descriptor = disk.open_plain(self.path, flags | os.O_APPEND)
        if kept:
            self.written = self._committed = kept[-1].stop
            self._size = kept[-1].end or 0
            self.nonfinite = self._bad = sum(committed.nonfinite for committed in kept)
            disk.check_size(self._descriptor, self._size, self.path)
        else:
            disk.sync_folder(self.path.parent)
        os.ftruncate(self._descriptor, self._size)

    def write(
        self,
        outputs: dict[str, torch.Tensor],
        ids: Sequence[int | str],
        missing: Collection[int] = (),
    ) -> None:
        data = _lines(outputs, ids, missing)
        checksum = zlib.crc32(data, self._checksum)
        bad, size = self._bad + nonfinite_rows(outputs.values()), self._size + len(data)
        written = self.written + len(ids)
        disk.write_all(self._descriptor, data)
        # Nothing is called from here on, so that Ctrl-C leaves all of these or none.
        self._size, self._checksum, self._bad, self.written = size, checksum, bad, written

    def commit(self) -> list[Committed]:
        if self.written == self._committed:
            return []
        disk.sync(self._descriptor)
        committed = Committed(
            start=self._committed,
            stop=self.written,
            files={self.path.name: self._checksum},
            end=self._size,
            nonfinite=self._bad - self.nonfinite,
        )
        self.nonfinite, self._committed, self._checksum = self._bad, self.written, 0
        return [committed]

    def close(self) -> list[Committed]:
        if self._descriptor < 0:
            return []
        try:
            os.ftruncate(self._descriptor, self._size)
            return self.commit()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def files(self) -> list[str]:
        return [self.path.name] if self.written else []


def _rows(outputs: dict[str, torch.Tensor]) -> int:
    return max((len(tensor) for tensor in outputs.values()), default=0)


def _lines(
    outputs: dict[str, torch.Tensor],
    ids: Sequence[int | str],
    missing: Collection[int] = (),
) -> bytes:
    columns = {name: tensor.tolist() for name, tensor in outputs.items()}
    for values in columns.values():
        for row in missing:
            values[row] = None
    lines = [
        json.dumps({"id": name, **{key: values[row] for key, values in columns.items()}})
        for row, name in enumerate(ids)
    ]
    return ("\n".join(lines) + "\n").encode()


def read(folder: Path) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The rows of every output, some lines at a time; those that hold null are left out.

    Raises:
        ValueError: rows are not of one shape.
    """
    with (folder / "predictions.jsonl").open(encoding="utf-8") as file:
        numbered = enumerate(map(json.loads, file))
        while taken := list(itertools.islice(numbered, _LINES)):
            whole = [(number, line) for number, line in taken if None not in line.values()]
            if whole:
                names = [name for name in whole[0][1] if name != "id"]
                rows = {name: _tensor([line[name] for _, line in whole]) for name in names}
                yield torch.tensor([number for number, _ in whole]), rows


def _tensor(values: list[Any]) -> torch.Tensor:
    """As exact as the numbers are written."""
    tensor = torch.tensor(values)
    return torch.tensor(values, dtype=torch.float64) if tensor.is_floating_point() else tensor
