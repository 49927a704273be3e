"""`gradrun profile`: modules, operators, trace, reports, and models that cannot be timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import gradrun
from gradrun import report
from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError
from gradrun.data.batch import Batch
from gradrun.models.loaded import LoadedModel
from gradrun.profiling.call_tree import CallTree
from gradrun.profiling.coverage import limitations
from gradrun.profiling.variant import ProfiledVariant, of_different_shapes
from gradrun.report.document import describe
from gradrun.results.profile import ProfileFigures, differences
from gradrun.results.result import ProfileResult, RunResult
from tests.conftest import Command

NETS = Path(__file__)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(8), Block(1024)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class FailsLater(nn.Module):
    """Fails in its tenth call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.part = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        FailsLater.total = getattr(FailsLater, "total", 0) + 1
        if FailsLater.total > 10:
            raise RuntimeError("broken after ten calls")
        return self.part(x)


class NeedsPlainTensors(nn.Module):
    """Fails while operators are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _get_current_dispatch_mode() is not None:
            raise TypeError("needs plain tensors")
        return self.part(x)


class ByMode(nn.Module):
    """Its second part does more where gradients are on."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.slow = nn.Linear(4, 4), Slow()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(self.same(x))


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(300 if torch.is_grad_enabled() else 1):
            x = x + 1
        return x


def scripted() -> nn.Module:
    return torch.jit.script(Block(8))


def compiled() -> nn.Module:
    model: Any = torch.compile(Block(8), backend="eager")
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def config(tmp_path: Path, build: str = "Net", **data: Any) -> dict[str, Any]:
    return {
        "model": {"source": "python", "target": f"{NETS}:{build}"},
        "data": {
            "source": "synthetic",
            "inputs": {"x": {"shape": [4]}},
            "samples": 24,
            "batch_size": 4,
            **data,
        },
        "run": {"threads": 1},
        "measure": {"budget": 0.05},
        "output": {"path": str(tmp_path / "run")},
    }


Profiled = Callable[..., ProfileResult]


@pytest.fixture
def profiled(tmp_path: Path) -> Profiled:
    def profile(build: str = "Net", **changes: Any) -> ProfileResult:
        data = changes.pop("data", {})
        return gradrun.profile(
            config(tmp_path, build, **data), trust_code=True, peaks=False, **changes
        )

    return profile


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ProfileResult:
    folder = tmp_path_factory.mktemp("profile")
    return gradrun.profile(
        config(folder), trust_code=True, peaks=False, trace=folder / "trace.json"
    )


def test_every_module_has_its_calls_work_memory_and_parameters(result: ProfileResult) -> None:
    (profile,) = result.profiles
    modules = {m.path: m for m in profile.modules}
    assert [*modules] == [
        "",
        *(f"blocks.{i}{part}" for i in (0, 1) for part in ("", ".first", ".act", ".last")),
    ]
    assert {m.calls for m in profile.modules} == {1.0}
    assert modules["blocks.1"].parameters == 4 * 1024 + 1024 + 1024 * 4 + 4
    assert modules[""].parameters == sum(modules[f"blocks.{i}"].parameters for i in (0, 1))
    figures = {m.calls.path: m for m in ProfileFigures(profile).modules}
    for path, width in (("blocks.0", 8), ("blocks.1", 1024)):
        work = figures[path].work
        assert work is not None
        assert work.total_flops == 2 * (2 * 4 * 4 * width)
        assert modules[f"{path}.first"].peak == 4 * width * 4, "bytes of its output"
        assert modules[path].peak == 2 * 4 * width * 4, "outputs of Linear and ReLU"
    whole = figures[""].work
    assert whole is not None
    assert whole.uncounted == ("add", "relu")
    assert all(len(m.seconds) == len(profile.hooked_seconds) > 1 for m in profile.modules)
    assert profile.inside > 0


def test_the_result_is_saved_and_read_back(result: ProfileResult) -> None:
    folder = Path(result.info.output_path)
    assert folder.name == "run-profile"
    assert RunResult.load(folder) == result


def test_operators_have_shapes_and_the_modules_that_call_them(result: ProfileResult) -> None:
    (profile,) = result.profiles
    assert 0 < len(profile.operators) <= 10
    assert [o.seconds for o in profile.operators] == sorted(
        (o.seconds for o in profile.operators), reverse=True
    )
    assert profile.operator_seconds >= sum(o.seconds for o in profile.operators)
    (product,) = (
        o for o in profile.operators if o.shapes == "[4] [4, 1024] [1024, 4]" and o.name == "addmm"
    )
    assert product.modules == ("blocks.1.last (Linear)",)
    assert product.calls == 1


