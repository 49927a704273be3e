"""One JSON object per sample and line: its id and its outputs as numbers or lists.

A float is written with enough digits to read back the same bits. NaN and infinities are written as
Python's json module reads them (NaN, Infinity); JSON itself lacks them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradrun.output.formats.text_writer import Columns, TextWriter, numbered_chunks

Array = np.ndarray[Any, Any]


class JsonlWriter(TextWriter):
    """Writes predictions.jsonl; each row may have another shape."""

    suffix = "jsonl"

    def lines(self, columns: Columns, ids: Sequence[int | str]) -> str:
        lines = [
            json.dumps({"id": name, **{key: values[row] for key, values in columns.items()}})
            for row, name in enumerate(ids)
        ]
        return "\n".join(lines) + "\n"


def read(folder: Path) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Yield the rows without null, some lines at a time.

    Raises:
        ValueError: rows differ in shape.
    """
    with (folder / "predictions.jsonl").open(encoding="utf-8") as file:
        for chunk in numbered_chunks(map(json.loads, file)):
            present = [(number, line) for number, line in chunk if None not in line.values()]
            if present:
                names = [name for name, value in present[0][1].items() if not _is_text(name, value)]
                rows = {name: np.array([line[name] for _, line in present]) for name in names}
                yield np.array([number for number, _ in present]), rows


def _is_text(name: str, value: Any) -> bool:
    """Whether a field is the id or a class name."""
    while isinstance(value, list) and value:
        value = value[0]
    return name == "id" or isinstance(value, str)
