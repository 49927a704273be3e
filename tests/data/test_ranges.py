"""Every source reads the batches of a range as it reads them in a whole pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
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


AWKWARD = {
    "bom.csv": "\ufeffname,a\n" + "".join(f"é{i},{i}\n" for i in range(COUNT)),
    "crlf.csv": "name,a\r\n" + "".join(f"row,{i}\r\n" for i in range(COUNT)),
    "quoted.csv": "name,a\n" + "".join(f'"two\nlines {i}",{i}\n\n' for i in range(COUNT)),
    "tabs.tsv": "name\ta\n" + "".join(f"row\t{i}\n" for i in range(COUNT)),
    "blank.jsonl": "\n" + "".join(f'{{"name": "ü", "a": {i}}}\n\n' for i in range(COUNT)),
    "crlf.ndjson": "".join(f'{{"a": {i}}}\r\n' for i in range(COUNT)),
    "no_end.jsonl": "\n".join(f'{{"a": {i}}}' for i in range(COUNT)),
}


@pytest.mark.parametrize("name", [*AWKWARD, "groups.parquet"])
def test_reading_starts_at_any_batch_of_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    if name in AWKWARD:
        path.write_bytes(AWKWARD[name].encode())
    else:
        frame = pandas.DataFrame({"a": np.arange(COUNT, dtype=np.float32)})
        frame.to_parquet(path, row_group_size=5)
    monkeypatch.setattr("gradrun.data.rows._PARQUET_ROWS", 3)
    inputs = {"x": {"columns": ["a"]}}
    source = data("records", path=path, inputs=inputs, batch_size=SIZE)
    for start in range(0, COUNT, SIZE):
        stop = min(start + SIZE, COUNT)
        (found,) = source.batches(start, stop)
        assert found.args[0].flatten().tolist() == list(range(start, stop))
        assert list(found.ids) == list(range(start, stop))


def test_a_range_in_the_middle_reads_only_its_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a\n" + "".join(f"{i}\n" for i in range(1000)))
    source = data("records", path=path, inputs={"x": {"columns": ["a"]}}, batch_size=10)
    with path.open("r+") as file:  # rows before the range are not parsed
        file.seek(len("a\n"))
        file.write("zz")
    (batch,) = source.batches(500, 510)
    assert batch.args[0].flatten().tolist() == list(range(500, 510))
    assert not batch.errors


def test_an_error_in_the_middle_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = [str(i) for i in range(100)]
    rows[57] = "bad"
    path.write_text("a\n" + "\n".join(rows) + "\n")
    source = data("records", path=path, inputs={"x": {"columns": ["a"]}}, batch_size=10)
    (batch,) = source.batches(50, 60)
    (error,) = batch.errors.values()
    assert "x.csv:59  " in str(error)
