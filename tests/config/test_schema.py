"""RunConfig: frozen, strict, closed, and the same after a round through JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from gradrun.config.check import LimitsSection
from gradrun.config.schema import RunConfig
from gradrun.core.grad_mode import GradMode

GOOD = {
    "model": {"source": "layers", "layers": [{"Linear": [4, 3]}, "ReLU"]},
    "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 7},
    "output": {"path": "out"},
}


def make(**sections) -> RunConfig:
    return RunConfig.model_validate_json(json.dumps(GOOD | sections))


def sections(kind: type[BaseModel] = RunConfig) -> set[type[BaseModel]]:
    """Every section class that a config can hold."""
    pending, found = [kind], set()
    while pending:
        part = pending.pop()
        if isinstance(part, type) and issubclass(part, BaseModel):
            found.add(part)
            pending += [field.annotation for field in part.model_fields.values()]
        else:
            pending += getattr(part, "__args__", ())
    return found


def test_every_section_is_frozen_strict_and_closed():
    assert len(sections()) >= 14
    for section in sections():
        settings = section.model_config
        # What else may be limited is a metric of the config's, which is checked there.
        unknown = "allow" if section is LimitsSection else "forbid"
        assert (settings["frozen"], settings["strict"], settings["extra"]) == (True, True, unknown)


@pytest.mark.parametrize("path", ["run", "run.mode", "data.samples", "model.layers", "output.path"])
def test_a_config_cannot_be_changed(path):
    config = make()
    *parents, name = path.split(".")
    section = getattr(config, parents[0]) if parents else config
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, name, getattr(section, name))


def test_a_config_survives_json():
    config = make(run={"mode": "grad", "threads": 2}, output={"path": "o", "select": ["a"]})
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_a_config_without_context_looks_for_no_files():
    config = make(model={"source": "torchscript", "path": "nowhere.pt"})
    assert config.model.path == Path("nowhere.pt")


def test_the_gradient_modes_are_texts():
    assert [str(mode) for mode in GradMode] == ["grad", "no_grad", "inference_mode"]
    assert make().run.mode is GradMode.INFERENCE_MODE


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "cuda:127", "mps"])
def test_a_device_is_one_that_torch_may_have(device):
    assert make(run={"device": device}).run.device == device


@pytest.mark.parametrize(
    "device", ["", "gpu", "cuda:", "cuda:-1", "cuda:1234", "cpu\n", "CPU", " cpu"]
)
def test_other_devices_are_refused(device):
    with pytest.raises(ValidationError):
        make(run={"device": device})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "../x"])
def test_a_selected_output_is_no_path(name):
    with pytest.raises(ValidationError, match=r"below output\.path"):
        make(output={"path": "o", "select": [name]})


@pytest.mark.parametrize(("given", "kept"), [("a", ("a",)), (["a", "1"], ("a", "1")), ([], ())])
def test_one_selected_output_needs_no_list(given, kept):
    assert make(output={"path": "o", "select": given}).output.select == kept


@pytest.mark.parametrize("target", ["mine.py:Net", "a/b.py:build", "pkg.mod:build", "pkg:x"])
def test_a_target_is_a_place_and_a_name(target):
    assert make(model={"source": "python", "target": target}).model.target == target


@pytest.mark.parametrize("target", ["", "mine.py", ":Net", "mine.py:", "mine.py:a b", "a.py:x()"])
def test_other_targets_are_refused(target):
    with pytest.raises(ValidationError, match="a target is"):
        make(model={"source": "python", "target": target})


def test_the_nouns_need_no_torch():
    code = (
        "import gradrun.config.schema, gradrun.config.load, sys; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
