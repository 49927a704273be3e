"""Tests of the search for parameters that are random numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gradrun.models.initialization import RandomOrigins, describe_random
from tests.support.forked import ForkedCommand


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(5, 3, padding_idx=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torch.save(net().state_dict(), folder / "w.pt")
    save_file(net().state_dict(), folder / "w.safetensors")
    torch.save(net(), folder / "module.pt")
    torch.jit.script(net()).save(folder / "script.pt")
    return folder


def described(build: Callable[[], nn.Module]) -> str:
    with RandomOrigins() as origins:
        module = build()
    return describe_random(origins.random_parameters(module), module)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 3) * 0.02)


def orthogonal() -> nn.Module:
    module = nn.Linear(3, 4)
    nn.init.orthogonal_(module.weight)
    nn.init.zeros_(module.bias)
    return module.half()


@pytest.mark.parametrize(
    "build",
    [
        net,
        orthogonal,
        Scaled,
        lambda: nn.LSTM(3, 4),
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        lambda: nn.Sequential(nn.LazyLinear(3)),
        lambda: torch.jit.script(nn.Linear(3, 4)),
        lambda: nn.DataParallel(nn.Linear(3, 4)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
    ],
)
def test_initial_weights_of_torch_are_random(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(5)
    assert described(build) == "random (seed 5)"


def test_the_seed_is_the_one_that_the_code_sets() -> None:
    def build() -> nn.Module:
        torch.manual_seed(42)
        return nn.Linear(2, 2)

    torch.manual_seed(5)
    assert described(build) == "random (seed 42)"


def test_weights_from_files_and_arrays_are_not_random(folder: Path) -> None:
    def load(assign: bool, state: dict[str, torch.Tensor]) -> nn.Module:
        module = net()
        module.load_state_dict(state, assign=assign)
        return module

    def from_numpy() -> nn.Module:
        module = nn.Linear(3, 4)
        module.weight.data = torch.from_numpy(np.ones((4, 3), np.float32))
        with torch.no_grad():
            module.bias.copy_(torch.from_numpy(np.ones(4, np.float32)))
        return module

    assert described(lambda: load(False, torch.load(folder / "w.pt"))) == ""
    assert described(lambda: load(True, torch.load(folder / "w.pt"))) == ""
    assert described(lambda: load(False, load_file(folder / "w.safetensors"))) == ""
    assert described(lambda: torch.load(folder / "module.pt", weights_only=False)) == ""
    assert described(lambda: torch.jit.load(folder / "script.pt")) == ""
    assert described(from_numpy) == ""
    assert described(nn.ReLU) == ""


def test_constants_alone_are_not_random() -> None:
    def build() -> nn.Module:
        module = nn.Linear(3, 4)
        nn.init.ones_(module.weight)
        nn.init.constant_(module.bias, 2)
        return module

    assert described(build) == ""


def test_weights_that_a_file_lacks_are_named(folder: Path) -> None:
    def build() -> nn.Module:
        module, state = net(), load_file(folder / "w.safetensors")
        del state["0.weight"]
        module.load_state_dict(state, strict=False)
        return module

    torch.manual_seed(5)
    assert described(build) == "1 of 5 tensors random (seed 5): 0.weight"


def test_the_numbers_are_those_of_a_build_without_observation() -> None:
    torch.manual_seed(5)
    plain = net().state_dict()
    torch.manual_seed(5)
    with RandomOrigins():
        observed = net().state_dict()
    assert all(torch.equal(plain[name], observed[name]) for name in plain)


def test_a_long_list_of_names_is_truncated() -> None:
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    names = [name for name, _ in module.named_parameters()][:5]
    torch.manual_seed(5)
    text = describe_random(names, module)
    assert text == "5 of 8 tensors random (seed 5): 0.weight, 0.bias, 1.weight and 2 more"


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        double = torch.compile(lambda x: 2 * x, backend="eager")
        self.table = nn.Parameter(double(torch.randn(3)))
        self.ones = nn.Parameter(double(torch.from_numpy(np.ones(3, np.float32))))


def test_results_of_a_compiled_function_have_the_origin_of_its_arguments() -> None:
    assert "1 of 2 tensors random (seed" in described(Compiled)
    assert described(Compiled).endswith(": table")


NET = """
import sys
from torch import nn

class Net(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def forward(self, x):
        assert "torch._dynamo" not in sys.modules
        return super().forward(x)
"""
CONFIG = """
model: {source: python, target: "net.py:Net"}
data: {source: synthetic, inputs: {x: {shape: [2]}}, samples: 8}
output: {path: out}
"""


def test_a_run_of_the_users_model_does_not_import_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "c.yaml").write_text(CONFIG)
    command = ForkedCommand("infer", "c.yaml", "--trust-code", cwd=tmp_path)
    _, stderr = command.communicate()
    assert command.returncode == 0, stderr
