"""Every model source gives the module that a config names, or says why there is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import nn

import gradrun
from gradrun.config.model import ModelConfig, PythonModel
from gradrun.core.errors import ConfigError, first_line
from gradrun.core.grad_mode import GradMode
from gradrun.inference.diagnosis import describe_model_error, explain_first_batch_failure
from gradrun.models import load_model
from gradrun.modes import grad_mode

# torch.jit announces its retirement; its files stay in use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

CPU = torch.device("cpu")
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def model(source: str, *, trust_code: bool = False, **keys: Any) -> nn.Module:
    config = {"source": source, **keys}
    parsed = TypeAdapter(ModelConfig).validate_json(json.dumps(config, default=str))
    return load_model(parsed, CPU, trust_code=trust_code)


def refused(source: str, *, trust_code: bool = False, **keys: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        model(source, trust_code=trust_code, **keys)
    return caught.value


# --- layers ------------------------------------------------------------------------------------


def test_layers_are_made_in_order_with_their_arguments() -> None:
    made = model(
        "layers",
        layers=[{"Linear": [4, 8]}, "ReLU", {"BatchNorm1d": 8}, {"Linear": {"in_features": 8,
                "out_features": 2, "bias": False}}],
    )  # fmt: skip
    assert [str(layer) for layer in made] == [
        "Linear(in_features=4, out_features=8, bias=True)",
        "ReLU()",
        str(nn.BatchNorm1d(8)),
        "Linear(in_features=8, out_features=2, bias=False)",
    ]
    assert made(X).shape == (5, 2)


@pytest.mark.parametrize("weights", [False, True])
def test_lazy_layers_take_their_size_from_the_data(tmp_path: Path, weights: bool) -> None:
    state = {"0.weight": torch.ones(3, 4), "0.bias": torch.zeros(3)}
    save_file(state, tmp_path / "w.safetensors")
    file = {"weights": tmp_path / "w.safetensors"} if weights else {}
    made = model("layers", layers=[{"LazyLinear": 3}], **file)
    assert made(X).shape == (5, 3)
    assert made[0].weight.shape == (3, 4)
    assert not weights or torch.equal(made[0].weight, state["0.weight"])


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("Relu", "no layer 'Relu'; did you mean ReLU"),
        ("functional", "no layer 'functional'"),
        ("__builtins__", "no layer"),
        ("os.system", "no layer"),
        ({"Linear": [4]}, "nn.Linear cannot be made with [4]"),
        ({"Linear": {"in": 4}}, "nn.Linear cannot be made with"),
        ({"Linear": ["a", "b"]}, "nn.Linear cannot be made with"),
        ({"Linear": [2**20, 2**22]}, "of weights, and"),
    ],
)
def test_a_layer_that_cannot_be_made_is_named(layer: Any, words: str) -> None:
    error = refused("layers", layers=["ReLU", layer])
    assert words in str(error)
    assert error.key == ("model.layers" if "of weights" in words else "model.layers.1")


# --- python ------------------------------------------------------------------------------------

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

OWN = {"mine", "beside", "bad", "some_package"}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of the user's, whose imports are undone."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    yield path
    for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
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
    made = model("python", target=f"{mine}:{name}", args=args, trust_code=True)
    assert made(X).shape == (5, width)
    assert (made.linear.bias is None) == ("bias" in args)
    assert not made.training


def test_a_target_is_anything_that_can_be_called(mine: Path) -> None:
    made = model("python", target=f"{mine}:call_me", trust_code=True)
    assert isinstance(made, nn.Tanh)


def test_a_target_is_found_in_a_package_of_the_folder(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = mine.parent / "some_package" / "deep"
    package.mkdir(parents=True)
    (package / "nets.py").write_text(MINE)
    monkeypatch.chdir(mine.parent)
    made = model("python", target="some_package.deep.nets:build", trust_code=True)
    assert made(X).shape == (5, 3)


def test_a_target_in_torch_itself_is_found() -> None:
    made = model("python", target="torch.nn:Linear", trust_code=True,
                 args={"in_features": 4, "out_features": 2})  # fmt: skip
    assert made(X).shape == (5, 2)


def test_a_target_imports_its_neighbours(mine: Path) -> None:
    (mine.parent / "beside.py").write_text("from mine import Net\n\n\nclass Beside(Net): pass\n")
    made = model("python", target=f"{mine.parent / 'beside.py'}:Beside", trust_code=True)
    assert made(X).shape == (5, 3)


@pytest.mark.parametrize("target", ["{mine}:Net", "mine:Net"])
def test_without_trust_nothing_is_imported(
    mine: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(mine.parent)
    error = refused("python", target=target.format(mine=mine))
    assert "--trust-code or GRADRUN_TRUST_CODE=1" in str(error)
    assert not (mine.parent / "imported").exists()
    model("python", target=target.format(mine=mine), trust_code=True)
    assert (mine.parent / "imported").exists(), "the mark would have shown it"


def test_the_environment_can_give_trust(
    mine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {
        "model": {"source": "python", "target": f"{mine}:Net"},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 2},
        "output": {"path": str(tmp_path / "out")},
    }
    for value in ("0", "", "true"):
        monkeypatch.setenv("GRADRUN_TRUST_CODE", value)
        with pytest.raises(ConfigError, match="--trust-code"):
            gradrun.infer(config)
    monkeypatch.setenv("GRADRUN_TRUST_CODE", "1")
    assert gradrun.infer(config).files == ("predictions.npy",)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("net", {}, "no 'net'; did you mean Net"),
        ("Nte", {}, "did you mean Net"),
        ("number", {}, "is the int 3, where a torch.nn.Module is wanted"),
        ("nothing", {}, "gives the NoneType None, where a torch.nn.Module is wanted"),
        ("broken", {}, "failed: ZeroDivisionError: division by zero"),
        ("broken", {}, "mine.py:"),
        ("leaves", {}, "failed: SystemExit"),
        ("Net", {"wide": 3}, "unexpected keyword argument 'wide'"),
        ("Builder", {}, "gives the Builder"),
    ],
)
def test_a_target_that_gives_no_module_is_explained(
    mine: Path, name: str, args: dict[str, Any], words: str
) -> None:
    error = refused("python", target=f"{mine}:{name}", args=args, trust_code=True)
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
def test_a_file_that_fails_to_import_is_explained(mine: Path, code: str, words: str) -> None:
    path = mine.with_name("bad.py")
    path.write_text(code)
    error = refused("python", target=f"{path}:Net", trust_code=True)
    assert f"importing {path} failed" in str(error)
    assert words in str(error)


def test_a_package_that_is_not_there_is_explained(mine: Path) -> None:
    error = refused("python", target="no_such_package.nets:Net", trust_code=True)
    assert "importing no_such_package.nets failed: ModuleNotFoundError" in str(error)


# --- files: torchscript and exported -----------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        hidden = self.linear(x)
        return {"out": hidden, "parts": (hidden * 2, x.sum(0))}


def program(path: Path, module: nn.Module, size: int, **sizes: int) -> Path:
    """An exported program for batches of `size`, or of the sizes that a Dim is given."""
    shapes = ({0: torch.export.Dim("n", **sizes)},) if sizes else None
    torch.export.save(torch.export.export(module, (X[:size],), dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("sizes", [{}, {"min": 3, "max": 8}], ids=["fixed", "at least 3"])
def test_a_batch_below_what_a_program_takes_is_padded_and_cut(
    tmp_path: Path, size: int, sizes: dict[str, int]
) -> None:
    module = Pair()
    made = model("exported", path=program(tmp_path / "p.pt2", module, 3, **sizes))
    padded = module(torch.cat([X[:size], X[size - 1 : size].expand(3 - size, 4)]))
    found = made(X[:size])
    assert torch.equal(found["out"], padded["out"][:size])
    assert torch.equal(found["parts"][0], padded["parts"][0][:size])
    assert torch.equal(found["parts"][1], padded["parts"][1]), "what has no row a sample is whole"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_program_of_any_batch_size_takes_every_size(tmp_path: Path, size: int) -> None:
    module = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    made = model("exported", path=program(tmp_path / "p.pt2", module, 3, min=1))
    assert torch.allclose(made(X[:size]), module(X[:size]))


@pytest.mark.parametrize("sizes", [{}, {"min": 1, "max": 3}], ids=["fixed", "at most 3"])
def test_a_batch_above_what_a_program_takes_is_refused_with_the_size_to_choose(
    tmp_path: Path, sizes: dict[str, int]
) -> None:
    path = program(tmp_path / "p.pt2", nn.Linear(4, 2), 3, **sizes)
    config = {
        "model": {"source": "exported", "path": str(path)},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 7},
        "output": {"path": str(tmp_path / "out")},
    }
    with pytest.raises(ConfigError, match=r"at most 3; set data\.batch_size to 3"):
        gradrun.infer(config)
    assert not (tmp_path / "out").exists()
    gradrun.infer(config, **{"data.batch_size": 3})
    assert np.load(tmp_path / "out/predictions.npy").shape == (7, 2)


@pytest.mark.parametrize("source", ["torchscript", "exported"])
def test_a_file_of_another_kind_is_refused_and_the_right_source_is_named(
    tmp_path: Path, source: str
) -> None:
    other = "exported" if source == "torchscript" else "torchscript"
    path = tmp_path / "model"
    if source == "torchscript":
        program(path, nn.Linear(4, 2), 3)
    else:
        torch.jit.save(torch.jit.script(nn.Linear(4, 2)), path)
    error = refused(source, path=path)
    assert other in str(error)
    assert error.key == "model.path"


@pytest.mark.parametrize("source", ["torchscript", "exported"])
@pytest.mark.parametrize("damage", ["empty", "text", "head", "tail", "state dict"])
def test_a_damaged_file_is_refused(tmp_path: Path, source: str, damage: str) -> None:
    path = tmp_path / "model"
    if source == "exported":
        program(path, nn.Linear(4, 2), 3)
    else:
        torch.jit.save(torch.jit.script(nn.Linear(4, 2)), path)
    whole = path.read_bytes()
    half = len(whole) // 2
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path / "state")
    state = (tmp_path / "state").read_bytes()
    cut = {"empty": b"", "text": b"hello" * 99, "head": whole[:half], "tail": whole[half:]}
    path.write_bytes({**cut, "state dict": state}[damage])
    assert refused(source, path=path).key == "model.path"


# --- what all sources share --------------------------------------------------------------------

EAGER: dict[str, Callable[[Path], dict[str, Any]]] = {
    "zoo": lambda _: {"name": "digits_cnn"},
    "layers": lambda _: {"layers": [{"Conv2d": [1, 2, 3]}, {"Dropout": 0.5}]},
    "python": lambda folder: {"target": f"{folder / 'mine.py'}:ready"},
    "torchscript": lambda folder: {"path": folder / "m.pt"},
}


@pytest.mark.parametrize("source", EAGER)
def test_type_and_training_flag_reach_every_eager_source(mine: Path, source: str) -> None:
    torch.jit.save(
        torch.jit.script(nn.Sequential(nn.Linear(4, 2), nn.Dropout())), mine.with_name("m.pt")
    )
    keys = EAGER[source](mine.parent)
    for training in (False, True):
        made = model(source, **keys, dtype="bfloat16", training=training, trust_code=True)
        assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
        assert all(module.training is training for module in made.modules())
    made = model(source, **keys, trust_code=True)
    assert not any(module.training for module in made.modules()), "eval() is the default"


def test_channels_last_lays_the_weights_out_so() -> None:
    made = model("zoo", name="digits_cnn", channels_last=True)
    weight = made.get_parameter("stage2.0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


@pytest.mark.parametrize("source", ["zoo", "layers", "python"])
def test_weights_from_a_file_reach_every_source_that_builds(mine: Path, source: str) -> None:
    keys = EAGER[source](mine.parent)
    state = model(source, **keys, trust_code=True).state_dict()
    state = {n: t + 1 if t.is_floating_point() else t.clone() for n, t in state.items()}
    save_file(state, mine.with_name("w.safetensors"))
    torch.save({"ema": state}, mine.with_name("w.pt"))
    for weights in ({"weights": mine.with_name("w.safetensors")},
                    {"weights": mine.with_name("w.pt"), "weights_key": "ema"}):  # fmt: skip
        made = model(source, **keys, **weights, trust_code=True).state_dict()
        assert all(torch.equal(made[name], state[name]) for name in state)


# --- refusals ----------------------------------------------------------------------------------


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
def test_a_refusal_of_a_file_names_the_input_and_what_was_wanted(
    tmp_path: Path, source: str
) -> None:
    path = tmp_path / "model"
    if source == "exported":
        program(path, nn.Linear(4, 2), 3)
    else:
        torch.jit.save(torch.jit.script(nn.Linear(4, 2)), path)
    text = refusal_of(model(source, path=path), torch.zeros(3, 9))
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


class Scaled(nn.Module):
    def forward(self, ids: torch.Tensor, feats: torch.Tensor) -> torch.Tensor:
        return feats * 2 + ids[:, None]


def test_a_program_exported_by_position_takes_inputs_by_name(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch")
    example = (torch.arange(6), torch.randn(6, 3))
    program = torch.export.export(Scaled(), example, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, tmp_path / "m.pt2")
    module = model("exported", path=str(tmp_path / "m.pt2"))
    ids, feats = torch.arange(4), torch.randn(4, 3)
    assert torch.equal(module(feats=feats, ids=ids), feats * 2 + ids[:, None])


class Writing(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.path)
        return x


def test_torchscript_that_writes_files_needs_trust(tmp_path: Path) -> None:
    marker = tmp_path / "written.pt"
    torch.jit.script(Writing(str(marker))).save(str(tmp_path / "m.pt"))
    with pytest.raises(ConfigError, match="uses save, which reaches beyond the model"):
        model("torchscript", path=str(tmp_path / "m.pt"))
    assert not marker.exists()
    is_trusted = model("torchscript", path=str(tmp_path / "m.pt"), trust_code=True)
    is_trusted(torch.ones(1))
    assert marker.exists(), "the attack is real"


def test_a_root_that_was_in_the_path_before_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "a")])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.py").write_text("from torch import nn\n\nNet = nn.ReLU\n")
        config = {"source": "python", "target": f"{tmp_path / name / 'net.py'}:Net"}
        load_model(PythonModel.model_validate(config), torch.device("cpu"), trust_code=True)
    assert str(tmp_path / "a") in sys.path
