"""Models that torch.compile compiles: other shapes are compiled before the timed pass."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler

import gradrun
from gradrun.config.model import CompileSection
from gradrun.core.errors import ConfigError
from gradrun.inference import compilation
from gradrun.inference.compilation import (
    CompiledModel,
    compiled_graphs,
    is_compiled,
    recompilation_limit_hits,
)
from gradrun.results.result import InferResult

NAMES = ("recompile_limit", "cache_size_limit")  # the second is that of torch 2.6
LIMIT = next(name for name in NAMES if hasattr(torch._dynamo.config, name))
needs_torch_2_7 = pytest.mark.skipif(
    LIMIT == "cache_size_limit",
    reason="torch 2.6 compiles nothing more in a process that reached its limit",
)

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


# --- model.compile -----------------------------------------------------------------------------

CALLS: list[tuple[int, ...]] = []
"""Shapes of the input of each call of a program of the backend `counting`."""


def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
    def program(*args: Any) -> Any:
        CALLS.append(tuple(args[-1].shape))
        return graph.forward(*args)

    return program


def without_autocast(graph: torch.fx.GraphModule, _: Any) -> Any:
    return torch.autocast("cpu", enabled=False)(graph.forward)


def without_compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
    try:
        raise InvalidCxxCompiler
    except InvalidCxxCompiler as error:
        raise RuntimeError("the backend failed") from error


def failing(graph: torch.fx.GraphModule, _: Any) -> Any:
    raise ValueError("no kernel for this")


@pytest.fixture(autouse=True, scope="module")
def _backends() -> Iterator[None]:
    backends = (counting, without_autocast, without_compiler, failing)
    for backend in backends:
        torch._dynamo.register_backend(backend, name=backend.__name__)
    yield
    registry = torch._dynamo.backends.registry
    for backend in backends:
        registry._BACKENDS.pop(backend.__name__, None)
        registry._COMPILER_FNS.pop(backend.__name__, None)


LAYERS: dict[str, Any] = {"source": "layers", "layers": [{"Linear": [4, 3]}]}

RETURNS_FLOAT32 = """
from torch import nn

