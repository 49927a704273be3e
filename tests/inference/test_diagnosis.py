"""Tests of the explanations for a model that fails on its first batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradrun.core.errors import first_line
from gradrun.core.grad_mode import GradMode
from gradrun.data.batch import Batch
from gradrun.inference.diagnosis import describe_model_error, explain_first_batch_failure
from gradrun.modes import grad_mode
from tests.support.loading import X

BATCH = Batch((X,), {}, len(X), range(len(X)))

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def explain(module: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        module(*args, **kwargs)
    batch = Batch(args, kwargs, 1, [0])
    return str(explain_first_batch_failure(module, batch, caught.value, GradMode.GRAD))


def test_the_explanation_names_both_shapes_and_the_module() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(9, 2)))
    text = explain(module, X)
    assert "failed on the input [5, 4] float32" in text
    assert "module 1.1 is Linear(in_features=9, out_features=2, bias=True)" in text
    assert "with weight [2, 9] float32 and got [5, 8] float32" in text


def test_the_explanation_names_dtypes_and_keywords() -> None:
    assert "[5, 4] int64" in explain(nn.Linear(4, 2), X.long())
    assert "failed on the input y [5, 4] float32" in explain(nn.Linear(4, 2), y=X)


def test_the_explanation_of_a_model_without_submodules_names_the_model() -> None:
    class Reshape(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(3, 3)

    text = explain(Reshape(), X)
    assert "module (the model) is Reshape() and got [5, 4] float32" in text
    assert "shape '[3, 3]' is invalid" in text


@pytest.mark.parametrize("source", ["torchscript", "exported"])
def test_the_explanation_of_a_program_names_the_given_and_the_expected_shape(source: str) -> None:
    module = nn.Linear(4, 2)
    program = (
        torch.jit.script(module)
        if source == "torchscript"
        else torch.export.export(module, (X[:3],), strict=False).module()
    )
    text = explain(program, torch.zeros(3, 9))
    assert "[3, 9] float32" in text
    assert "4" in text.split("float32", 1)[1]


def test_out_of_memory_asks_for_a_smaller_batch() -> None:
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.\nmore")
    found = explain_first_batch_failure(nn.ReLU(), BATCH, error, GradMode.NO_GRAD)
    assert found.key == "data.batch_size"
    assert "choose a smaller batch" in str(found)
    assert "more" not in str(found).split("(")[1]


BACKWARD_CALLS = {
    "backward": lambda made: made.sum().backward(),
    "grad": lambda made: torch.autograd.grad(made.sum(), [made]),
}


class ComputesGradients(nn.Module):
    """Runs a backward pass inside its forward."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.linear, self.call = nn.Linear(4, 2), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.linear(x)
        BACKWARD_CALLS[self.call](made)
        return made


def error_of(module: nn.Module, mode: GradMode) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught, grad_mode(mode):
        module(X)
    return caught.value


@pytest.mark.parametrize("call", BACKWARD_CALLS)
@pytest.mark.parametrize(
    ("mode", "alternative"),
    [
        (GradMode.NO_GRAD, "or use torch.enable_grad() around"),
        (GradMode.INFERENCE_MODE, "or use run.mode=no_grad with torch.enable_grad() around"),
    ],
)
def test_a_backward_inside_the_model_is_reported_with_mode_line_and_solution(
    call: str, mode: GradMode, alternative: str
) -> None:
    module = ComputesGradients(call)
    error = error_of(module, mode)
    line = BACKWARD_CALLS[call].__code__.co_firstlineno
    text = describe_model_error(error, mode)
    assert text.startswith(f"{call}() at {__file__}:{line} needs a graph, but ")
    assert f"the model ran in {mode}, which records none" in text
    assert f"set run.mode=grad, {alternative} that part of the model" in text
    explained = explain_first_batch_failure(module, BATCH, error, mode)
    assert (str(explained), explained.key) == (text, "run.mode")


def test_the_reported_solution_works() -> None:
    class Enabled(ComputesGradients):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return super().forward(x)

    with torch.no_grad():
        assert Enabled("backward")(X).shape == (5, 2)
    assert "inference_mode" in describe_model_error(
        error_of(Enabled("backward"), GradMode.INFERENCE_MODE), GradMode.INFERENCE_MODE
    )


def test_a_backward_that_fails_in_grad_mode_is_not_explained_by_the_mode() -> None:
    class Frozen(ComputesGradients):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x)

    error = error_of(Frozen("backward"), GradMode.GRAD)
    line = BACKWARD_CALLS["backward"].__code__.co_firstlineno
    assert (
        describe_model_error(error, GradMode.GRAD) == f"RuntimeError: {error} ({__file__}:{line})"
    )
    assert "failed on the input" in str(
        explain_first_batch_failure(Frozen("grad"), BATCH, error, GradMode.GRAD)
    )


def test_a_backward_in_torchscript_has_no_python_line() -> None:
    class Scripted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.sum().backward()
            return x

    error = error_of(torch.jit.script(Scripted()), GradMode.NO_GRAD)
    error.__traceback__ = None
    assert describe_model_error(error, GradMode.NO_GRAD).startswith("backward() needs a graph")


def test_the_first_line_of_an_error_is_never_empty() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
