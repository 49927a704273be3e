"""One JSON object per sample and line: its id and its outputs as numbers or lists.

A float is written with enough digits to read back the same bits. NaN and infinities are written as
Python's json module reads them (NaN, Infinity); JSON itself lacks them.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradrun.output.formats.text_writer import Columns, TextWriter, numbered_chunks
from gradrun.output.missing import MISSING_CLASS

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


def read(folder: Path, skip: Container[str] = ()) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Yield the rows without the columns in `skip`, some lines at a time.

    A missing class is MISSING_CLASS.

    Rows of null are omitted, unless they can be missing classes.

    Raises:
        ValueError: rows differ in shape.
    """
    types: dict[str, type] = {}
    with (folder / "predictions.jsonl").open(encoding="utf-8") as file:
        for chunk in numbered_chunks(map(json.loads, file)):
            lines = [line for _, line in chunk]
            names = [name for name in lines[0] if name != "id" and name not in skip]
            for name in names:
                leaves = (leaf for line in lines for leaf in _leaves(line[name]))
                found = next((type(leaf) for leaf in leaves if leaf is not None), None)
                types |= {name: found} if found else {}
            numbers = {name: types.get(name, int) for name in names}
            numbers = {name: kind for name, kind in numbers.items() if kind is not str}
            # A map of classes is a list even if all are missing.
            scalars = not any(isinstance(line[name], list) for line in lines for name in numbers)
            classes = scalars and {*numbers.values()} <= {int}
            present = [
                (number, line)
                for number, line in chunk
                if classes or any(line[name] is not None for name in numbers)
            ]
            if present:
                rows = {name: _parse([line[name] for _, line in present]) for name in numbers}
                yield np.array([number for number, _ in present]), rows


def records(folder: Path) -> Iterator[Any]:
    """Yield the lines."""
    with (folder / "predictions.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the items of a nested list."""
    if not isinstance(value, list):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _parse(values: list[Any]) -> Array:
    array = np.array(values)
    if array.dtype != object:
        return array
    return np.where(array == np.array(None), MISSING_CLASS, array).astype(np.int64)
