"""One JSON object a sample and line: its id and its outputs as numbers or lists.

Knows JSON; a float is written so that reading it gives the same bits. NaN and infinities are
written as Python reads them (NaN, Infinity), for which JSON proper has no word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gradrun.output.formats.text_writer import Columns, TextWriter, numbered_lots


class JsonlWriter(TextWriter):
    """predictions.jsonl; a row may have any shape, and each its own."""

    suffix = "jsonl"

    def lines(self, columns: Columns, ids: Sequence[int | str]) -> str:
        lines = [
            json.dumps({"id": name, **{key: values[row] for key, values in columns.items()}})
            for row, name in enumerate(ids)
        ]
        return "\n".join(lines) + "\n"


def read(folder: Path) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The rows of every output, some lines at a time; those that hold null are left out.

    Raises:
        ValueError: rows are not of one shape.
    """
    with (folder / "predictions.jsonl").open(encoding="utf-8") as file:
        for taken in numbered_lots(map(json.loads, file)):
            whole = [(number, line) for number, line in taken if None not in line.values()]
            if whole:
                # What classes are called is no output of the model's.
                names = [name for name, value in whole[0][1].items() if not _is_text(name, value)]
                rows = {name: _tensor([line[name] for _, line in whole]) for name in names}
                yield torch.tensor([number for number, _ in whole]), rows


def _is_text(name: str, value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return name == "id" or isinstance(value, str)


def _tensor(values: list[Any]) -> torch.Tensor:
    """As exact as the numbers are written."""
    tensor = torch.tensor(values)
    return torch.tensor(values, dtype=torch.float64) if tensor.is_floating_point() else tensor
