"""Results and reports state where the weights come from, and warn if they are random."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradrun
from gradrun.report import render
from gradrun.results.result import InferResult, RunResult

NET = """
import torch
from torch import nn

class Net(nn.Linear):
    def __init__(self, file=None):
        super().__init__(4, 2)
        if file:
            self.load_state_dict(torch.load(file), strict=False)

class Twice(nn.Module):
    def forward(self, x):
        return 2 * x
"""
SYNTHETIC = {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 8}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    (tmp_path / "net.py").write_text(NET)
    np.save(tmp_path / "x.npy", np.ones((8, 4), np.float32))

    def infer(model: dict[str, Any], data: dict[str, Any] | None = None) -> InferResult:
        if target := model.get("target"):
            model = model | {"source": "python", "target": f"{tmp_path}/net.py:{target}"}
        else:
            model = {"source": "layers", "layers": [{"Linear": [4, 2]}]} | model
        return gradrun.infer(
            {
                "model": model,
                "data": data or {"source": "arrays", "path": str(tmp_path / "x.npy")},
                "run": {"warmup": 0, "seed": 3},
                "output": {"path": str(tmp_path / "out")},
            },
            trust_code=True,
            overwrite=True,
        )

    return infer


def weights(result: InferResult) -> list[str]:
    return [one.text for one in result.interpretation if one.topic == "weights"]


def random_warnings(result: InferResult) -> list[str]:
    return [warning.text for warning in result.warnings if warning.code == "random_weights"]


def test_random_weights_over_real_data_are_stated_and_warned_of(run: Any, tmp_path: Path) -> None:
    result = run({})
    assert weights(result) == ["random (seed 3)"]
    (warning,) = random_warnings(result)
    assert "random (seed 3)" in warning
    assert "set model.weights to a file" in warning
    saved = RunResult.load(tmp_path / "out")
    assert isinstance(saved, InferResult)
    assert weights(saved) == ["random (seed 3)"]
    for form in ("table", "html"):
        text = render([("out", saved)], form)
        assert text.count("random (seed 3)") == 2, "in the table and in the warning"


def test_random_weights_over_synthetic_data_are_stated_only(run: Any) -> None:
    result = run({}, SYNTHETIC)
    assert weights(result) == ["random (seed 3)"]
    assert random_warnings(result) == []


def test_a_file_of_weights_is_stated_with_its_hash(run: Any, tmp_path: Path) -> None:
    torch.save({"module.0." + k: v for k, v in nn.Linear(4, 2).state_dict().items()}, "w.pt")
    digest = hashlib.sha256(Path("w.pt").read_bytes()).hexdigest()[:8]
    result = run({"weights": "w.pt"})
    assert weights(result) == [f"w.pt (sha256 {digest})", "prefix 'module.' removed from all keys"]
    assert random_warnings(result) == []


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (None, "made by net.py:Net; random (seed 3)"),
        (["weight", "bias"], "made by net.py:Net"),
        (["weight"], "made by net.py:Net; 1 of 2 tensors random (seed 3): bias"),
    ],
)
def test_weights_that_the_users_code_sets_are_stated_with_its_name(
    run: Any, keys: list[str] | None, text: str
) -> None:
    torch.save(
        {key: value for key, value in nn.Linear(4, 2).state_dict().items() if key in (keys or ())},
        "own.pt",
    )
    result = run({"target": "Net", "args": {"file": "own.pt"} if keys else {}})
    assert weights(result) == [text]
    assert bool(random_warnings(result)) == ("random" in text)


def test_a_model_without_parameters_has_no_random_weights(run: Any) -> None:
    assert weights(run({"layers": ["Flatten"]})) == ["none (the model has no parameters)"]
    result = run({"target": "Twice"})
    assert weights(result) == ["none (the model has no parameters)"]
    assert random_warnings(result) == []
