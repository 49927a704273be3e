"""quarantine.jsonl: the samples that failed, one JSON object per line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Protocol

from gradrun.core import files

FILE_NAME = "quarantine.jsonl"


class SampleLog(Protocol):
    """Records failed samples."""

    path: Path
    count: int

    def add(self, sample: int, sample_id: int | str, error: str, details: str) -> None:
        """Record a sample: position in the input, id, error message, traceback."""


class Quarantine:
    """Records failed samples; the file is created with the first one.

    A line is synced before the commit of the samples around it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self.count = 0

    def truncate(self, sample: int) -> None:
        """Keep the entries of samples before this one, and remove all others."""
        if not self.path.exists():
            return
        lines = [(_position(line), line) for line in files.read_lines(self.path)]
        retained = [line for position, line in lines if position is not None and position < sample]
        self.count = len(retained)
        draft = self.path.with_name(f"{FILE_NAME}.tmp")
        _write(draft, b"".join(retained), os.O_TRUNC)
        draft.replace(self.path)

    def add(self, sample: int, sample_id: int | str, error: str, details: str) -> None:
        """Append a sample: position in the input, id, error message, traceback."""
        line = {"sample": sample, "id": sample_id, "error": error, "traceback": details}
        _write(self.path, json.dumps(line).encode() + b"\n", os.O_APPEND)
        self.count += 1


def quarantined_positions(folder: Path) -> set[int]:
    """Input positions of the quarantined samples of a run folder."""
    path = folder / FILE_NAME
    positions = map(_position, files.read_lines(path) if path.exists() else ())
    return {position for position in positions if position is not None}


def _position(line: bytes) -> int | None:
    """Return the input position of an entry; None if it is damaged, such as by a full disk."""
    try:
        position = json.loads(line)["sample"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return position if isinstance(position, int) else None


def _write(path: Path, data: bytes, flag: int) -> None:
    descriptor = files.open_regular(path, os.O_WRONLY | os.O_CREAT | flag)
    try:
        files.write_all(descriptor, data)
        files.sync(descriptor)
    finally:
        os.close(descriptor)
