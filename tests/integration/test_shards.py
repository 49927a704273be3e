"""Corpora in shards, as a user runs them: checked against plain loops, and resumed."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import yaml

import gradrun
from gradrun.core.errors import ConfigError, RunFailed
from tests.conftest import Command
from tests.support.small_models import save_bert, skewed

TEXTS = skewed(90)
IDS = [f"doc-{number}" for number in range(len(TEXTS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 4 .jsonl.gz shards and 3 .parquet shards of the same texts."""
    folder = tmp_path_factory.mktemp("corpus")
    save_bert(folder / "bert")
    table = pandas.DataFrame({"key": IDS, "body": TEXTS})
    for form, bounds in {"jsonl.gz": [0, 40, 41, 70, 90], "parquet": [0, 13, 50, 90]}.items():
        (folder / form).mkdir()
        for number, (start, stop) in enumerate(itertools.pairwise(bounds), 8):
            part, path = table[start:stop], folder / form / f"part-{number}.{form}"
            if form == "parquet":
                part.to_parquet(path)
            else:
                lines = [json.dumps(row) for row in part.to_dict("records")]
                path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


@pytest.fixture(scope="module")
def embeddings(folder: Path) -> np.ndarray[Any, Any]:
    """The mean of the last hidden state of each text, in a plain loop."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    model = AutoModel.from_pretrained(folder / "bert").eval()
    with torch.inference_mode():
        rows = [model(**tokenizer(text, return_tensors="pt"))[0][0].mean(0) for text in TEXTS]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("form", ["jsonl.gz", "parquet"])
def test_shards_of_texts_are_embedded_to_parquet_with_ids(
    folder: Path, embeddings: np.ndarray[Any, Any], tmp_path: Path, form: str, cli: Command
) -> None:
    config = {
        "model": {"source": "huggingface", "path": str(folder / "bert")},
        "data": {
            "source": "text",
            "path": str(folder / form / "part-*"),
            "field": "body",
            "id": "key",
            "batch_size": 8,
        },
        "output": {
            "path": "out",
            "format": "parquet",
            "select": "last_hidden_state",
            "transform": "mean_pool",
        },
        "measure": {"memory": False},
    }
    path = tmp_path / "embed.yaml"
    path.write_text(yaml.safe_dump(config))
    answer = cli("infer", path)
    assert answer.code == 0
    files = 4 if form == "jsonl.gz" else 3
    assert f"{files} files, {form}, 90 rows, first part-8.{form}" in " ".join(answer.out.split())
    table = pandas.read_parquet(tmp_path / "out" / "predictions")
    assert table["id"].tolist() == IDS
    found = np.stack(table["prediction"].tolist())
    np.testing.assert_allclose(found, embeddings, rtol=1e-4, atol=1e-5)


NET = """
import torch
from pathlib import Path

class Net(torch.nn.Module):
    def forward(self, x):
        if x[0, 0] == 12 and Path(__file__).with_name("stop").exists():
            raise ValueError("stopped")
        return x * 2
