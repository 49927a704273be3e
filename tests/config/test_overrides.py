"""Overrides by --set."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradrun.config.load import load_config
from gradrun.core.grad_mode import GradMode
from tests.support.config_files import errors, write


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("run.mode=grad", "run", "mode", GradMode.GRAD),
        (" run.seed =3", "run", "seed", 3),
        ("data.batch_size= 5 # five", "data", "batch_size", 5),
        ("run.deterministic=true", "run", "deterministic", True),
        ("output.select=[a, b]", "output", "select", ("a", "b")),
        ("output.select='1'", "output", "select", ("1",)),
        ("model.weights_key=a=b", "model", "weights_key", "a=b"),
        ("model.weights_key='7'", "model", "weights_key", "7"),
        ("model.dtype=", "model", "dtype", None),
        ("measure.memory=false", "measure", "memory", False),
        ("measure={memory: false}", "measure", "memory", False),
    ],
)
def test_set_values_are_parsed_like_the_file(text, section, key, value):
    config = load_config(write(), [text]).config
    assert getattr(getattr(config, section), key) == value


def test_a_dash_is_standard_input():
    records = """
model: {source: layers, layers: [{Linear: [1, 1]}]}
data: {source: records, path: rows.csv, inputs: {x: {columns: [a]}}}
output: {path: out}
"""
    Path("c.yaml").write_text(records)
    config = load_config("c.yaml", ["data.path=-"]).config
    assert config.data.path == Path("-")


def test_the_last_set_of_a_key_wins():
    assert load_config(write(), ["run.seed=1", "run.seed=2"]).config.run.seed == 2


def test_set_replaces_a_whole_section():
    config = load_config(write(), ["data.inputs={y: {shape: [2]}}"]).config
    assert list(config.data.inputs) == ["y"]


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("run.mode=nograd", 10, "run.mode: unknown value 'nograd'; did you mean no_grad?"),
        ("run.md=grad", 8, "run.md: unknown key; did you mean mode?"),
        ("rn.mode=grad", 9, "rn: unknown key; did you mean run?"),
        ("run.mode.x=1", 12, "run.mode is not a section; cannot set keys below it"),
        ("model.layers.0=ReLU", 16, "model.layers is not a section"),
        ("run=5", 5, "run: 5 is not a section"),
        ("data.samples='7'", 14, "data.samples: '7' is not an integer"),
        ("data.samples=", 14, "data.samples: null is not an integer"),
        ("data.samples=[1", 16, "invalid YAML: expected ',' or ']'"),
        ("run.mode=!!python/name:os.system", 10, "tag !!python/name:os.system"),
        ("output.path=../x", 13, "contains '..'"),
        ("nothing", 1, "expected key.path=value"),
        ("=3", 1, "expected key.path=value"),
        ("a..b=3", 1, "expected key.path=value"),
    ],
)
def test_an_invalid_set_is_reported_with_its_location(text, column, message):
    first, shown, caret = errors("", "", text).splitlines()
    assert first.startswith(f"--set:1:{column}  ")
    assert message in first
    assert shown == f"    {text}"
    assert caret == "    " + " " * (column - 1) + "^"


def test_errors_of_the_file_and_of_set_are_reported_together():
    message = errors("samples: 7", "smples: 7", "run.md=1", "rn.mode=grad")
    places = [line.split()[0] for line in message.splitlines() if not line.startswith(" ")]
    assert places == ["--set:1:8", "--set:1:9", "c.yaml:4:1", "c.yaml:7:3"]
