"""Places in the code of a model that findings name."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from torch import nn

from gradrun.audits.target import AuditTarget, source_of, users_line
from gradrun.config.load import load_config
from tests.support.planted_search import BASE


class Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Inherits(nn.Linear):
    """A class of this file with the forward of torch."""


class Caller(nn.Module):
    """Notes the line of the user's code that called it."""

    line: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.line = users_line(sys._getframe().f_back)  # a frame of torch
        return x


def test_the_source_of_a_module_is_its_forward_or_its_class() -> None:
    line = inspect.getsourcelines(Own.forward)[1]
    assert source_of(Own(2, 2)) == f"{__file__}:{line}"
    line = inspect.getsourcelines(Inherits)[1]
    assert source_of(Inherits(2, 2)) == f"{__file__}:{line}"


def test_modules_of_torch_and_those_without_a_file_have_no_source() -> None:
    assert source_of(nn.Linear(2, 2)) is None
    assert source_of(torch.jit.script(nn.Linear(2, 2))) is None
    space: dict[str, type[nn.Module]] = {"Module": nn.Module}
    exec("class Typed(Module):\n    def forward(self, x): return x", space)
    assert source_of(space["Typed"]()) is None


def test_the_line_of_the_user_is_the_innermost_outside_of_torch() -> None:
    caller = Caller()
    model = nn.Sequential(nn.Sequential(caller))

    def call() -> None:
        model(torch.ones(1))

    call()
    assert caller.line == f"{__file__}:{call.__code__.co_firstlineno + 1}"
    assert users_line(None) is None


@pytest.mark.parametrize("kind", [Own, Inherits])
def test_a_label_has_the_path_and_the_type(kind: type[nn.Module]) -> None:
    inner = kind(2, 2)
    model = nn.Sequential(nn.ReLU(), inner)
    target = AuditTarget("", load_config(BASE).config, torch.device("cpu"), model, [])
    assert target.label(inner) == f"1 ({kind.__name__})"
    assert target.label(target.model) == "(the model) (Sequential)"
    assert target.label(nn.ReLU()) == "(outside the model) (ReLU)"
    assert target.labelled(f"1 ({kind.__name__})") is inner
    assert target.labelled("gone (ReLU)") is target.model
