"""Parquet as a source: the same rows as in other tables, read by row group and never held whole."""

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
from gradrun.core.errors import ConfigError
from gradrun.data import open_data
from gradrun.data.source import BatchSource
from gradrun.output.formats.parquet import ParquetWriter
from gradrun.output.journal import CommittedRange
from tests.conftest import ROOT, Command

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


def test_it_gives_the_batches_that_the_same_rows_give_as_jsonl(file: Path) -> None:
    other = file.with_suffix(".jsonl")
    rows = (dict(zip(TABLE, row, strict=True)) for row in zip(*TABLE.values(), strict=True))
    other.write_text("\n".join(map(json.dumps, rows)))
    found, same = opened(file), opened(other)
    assert (found.samples, found.sample_bytes) == (same.samples, same.sample_bytes) == (ROWS, 16)
    for start in (0, 8, 17, 49):
        for one, another in zip(found.batches(start), same.batches(start), strict=True):
            assert torch.equal(one.args[0], another.args[0])
            assert one.ids == another.ids


def test_what_pandas_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "frame.parquet"
    pandas.DataFrame({"a": np.arange(5, dtype=np.float32)}, index=list("vwxyz")).to_parquet(path)
    (batch,) = opened(path, inputs={"x": {"columns": ("a",)}}, id=None).batches()
    assert batch.args[0].tolist() == [[0], [1], [2], [3], [4]]


WRONG = {
    "a null": ({"a": [1.0, None]}, r"wrong\.parquet:2  column 'a' is missing"),
    "a text": ({"a": ["1", "x"]}, r"wrong\.parquet:2  column 'a' is 'x', which is no float32"),
    "lists of two lengths": ({"a": [[1.0], [1.0, 2.0]]}, "2 values, where the first row has 1"),
    "no such column": ({"b": [1.0]}, "has no column 'a'"),
    "no rows": ({"a": pa.array([], pa.float32())}, "there are no samples"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_are_no_numbers_are_an_error_with_their_place(tmp_path: Path, name: str) -> None:
    table, said = WRONG[name]
    parquet.write_table(pa.table(table), tmp_path / "wrong.parquet")
    with pytest.raises(ConfigError, match=said):
        list(
            opened(tmp_path / "wrong.parquet", inputs={"x": {"columns": ("a",)}}, id=None).batches()
        )


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_damaged_file_is_an_error(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        opened(file)


def test_a_column_may_hold_the_labels(file: Path, tmp_path: Path) -> None:
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


def test_a_file_larger_than_what_is_held_leaves_the_resident_set_flat(tmp_path: Path) -> None:
    # tests/bench does this with a million rows.
    script = ROOT / "tests" / "bench" / "parquet_rows.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, "300000"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    seen = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert seen[-1] < 1.06 * seen[1]


def test_ids_and_rows_go_on_behind_a_commit_of_part_of_a_part(tmp_path: Path) -> None:
    rows = torch.arange(40.0).reshape(20, 2)
    ids = [f'"{i}"\n' for i in range(20)]

    def written(folder: Path, upto: int, kept: list[CommittedRange]) -> list[CommittedRange]:
        folder.mkdir(exist_ok=True)
        sink = ParquetWriter(folder, 20)
        sink.open({"prediction": rows[:1]}, kept)
        told = list(kept)
        for at in range(sink.written, upto, 4):
            sink.write({"prediction": rows[at : at + 4]}, ids[at : at + 4])
            told += sink.commit()
        return told if upto < 20 else told + sink.close()

    broken = written(tmp_path / "resumed", 12, [])
    assert not list((tmp_path / "resumed").glob("*.parquet"))
    written(tmp_path / "resumed", 20, broken)
    written(tmp_path / "whole", 20, [])
    (one,), (other,) = ([*(tmp_path / name).iterdir()] for name in ("resumed", "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert pandas.read_parquet(one)["id"].tolist() == ids


def test_a_run_is_verified(cli: Command, file: Path, tmp_path: Path) -> None:
    config = {
        "model": {"source": "layers", "layers": [{"Linear": [4, 2]}]},
        "data": {
            "source": "records",
            "path": str(file),
            "inputs": {"x": {"columns": ["a", "b", "vector"]}},
            "id": "name",
        },
        "output": {"path": str(tmp_path / "out"), "format": "parquet"},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert cli("infer", tmp_path / "c.yaml").code == 0
    answer = cli("verify", tmp_path / "out")
    assert (answer.code, "50 of 50 samples are there" in " ".join(answer.out.split())) == (0, True)
    found = pandas.read_parquet(tmp_path / "out" / "predictions-00000.parquet")
    assert found["id"].tolist() == TABLE["name"]
