"""Runs whose outputs are not one row of fixed shape: detectors, texts, the user's own function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

import gradrun
from gradrun.core.errors import ConfigError
from tests.support.engines import InlineEngines

NET = """
import torch
from torch import nn

class Detector(nn.Module):
    class_names = ("background", "cat", "dog")

    def forward(self, rows):
        found = []
        for row in rows:
            if row[0] > 7.5:
                raise ValueError("no features")
            count = int(row[0]) % 4
            boxes = row[None, :] * torch.arange(1.0, count + 1)[:, None]
            scores = boxes[:, 1] / (row[0] - 5)
            found.append({"boxes": boxes, "labels": torch.arange(count) % 3, "scores": scores})
        return found

class Texts(nn.Module):
    def forward(self, rows):
        return [f"sum {row.sum():.0f}" for row in rows]

class Scores(nn.Module):
    def forward(self, rows):
        return rows * 2
"""
POST = """
from helper import NAMES

def decode(scores):
    if (scores[:, 0] == 6).any():
        raise KeyError("six")
    return {
        "text": [NAMES[int(row[0]) // 2 % 3] for row in scores],
        "over": [row[row > 3] for row in scores],
        "total": scores.sum(1),
    }

def short(scores):
    return ["x"]

number = 3
"""
SAMPLES, BATCH = 11, 4


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "post.py").write_text(POST)
    (tmp_path / "helper.py").write_text('NAMES = ["a", "b", "c"]\n')
    rows = np.stack([np.arange(SAMPLES), np.linspace(0, 1, SAMPLES)], 1).astype(np.float32)
    rows[rows[:, 0] > 7, 0] -= 8
    rows[5, 0] = 4
    np.save(tmp_path / "rows.npy", rows)
    return {
        "model": {"source": "python", "target": f"{tmp_path}/net.py:Detector"},
        "data": {"source": "arrays", "path": f"{tmp_path}/rows.npy", "batch_size": BATCH},
        "run": {"warmup": 0},
        "output": {"path": f"{tmp_path}/out", "format": "jsonl"},
    }


def rows_in(folder: Path) -> np.ndarray[Any, Any]:
    return np.load(folder / "rows.npy")  # type: ignore[no-any-return]


def detections(row: np.ndarray[Any, Any]) -> dict[str, Any]:
    """What the detector returns for a sample, by NumPy."""
    count = int(row[0]) % 4
    boxes = row[None, :] * np.arange(1, count + 1, dtype=np.float32)[:, None]
    numbers = [n % 3 for n in range(count)]
    return {
        "boxes": boxes.tolist(),
        "labels": numbers,
        "scores": (boxes[:, 1] / (row[0] - np.float32(5))).tolist(),
        "label_names": [("background", "cat", "dog")[n] for n in numbers],
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").open()]


def plain(value: Any) -> Any:
    """Return nested arrays of pandas as lists."""
    return [plain(item) for item in value] if isinstance(value, list | np.ndarray) else value


def test_the_boxes_of_a_detector_are_written_to_jsonl_and_parquet(
    config: dict[str, Any], tmp_path: Path
) -> None:
    result = gradrun.infer(config, trust_code=True)
    expected = [{"id": i, **detections(row)} for i, row in enumerate(rows_in(tmp_path))]
    assert lines(tmp_path / "out") == expected
    stated = {one.topic: one.text for one in result.interpretation}
    assert stated["output boxes"] == "float32 with 2 dimensions, one per sample"
    assert not [w for w in result.warnings if w.code == "batch_dependent"]
    config["output"] |= {"path": f"{tmp_path}/table", "format": "parquet"}
    gradrun.infer(config, trust_code=True)
    table = pandas.read_parquet(tmp_path / "table" / "predictions")
    assert [{k: plain(v) for k, v in row.items()} for row in table.to_dict("records")] == expected
    assert gradrun.verify(tmp_path / "table").damaged == ()


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_values_are_the_same_with_workers(
    config: dict[str, Any], tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["output"]["format"] = form
    gradrun.infer(config, trust_code=True)
    InlineEngines(monkeypatch)
    config |= {"output": {"path": f"{tmp_path}/spread", "format": form}}
    config["engine"] = {"source": "processes", "workers": 2}
    gradrun.infer(config, trust_code=True)
    for one in (tmp_path / "out").rglob("predictions*"):
        if one.is_file():
            other = tmp_path / "spread" / one.relative_to(tmp_path / "out")
            assert one.read_bytes() == other.read_bytes()


def test_nan_in_values_and_failing_samples_are_quarantined(
    config: dict[str, Any], tmp_path: Path
) -> None:
    rows = rows_in(tmp_path)
    rows[5] = (5, 0.5)  # a division by 0
    rows[9, 0] = 8
    np.save(tmp_path / "rows.npy", rows)
    config["run"] |= {"on_error": "quarantine", "on_nonfinite": "quarantine"}
    result = gradrun.infer(config, trust_code=True)
    assert result.quarantined == 2
    written = lines(tmp_path / "out")
    for i, row in enumerate(rows):
        missing = dict.fromkeys(("boxes", "labels", "scores", "label_names"))
        assert written[i] == {"id": i, **(missing if i in (5, 9) else detections(row))}


def test_a_model_may_return_texts(config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["target"] = f"{tmp_path}/net.py:Texts"
    config["output"]["format"] = "csv"
    gradrun.infer(config, trust_code=True)
    table = pandas.read_csv(tmp_path / "out" / "predictions.csv")
    sums = rows_in(tmp_path).sum(1)
    assert table["prediction"].tolist() == [f"sum {total:.0f}" for total in sums]
    config["output"] |= {"path": f"{tmp_path}/npy", "format": "npy"}
    with pytest.raises(ConfigError, match=r"npy cannot store .* jsonl or parquet or csv"):
        gradrun.infer(config, trust_code=True)
    assert not (tmp_path / "npy").exists()


# --- output.transform: FILE.py:FUNCTION -----------------------------------------------------------


@pytest.fixture
def decoding(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    config["model"]["target"] = f"{tmp_path}/net.py:Scores"
    config["output"]["transform"] = f"{tmp_path}/post.py:decode"
    return config


def test_a_function_of_the_user_decodes_outputs_and_failing_samples_are_isolated(
    decoding: dict[str, Any], tmp_path: Path
) -> None:
    rows = rows_in(tmp_path)
    with pytest.raises(ConfigError, match=r"post\.py:decode failed: KeyError: 'six' .*on_error"):
        gradrun.infer(decoding, trust_code=True)
    decoding["run"]["on_error"] = "quarantine"
    result = gradrun.infer(decoding, trust_code=True)
    assert result.quarantined == 1
    for i, (line, row) in enumerate(zip(lines(tmp_path / "out"), rows * 2, strict=True)):
        if row[0] == 6:
            assert line == {"id": i, "text": None, "over": None, "total": None}
            continue
        assert line["text"] == "abc"[int(row[0]) // 2 % 3]
        assert line["over"] == row[row > 3].tolist()
        assert line["total"] == pytest.approx(float(row.sum()))


def test_a_changed_function_does_not_continue_a_run(
    decoding: dict[str, Any], tmp_path: Path
) -> None:
    decoding["run"]["on_error"] = "quarantine"
    gradrun.infer(decoding, trust_code=True)
    (tmp_path / "helper.py").write_text('NAMES = ["x", "b", "c"]\n')
    with pytest.raises(ConfigError, match=r"helper\.py changed"):
        gradrun.infer(decoding, trust_code=True, resume=True)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ("post.py:decod", "has no function 'decod'; did you mean decode"),
        ("post.py:number", "has no function 'number'"),
        ("post.py:short", "the output of post.py:short is a list of 1 items for a batch of 4"),
        (["softmax", "post.py:decode"], "must be the first transform"),
        ({"x": "post.py:decode"}, "must be the first transform"),
        ("softmx", "did you mean softmax"),
        ("none.py:decode", "does not exist"),
    ],
)
def test_a_wrong_function_is_refused(
    decoding: dict[str, Any], tmp_path: Path, transform: Any, words: str
) -> None:
    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: absolute(one) for name, one in value.items()}
        if isinstance(value, list):
            return [absolute(one) for one in value]
        return f"{tmp_path}/{value}" if ":" in value else value

    decoding["output"]["transform"] = absolute(transform)
    with pytest.raises(ConfigError, match=words):
        gradrun.infer(decoding, trust_code=True)
    assert not (tmp_path / "out").exists()


def test_a_function_needs_trust(decoding: dict[str, Any], tmp_path: Path) -> None:
    decoding["model"] = {"source": "layers", "layers": ["Identity"]}
    (tmp_path / "post.py").write_text("open('ran', 'w')")
    with pytest.raises(ConfigError, match="--trust-code"):
        gradrun.infer(decoding)
    assert not Path("ran").exists()


def test_transforms_of_tensors_and_metrics_refuse_values(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["output"]["transform"] = "softmax"
    with pytest.raises(ConfigError, match="output 'boxes' has one value per sample"):
        gradrun.infer(config, trust_code=True)
    config["output"]["transform"] = {"scores": "softmax"}
    with pytest.raises(ConfigError, match="output 'scores' has one value per sample"):
        gradrun.infer(config, trust_code=True)