"""


def config(folder: Path, form: str) -> dict[str, Any]:
    """Write 5 shards of 4 rows; the model stops at row 12 while there is a file "stop"."""
    (folder / "net.py").write_text(NET)
    (folder / "stop").touch()
    (folder / "shards").mkdir()
    for number in range(5):
        rows = pandas.DataFrame({"a": np.arange(4) + 4 * number})
        path = folder / "shards" / f"{number}.{form}"
        match form:
            case "parquet":
                rows.to_parquet(path)
            case "npy":
                np.save(path, rows.to_numpy(np.float32))
            case _:
                rows.to_csv(path, index=False)
    data = {"source": "records", "inputs": {"x": {"columns": ["a"]}}}
    data = {"source": "arrays"} if form == "npy" else data
    return {
        "model": {"source": "python", "target": str(folder / "net.py") + ":Net"},
        "data": data | {"path": str(folder / "shards"), "batch_size": 4},
        "run": {"warmup": 0},
        "measure": {"memory": False},
        "output": {"path": str(folder / "out")},
    }


def stop_and_change(folder: Path, form: str, shard: int) -> dict[str, Any]:
    """Stop a run after 3 shards, and write a shard again with another value."""
    given = config(folder, form)
    with pytest.raises(RunFailed):
        gradrun.infer(given, trust_code=True)
    (folder / "stop").unlink()
    path, rows = folder / "shards" / f"{shard}.{form}", pandas.DataFrame({"a": [0, 7, 8, 9]})
    match form:
        case "parquet":
            rows.to_parquet(path)
        case "npy":
            np.save(path, rows.to_numpy(np.float32))
        case _:
            rows.to_csv(path, index=False)
    os.utime(path, (1, 1))
    return given


@pytest.mark.parametrize("form", ["csv.gz", "parquet", "npy"])
def test_a_resume_after_a_change_of_a_predicted_shard_is_refused(tmp_path: Path, form: str) -> None:
    given = stop_and_change(tmp_path, form, 1)
    expected = "first 12 samples" if form == "csv.gz" else "the files in data.path changed"
    with pytest.raises(ConfigError, match=expected):
        gradrun.infer(given, trust_code=True, resume=True)


def test_a_resume_after_a_change_of_a_later_row_continues(tmp_path: Path) -> None:
    given = stop_and_change(tmp_path, "csv.gz", 4)
    gradrun.infer(given, trust_code=True, resume=True)
    found = np.load(tmp_path / "out" / "predictions.npy")[:, 0]
    assert found.tolist() == [*range(0, 32, 2), 0, 14, 16, 18]


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_a_resume_after_shards_changed_their_order_is_refused(tmp_path: Path, form: str) -> None:
    given = config(tmp_path, form)
    with pytest.raises(RunFailed):
        gradrun.infer(given, trust_code=True)
    (tmp_path / "shards" / f"0.{form}").rename(tmp_path / "shards" / f"9.{form}")
    with pytest.raises(ConfigError, match=r"the files in data\.path changed"):
        gradrun.infer(given, trust_code=True, resume=True)


@pytest.mark.parametrize(
    ("output", "message"),
    [("shards/out", r"is inside of data\.path"), ("", r"contains data\.path")],
)
def test_outputs_and_data_in_one_folder_are_an_error(
    tmp_path: Path, output: str, message: str
) -> None:
    given = config(tmp_path, "npy")
    given["output"] = {"path": str(tmp_path / output)}
    with pytest.raises(ConfigError, match=message):
        gradrun.infer(given, trust_code=True)


def test_an_overwrite_does_not_remove_the_files_of_a_pattern(tmp_path: Path) -> None:
    given = config(tmp_path, "npy")
    (tmp_path / "shards").rename(tmp_path / "predictions")
    np.save(tmp_path / "predictions.npy", np.zeros((4, 1), np.float32))
    given["data"]["path"] = str(tmp_path / "*.npy")
    given["output"] = {"path": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"would remove .*predictions\.npy"):
        gradrun.infer(given, trust_code=True, overwrite=True)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "data.path: has 0 entries; allowed: at least 1"),
        (["a.csv", "absent.csv"], "absent.csv does not exist"),
        ("absent-*.csv", "no file matches"),
        (["a.csv", "a.csv"], "a.csv is listed twice"),
    ],
)
def test_a_path_without_files_is_an_error_of_the_config(
    tmp_path: Path, cli: Command, path: Any, message: str
) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n")
    given = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "records", "path": path, "inputs": {"x": {"columns": ["a"]}}},
        "output": {"path": "out"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(given))
    answer = cli("infer", tmp_path / "c.yaml")
    assert answer.code == 2
    assert message in " ".join(answer.err.split())
    assert "c.yaml:" in answer.err
    assert "is not text" not in answer.err
