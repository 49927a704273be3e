"""ids.txt: the ids of the samples, one per line, beside predictions in a format without ids."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradrun.core import files
from gradrun.output.class_labels import as_line
from gradrun.output.journal import CommittedRange

if TYPE_CHECKING:
    import torch

    from gradrun.output.formats import PredictionWriter
    from gradrun.output.transforms import Outputs

FILE_NAME = "ids.txt"


class IdsWriter:
    """A writer that appends the ids of each range that another writer commits.

    Line i of the file belongs to row i of the predictions. Line breaks in ids are escaped.
    """

    def __init__(self, writer: PredictionWriter, folder: Path) -> None:
        self.writer, self.path = writer, folder / FILE_NAME
        self._ids: list[int | str] = []
        self._first = 0
        """Number of the sample of the first id in the list; earlier ids are in the file."""
        self._size = 0
        self._descriptor = -1

    @property
    def written(self) -> int:
        return self.writer.written

    @property
    def nonfinite(self) -> int:
        return self.writer.nonfinite

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        self.writer.open(outputs, committed)
        self._first = committed[-1].stop if committed else 0
        self._size = (committed[-1].end or 0) if committed else 0
        flags = os.O_RDWR if committed else os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._descriptor = files.open_regular(self.path, flags)
        files.check_size(self._descriptor, self._size, self.path)
        os.ftruncate(self._descriptor, self._size)
        if not committed:
            files.sync_folder(self.path.parent)

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        # Repeating this after Ctrl-C in the writer is harmless.
        self._ids[self.written - self._first :] = ids
        self.writer.write(outputs, ids, valid)

    def commit(self) -> list[CommittedRange]:
        return [self._with_ids(committed) for committed in self.writer.commit()]

    def close(self) -> list[CommittedRange]:
        try:
            return [self._with_ids(committed) for committed in self.writer.close()]
        finally:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def files(self) -> list[str]:
        return [*self.writer.files(), *([FILE_NAME] if self._size else [])]

    def _with_ids(self, committed: CommittedRange) -> CommittedRange:
        """Append the ids of a committed range, and add the file to the range."""
        count = committed.stop - self._first
        data = "".join(f"{as_line(name)}\n" for name in self._ids[:count]).encode(
            "utf-8", "backslashreplace"
        )
        files.write_at(self._descriptor, data, self._size)
        files.sync(self._descriptor)
        self._ids, self._first, self._size = (
            self._ids[count:], committed.stop, self._size + len(data),
        )  # fmt: skip
        changes: dict[str, Any] = {
            "files": {**committed.files, FILE_NAME: zlib.crc32(data)},
            "end": self._size,
        }
        return committed.model_copy(update=changes)
