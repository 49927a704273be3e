"""Parquet shards in a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import torch

from gradrun.config.output import OutputSection
from gradrun.output.formats import open_writer
from gradrun.output.journal import CommittedRange
from tests.conftest import Command


def test_ids_and_rows_of_an_incomplete_shard_are_continued(tmp_path: Path) -> None:
    rows = torch.arange(40.0).reshape(20, 2)
    ids = [f'"{i}"\n' for i in range(20)]

    def written(folder: Path, stop: int, before: list[CommittedRange]) -> list[CommittedRange]:
        folder.mkdir(exist_ok=True)
        writer = open_writer(OutputSection(path=folder, format="parquet"), 20)
        writer.open({"prediction": rows[:1]}, before)
        for at in range(writer.written, stop, 4):
            writer.write({"prediction": rows[at : at + 4]}, ids[at : at + 4])
            assert writer.commit() == []
        return before + writer.close()

    ranges = written(tmp_path / "resumed", 12, [])
    ranges = written(tmp_path / "resumed", 20, ranges)
    assert [committed.stop for committed in ranges] == [12, 20]
    written(tmp_path / "whole", 20, [])
    (one,), (other,) = ([*(tmp_path / name).rglob("*.parquet")] for name in ("resumed", "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert pandas.read_parquet(one)["id"].tolist() == ids


def test_a_run_is_verified(cli: Command, tmp_path: Path) -> None:
    config = {
        "model": {"source": "layers", "layers": [{"Linear": [2, 2]}]},
        "data": {
            "source": "records",
            "path": str(tmp_path / "t.csv"),
            "inputs": {"x": {"columns": ["a", "b"]}},
            "id": "name",
        },
        "output": {"path": str(tmp_path / "out"), "format": "parquet"},
    }
    lines = ["name,a,b", *(f"row {i},{i},{i % 7}" for i in range(50))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert cli("infer", tmp_path / "c.yaml").code == 0
    answer = cli("verify", tmp_path / "out")
    assert (answer.code, "50 of 50 samples verified" in " ".join(answer.out.split())) == (0, True)
    found = pandas.read_parquet(tmp_path / "out" / "predictions")
    assert found["id"].tolist() == [f"row {i}" for i in range(50)]
