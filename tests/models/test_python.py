"""Tests of the source `python`: classes, functions and modules of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradrun
from gradrun.config.model import PythonModel
from gradrun.core.errors import ConfigError
from gradrun.models import load_model
from tests.support.loading import X, load, load_error

MINE = """
import pathlib
from torch import nn

pathlib.Path(__file__).with_name("imported").touch()


class Net(nn.Module):
    def __init__(self, width=3, *, bias=True):
        super().__init__()
        self.linear = nn.Linear(4, width, bias=bias)

    def forward(self, x):
        return self.linear(x)


def build(width=3):
    return Net(width)


class Builder:
    @staticmethod
    def build():
        return nn.ReLU()

    def __call__(self):
        return nn.Tanh()


ready = Net(7)
call_me = Builder()
number = 3


def nothing():
    pass


def broken():
    return 1 / 0


def leaves():
    raise SystemExit(3)
"""

USER_MODULES = {"mine", "beside", "bad", "some_package"}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Python file of the user's; its imports are undone after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    yield path
    for name in [name for name in sys.modules if name.split(".")[0] in USER_MODULES]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "args", "width"),
    [
        ("Net", {}, 3),
        ("Net", {"width": 5, "bias": False}, 5),
        ("build", {"width": 6}, 6),
        ("ready", {}, 7),
    ],
)
def test_a_target_is_a_class_a_function_or_a_module(
    mine: Path, name: str, args: dict[str, Any], width: int
) -> None:
    module = load("python", target=f"{mine}:{name}", args=args, trust_code=True)
    assert module(X).shape == (5, width)
    assert (module.linear.bias is None) == ("bias" in args)
    assert not module.training


def test_a_target_may_be_any_callable(mine: Path) -> None:
    module = load("python", target=f"{mine}:call_me", trust_code=True)
    assert isinstance(module, nn.Tanh)


def test_a_target_may_be_in_a_package_of_the_current_folder(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = mine.parent / "some_package" / "deep"
    package.mkdir(parents=True)
    (package / "nets.py").write_text(MINE)
    monkeypatch.chdir(mine.parent)
    module = load("python", target="some_package.deep.nets:build", trust_code=True)
    assert module(X).shape == (5, 3)


def test_a_target_may_be_in_an_installed_package() -> None:
    module = load("python", target="torch.nn:Linear", trust_code=True,
                 args={"in_features": 4, "out_features": 2})  # fmt: skip
    assert module(X).shape == (5, 2)


def test_a_target_can_import_modules_in_its_folder(mine: Path) -> None:
    (mine.parent / "beside.py").write_text("from mine import Net\n\n\nclass Beside(Net): pass\n")
    module = load("python", target=f"{mine.parent / 'beside.py'}:Beside", trust_code=True)
    assert module(X).shape == (5, 3)


@pytest.mark.parametrize("target", ["{mine}:Net", "mine:Net"])
def test_without_trust_nothing_is_imported(
    mine: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(mine.parent)
    error = load_error("python", target=target.format(mine=mine))
    assert "trust_code=True or set GRADRUN_TRUST_CODE=1" in str(error)
    assert not (mine.parent / "imported").exists()
    load("python", target=target.format(mine=mine), trust_code=True)
    assert (mine.parent / "imported").exists(), "importing it creates the file"


def test_the_environment_variable_grants_trust(
    mine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {
        "model": {"source": "python", "target": f"{mine}:Net"},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 2},
        "output": {"path": str(tmp_path / "out")},
    }
    for value in ("0", "", "true"):
        monkeypatch.setenv("GRADRUN_TRUST_CODE", value)
        with pytest.raises(ConfigError, match="trust_code=True"):
            gradrun.infer(config)
    monkeypatch.setenv("GRADRUN_TRUST_CODE", "1")
    assert gradrun.infer(config).files == ("predictions.npy",)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("net", {}, "no 'net'; did you mean Net"),
        ("Nte", {}, "did you mean Net"),
        ("number", {}, "is the int 3, not a torch.nn.Module"),
        ("nothing", {}, "returns the NoneType None, not a torch.nn.Module"),
        ("broken", {}, "failed: ZeroDivisionError: division by zero"),
        ("broken", {}, "mine.py:"),
        ("leaves", {}, "failed: SystemExit"),
        ("Net", {"wide": 3}, "unexpected keyword argument 'wide'"),
        ("Builder", {}, "returns the Builder"),
    ],
)
def test_a_target_that_does_not_return_a_module_is_an_error(
    mine: Path, name: str, args: dict[str, Any], words: str
) -> None:
    error = load_error("python", target=f"{mine}:{name}", args=args, trust_code=True)
    assert words in str(error)
    assert error.key in {"model.target", "model"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ValueError('sorry')", "ValueError: sorry"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("def broken(:", "SyntaxError"),
        ("x = 1\n\n1 / 0", "bad.py:3"),
        ("\0", ""),
    ],
)
def test_a_file_that_cannot_be_imported_is_an_error(mine: Path, code: str, words: str) -> None:
    path = mine.with_name("bad.py")
    path.write_text(code)
    error = load_error("python", target=f"{path}:Net", trust_code=True)
    assert f"importing {path} failed" in str(error)
    assert words in str(error)


def test_a_missing_package_is_an_error(mine: Path) -> None:
    error = load_error("python", target="no_such_package.nets:Net", trust_code=True)
    assert "importing no_such_package.nets failed: ModuleNotFoundError" in str(error)


def test_a_root_that_was_in_sys_path_before_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "a")])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.py").write_text("from torch import nn\n\nNet = nn.ReLU\n")
        config = {"source": "python", "target": f"{tmp_path / name / 'net.py'}:Net"}
        load_model(PythonModel.model_validate(config), torch.device("cpu"), trust_code=True)
    assert str(tmp_path / "a") in sys.path
