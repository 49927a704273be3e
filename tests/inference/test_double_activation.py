"""The warning about softmax or sigmoid over a model that returns probabilities already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradrun
from gradrun.results.result import InferResult

LOGITS = np.random.default_rng(0).normal(0, 3, (12, 3)).astype(np.float32)
SOFTMAX = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
SIGMOID = 1 / (1 + np.exp(-LOGITS))


def run(folder: Path, outputs: np.ndarray[Any, Any], transform: Any) -> InferResult:
    """Run a model that returns the given outputs."""
    np.save(folder / "x.npy", outputs)
    return gradrun.infer(
        {
            "model": {"source": "layers", "layers": ["Identity"]},
            "data": {"source": "arrays", "path": str(folder / "x.npy"), "batch_size": 4},
            "run": {"warmup": 0},
            "measure": {"memory": False},
            "output": {"path": str(folder / "out"), "transform": transform},
        }
    )


def warned(result: InferResult) -> list[str]:
    return [w.text for w in result.warnings if w.code == "double_activation"]


@pytest.mark.parametrize(
    ("outputs", "transform", "activation"),
    [
        (SOFTMAX, "softmax", "softmax"),
        (SOFTMAX, "classify", "softmax"),
        (SOFTMAX, ["softmax", "topk"], "softmax"),
        (SOFTMAX.astype(np.float16), "softmax", "softmax"),
        (SIGMOID, "sigmoid", "sigmoid"),
        (SIGMOID, ["sigmoid", "threshold"], "sigmoid"),
        (SIGMOID[:, 0], "sigmoid", "sigmoid"),
        (LOGITS, ["softmax", "classify"], "softmax"),
        (np.stack([SOFTMAX] * 5, 2)[..., None], "softmax", "softmax"),
    ],
)
def test_probabilities_before_an_activation_give_a_warning(
    tmp_path: Path, outputs: np.ndarray[Any, Any], transform: Any, activation: str
) -> None:
    if "topk" in transform:
        outputs = np.concatenate([outputs, np.zeros((12, 2), np.float32)], 1)
    (text,) = warned(run(tmp_path, outputs, transform))

    assert f"before {activation} are all within 0 to 1" in text
    assert "probabilities already" in text
    assert "output.transform: none" in text


@pytest.mark.parametrize(
    ("outputs", "transform"),
    [
        (LOGITS, "softmax"),
        (LOGITS, "classify"),
        (LOGITS, "sigmoid"),
        (LOGITS[:, 0], ["sigmoid", "threshold"]),
        (SOFTMAX, "none"),
        (SOFTMAX, "argmax"),
        (np.abs(LOGITS), "sigmoid"),
        (np.zeros((12, 3), np.float32), "sigmoid"),
        (SIGMOID * 0.9, "softmax"),
    ],
)
def test_logits_and_outputs_without_an_activation_give_no_warning(
    tmp_path: Path, outputs: np.ndarray[Any, Any], transform: Any
) -> None:
    assert warned(run(tmp_path, outputs, transform)) == []


def test_logits_that_leave_the_range_in_the_last_full_batch_give_no_warning(tmp_path: Path) -> None:
    outputs = np.concatenate([SIGMOID[:8], LOGITS[8:], SIGMOID[:1]])

    assert warned(run(tmp_path, outputs, "sigmoid")) == []