class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        return super().forward(x).float()
"""


def infer(folder: Path, model: Any, **sections: Any) -> InferResult:
    torch._dynamo.reset()
    CALLS.clear()
    np.save(folder / "x.npy", ROWS)
    config: dict[str, Any] = {
        "model": model if "source" in model else LAYERS | {"compile": model},
        "data": {"source": "arrays", "path": f"{folder}/x.npy", "batch_size": 4},
        "output": {"path": str(folder / "out")},
    }
    return gradrun.infer(config, overwrite=True, trust_code=True, **sections)


def by_hand() -> np.ndarray[Any, Any]:
    torch.manual_seed(0)
    with torch.inference_mode():
        return nn.Linear(4, 3)(torch.from_numpy(ROWS)).numpy()


def texts(result: InferResult, code: str) -> list[str]:
    return [warning.text for warning in result.warnings if warning.code == code]


def test_full_batches_run_compiled_and_a_shorter_last_one_eagerly(tmp_path: Path) -> None:
    result = infer(tmp_path, {"backend": "counting"})
    assert np.allclose(np.load(tmp_path / "out" / "predictions.npy"), by_hand(), atol=1e-6)
    assert set(CALLS) == {(4, 4)}
    (stated,) = [s.text for s in result.interpretation if s.topic == "compile"]
    assert stated == "counting, batches of 4; others, such as a shorter last one, run eagerly"
    compilation = result.measurements[0].compilation
    assert compilation is not None
    assert compilation.graphs == 1
    assert compilation.seconds > compilation.compiled > 0
    assert compilation.eager > 0
    assert not texts(result, "recompiled")


def test_a_dynamic_program_runs_a_shorter_last_batch_too(tmp_path: Path) -> None:
    result = infer(tmp_path, {"backend": "counting", "dynamic": True})
    assert set(CALLS) == {(4, 4), (2, 4)}
    assert not texts(result, "recompiled")
    result = infer(tmp_path, {"backend": "counting", "dynamic": True}, **{"data.batch_size": 3})
    assert set(CALLS) == {(3, 4)}, "the last batch has one sample"
    assert not texts(result, "recompiled")


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad"])
def test_tensors_from_inside_and_outside_of_inference_mode_need_one_program(mode: str) -> None:
    torch._dynamo.reset()
    section = CompileSection(backend="counting")
    model = CompiledModel(nn.Linear(4, 3), section, batch_size=5, varying=False)
    outside, graphs = torch.ones(5, 4), compiled_graphs()
    with getattr(torch, mode)():
        model(torch.ones(5, 4))
        model(outside)
        model(outside)
    assert compiled_graphs() == graphs + 1


def test_data_of_less_than_a_batch_run_compiled(tmp_path: Path) -> None:
    infer(tmp_path, {"backend": "counting"}, **{"data.batch_size": 64})
    assert set(CALLS) == {(10, 4)}


def test_an_unknown_backend_is_an_error_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.compile\.backend: .*did you mean inductor\?"):
        infer(tmp_path, {"backend": "inducto"})


def test_a_missing_compiler_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        infer(tmp_path, {"backend": "without_compiler"})
    assert str(raised.value).endswith(
        "model.compile: torch.compile needs a C++ compiler and finds none; install g++ or "
        "clang++, set the environment variable CXX to one, or set model.compile: false"
    )


def test_a_failing_backend_is_distinguished_from_a_failing_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs, but .* the backend failing fails: .*kernel"):
        infer(tmp_path, {"backend": "failing"})
    too_wide = LAYERS | {"layers": [{"Linear": [5, 3]}], "compile": {"backend": "failing"}}
    with pytest.raises(ConfigError, match=r"module 0 is Linear.* got \[4, 4\]"):
        infer(tmp_path, too_wide)


def test_autocast_that_a_program_ignores_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(RETURNS_FLOAT32)
    target = f"{tmp_path}/net.py:Net"

    def ignored(backend: str) -> list[str]:
        model = {"source": "python", "target": target, "compile": {"backend": backend}}
        result = infer(tmp_path, model, run={"autocast": "bfloat16"})
        return texts(result, "autocast_ignored")

    (text,) = ignored("without_autocast")
    assert "no effect on the compiled model" in text
    assert ignored("counting") == []


def test_a_program_whose_outputs_have_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is float32 if it is compiled and bfloat16 if not"):
        infer(tmp_path, {"backend": "without_autocast"}, run={"autocast": "bfloat16"})


@contextmanager
def _no_graphs_yet() -> Iterator[None]:
    """Set the number of graphs that were compiled in this process to 0."""
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats.pop("unique_graphs", 0)
    try:
        yield
    finally:
        stats["unique_graphs"] += graphs


def test_a_model_of_which_nothing_is_compiled_is_a_warning(tmp_path: Path) -> None:
    # The counters of other tests in this process.
    with torch._dynamo.config.patch(disable=True), _no_graphs_yet():
        (text,) = texts(infer(tmp_path, {"backend": "counting"}), "not_compiled")
    assert "compiled no part of the model" in text
    assert CALLS == []


def test_another_compilation_cannot_resume_a_run(tmp_path: Path) -> None:
    infer(tmp_path, {"backend": "counting"})
    journal = tmp_path / "out" / "journal.jsonl"
    header, first, *_ = journal.read_text().splitlines(keepends=True)
    journal.write_text(header + first)
    (tmp_path / "out" / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.compile.* changed from"):
        gradrun.infer(
            {
                "model": LAYERS,
                "data": {"source": "arrays", "path": f"{tmp_path}/x.npy", "batch_size": 4},
                "output": {"path": str(tmp_path / "out")},
            },
            resume=True,
        )


def test_the_limit_of_recompilations_is_reported_once_it_is_hit() -> None:
    torch._dynamo.reset()
    double: Any = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    with recompilation_limit_hits() as hits:
        for size in range(2, 12):
            double(torch.ones(size))
    assert len(hits) == 1
    assert f"hit config.{LIMIT}" in hits[0]


@needs_torch_2_7
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_freezing_reaches_inductor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise RuntimeError("about to freeze")  # before a C++ compiler runs

    monkeypatch.setattr("torch._inductor.freezing.freeze", stop)
    with pytest.raises(ConfigError, match="backend inductor fails: RuntimeError: about to freeze"):
        infer(tmp_path, {"freezing": True}, run={"mode": mode})


@needs_torch_2_7
@torch._dynamo.config.patch({LIMIT: 2})  # monkeypatch would delete the setting at its end
def test_a_run_that_reaches_the_limit_of_compilations_warns_of_its_eager_batches(
    tmp_path: Path,
) -> None:
    torch._dynamo.reset()
    lines = (json.dumps({"s": [1.0] * (i // 2 + 1)}) for i in range(24))
    (tmp_path / "s.jsonl").write_text("\n".join(lines) + "\n")
    result = gradrun.infer(
        {
            "model": {
                "source": "layers",
                "layers": ["ReLU"],
                "compile": {"backend": "eager", "dynamic": False},
            },
            "data": {
                "source": "records",
                "path": str(tmp_path / "s.jsonl"),
                "inputs": {"x": {"columns": ["s"], "pad": 0}},
                "batch_size": 2,
            },
            "output": {"path": str(tmp_path / "out"), "format": "jsonl"},
        }
    )
    (warning,) = [w for w in result.warnings if w.code == "recompilation_limit"]
    assert "batches of further shapes ran eagerly" in warning.text


# --- CUDA graphs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiled", "key"),
    [({"backend": "cudagraphs"}, "backend"), ({"mode": "reduce-overhead"}, "mode")],
)
def test_cuda_graphs_on_the_cpu_are_an_error_that_names_what_is_allowed(
    tmp_path: Path, compiled: dict[str, str], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        infer(tmp_path, compiled, run={"device": "cpu"})
    assert f"model.compile.{key}: {compiled[key]} uses CUDA graphs and" in str(caught.value)
    assert "allowed here: backend: inductor, with mode: default, max-autotune" in str(caught.value)


def test_a_cuda_graph_has_one_shape(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dynamic: true cannot be combined with backend: cudag"):
        infer(tmp_path, {"backend": "cudagraphs", "dynamic": True})
    section = CompileSection(mode="reduce-overhead")
    with pytest.raises(ConfigError, match=r"one shape.*set data\.padding: max_length"):
        compilation._check_cuda_graphs(section.cuda_graphs, torch.device("cuda"), varying=True)
    compilation._check_cuda_graphs(section.cuda_graphs, torch.device("cuda"), varying=False)
    assert not CompileSection(mode="max-autotune").cuda_graphs


@dataclasses.dataclass
class Pair:
    """An output whose class torch does not split into tensors."""

    double: torch.Tensor
    more: dict[str, torch.Tensor]


def test_outputs_of_a_cuda_graph_are_copied_because_it_writes_to_the_same_memory() -> None:
    memory = torch.zeros(2, 3)

    class Replay(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            torch.mul(x, 2, out=memory)
            return memory, [memory], Pair(memory, {"third": memory})

    section = CompileSection(backend="cudagraphs")
    for cuda in (False, True):
        model = CompiledModel(nn.Identity(), section, batch_size=2, varying=False, cuda=cuda)
        model.compiled = Replay()
        tensor, (item,), pair = model(torch.ones(2, 3))
        model(torch.zeros(2, 3))
        found = [tensor, item, pair.double, pair.more["third"]]
        assert [rows[0, 0].item() for rows in found] == [2.0 if cuda else 0.0] * 4
