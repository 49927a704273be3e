"""Any mutated config either runs (exit code 0) or is a reported error (exit code 2)."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("GRADRUN_EXAMPLES", "80"))

MODELS: list[Any] = [
    {"source": "layers", "layers": [{"Linear": [4, 3]}, "ReLU", {"Linear": {"in_features": 3}}]},
    {"source": "layers", "layers": ["Tanh", {"Softmax": {"dim": 1}}], "dtype": "float64"},
    {"source": "zoo", "name": "mlp", "args": {"width": 4, "depth": 2}},
    {"source": "python", "target": "x.npy:Net", "args": {"width": 4}, "weights": "x.npz"},
    {"source": "torchscript", "path": "x.npz", "training": True},
]
MODELS[0]["layers"][2]["Linear"]["out_features"] = 2
DATA: list[Any] = [
    {
        "source": "synthetic",
        "inputs": {"x": {"shape": [4], "distribution": "uniform", "low": 0, "high": 2}},
        "samples": 7,
        "batch_size": 3,
    },
    {"source": "arrays", "path": "x.npy", "inputs": {"x": {"shape": [4], "scale": 0.5}}},
    {"source": "arrays", "inputs": {"i": {"path": "x.npz", "key": "a", "dtype": "float32"}}},
    {"source": "records", "path": "x.csv", "inputs": {"x": {"columns": ["a", "b"]}}, "id": "a"},
]
DATA[3]["inputs"]["x"]["columns"] *= 2
REST: dict[str, Any] = {
    "run": {"mode": "no_grad", "device": "cpu", "threads": 1, "seed": 1, "warmup": 0},
    "measure": {"memory": False},
}
OUTPUTS: list[Any] = [
    {"path": "out", "format": "jsonl", "transform": "topk", "k": 1},
    {"path": "out/a", "format": "safetensors", "transform": "softmax", "dim": 1},
    {"path": "out", "format": "npy", "select": ["0"]},
]

WORDS = """
    source layers name args weights weights_key dtype channels_last training path inputs
    shape distribution low high samples batch_size call key columns id mode device threads
    seed autocast warmup deterministic memory format select transform dim k model data run
    measure output zoo grad digits_cnn positional randint zeros float16 bool auto cuda mps
    argmax none x.npy x.npz x.csv a b Linear LazyLinear RNN Flatten Identity Embedding
    Dropout Sigmoid Sequential Module
""".split()
# Numbers are small or beyond every limit; runs with numbers in between would take hours.
NUMBERS = st.integers(-3, 9) | st.sampled_from([2**41, 2**63, -(2**63), 10**30, -(10**400)])
FLOATS = st.floats(-4, 4) | st.sampled_from([float("inf"), float("nan"), -0.0, 1e308, 5e-324])
NASTY = ["", "~", "~nobody-here/x", "..", "a/../../b", "[/]", "[bold]", "\x1b]0;x\x07", "\0", "名"]
TEXTS = st.sampled_from([*WORDS, *NASTY, "x" * 300]) | st.text(max_size=6).filter(
    lambda text: not text.startswith("/")  # an absolute output.path is allowed
)
SCALARS = st.none() | st.booleans() | NUMBERS | FLOATS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)
CHANGES = [*["tweak"] * 6, "drop", "rename", "replace", "wrap", "swap", "add"]
DAMAGE = [
    *" \n\t:,-#[]{}&*!|>'\"%@`?~.0e",
    "\n  ",
    "&a ",
    "*a",
    "!!set ",
    "<<: ",
    "\ufeff",
    "\\ud800",
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of a nested value, so that it can be changed."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    pairs = []
    for key in keys:
        pairs.append((value, key))
        if isinstance(value[key], dict | list):
            pairs += places(value[key])
    return pairs


def mutate(config: dict[str, Any], draw: Any) -> None:
    """Drop, rename, replace, wrap or swap a random value."""
    spots = places(config)
    if not spots:
        return
    holder, key = draw(st.sampled_from(spots))
    old = holder[key]
    match draw(st.sampled_from(CHANGES)):
        case "tweak" if isinstance(old, bool):
            holder[key] = not old
        case "tweak" if isinstance(old, int | float):
            holder[key] = draw(NUMBERS | FLOATS)
        case "tweak" if isinstance(old, str):
            holder[key] = draw(TEXTS)
        case "drop":
            del holder[key]
        case "rename" if isinstance(holder, dict):
            holder[draw(TEXTS)] = holder.pop(key)
        case "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"x": holder[key]}]))
        case "swap":
            other, name = draw(st.sampled_from(spots))
            holder[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(holder[key])
        case "add" if isinstance(holder, dict):
            holder[draw(TEXTS)] = draw(VALUES)
        case _:
            holder[key] = draw(VALUES)


def damage(text: str, draw: Any) -> str:
    at = draw(st.integers(0, len(text)))
    cut = draw(st.integers(0, 3))
    return text[:at] + draw(st.sampled_from(["", *DAMAGE])) + text[at + cut :]


@st.composite
def configs(draw: Any) -> str:
    one_of = [draw(st.sampled_from(choice)) for choice in (MODELS[:2] * 3 + MODELS, DATA, OUTPUTS)]
    config = copy.deepcopy(dict(zip(("model", "data", "output"), one_of, strict=True)) | REST)
    for _ in range(draw(st.integers(0, 3))):
        mutate(config, draw)
    text = yaml.safe_dump(config, allow_unicode=draw(st.booleans()), sort_keys=False)
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 3]))):
        text = damage(text, draw)
    # torch.compile would run a compiler for half a minute.
    return text.replace("compile", "kompile")


@pytest.fixture(scope="module")
def data_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = np.arange(20, dtype=np.float32).reshape(5, 4)
    np.save(folder / "x.npy", rows)
    np.savez(folder / "x.npz", a=rows, b=rows[:0])
    (folder / "x.csv").write_text("a,b\n1,2\n3,4\n")
    return folder


@pytest.mark.parametrize("output", range(len(OUTPUTS)))
@pytest.mark.parametrize("data", range(len(DATA)))
@pytest.mark.parametrize("model", range(3))
def test_the_unchanged_configs_run(cli, data_files, tmp_path, model, data, output):
    sections = {"model": MODELS[model], "data": DATA[data], "output": OUTPUTS[output]}
    for file in data_files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(sections | REST))
    assert cli("infer", tmp_path / "c.yaml").code == 0


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="GRADRUN_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(text=configs())
def test_a_mutated_config_never_causes_a_traceback(text, cli, data_files, monkeypatch):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in data_files.iterdir():
            (folder / file.name).symlink_to(file)
        monkeypatch.setenv("HOME", name)
        (folder / "c.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        answer = cli("infer", folder / "c.yaml")
        written = [path for path in folder.rglob("*") if path.name.startswith("predictions")]
        event(f"exit {answer.code}")
    assert answer.code in (0, 2), answer.text
    assert bool(written) == (answer.code == 0), answer.text
    assert "Traceback" not in answer.text
    assert "\x1b" not in answer.text
    if answer.code == 2:
        assert answer.err.startswith("error: ")
        assert not answer.out