def test_a_trace_is_valid_and_its_modules_nest_as_in_the_model(result: ProfileResult) -> None:
    trace = json.loads((Path(result.info.output_path).parent / "trace.json").read_text())
    events = trace["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert all({"name", "ph", "ts", "dur", "pid", "tid"} <= event.keys() for event in spans)
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    assert [span["ts"] for span in spans] == sorted(span["ts"] for span in spans)
    assert min(span["ts"] for span in spans) == 0
    batches = [span for span in spans if span["cat"] == "batch"]
    assert len(batches) == 3
    modules = [span for span in spans if span["cat"] == "module"]
    assert len(modules) == 3 * len(result.profiles[0].modules)

    def inside(outer: dict[str, Any]) -> list[str]:
        end = outer["ts"] + outer["dur"]
        return [
            span["name"]
            for span in modules
            if outer["ts"] <= span["ts"] and span["ts"] + span["dur"] <= end and span is not outer
        ]

    (block, *_) = (span for span in modules if span["name"] == "blocks.1 (Block)")
    assert inside(block) == [
        f"blocks.1.{part}" for part in ("first (Linear)", "act (ReLU)", "last (Linear)")
    ]
    products = [span for span in spans if span["name"] == "aten::addmm"]
    assert {span["args"]["module"] for span in products} == {
        f"blocks.{i}.{part} (Linear)" for i in (0, 1) for part in ("first", "last")
    }
    sizes = [event["args"]["bytes"] for event in events if event["ph"] == "C"]
    assert max(sizes) >= 4 * 1024 * 4


def test_variants_name_the_module_that_makes_the_difference(profiled: Profiled) -> None:
    found = profiled("ByMode", over=("run.mode", ["grad", "inference_mode"]))
    assert [profile.variant for profile in found.profiles] == ["grad", "inference_mode"]
    first, *_ = differences(*found.profiles)
    assert (first.label, first.own) == ("slow (Slow)", True)
    assert first.difference.high < 0
    assert "slow (Slow)" in describe(found).verdict


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (("run.device", ["cpu", "cpu"]), "one device"),
        (("run.allocator", ["retain", "system"]), "one process"),
        (("engine.workers", [1, 2]), "use gradrun compare"),
        (("run.mode", ["grad"]), "at least two values"),
        (("run.mode", ["grad", "none"]), "unknown mode"),
    ],
)
def test_keys_that_cannot_vary_in_one_process_are_errors(
    profiled: Profiled, over: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        profiled(over=over)


def test_a_fused_encoder_layer_is_stated_and_stays_fused(profiled: Profiled) -> None:
    shape = {"inputs": {"x": {"shape": [3, 4]}}}
    found = profiled("encoder", data=shape)
    assert [m.path for m in found.profiles[0].modules] == ["", "layers.0"]
    (text,) = (s.text for s in found.interpretation if s.topic == "fused")
    assert "layers.0" in text
    called = profiled("encoder", data=shape, run={"mode": "grad"})
    assert len(called.profiles[0].modules) > 6
    assert [s.topic for s in called.interpretation] == ["batches", "not called"]
    assert "self_attn.out_proj" in called.interpretation[1].text


def test_modules_inside_torchscript_are_stated(profiled: Profiled) -> None:
    found = profiled("scripted")
    assert [m.path for m in found.profiles[0].modules] == [""]
    assert [w.code for w in found.warnings] == ["torchscript"]
    work = found.profiles[0].modules[0].work
    assert work is not None
    assert work.total_flops == 2 * (2 * 4 * 4 * 8)


@pytest.mark.parametrize("build", ["compiled", "Block"])
def test_a_compiled_model_is_timed_as_a_whole_without_hooks(profiled: Profiled, build: str) -> None:
    model = {"args": {"width": 8}, "compile": {"backend": "eager"}} if build == "Block" else {}
    found = profiled(build, model=model)
    (profile,) = found.profiles
    assert [m.path for m in profile.modules] == [""]
    assert [w.code for w in found.warnings] == ["compiled"]
    assert (profile.inside, profile.outside) == (0, 0)
    work = profile.modules[0].work
    assert work is not None
    assert work.total_flops == 2 * (2 * 4 * 4 * 8)


def test_a_model_that_fails_is_an_error_of_the_config(profiled: Profiled) -> None:
    with pytest.raises(ConfigError, match=r"the model failed on the input \[4, 5\]"):
        profiled(data={"inputs": {"x": {"shape": [5]}}})


def test_a_model_that_fails_later_ends_with_its_reason(profiled: Profiled) -> None:
    with pytest.raises(gradrun.RunFailed, match="broken after ten calls"):
        profiled("FailsLater")


def test_a_pass_that_fails_after_the_times_is_a_warning(profiled: Profiled) -> None:
    found = profiled("NeedsPlainTensors")
    (warning,) = found.warnings
    assert warning.code == "pass_failed"
    assert warning.text.startswith("the operations were not counted: TypeError: needs plain")
    assert [m.work for m in found.profiles[0].modules] == [None, None]
    assert found.profiles[0].operators
    text = report.render([("a", found)], "table")
    assert "Operator" in text
    assert "FLOP" not in text


def test_the_release_of_outputs_is_not_in_the_forward_pass() -> None:
    now = 0

    class Output:
        def __del__(self) -> None:
            nonlocal now
            now += 1_000

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Output:
            nonlocal now
            now += 7_000
            return Output()

    model = Model()
    variant = ProfiledVariant(
        name="",
        config=load_config(config(Path()), ()).config,
        device=torch.device("cpu"),
        loaded=LoadedModel(model),
        batches=[Batch((torch.ones(1),), {}, 1, [0])],
        tree=CallTree(model),
        hooks=True,
    )
    for hooks in (False, True):
        variant.time_block(5, lambda: now, hooks=hooks)
    assert variant.plain == variant.hooked == variant.tree.nodes[0].rounds == pytest.approx([7e-6])


def test_one_batch_of_each_shape_is_profiled_in_order() -> None:
    batches = [Batch((torch.ones(2, n),), {}, 2, range(2)) for n in (3, 5, 3, 4, 5)]
    found = of_different_shapes(batches)
    assert [id(batch) for batch in found] == [id(batches[i]) for i in (0, 1, 3)]


@pytest.mark.parametrize(
    ("calls", "device", "codes"),
    [
        ([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]], "cpu", []),
        ([[2.0, 2.0, 2.0], [1.0, 0.8, 1.0]], "cpu", ["calls_vary"]),
        ([[2.0, 2.0, 2.0], [100.0, 100.5, 100.0]], "cpu", []),
        ([[1.0, 1.0, 1.0]], "cuda:0", ["synchronized"]),
    ],
)
def test_rounds_that_call_other_modules_or_wait_for_a_device_are_a_warning(
    calls: list[list[float]], device: str, codes: list[str]
) -> None:
    tree = SimpleNamespace(nodes=[SimpleNamespace(calls=of_node) for of_node in calls])
    variant: Any = SimpleNamespace(model=Net(), tree=tree, device=torch.device(device))
    assert [warning.code for warning in limitations(variant)] == codes


