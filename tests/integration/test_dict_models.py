"""Models that take one dict of inputs, and classes of transformers that are not supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradrun
from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError

NET = """
from torch import nn

class Net(nn.Module):
    def forward(self, batch):
        sums = batch["x"].sum(1) + 10 * batch["y"]
        return {"sums": sums, "parts": [{"x": batch["x"]}, batch["y"]]}
"""


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "net.py").write_text(NET)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.random((5, 3)), y=rng.random(5))
    return {
        "model": {"source": "python", "target": f"{tmp_path}/net.py:Net"},
        "data": {
            "source": "arrays",
            "path": str(tmp_path / "d.npz"),
            "inputs": {"x": {"key": "x"}, "y": {"key": "y"}},
            "batch_size": 2,
        },
        "run": {"warmup": 0},
        "output": {"path": str(tmp_path / "out")},
    }


def test_a_model_takes_all_inputs_in_one_dict_and_returns_nested_outputs(
    config: dict[str, Any], tmp_path: Path
) -> None:
    gradrun.infer(config, trust_code=True, **{"data.call": "dict"})
    data = np.load(tmp_path / "d.npz")
    expected = {
        "sums": data["x"].sum(1) + 10 * data["y"],
        "parts.0.x": data["x"],
        "parts.1": data["y"],
    }
    for name, rows in expected.items():
        assert np.allclose(np.load(tmp_path / "out" / f"predictions.{name}.npy"), rows)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("inputs", [["x"], ["x", "y"]])
def test_the_error_of_a_model_that_expects_a_dict_names_the_key(
    config: dict[str, Any], inputs: list[str]
) -> None:
    config["data"]["inputs"] = {name: {"key": name} for name in inputs}
    with pytest.raises(ConfigError, match=r"data\.call: dict passes all inputs as one dict"):
        gradrun.infer(config, trust_code=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("AutoModelForSeq2SeqLM", "AutoModelForSeq2SeqLM needs model.generate"),
        ("AutoModelForSpeechSeq2Seq", "AutoModelForTextEncoding runs the encoder alone"),
        ("AutoModelForImageTextToText", "it generates text from images"),
        ("AutoModelForObjectDetection", "write a python target that returns this model"),
        ("AutoModelForCausalML", "did you mean AutoModelForCausalLM"),
        ("AutoModelForSequenceClasification", "did you mean AutoModelForSequenceClassification"),
    ],
)
def test_a_class_of_transformers_is_suggested_for_typing_errors_only(
    config: dict[str, Any], tmp_path: Path, name: str, words: str
) -> None:
    config["model"] = {"source": "huggingface", "path": str(tmp_path), "auto_class": name}
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert words in str(caught.value)
    assert ("did you mean" in str(caught.value)) == ("did you mean" in words)
    assert "AutoModelForTextEncoding" in str(caught.value)
