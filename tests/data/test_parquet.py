"""Parquet as a data source: the same rows as in other tables, read by row group."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import gradrun
from gradrun.config.data import RecordsData
from gradrun.core.errors import ConfigError, SampleError
from gradrun.data import open_data
from gradrun.data.source import BatchSource
from tests.conftest import ROOT
from tests.support.sources import read_all

ROWS = 50
TABLE = {
    "name": [f"row {i}" for i in range(ROWS)],
    "a": [float(i) for i in range(ROWS)],
    "b": [i % 7 for i in range(ROWS)],
    "vector": [[i / 2, i / 4] for i in range(ROWS)],
}


def opened(path: Path, **changes: Any) -> BatchSource:
    given = {
        "source": "records",
        "path": path,
        "inputs": {"x": {"columns": ("a", "b", "vector")}},
        "id": "name",
        "batch_size": 8,
    }
    return open_data(RecordsData.model_validate(given | changes), seed=0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    parquet.write_table(pa.table(TABLE), tmp_path / "table.parquet", row_group_size=7)
    return tmp_path / "table.parquet"


def test_parquet_yields_the_same_batches_as_jsonl(file: Path) -> None:
    other = file.with_suffix(".jsonl")
    rows = (dict(zip(TABLE, row, strict=True)) for row in zip(*TABLE.values(), strict=True))
    other.write_text("\n".join(map(json.dumps, rows)))
    found, same = opened(file), opened(other)
    assert (found.samples, found.sample_bytes) == (same.samples, same.sample_bytes) == (ROWS, 16)
    for start in (0, 8, 17, 49):
        for one, another in zip(found.batches(start), same.batches(start), strict=True):
            assert torch.equal(one.args[0], another.args[0])
            assert one.ids == another.ids


def test_files_written_by_pandas_are_read(tmp_path: Path) -> None:
    path = tmp_path / "frame.parquet"
    pandas.DataFrame({"a": np.arange(5, dtype=np.float32)}, index=list("vwxyz")).to_parquet(path)
    (batch,) = opened(path, inputs={"x": {"columns": ("a",)}}, id=None).batches()
    assert batch.args[0].tolist() == [[0], [1], [2], [3], [4]]


WRONG = {
    "a null": ({"a": [1.0, None]}, r"wrong\.parquet:2  column 'a' is null"),
    "a text": (
        {"a": ["1", "x"]},
        r"wrong\.parquet:2  column 'a' is 'x', not a number of type float32",
    ),
    "lists of two lengths": (
        {"a": [[1.0], [1.0, 2.0]]},
        "2 values for input 'x', but most rows have 1",
    ),
    "no such column": ({"b": [1.0]}, "has no column 'a'"),
    "no rows": ({"a": pa.array([], pa.float32())}, "contains no samples"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_values_are_an_error_with_their_location(tmp_path: Path, name: str) -> None:
    table, message = WRONG[name]
    parquet.write_table(pa.table(table), tmp_path / "wrong.parquet")
    with pytest.raises((ConfigError, SampleError), match=message):
        read_all(opened(tmp_path / "wrong.parquet", inputs={"x": {"columns": ("a",)}}, id=None))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_damaged_file_is_an_error(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        opened(file)


def test_labels_may_be_a_column(file: Path, tmp_path: Path) -> None:
    result = gradrun.infer(
        {
            "model": {"source": "layers", "layers": ["Identity"]},
            "data": {
                "source": "records",
                "path": str(file),
                "inputs": {"x": {"columns": ["a"]}},
                "labels": "a",
            },
            "output": {"path": str(tmp_path / "out"), "format": "parquet"},
            "metrics": ["mse"],
        }
    )
    assert [(metric.value, metric.samples) for metric in result.metrics] == [(0.0, ROWS)]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    # The benchmark does this with a million rows.
    script = ROOT / "benchmarks" / "parquet_rows.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, "150000"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    seen = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert seen[-1] < 1.06 * seen[1]
