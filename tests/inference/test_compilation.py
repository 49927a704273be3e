"""Models that torch.compile compiles: other shapes are compiled before the timed pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradrun
from gradrun.inference.compilation import is_compiled
from gradrun.results.result import InferResult

NET = """
import torch
from torch import nn

COMPILED = []

def backend(graph, inputs):
    COMPILED.append([tuple(map(int, x.shape)) for x in inputs if hasattr(x, "shape")])
    return graph.forward

class Net(nn.Module):
    def forward(self, x):
        return x.cumsum(1) * 2

whole = torch.compile(Net(), backend=backend)
in_place = Net()
in_place.compile(backend=backend)
"""
ROWS = np.arange(40, dtype=np.float32).reshape(10, 4)


def run(folder: Path, name: str, **run: Any) -> InferResult:
    torch._dynamo.reset()
    (folder / "net.py").write_text(NET)
    np.save(folder / "x.npy", ROWS)
    result = gradrun.infer(
        {
            "model": {"source": "python", "target": f"{folder}/net.py:{name}"},
            "data": {"source": "arrays", "path": f"{folder}/x.npy", "batch_size": 4},
            "run": run,
            "measure": {"memory": False, "batch_independence": False},
            "output": {"path": str(folder / "out")},
        },
        trust_code=True,
    )
    assert np.array_equal(np.load(folder / "out" / "predictions.npy"), ROWS.cumsum(1) * 2)
    return result


def recompiled(result: InferResult) -> list[str]:
    return [warning.text for warning in result.warnings if warning.code == "recompiled"]


@pytest.mark.parametrize("name", ["whole", "in_place"])
def test_a_shorter_last_batch_is_compiled_before_the_timed_pass(tmp_path: Path, name: str) -> None:
    result = run(tmp_path, name)
    assert result.measurements[0].batch_sizes == (4, 4, 2)
    assert recompiled(result) == []


def test_a_compilation_in_the_timed_pass_is_a_warning(tmp_path: Path) -> None:
    (text,) = recompiled(run(tmp_path, "whole", warmup=0))
    assert "torch.compile compiled 1 graph during the timed pass" in text
    assert "model.compile: false" in text


def test_compiled_modules_are_found_at_any_depth() -> None:
    inner = nn.Linear(2, 2)
    assert not is_compiled(nn.Sequential(inner))
    assert is_compiled(torch.compile(nn.ReLU()))  # type: ignore[arg-type]
    inner.compile()
    assert is_compiled(nn.Sequential(inner))
