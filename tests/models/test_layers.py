"""Tests of the source `layers`: torch.nn layers by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.loading import X, load, load_error


def test_layers_are_built_in_order_with_their_arguments() -> None:
    module = load(
        "layers",
        layers=[{"Linear": [4, 8]}, "ReLU", {"BatchNorm1d": 8}, {"Linear": {"in_features": 8,
                "out_features": 2, "bias": False}}],
    )  # fmt: skip
    assert [str(layer) for layer in module] == [
        "Linear(in_features=4, out_features=8, bias=True)",
        "ReLU()",
        str(nn.BatchNorm1d(8)),
        "Linear(in_features=8, out_features=2, bias=False)",
    ]
    assert module(X).shape == (5, 2)


@pytest.mark.parametrize("weights", [False, True])
def test_lazy_layers_take_their_size_from_the_data(tmp_path: Path, weights: bool) -> None:
    state = {"0.weight": torch.ones(3, 4), "0.bias": torch.zeros(3)}
    save_file(state, tmp_path / "w.safetensors")
    file = {"weights": tmp_path / "w.safetensors"} if weights else {}
    module = load("layers", layers=[{"LazyLinear": 3}], **file)
    assert module(X).shape == (5, 3)
    assert module[0].weight.shape == (3, 4)
    assert not weights or torch.equal(module[0].weight, state["0.weight"])


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("Relu", "no layer 'Relu'; did you mean ReLU"),
        ("functional", "no layer 'functional'"),
        ("__builtins__", "no layer"),
        ("os.system", "no layer"),
        ({"Linear": [4]}, "nn.Linear does not accept [4]"),
        ({"Linear": {"in": 4}}, "nn.Linear does not accept"),
        ({"Linear": ["a", "b"]}, "nn.Linear does not accept"),
        ({"Linear": [2**20, 2**22]}, "of weights, but only"),
    ],
)
def test_a_layer_that_cannot_be_built_is_an_error_at_its_key(layer: Any, words: str) -> None:
    error = load_error("layers", layers=["ReLU", layer])
    assert words in str(error)
    assert error.key == ("model.layers" if "of weights" in words else "model.layers.1")
