"""The predictions of `infer` equal those of a plain loop over the same batches, bit for bit.

The loops here use torch and numpy alone; nothing of gradrun makes the expected values.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gradrun
from gradrun.data import prefetch

# torch.jit is deprecated, but its files are still in use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

ROOT = Path(__file__).parents[2]
BATCH, SAMPLES = 16, 70  # four whole batches and one of six
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
FORMATS = ("npy", "safetensors", "jsonl")
SOURCES = ("zoo", "layers", "python", "torchscript", "exported")
LAYERS = [{"Conv2d": [1, 4, 3]}, {"BatchNorm2d": 4}, "ReLU", "Flatten", {"Linear": [144, 10]}]
IMAGE = {"dtype": "float32", "scale": 0.0625, "shape": [1, 8, 8]}
RUN = {"threads": 1, "warmup": 1, "device": "cpu"}

NETS = """
import dataclasses
import typing
import torch
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(144, 10))


class Add(nn.Module):
    def forward(self, *, left, right):
        return left + 3 * right


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2).add_(1).sum(1)


class Flags(nn.Module):
    def forward(self, x):
        flags = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
        return torch.tensor([flags]).expand(len(x), 2)


class Many(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        low, high = x.amin(1), x * 2
        return {"tuple": (low, high), "list": [low, high], "dict": {"low": low, "high": high},
                "dataclass": Pair(low, high), "named": Named(low, high),
                "nested": ({"low": low}, (high,))}[self.kind]


@dataclasses.dataclass
class Pair:
    low: torch.Tensor
    high: torch.Tensor


class Named(typing.NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


trained = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5))
nn.init.uniform_(trained[1].weight, generator=torch.Generator().manual_seed(7))
nn.init.zeros_(trained[1].bias)
"""


@dataclass
class Files:
    """A network with random weights in the format of every source, and its data."""

    folder: Path
    images: np.ndarray

    def model(self, source: str) -> dict[str, Any]:
        path = {"torchscript": "net.pt", "exported": "net.pt2"}.get(source, "net.safetensors")
        file = str(self.folder / path)
        return {
            "zoo": {"source": source, "name": "digits_cnn"},
            "layers": {"source": source, "layers": LAYERS, "weights": file},
            "python": {"source": source, "target": self.target("Net"), "weights": file},
            "torchscript": {"source": source, "path": file},
            "exported": {"source": source, "path": file},
        }[source]

    def target(self, name: str) -> str:
        return f"{self.folder / 'equality_nets.py'}:{name}"

    def by_hand(self, source: str) -> Callable[..., torch.Tensor]:
        if source == "zoo":
            module = runpy.run_path(str(ROOT / "models/digits_cnn.py"))["build"]()
            module.load_state_dict(load_file(ROOT / "models/digits_cnn.safetensors"))
            return module.eval()
        if source == "torchscript":
            return torch.jit.load(self.folder / "net.pt").eval()
        if source == "exported":
            return torch.export.load(self.folder / "net.pt2").module()
        module = net()
        module.load_state_dict(load_file(self.folder / "net.safetensors"))
        return module.eval()

    @property
    def data(self) -> dict[str, Any]:
        return {
            "source": "arrays",
            "path": str(self.folder / "images.npy"),
            "inputs": {"image": IMAGE},
            "batch_size": BATCH,
        }

    def batches(self) -> Iterator[torch.Tensor]:
        """The batches of the data section."""
        for start in range(0, SAMPLES, BATCH):
            rows = torch.from_numpy(self.images[start : start + BATCH])
            yield (rows.to(torch.float32) * 0.0625).reshape(-1, 1, 8, 8)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("equality")
    images = np.load(ROOT / "configs/digits.npz")["images"][:SAMPLES].copy()
    np.save(folder / "images.npy", images)
    (folder / "equality_nets.py").write_text(NETS)
    torch.manual_seed(3)
    module = net()
    module(torch.randn(64, 1, 8, 8))  # gives batch norm running statistics
    module.eval()
    save_file(module.state_dict(), folder / "net.safetensors")
    example = torch.zeros(BATCH, 1, 8, 8)
    torch.jit.save(torch.jit.script(module), folder / "net.pt")
    # Before torch 2.7, strict is the default, and fails after many compilations in the process.
    export = partial(torch.export.export, module, (example,), strict=False)
    any_size = export(dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(any_size, folder / "net.pt2")
    torch.export.save(export(), folder / "fixed.pt2")
    return Files(folder, images)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: sums over several threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def predict(files: Files, tmp_path: Path) -> Callable[..., torch.Tensor]:
    """Run `infer` over the images and read the predictions."""

    def run(
        model: dict[str, Any], form: str = "npy", name: str = "", **sections: dict[str, Any]
    ) -> torch.Tensor:
        config = {
            "model": model,
            "data": files.data | sections.get("data", {}),
            "run": RUN | sections.get("run", {}),
            "measure": {"memory": False} | sections.get("measure", {}),
            "output": {"path": str(tmp_path / "out"), "format": form} | sections.get("output", {}),
        }
        gradrun.infer(config, trust_code=True, overwrite=True)
        return read(tmp_path / "out", form, name)

    return run


def read(folder: Path, form: str, name: str = "") -> torch.Tensor:
    if form == "npy":
        file = f"predictions.{name}.npy" if name else "predictions.npy"
        return torch.from_numpy(np.load(folder / file))
    name = name or "prediction"
    if form == "safetensors":
        parts = sorted(folder.glob("predictions-*.safetensors"))
        return torch.cat([load_file(part)[name] for part in parts])
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(len(lines)))
    return torch.tensor([line[name] for line in lines], dtype=torch.float32)


def loop(
    model: Callable[..., torch.Tensor], batches: Iterator[torch.Tensor], mode: str
) -> torch.Tensor:
    """The plain loop that is the reference."""
    outputs = []
    for batch in batches:
        with MODES[mode]():
            outputs.append(model(batch))
    return torch.cat([rows.detach() for rows in outputs])


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.numpy().tobytes() == theirs.numpy().tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_and_format_gives_the_bits_of_a_plain_loop(
    files: Files, predict: Callable[..., torch.Tensor], source: str, form: str, mode: str
) -> None:
    ours = predict(files.model(source), form, run={"mode": mode})
    assert_same_bits(ours, loop(files.by_hand(source), files.batches(), mode))


def test_warm_up_and_memory_passes_do_not_affect_the_predictions(
    files: Files, predict: Callable[..., torch.Tensor]
) -> None:
    ours = predict(files.model("layers"), run={"warmup": "auto"}, measure={"memory": True})
    assert_same_bits(ours, loop(files.by_hand("layers"), files.batches(), "inference_mode"))


@pytest.mark.parametrize("seed", [0, 5])
def test_random_weights_equal_those_of_torch_with_the_same_seed(
    files: Files, predict: Callable[..., torch.Tensor], seed: int
) -> None:
    ours = predict({"source": "layers", "layers": LAYERS}, run={"seed": seed})
    torch.manual_seed(seed)
    assert_same_bits(ours, loop(net().eval(), files.batches(), "inference_mode"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_model_dtype_casts_weights_and_inputs(
    files: Files, predict: Callable[..., torch.Tensor], dtype: str
) -> None:
    kind = getattr(torch, dtype)
    ours = predict(files.model("layers") | {"dtype": dtype})
    theirs = loop(
        files.by_hand("layers").to(kind), (b.to(kind) for b in files.batches()), "inference_mode"
    )
    # numpy has no bfloat16, and float32 represents all of its values.
    assert_same_bits(ours, theirs.float() if dtype == "bfloat16" else theirs)


def test_channels_last_gives_the_bits_of_a_loop_in_channels_last(
    files: Files, predict: Callable[..., torch.Tensor]
) -> None:
    model = files.by_hand("layers").to(memory_format=torch.channels_last)
    ours = predict(files.model("layers") | {"channels_last": True})
    assert_same_bits(ours, loop(model, files.batches(), "inference_mode"))


@pytest.mark.parametrize("mode", MODES)
def test_autocast_gives_the_bits_of_a_loop_under_autocast(
    files: Files, predict: Callable[..., torch.Tensor], mode: str
) -> None:
    ours = predict(files.model("layers"), run={"autocast": "bfloat16", "mode": mode})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = loop(files.by_hand("layers"), files.batches(), mode)
    assert theirs.dtype == torch.bfloat16
    assert_same_bits(ours, theirs.float())


@pytest.mark.parametrize("mode", MODES)
def test_training_mode_equals_a_seeded_loop_with_dropout_and_batch_norm(
    files: Files, predict: Callable[..., torch.Tensor], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "gradrun_file_equality_nets", raising=False)
    theirs = runpy.run_path(str(files.folder / "equality_nets.py"))["trained"]
    ours = predict(
        {"source": "python", "target": files.target("trained"), "training": True},
        run={"mode": mode, "seed": 11, "warmup": 3},
        measure={"memory": True},
    )
    torch.manual_seed(11)
    expected = loop(theirs.train(), files.batches(), mode)
    assert (expected == 0).any(), "dropout is active"
    assert_same_bits(ours, expected)
    # The batches of warm-up and memory pass must not affect batch norm.
    seen = sys.modules["gradrun_file_equality_nets"].trained[2]
    assert int(seen.num_batches_tracked) == len(list(files.batches()))
    assert_same_bits(seen.running_mean, theirs[2].running_mean)
    assert_same_bits(seen.running_var, theirs[2].running_var)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_changes_its_input_does_not_change_the_data(
    files: Files, predict: Callable[..., torch.Tensor], tmp_path: Path, mode: str, form: str
) -> None:
    values = files.images.astype(np.float32)
    np.save(tmp_path / "floats.npy", values)
    before = (tmp_path / "floats.npy").read_bytes()
    data = {"path": str(tmp_path / "floats.npy"), "inputs": {"x": {}}}
    ours = predict(
        {"source": "python", "target": files.target("InPlace")}, form, data=data, run={"mode": mode}
    )
    theirs = [
        (torch.from_numpy(values[i : i + BATCH]) * 2 + 1).sum(1) for i in range(0, SAMPLES, BATCH)
    ]
    assert_same_bits(ours, torch.cat(theirs))
    assert (tmp_path / "floats.npy").read_bytes() == before


@pytest.mark.parametrize(
    ("mode", "flags"),
    [("grad", [True, False]), ("no_grad", [False, False]), ("inference_mode", [False, True])],
)
def test_every_batch_runs_in_the_configured_mode(
    files: Files, predict: Callable[..., torch.Tensor], mode: str, flags: list[bool]
) -> None:
    model = {"source": "python", "target": files.target("Flags")}
    assert predict(model, run={"mode": mode}).tolist() == [flags] * SAMPLES


@pytest.mark.parametrize("form", FORMATS)
def test_several_inputs_are_passed_by_name(
    files: Files, predict: Callable[..., torch.Tensor], tmp_path: Path, form: str
) -> None:
    left, right = np.random.default_rng(0).random((2, SAMPLES, 3), np.float32)
    np.savez(tmp_path / "both.npz", a=left, b=right)
    data = {
        "path": str(tmp_path / "both.npz"),
        "inputs": {"right": {"key": "b"}, "left": {"key": "a"}},
    }
    ours = predict({"source": "python", "target": files.target("Add")}, form, data=data)
    assert_same_bits(ours, torch.from_numpy(left) + 3 * torch.from_numpy(right))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("tuple", "0", "1"),
        ("list", "0", "1"),
        ("dict", "low", "high"),
        ("dataclass", "low", "high"),
        ("named", "low", "high"),
        ("nested", "0.low", "1.0"),
    ],
)
def test_every_output_of_a_model_is_written_under_its_name(
    files: Files, predict: Callable[..., torch.Tensor], kind: str, low: str, high: str, form: str
) -> None:
    model = {"source": "python", "target": files.target("Many"), "args": {"kind": kind}}
    data = {"inputs": {"image": {"dtype": "float32"}}}
    pixels = torch.from_numpy(files.images).float()
    assert_same_bits(predict(model, form, low, data=data), pixels.amin(1))
    assert_same_bits(predict(model, form, high, data=data), pixels * 2)


def test_a_program_of_fixed_batch_size_gives_the_bits_of_padding_by_hand(
    files: Files, predict: Callable[..., torch.Tensor]
) -> None:
    path = files.folder / "fixed.pt2"
    ours = predict({"source": "exported", "path": str(path)})
    program = torch.export.load(path).module()
    outputs = []
    for batch in files.batches():
        full = torch.cat([batch, batch[-1:].expand(BATCH - len(batch), 1, 8, 8)])
        with torch.inference_mode():
            outputs.append(program(full)[: len(batch)])
    assert_same_bits(ours, torch.cat(outputs))


@pytest.mark.parametrize("data", ["arrays", "records"])
def test_prefetching_changes_no_bit(
    files: Files,
    predict: Callable[..., torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: str,
) -> None:
    rows = [{"pixels": image.tolist()} for image in files.images]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = {
        "source": "records",
        "path": str(tmp_path / "rows.jsonl"),
        "inputs": {"image": IMAGE | {"columns": ["pixels"]}},
    }
    threads = []
    monkeypatch.setattr(
        "gradrun.inference.runner.prefetch",
        lambda *given: threads.append(1) or prefetch.prefetch(*given),
    )
    expected = loop(files.by_hand("layers"), files.batches(), "inference_mode")
    for worth, used in ((float("inf"), 0), (0.0, 1)):
        monkeypatch.setattr(prefetch, "MIN_SECONDS", worth)
        ours = predict(files.model("layers"), data=records if data == "records" else {})
        assert len(threads) == used
        assert_same_bits(ours, expected)


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_gives_the_bits_of_a_compiled_loop(
    files: Files, predict: Callable[..., torch.Tensor]
) -> None:
    ours = predict(files.model("layers") | {"compile": True}, data={"batch_size": 35})
    model = torch.compile(files.by_hand("layers"))
    halves = torch.cat(list(files.batches())).split(35)
    assert_same_bits(ours, loop(model, iter(halves), "inference_mode"))
