"""Every source reads the batches of a range as it reads them in a whole pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradrun.data.batch import Batch
from gradrun.data.source import BatchSource
from tests.support.sources import data

COUNT, SIZE = 23, 4
RANGES = [(0, 4), (4, 12), (12, 23), (20, 23), (0, 23), (8, 8)]


def _open(source: str, folder: Path) -> BatchSource:
    values = np.arange(COUNT * 2, dtype=np.float32).reshape(COUNT, 2)
    match source:
        case "arrays":
            np.save(folder / "x.npy", values)
            return data("arrays", path=folder / "x.npy", batch_size=SIZE)
        case "synthetic":
            return data("synthetic", inputs={"x": {"shape": [2]}}, samples=COUNT, batch_size=SIZE)
        case "csv" | "jsonl":
            path = folder / f"x.{source}"
            rows = (
                ["a,b", *(f"{a},{b}" for a, b in values)]
                if source == "csv"
                else [f'{{"a": {a}, "b": {b}}}' for a, b in values]
            )
            path.write_text("\n".join(rows) + "\n")
            inputs = {"x": {"columns": ["a", "b"]}}
            return data("records", path=path, inputs=inputs, batch_size=SIZE)
    for number in range(COUNT):
        Image.new("RGB", (3, 2), (number, 0, 0)).save(folder / f"{number:02}.png")
    return data("images", path=folder, batch_size=SIZE)


def _same(left: Batch, right: Batch) -> bool:
    pairs = zip(left.tensors(), right.tensors(), strict=True)
    return list(left.ids) == list(right.ids) and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("source", ["arrays", "synthetic", "csv", "jsonl", "images"])
def test_a_range_has_the_batches_of_the_whole_pass(source: str, tmp_path: Path) -> None:
    opened = _open(source, tmp_path)
    whole = list(opened.batches())
    for start, stop in RANGES:
        expected = whole[start // SIZE : -(-stop // SIZE)]
        found = list(opened.batches(start, stop))
        assert len(found) == len(expected)
        assert all(_same(*pair) for pair in zip(found, expected, strict=True))
