"""The starter config is valid, also for a model in the user's code."""

from __future__ import annotations

import pytest
import yaml

from gradrun.config.load import load_config
from gradrun.config.model import PythonModel
from gradrun.config.template import config_template


def test_the_starter_is_valid_and_names_the_alternatives(tmp_path):
    (tmp_path / "c.yaml").write_text(config_template())
    config = load_config(tmp_path / "c.yaml").config
    assert config.output.path == tmp_path / "runs/first"
    assert config_template().count("#") >= 8
    for word in ("zoo", "python", "torchscript", "exported", "arrays", "records", "no_grad"):
        assert word in config_template()


@pytest.mark.parametrize("text", [config_template(), config_template("nets/mine.py:Net")])
def test_lines_have_at_most_100_characters(text):
    assert max(map(len, text.splitlines())) <= 100
    assert "%" not in text


def test_the_commented_lines_are_valid(tmp_path):
    text = config_template().replace("  # weights: weights.safetensors", "  weights: w.safetensors")
    for line in ("source: synthetic", "inputs: {x", "samples: 10000"):
        text = text.replace(f"  {line}", f"  # {line}")
    text = text.replace("# source: arrays", "source: arrays").replace("# path: in", "path: in")
    (tmp_path / "c.yaml").write_text(text)
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "inputs.npy").touch()
    config = load_config(tmp_path / "c.yaml").config
    assert config.data.source == "arrays"
    assert config.model.weights == tmp_path / "w.safetensors"


@pytest.mark.parametrize(
    "target", ["nets/mine.py:Net", "a b.py:Net", "#a.py:Net", "a: #b.py:Net", "x\x1b%s'\".py:Net"]
)
def test_any_target_is_inserted(target):
    model = yaml.safe_load(config_template(target))["model"]
    assert PythonModel.model_validate(model).target == target


def test_a_plain_target_is_not_quoted():
    assert "target: nets/mine.py:Net\n" in config_template("nets/mine.py:Net")