def test_the_graph_of_an_exported_model_is_timed_as_a_whole() -> None:
    graph = torch.fx.symbolic_trace(Block(8))
    tree = SimpleNamespace(nodes=[SimpleNamespace(calls=[1.0])])
    variant: Any = SimpleNamespace(model=graph, tree=tree, device=torch.device("cpu"))
    (warning,) = limitations(variant)
    assert warning.text.startswith("an exported model is a graph of operators without modules")


def test_the_batches_of_the_rounds_are_stated(profiled: Profiled) -> None:
    (text,) = (s.text for s in profiled().interpretation if s.topic == "batches")
    assert text == "every round runs the same batch, of shape 4 x 4"


# --- the command -------------------------------------------------------------------------------


def test_the_command_prints_the_tables_and_writes_json(
    tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    path = tmp_path / "net.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path)))
    words = ("profile", path, "--trust-code", "--no-peaks", "--top", 3)
    answer = cli(*words, "--json", tmp_path / "out.json", "--trace", tmp_path / "t.json")
    assert answer.code == 0, answer.text
    for text in ("Module", "· blocks.1 Block", "more modules in the time", "Operator", "addmm"):
        assert text in answer.out
    assert RunResult.load(tmp_path / "out.json").kind == "profile"
    assert (tmp_path / "t.json").is_file()
    for suffix in ("md", "csv", "json", "txt"):
        assert cli("report", tmp_path / "run-profile", "-o", tmp_path / f"r.{suffix}").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("profile",), "a config is required"),
        (("profile", "--machine", "--trace", "x"), "--machine measures this machine"),
        (("profile", "no.yaml"), "no.yaml"),
        (("profile", "{config}", "--trace", "/no/where/t.json"), "--trace"),
        (("profile", "{config}", "--over", "run.mode"), "expected KEY=A,B"),
        (("profile", "{config}", "--depth", "-1"), "depth"),
    ],
)
def test_wrong_usage_is_one_sentence(
    words: tuple[str, ...], message: str, tmp_path: Path, cli: Command
) -> None:
    import yaml

    path = tmp_path / "net.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path)))
    answer = cli(*(word.format(config=path) for word in words))
    assert answer.code == 2
    assert message in answer.text
    assert "Traceback" not in answer.text
