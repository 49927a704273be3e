"""Ids beside the predictions, in every format, for whole, stopped and resumed runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.dataset
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import gradrun
from gradrun.config.output import OutputSection
from gradrun.core.progress import Progress
from gradrun.output.formats import FORMATS, open_writer, sharded_writer
from gradrun.output.journal import CommittedRange, JournalHeader, JournalState
from gradrun.output.verification import damaged_ranges

ROWS, BATCH = 300, 8  # more than 256 numbered ids: Python caches small integers


def ids_of(folder: Path, form: str) -> list[Any]:
    """The ids of a run, read with other tools; as text if the format has no types."""
    if form in {"npy", "safetensors"}:
        return (folder / "ids.txt").read_text().split("\n")[:-1]
    if form == "parquet":
        return pandas.read_parquet(folder / "predictions")["id"].tolist()
    if form == "csv":
        with (folder / "predictions.csv").open(newline="") as file:
            return [row["id"] for row in csv.DictReader(file)]
    return [json.loads(line)["id"] for line in (folder / "predictions.jsonl").open()]


def run(folder: Path, form: str, data: dict[str, Any], **keys: Any) -> Any:
    config = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"batch_size": BATCH, **data},
        "run": {"warmup": 0},
        "measure": {"memory": False},
        "output": {"path": str(folder), "format": form},
    }
    return gradrun.infer(config, **keys)


def records(path: Path) -> dict[str, Any]:
    return {"source": "records", "path": str(path), "inputs": {"x": {"columns": ["a"]}}, "id": "k"}


KEYS = {
    "whole numbers": ([str(7 * i) for i in range(ROWS)], True),
    "leading zeros": ([f"{i:04}" for i in range(ROWS)], False),
    "one text at the end": ([*map(str, range(ROWS - 1)), "last"], False),
    "decimals": ([f"{i}.0" for i in range(ROWS)], False),
    "beyond int64": ([*map(str, range(ROWS - 1)), str(2**63)], False),
}


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "files"])
def test_the_ids_of_a_run_have_one_type_that_the_whole_column_decides(
    tmp_path: Path, form: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_writer, "LEAST_ROWS", 64)
    keys, whole = KEYS[kind]
    lines = [f"{key},{i}" for i, key in enumerate(keys)]
    (tmp_path / "t.csv").write_text("k,a\n" + "\n".join(lines) + "\n")
    result = run(tmp_path / "out", form, records(tmp_path / "t.csv"))
    typed = form in {"jsonl", "parquet"}
    assert ids_of(tmp_path / "out", form) == ([*map(int, keys)] if whole and typed else keys)
    if form == "parquet":
        assert len(result.files) > 1
        kinds = {
            pyarrow.parquet.read_schema(tmp_path / "out" / f).field("id").type for f in result.files
        }
        assert kinds == {pyarrow.int64() if whole else pyarrow.string()}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_whole_numbers_of_typed_tables_stay_numbers_and_texts_stay_texts(
    tmp_path: Path, suffix: str
) -> None:
    for name, keys in (("numbers", [*range(ROWS)]), ("texts", [*map(str, range(ROWS))])):
        frame = pandas.DataFrame({"k": keys, "a": np.arange(float(ROWS))})
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_parquet(path)
        run(tmp_path / name, "jsonl", records(path))
        assert ids_of(tmp_path / name, "jsonl") == keys


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "files"])
def test_images_have_their_paths_as_ids_in_every_format(tmp_path: Path, form: str) -> None:
    names = ["B.png", "a-b/c.png", "a/b.png", "a/b10.png", "a/b9.png", "ü.png"]
    for name in names:
        (tmp_path / "pics" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "pics" / name)
    run(tmp_path / "out", form, {"source": "images", "path": str(tmp_path / "pics")})
    assert ids_of(tmp_path / "out", form) == sorted(names)


@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_data_without_ids_have_no_file_of_ids(tmp_path: Path, form: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 2), np.float32))
    result = run(tmp_path / "out", form, {"source": "arrays", "path": str(tmp_path / "x.npy")})
    assert not (tmp_path / "out" / "ids.txt").exists()
    assert "ids.txt" not in result.files


def test_line_breaks_in_ids_are_escaped_so_that_lines_match_rows(tmp_path: Path) -> None:
    names = ["a\nb", "c\r", "d\\e", "\ud83d"]
    writer = open_writer(OutputSection(path=tmp_path, format="npy"), 4, has_ids=True)
    rows = {"prediction": torch.zeros(4)}
    writer.open(rows)
    writer.write(rows, names)
    writer.close()
    lines = (tmp_path / "ids.txt").read_text().splitlines()
    assert lines == ["a\\nb", "c\\r", "d\\e", "\\ud83d"]


# --- crashes -----------------------------------------------------------------------------------


@pytest.fixture(params=["npy", "safetensors"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(sharded_writer, "LEAST_ROWS", 10)
    return request.param


IDS = [f"sample {i}" for i in range(23)]


def write(folder: Path, form: str, stop: int, before: list[CommittedRange], *, kill: bool) -> None:
    """Write samples up to `stop` in batches of five; a killed writer is not closed."""
    config = OutputSection(path=folder, format=form)
    writer = open_writer(config, 23, 5, has_ids=True)
    values = torch.arange(23.0)
    writer.open({"prediction": values[:5]}, before)
    for start in range(writer.written, stop, 5):
        end = min(start + 5, stop)
        writer.write({"prediction": values[start:end]}, IDS[start:end])
        before += writer.commit()
    if kill:
        writer.write({"prediction": values[stop : stop + 3]}, IDS[stop : stop + 3])
        with (folder / "ids.txt").open("a") as file:
            file.write("written but not in the jour")
    else:
        before += writer.close()


def damaged(folder: Path, ranges: list[CommittedRange]) -> list[str]:
    head = JournalHeader(gradrun="0.1.0", samples=23, config={}, files={})
    state = JournalState(head, ranges, [0], torn=False)
    return [damage.file for damage in damaged_ranges(folder, state)]


@pytest.mark.parametrize("stop", [5, 10, 20])
@pytest.mark.parametrize("kill", [True, False])
def test_ids_and_predictions_match_after_a_kill_and_a_resume(
    tmp_path: Path, form: str, stop: int, kill: bool
) -> None:
    ranges: list[CommittedRange] = []
    write(tmp_path, form, stop, ranges, kill=kill)
    if not ranges:
        return  # a shard that was not sealed: the run starts over
    assert damaged(tmp_path, ranges) == []
    write(tmp_path, form, 23, ranges, kill=False)
    assert damaged(tmp_path, ranges) == []
    assert (tmp_path / "ids.txt").read_text().splitlines() == IDS
    if form == "npy":
        found = np.load(tmp_path / "predictions.npy")
    else:
        shards = sorted(tmp_path.glob("*.safetensors"))
        found = np.concatenate([load_file(shard)["prediction"].numpy() for shard in shards])
    assert found.tolist() == list(range(23))


def test_a_changed_id_is_found_by_verify(tmp_path: Path, form: str) -> None:
    ranges: list[CommittedRange] = []
    write(tmp_path, form, 23, ranges, kill=False)
    text = (tmp_path / "ids.txt").read_text()
    (tmp_path / "ids.txt").write_text(text.replace("sample 12", "sample 21"))
    assert damaged(tmp_path, ranges) == ["ids.txt"]


def test_a_run_that_is_interrupted_and_resumed_keeps_the_ids(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"key {i},{i}" for i in range(ROWS)]
    (tmp_path / "t.csv").write_text("k,a\n" + "\n".join(lines) + "\n")
    monkeypatch.setattr("gradrun.inference.timed_loop._CALLBACK_NS", 0)

    def stop(progress: Progress) -> None:
        if progress.done >= 120:
            raise KeyboardInterrupt

    with pytest.raises(gradrun.GradrunError):
        run(tmp_path / "out", form, records(tmp_path / "t.csv"), progress=stop)
    result = run(tmp_path / "out", form, records(tmp_path / "t.csv"), resume=True)
    assert 0 < result.resumed_at < ROWS
    assert ids_of(tmp_path / "out", form) == [f"key {i}" for i in range(ROWS)]
    assert "ids.txt" in result.files
    assert not gradrun.verify(tmp_path / "out").damaged


# --- folders that other tools read ---------------------------------------------------------------


def test_the_folder_of_parquet_predictions_is_a_dataset_for_other_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_writer, "LEAST_ROWS", 64)
    frame = pandas.DataFrame({"k": range(ROWS), "a": np.arange(float(ROWS))})
    frame.to_csv(tmp_path / "t.csv", index=False)
    result = run(tmp_path / "out", "parquet", records(tmp_path / "t.csv"))
    assert len(result.files) > 1
    folder = tmp_path / "out" / "predictions"
    found = pandas.read_parquet(folder)
    assert found["id"].tolist() == frame["k"].tolist()
    assert np.array_equal(np.stack(found["prediction"])[:, 0], frame["a"])
    dataset = pyarrow.dataset.dataset(folder, format="parquet")
    assert dataset.count_rows() == ROWS
    assert dataset.to_table()["id"].to_pylist() == frame["k"].tolist()
    merged = frame.merge(found, left_on="k", right_on="id", validate="one_to_one")
    assert len(merged) == ROWS


def test_an_overwrite_replaces_the_folder_of_parquet_predictions(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("k,a\n1,1\n2,2\n")
    run(tmp_path / "out", "parquet", records(tmp_path / "t.csv"))
    run(tmp_path / "out", "npy", records(tmp_path / "t.csv"), overwrite=True)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"predictions.npy", "ids.txt", "journal.jsonl", "result.json"}
