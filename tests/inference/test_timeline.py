"""The memory of a forward pass over time, and the module at its peak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradrun
from gradrun.core.grad_mode import GradMode
from gradrun.core.imports import import_file
from gradrun.core.resources import bundled
from gradrun.inference.meters.cpu_memory import forward_memory
from gradrun.inference.meters.timeline import downsample
from gradrun.modes import grad_mode
from gradrun.results.result import Memory
from tests.support.workers import in_process_workers

INPUTS = {
    "mlp": (32, 64),
    "digits_cnn": (4, 1, 8, 8),
    "resnet18": (1, 3, 64, 64),
    "transformer_encoder": (2, 16, 256),
}


def zoo(name: str) -> nn.Module:
    model: nn.Module = import_file(bundled("models") / f"{name}.py").build()
    return model.eval()


@pytest.mark.parametrize("mode", GradMode)
@pytest.mark.parametrize("name", INPUTS)
def test_module_marks_do_not_change_the_memory(name: str, mode: GradMode) -> None:
    model, batch = zoo(name), torch.randn(INPUTS[name])
    with grad_mode(mode):
        alone = forward_memory(lambda: model(batch))
        marked = forward_memory(lambda: model(batch), model)
    assert marked[:3] == alone[:3]
    assert alone.peak_module is None
    assert marked.timeline
    assert max(marked.timeline) == marked.peak
    assert (marked.timeline[0], marked.timeline[-1]) == (0, marked.retained)
    assert len(marked.timeline) <= 200
    path, _, kind = (marked.peak_module or "").rpartition(" ")
    module = model if path == "(the model)" else model.get_submodule(path)
    assert kind == f"({type(module).__name__})"


class Allocates(nn.Module):
    """Allocates 1,000 floats, calls `inner`, and frees them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 5_000)
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = torch.ones(1000)
        x = self.inner(x) + held[0]
        del held
        self.wide(x)
        return self.last(x)


def test_the_peak_module_is_the_innermost_running_module() -> None:
    model = Allocates().eval()
    with torch.no_grad():
        assert forward_memory(lambda: model(torch.ones(1, 8)), model).peak_module == "wide (Linear)"
        model.wide = nn.Linear(8, 8)
        own = forward_memory(lambda: model(torch.ones(1, 8)), model)
    assert own.peak_module == "(the model) (Allocates)", "its own allocation, outside of submodules"


def test_a_module_whose_error_was_caught_is_not_the_peak_module() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.wide = Fails(), nn.Linear(8, 5_000)

        def forward(self, x: torch.Tensor) -> Any:
            try:
                self.fails(x)
            except ValueError:
                return self.wide(x)

    model = Catches()
    with torch.no_grad():
        found = forward_memory(lambda: model(torch.ones(1, 8)), model)
    assert found.peak_module == "wide (Linear)"


def test_a_compiled_model_has_no_peak_module() -> None:
    model = nn.Linear(4, 4)
    compiled = torch.compile(model, backend="eager")
    batch = torch.ones(1, 4)
    compiled(batch)
    found = forward_memory(lambda: compiled(batch), compiled)
    assert found.peak_module is None
    assert found.peak


@given(st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=2_000))
def test_downsampling_preserves_the_ends_the_extremes_and_the_order(points: list[int]) -> None:
    reduced = downsample(points, 60)
    assert len(reduced) <= 60
    assert (reduced[0], reduced[-1]) == (points[0], points[-1])
    assert (min(reduced), max(reduced)) == (min(points), max(points))
    rest = iter(points)
    assert all(point in rest for point in reduced), "in the same order"


CONFIG: dict[str, Any] = {
    "model": {
        "source": "layers",
        "layers": [{"Linear": [64, 1024]}, "ReLU", {"Linear": [1024, 8]}],
    },
    "data": {
        "source": "synthetic",
        "inputs": {"x": {"shape": [64]}},
        "samples": 64,
        "batch_size": 32,
    },
    "run": {"threads": 1},
    "measure": {"budget": 0.4, "processes": 2, "precision": 0.5},
}


def assert_whole(memory: Memory) -> None:
    assert memory.timeline
    assert max(memory.timeline) == memory.forward_peak
    assert memory.timeline[-1] == memory.retained
    assert memory.peak_module == "1 (ReLU)"


def test_every_command_reports_the_timeline(tmp_path: Any) -> None:
    config = CONFIG | {"output": {"path": str(tmp_path / "out")}}
    assert_whole(gradrun.infer(config).measurements[0].memory)
    assert_whole(gradrun.audit(config, compile=False).measurements[-1].memory)
    with in_process_workers():
        compared = gradrun.compare(config, "no_grad,inference_mode")
    for found in compared.result.measurements:
        assert type(found.mode) is gradrun.GradMode
        assert_whole(found.memory)
