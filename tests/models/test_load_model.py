"""Tests of what all model sources share: weights, dtype, memory format and mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradrun.config.model import PythonModel
from gradrun.models import load_model
from tests.support.loading import load

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

NAMED = """
import numpy
from torch import nn

class Net(nn.Identity):
    class_names = {}

class Raises(nn.Identity):
    @property
    def class_names(self):
        raise ValueError("not now")
"""

EAGER: dict[str, Callable[[Path], dict[str, Any]]] = {
    "zoo": lambda _: {"name": "digits_cnn"},
    "layers": lambda _: {"layers": [{"Conv2d": [1, 2, 3]}, {"Dropout": 0.5}]},
    "python": lambda folder: {"target": f"{folder / 'mine.py'}:ready"},
    "torchscript": lambda folder: {"path": folder / "m.pt"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model as Python code and as TorchScript."""
    net = "nn.Sequential(nn.Linear(4, 2), nn.Dropout())"
    (tmp_path / "mine.py").write_text(f"from torch import nn\n\nready = {net}\n")
    module = nn.Sequential(nn.Linear(4, 2), nn.Dropout())
    torch.jit.save(torch.jit.script(module), tmp_path / "m.pt")
    return tmp_path


@pytest.mark.parametrize("source", EAGER)
def test_dtype_and_training_mode_apply_to_every_eager_source(folder: Path, source: str) -> None:
    keys = EAGER[source](folder)
    for training in (False, True):
        module = load(source, **keys, dtype="bfloat16", training=training, trust_code=True)
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert all(part.training is training for part in module.modules())
    module = load(source, **keys, trust_code=True)
    assert not any(part.training for part in module.modules()), "eval() is the default"


def test_channels_last_changes_the_layout_of_the_weights() -> None:
    weight = load("zoo", name="digits_cnn", channels_last=True).get_parameter("stage2.0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


@pytest.mark.parametrize("source", ["zoo", "layers", "python"])
def test_weights_from_a_file_are_loaded_by_every_source_that_builds_a_model(
    folder: Path, source: str
) -> None:
    keys = EAGER[source](folder)
    state = load(source, **keys, trust_code=True).state_dict()
    state = {n: t + 1 if t.is_floating_point() else t.clone() for n, t in state.items()}
    save_file(state, folder / "w.safetensors")
    torch.save({"ema": state}, folder / "w.pt")
    for weights in (
        {"weights": folder / "w.safetensors"},
        {"weights": folder / "w.pt", "weights_key": "ema"},
    ):
        loaded = load(source, **keys, **weights, trust_code=True).state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ("['cat', 'dog']", ("cat", "dog")),
        ("('cat', 'dog')", ("cat", "dog")),
        ("{0: 'cat', 1: 'dog'}", ("cat", "dog")),
        ("{1: 'dog', 0: 'cat'}", ("cat", "dog")),
        ("{'1': 'dog', '0': 'cat'}", ("cat", "dog")),
        ("{'dog': 1, 'cat': 0}", ("cat", "dog")),
        ("numpy.array(['cat', 'dog'])", ("cat", "dog")),
        ("None", ()),
        ("7", ()),
        ("'cat'", ()),
        ("{}", ()),
        ("[]", ()),
        ("[1, 2]", ()),
        ("[None]", ()),
        ("{'cat', 'dog'}", ()),
        ("{1: 'cat', 2: 'dog'}", ()),
        ("{'cat': 'Katze'}", ()),
        ("{'cat': 0, 'dog': 0}", ()),
        ("{0: None, 1: 'dog'}", ()),
        ("lambda: ['cat']", ()),
    ],
)
def test_class_names_of_a_model_are_a_list_or_a_mapping_with_indices(
    tmp_path: Path, names: str, classes: tuple[str, ...]
) -> None:
    (tmp_path / "mine.py").write_text(NAMED.replace("{}", names))
    assert load_named(tmp_path, "Net") == classes


def test_a_property_class_names_that_fails_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NAMED)
    assert load_named(tmp_path, "Raises") == ()


def load_named(folder: Path, name: str) -> tuple[str, ...]:
    config = PythonModel(source="python", target=f"{folder / 'mine.py'}:{name}")
    return load_model(config, torch.device("cpu"), trust_code=True).classes
