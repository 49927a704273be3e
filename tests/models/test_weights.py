"""Weights reach the module that they fit; any other file is refused, and no file runs code."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradrun.core.errors import ConfigError
from gradrun.models.weights import load_weights


def net(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(1)
    module = net()
    module(torch.randn(8, 2))
    return module


def loaded(path: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    module = net()
    load_weights(module, path, key)
    return module.state_dict()


def refused(path: Path, key: str | None = None, width: int = 3) -> ConfigError:
    module = net(width)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_weights(module, path, key)
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before), "nothing was loaded"
    return caught.value


def assert_loaded(state: dict[str, torch.Tensor], trained: nn.Module) -> None:
    expected = trained.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert int(state["1.num_batches_tracked"]) == 1, "buffers come along"


@pytest.mark.parametrize(
    ("nest", "key"),
    [
        (lambda state: state, None),
        (lambda state: OrderedDict(state), None),
        (lambda state: {"state_dict": state, "epoch": 3}, None),
        (lambda state: {"model": state, "optimizer": {"lr": 0.1}}, None),
        (lambda state: {"model_state_dict": state, "loss": 0.5}, None),
        (lambda state: {"ema": state, "model": {}}, "ema"),
        (lambda state: {"runs": {"best": state}}, "runs.best"),
        (lambda state: {"dotted.name": state}, "dotted.name"),
    ],
)
def test_a_state_dict_is_found_bare_nested_or_under_the_key_named(
    tmp_path: Path, trained: nn.Module, nest: Any, key: str | None
) -> None:
    torch.save(nest(trained.state_dict()), tmp_path / "w.pt")
    assert_loaded(loaded(tmp_path / "w.pt", key), trained)


def test_safetensors_are_loaded(tmp_path: Path, trained: nn.Module) -> None:
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    assert_loaded(loaded(tmp_path / "w.safetensors"), trained)


def test_a_checkpoint_of_the_old_format_is_loaded(tmp_path: Path, trained: nn.Module) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert_loaded(loaded(tmp_path / "w.pt"), trained)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_missing_surplus_and_misshapen_keys_are_all_listed(
    tmp_path: Path, trained: nn.Module, suffix: str
) -> None:
    state = trained.state_dict()
    state["head.weight"] = state.pop("2.weight")
    state["0.weight"] = torch.zeros(5, 2)
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    error = refused(path)
    assert error.key == "model.weights"
    for words in (
        "missing in the file: 2.weight",
        "not in the model: head.weight",
        "of another shape: 0.weight [5, 2] (the model has [3, 2])",
    ):
        assert words in str(error)


def test_a_long_list_of_keys_is_cut(tmp_path: Path) -> None:
    torch.save({f"k{i}": torch.zeros(1) for i in range(20)}, tmp_path / "w.pt")
    assert "k7 and 12 more" in str(refused(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("nest", "key", "words"),
    [
        (lambda state: {"ema": state, "epoch": 1}, None, "it holds ema, epoch"),
        (lambda state: {"ema": state}, "best", "no state dict under 'best'; it holds ema"),
        (lambda state: {"ema": state}, "ema.best", "no state dict under 'ema.best'"),
        (lambda state: {"epoch": 3}, None, "no state dict at the top"),
        (lambda state: {}, None, "no state dict at the top"),
        (lambda state: [1, 2], None, "it holds a list"),
        (lambda state: torch.zeros(3), None, "it holds a Tensor"),
        (lambda state: torch.zeros(3), "ema", "it holds a Tensor"),
        (lambda state: 7, "ema", "it holds a int"),
        (lambda state: {"model": {"a": 1}}, "model", "no state dict under 'model'"),
    ],
)
def test_a_checkpoint_without_a_state_dict_says_what_it_holds(
    tmp_path: Path, trained: nn.Module, nest: Any, key: str | None, words: str
) -> None:
    torch.save(nest(trained.state_dict()), tmp_path / "w.pt")
    assert words in str(refused(tmp_path / "w.pt", key))


class _Attack:
    def __init__(self, mark: Path) -> None:
        self.command = f"touch '{mark}'"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_checkpoint_that_unpickles_objects_is_refused_and_runs_nothing(
    tmp_path: Path, trained: nn.Module, form: str
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "w.pt"
    payload = {"state_dict": trained.state_dict(), "config": _Attack(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(_Attack(mark)))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    error = refused(path)
    assert not mark.exists()
    assert "unpickling them could run code" in str(error)
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists(), "the attack would have worked"


def test_a_whole_pickled_module_is_refused(tmp_path: Path, trained: nn.Module) -> None:
    torch.save(trained, tmp_path / "w.pt")
    assert "torch.save(model.state_dict()" in str(refused(tmp_path / "w.pt"))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "head", "tail", "middle"])
def test_a_damaged_file_is_refused(
    tmp_path: Path, trained: nn.Module, suffix: str, damage: str
) -> None:
    path = tmp_path / f"w.{suffix}"
    state = trained.state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"no weights here\n" * 9,
            "head": whole[: len(whole) // 2],
            "tail": whole[len(whole) // 2 :],
            "middle": whole[:20] + b"\xff" * 40 + whole[60:],
        }[damage]
    )
    assert refused(path).key == "model.weights"


def test_weights_are_cast_to_the_type_of_the_module(tmp_path: Path, trained: nn.Module) -> None:
    half = {name: tensor.half() for name, tensor in trained.state_dict().items()}
    torch.save(half, tmp_path / "w.pt")
    state = loaded(tmp_path / "w.pt")
    assert state["0.weight"].dtype == torch.float32
    assert torch.equal(state["0.weight"], half["0.weight"].float())
