"""Warnings about classes in another order, or in another dimension, than the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import gradrun
from gradrun.cli.app import app

SIZE, EACH = 6, 20
TRUE = np.repeat(np.arange(SIZE), EACH)
NAMES = ["zero", "one", "two", "three", "four", "five"]


def run(folder: Path, predicted: np.ndarray, labels: np.ndarray = TRUE, **changes: Any) -> Any:
    """Run a model that returns its inputs, which are scores of the classes `predicted`."""
    np.save(folder / "x.npy", np.eye(SIZE, dtype=np.float32)[predicted])
    np.save(folder / "y.npy", labels)
    return gradrun.infer(
        {
            "model": {"source": "layers", "layers": ["Identity"]},
            "data": {
                "source": "arrays",
                "path": str(folder / "x.npy"),
                "labels": {"path": str(folder / "y.npy")},
                "classes": NAMES,
                "batch_size": 7,
            },
            "metrics": ["accuracy"],
            "measure": {"memory": False},
            "output": {"path": str(folder / "out")},
            **changes,
        },
        resume=True,
    )


def order_warnings(result: Any) -> list[str]:
    return [warning.text for warning in result.warnings if warning.code == "class_order"]


@pytest.mark.parametrize("metric", ["accuracy", "auroc", "confusion_matrix"])
def test_two_exchanged_classes_are_named_with_their_shares(tmp_path: Path, metric: str) -> None:
    predicted = TRUE.copy()
    predicted[TRUE == 4], predicted[TRUE == 5] = 5, 4
    predicted[(TRUE == 5).nonzero()[0][:3]] = 5  # 17 of 20
    (text,) = order_warnings(run(tmp_path, predicted, metrics=[metric]))
    assert text.startswith("2 classes are predicted as one another: four as five (100%), ")
    assert "five as four (85%);" in text
    assert "data.classes" in text


def test_a_permutation_of_all_classes_is_found_in_the_predictions_of_several_chunks(
    tmp_path: Path,
) -> None:
    (text,) = order_warnings(run(tmp_path, (TRUE + 1) % SIZE, output={"path": str(tmp_path / "o")}))
    assert "6 classes are predicted as one another: zero as one (100%), one as two" in text
    assert "three as four (100%), ...;" in text


def test_confusions_that_are_no_permutation_are_no_warning(tmp_path: Path) -> None:
    predicted = TRUE.copy()
    predicted[TRUE == 4] = 5  # all fours as fives, and fives as fives
    predicted[TRUE == 0] = 1
    predicted[TRUE == 1] = 2
    assert order_warnings(run(tmp_path, predicted)) == []


def test_few_samples_of_a_class_are_no_evidence(tmp_path: Path) -> None:
    few = np.array([0, 1, 4, 4, 4, 4, 5, 5, 5, 5])
    predicted = np.array([0, 1, 5, 5, 5, 5, 4, 4, 4, 4])
    assert order_warnings(run(tmp_path, predicted, few)) == []


def test_a_corrected_order_of_names_removes_the_warning_of_the_finished_run(
    tmp_path: Path,
) -> None:
    predicted = np.where(TRUE == 4, 5, np.where(TRUE == 5, 4, TRUE))
    assert len(order_warnings(run(tmp_path, predicted))) == 1
    again = run(tmp_path, predicted, metrics=["f1"])
    assert len(order_warnings(again)) == 1
    exchanged = np.where(TRUE == 4, 5, np.where(TRUE == 5, 4, TRUE))
    other = run(tmp_path, predicted, exchanged, output={"path": str(tmp_path / "other")})
    assert order_warnings(other) == []
    assert other.metrics[0].value == 1


TAGGER = """
import torch

class Tagger(torch.nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        self.body, self.head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 10)
        self.transposed = transposed

    def forward(self, x):
        scores = self.head(self.body(x))
        return scores.mT if self.transposed else scores
"""


@pytest.mark.parametrize(
    ("transposed", "dim", "warned"),
    [(False, 2, 0), (False, 1, 2), (True, 1, 0), (True, 2, 1)],
)
def test_a_class_dimension_that_the_last_layer_contradicts_is_a_warning(
    tmp_path: Path, transposed: bool, dim: int, warned: int
) -> None:
    (tmp_path / "net.py").write_text(TAGGER)
    result = gradrun.infer(
        {
            "model": {
                "source": "python",
                "target": f"{tmp_path}/net.py:Tagger",
                "args": {"transposed": transposed},
            },
            "data": {"source": "synthetic", "inputs": {"x": {"shape": [8, 3]}}, "samples": 4},
            "output": {"path": str(tmp_path / "out"), "transform": "argmax", "dim": dim},
            "measure": {"memory": False},
        },
        trust_code=True,
    )
    texts = [w.text for w in result.warnings if w.code == "class_dimension"]
    assert len(texts) == (warned > 0)
    if warned:
        assert f"dimension {dim} with 8 values" in texts[0]
        assert "last layer, head, has 10 outputs" in texts[0]
        assert f"set output.dim: {warned}" in texts[0]


def test_validate_explains_the_doubts_about_a_config(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 64), np.float32))
    (tmp_path / "c.yaml").write_text(
        "model: {source: zoo, name: mlp}\ndata: {source: arrays, path: x.npy}\n"
        "output: {path: out}\n"
    )
    shown = CliRunner().invoke(app, ["validate", "--explain", str(tmp_path / "c.yaml")])
    assert shown.exit_code == 0
    assert "! weights: random (seed 0), so the predictions are not" in shown.output
