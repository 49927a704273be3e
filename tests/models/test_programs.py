"""Tests of the sources `torchscript` and `exported`, whose files contain programs."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradrun
from gradrun.core.errors import ConfigError
from tests.support import attack_files
from tests.support.loading import X, load, load_error

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        hidden = self.linear(x)
        return {"out": hidden, "parts": (hidden * 2, x.sum(0))}


class Scaled(nn.Module):
    def forward(self, ids: torch.Tensor, feats: torch.Tensor) -> torch.Tensor:
        return feats * 2 + ids[:, None]


def export(path: Path, module: nn.Module, size: int, **sizes: int) -> Path:
    """Export a program for batches of `size`, or for the sizes of a Dim."""
    shapes = ({0: torch.export.Dim("n", **sizes)},) if sizes else None
    program = torch.export.export(module, (X[:size],), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of nn.Linear(4, 2) for each source; the exported one takes batches of 3."""
    folder = tmp_path_factory.mktemp("programs")
    torch.jit.save(torch.jit.script(nn.Linear(4, 2)), folder / "m.pt")
    return {
        "torchscript": folder / "m.pt",
        "exported": export(folder / "m.pt2", nn.Linear(4, 2), 3),
    }


@pytest.mark.parametrize("source", ["torchscript", "exported"])
def test_a_program_needs_trust_and_is_not_loaded_without_it(
    files: dict[str, Path], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("the file was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", loaded)
        patch.setattr(torch.export, "load", loaded)
        error = load_error(source, path=files[source])
    assert re.search(r"contains an? .* program and was not loaded, because it could", str(error))
    assert "pass trust_code=True or set GRADRUN_TRUST_CODE=1" in str(error)
    assert error.key == "model.path"
    assert load(source, path=files[source], trust_code=True)(X[:3]).shape == (3, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("source", "create"),
    [
        ("torchscript", attack_files.script_that_writes),
        ("exported", attack_files.export_that_writes),
    ],
)
def test_loading_a_hostile_program_runs_its_code_only_with_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, create: attack_files.Create
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m").write_bytes(create())
    load_error(source, path="m")
    assert not Path("evil").exists()
    with suppress(ConfigError):  # the exported program is invalid as well
        load(source, path="m", trust_code=True)
    assert Path("evil").exists(), "the attack works on torch itself"


@pytest.fixture(scope="module", params=[{}, {"min": 3, "max": 8}], ids=["fixed", "at least 3"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, nn.Module]:
    """A module, and the same as an exported program for batches of at least 3."""
    path = export(tmp_path_factory.mktemp("pair") / "p.pt2", module := Pair(), 3, **request.param)
    return module, load("exported", path=path, trust_code=True)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_batch_below_the_minimum_is_padded_and_its_outputs_truncated(
    pair: tuple[nn.Module, nn.Module], size: int
) -> None:
    module, program = pair
    padded = module(torch.cat([X[:size], X[size - 1 : size].expand(3 - size, 4)]))
    outputs = program(X[:size])
    assert torch.equal(outputs["out"], padded["out"][:size])
    assert torch.equal(outputs["parts"][0], padded["parts"][0][:size])
    assert torch.equal(outputs["parts"][1], padded["parts"][1]), "not truncated: no row per sample"


def test_a_program_for_any_batch_size_takes_every_size(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    program = load("exported", path=export(tmp_path / "p.pt2", module, 3, min=1), trust_code=True)
    for size in (1, 2, 5):
        assert torch.allclose(program(X[:size]), module(X[:size]))


@pytest.mark.parametrize("sizes", [{}, {"min": 1, "max": 3}], ids=["fixed", "at most 3"])
def test_a_batch_above_the_maximum_is_an_error_with_the_size_to_choose(
    tmp_path: Path, sizes: dict[str, int]
) -> None:
    path = export(tmp_path / "p.pt2", nn.Linear(4, 2), 3, **sizes)
    config = {
        "model": {"source": "exported", "path": str(path)},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 7},
        "output": {"path": str(tmp_path / "out")},
    }
    with pytest.raises(ConfigError, match=r"at most 3; set data\.batch_size to 3"):
        gradrun.infer(config, trust_code=True)
    assert not (tmp_path / "out").exists()
    gradrun.infer(config, trust_code=True, **{"data.batch_size": 3})
    assert np.load(tmp_path / "out/predictions.npy").shape == (7, 2)


@pytest.mark.parametrize("source", ["torchscript", "exported"])
def test_a_file_of_the_other_kind_is_an_error_that_names_its_source(
    files: dict[str, Path], source: str
) -> None:
    other = "exported" if source == "torchscript" else "torchscript"
    error = load_error(source, path=files[other], trust_code=True)
    assert f"source: {other} reads" in str(error)
    assert error.key == "model.path"


@pytest.mark.parametrize("source", ["torchscript", "exported"])
@pytest.mark.parametrize("damage", ["empty", "text", "head", "tail", "state dict"])
def test_a_damaged_file_is_an_error(
    files: dict[str, Path], tmp_path: Path, source: str, damage: str
) -> None:
    whole = files[source].read_bytes()
    half = len(whole) // 2
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path / "state")
    state = (tmp_path / "state").read_bytes()
    parts = {"empty": b"", "text": b"hello" * 99, "head": whole[:half], "tail": whole[half:]}
    (tmp_path / "model").write_bytes({**parts, "state dict": state}[damage])
    assert load_error(source, path=tmp_path / "model", trust_code=True).key == "model.path"


def test_a_program_exported_by_position_takes_inputs_by_name(tmp_path: Path) -> None:
    batch = torch.export.Dim.AUTO
    example = (torch.arange(6), torch.randn(6, 3))
    shapes = ({0: batch}, {0: batch})
    program = torch.export.export(Scaled(), example, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "m.pt2")
    module = load("exported", path=str(tmp_path / "m.pt2"), trust_code=True)
    ids, feats = torch.arange(4), torch.randn(4, 3)
    assert torch.equal(module(feats=feats, ids=ids), feats * 2 + ids[:, None])
