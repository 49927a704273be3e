"""Tests of the explanations for a model that fails on its first batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradrun.core.errors import first_line
from gradrun.core.grad_mode import GradMode
from gradrun.inference.diagnosis import describe_model_error, explain_first_batch_failure
from gradrun.modes import grad_mode
from tests.support.loading import X

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def refusal_of(module: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        module(*args, **kwargs)
    return str(explain_first_batch_failure(module, args, kwargs, caught.value, GradMode.GRAD))


def test_a_refusal_names_both_shapes_and_the_module() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(9, 2)))
    text = refusal_of(module, X)
    assert "refuses the input [5, 4] float32" in text
    assert "module 1.1 is Linear(in_features=9, out_features=2, bias=True)" in text
    assert "with weight [2, 9] float32 and got [5, 8] float32" in text


def test_a_refusal_names_types_and_keywords() -> None:
    assert "[5, 4] int64" in refusal_of(nn.Linear(4, 2), X.long())
    assert "refuses the input y [5, 4] float32" in refusal_of(nn.Linear(4, 2), y=X)


def test_a_refusal_of_a_model_without_inner_modules_names_the_model() -> None:
    class Reshape(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(3, 3)

    text = refusal_of(Reshape(), X)
    assert "module (the model) is Reshape() and got [5, 4] float32" in text
    assert "shape '[3, 3]' is invalid" in text


@pytest.mark.parametrize("source", ["torchscript", "exported"])
def test_a_refusal_of_a_file_names_the_input_and_what_was_wanted(source: str) -> None:
    module = nn.Linear(4, 2)
    program = (
        torch.jit.script(module)
        if source == "torchscript"
        else torch.export.export(module, (X[:3],)).module()
    )
    text = refusal_of(program, torch.zeros(3, 9))
    assert "[3, 9] float32" in text
    assert "4" in text.split("float32", 1)[1]


def test_a_refusal_for_want_of_memory_asks_for_a_smaller_batch() -> None:
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.\nmore")
    found = explain_first_batch_failure(nn.ReLU(), (X,), {}, error, GradMode.NO_GRAD)
    assert found.key == "data.batch_size"
    assert "choose a smaller batch" in str(found)
    assert "more" not in str(found).split("(")[1]


WAYS_BACK = {
    "backward": lambda made: made.sum().backward(),
    "grad": lambda made: torch.autograd.grad(made.sum(), [made]),
}


class GoingBack(nn.Module):
    """Asks for gradients inside its own forward."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(4, 2), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.linear(x)
        WAYS_BACK[self.way](made)
        return made


def error_of(module: nn.Module, mode: GradMode) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught, grad_mode(mode):
        module(X)
    return caught.value


@pytest.mark.parametrize("way", WAYS_BACK)
@pytest.mark.parametrize(
    ("mode", "instead"),
    [
        (GradMode.NO_GRAD, "or torch.enable_grad() around"),
        (GradMode.INFERENCE_MODE, "or run.mode=no_grad with torch.enable_grad() around"),
    ],
)
def test_a_backward_inside_the_model_is_told_with_mode_line_and_what_to_do(
    way: str, mode: GradMode, instead: str
) -> None:
    module = GoingBack(way)
    error = error_of(module, mode)
    line = WAYS_BACK[way].__code__.co_firstlineno
    text = describe_model_error(error, mode)
    assert text.startswith(f"{way}() at {__file__}:{line} has nothing to go back through: ")
    assert f"the model ran in {mode}, which records nothing" in text
    assert f"choose run.mode=grad, {instead} that part of the model" in text
    refused = explain_first_batch_failure(module, (X,), {}, error, mode)
    assert (str(refused), refused.key) == (text, "run.mode")


def test_the_way_out_that_it_names_is_one() -> None:
    class Enabled(GoingBack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return super().forward(x)

    with torch.no_grad():
        assert Enabled("backward")(X).shape == (5, 2)
    assert "inference_mode" in describe_model_error(
        error_of(Enabled("backward"), GradMode.INFERENCE_MODE), GradMode.INFERENCE_MODE
    )


def test_a_backward_that_fails_in_grad_is_no_fault_of_the_mode() -> None:
    class Frozen(GoingBack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x)

    error = error_of(Frozen("backward"), GradMode.GRAD)
    line = WAYS_BACK["backward"].__code__.co_firstlineno
    assert (
        describe_model_error(error, GradMode.GRAD) == f"RuntimeError: {error} ({__file__}:{line})"
    )
    assert "refuses the input" in str(
        explain_first_batch_failure(Frozen("grad"), (X,), {}, error, GradMode.GRAD)
    )


def test_a_backward_of_torchscript_has_no_line_of_python() -> None:
    class Scripted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.sum().backward()
            return x

    error = error_of(torch.jit.script(Scripted()), GradMode.NO_GRAD)
    error.__traceback__ = None
    assert describe_model_error(error, GradMode.NO_GRAD).startswith(
        "backward() has nothing to go back through"
    )


def test_the_first_line_of_an_error_is_never_empty() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
