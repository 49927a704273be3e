"""RunConfig: immutable, strictly typed, without unknown keys."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from gradrun.config.check import LimitsSection, RegressionSection
from gradrun.config.load import load_config
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
    """Return all section classes of a config."""
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
        # Other keys of these two are metrics, which RunConfig validates.
        unknown = "allow" if section in {LimitsSection, RegressionSection} else "forbid"
        assert (settings["frozen"], settings["strict"], settings["extra"]) == (True, True, unknown)


@pytest.mark.parametrize("path", ["run", "run.mode", "data.samples", "model.layers", "output.path"])
def test_a_config_is_immutable(path):
    config = make()
    *parents, name = path.split(".")
    section = getattr(config, parents[0]) if parents else config
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, name, getattr(section, name))


def test_a_config_round_trips_through_json():
    config = make(run={"mode": "grad", "threads": 2}, output={"path": "o", "select": ["a"]})
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_without_a_path_resolver_paths_stay_as_written():
    config = make(model={"source": "torchscript", "path": "nowhere.pt"})
    assert config.model.path == Path("nowhere.pt")


def test_gradient_modes_are_strings():
    assert [str(mode) for mode in GradMode] == ["grad", "no_grad", "inference_mode"]
    assert make().run.mode is GradMode.INFERENCE_MODE


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "cuda:127", "mps"])
def test_valid_devices_are_accepted(device):
    assert make(run={"device": device}).run.device == device


@pytest.mark.parametrize(
    "device", ["", "gpu", "cuda:", "cuda:-1", "cuda:1234", "cpu\n", "CPU", " cpu"]
)
def test_invalid_devices_are_rejected(device):
    with pytest.raises(ValidationError):
        make(run={"device": device})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "../x"])
def test_a_selected_output_must_not_be_a_path(name):
    with pytest.raises(ValidationError, match=r"below output\.path"):
        make(output={"path": "o", "select": [name]})


@pytest.mark.parametrize(("given", "selected"), [("a", ("a",)), (["a", "1"], ("a", "1")), ([], ())])
def test_a_single_selected_output_needs_no_list(given, selected):
    assert make(output={"path": "o", "select": given}).output.select == selected


@pytest.mark.parametrize("target", ["mine.py:Net", "a/b.py:build", "pkg.mod:build", "pkg:x"])
def test_valid_targets_are_accepted(target):
    assert make(model={"source": "python", "target": target}).model.target == target


@pytest.mark.parametrize("target", ["", "mine.py", ":Net", "mine.py:", "mine.py:a b", "a.py:x()"])
def test_invalid_targets_are_rejected(target):
    with pytest.raises(ValidationError, match="a target is"):
        make(model={"source": "python", "target": target})


def test_the_schema_does_not_import_torch():
    code = (
        "import gradrun.config.schema, gradrun.config.load, sys; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_replace_changes_keys_and_sections() -> None:
    config = make(check={"limits": {"accuracy": ">= 0.9"}})
    changed = config.replace({"run.mode": GradMode.GRAD, "output.path": Path("new"), "metrics": ()})
    assert (changed.run.mode, changed.output.path) == (GradMode.GRAD, Path("new"))
    assert (changed.data, changed.check) == (config.data, config.check)
    assert config.run.mode is GradMode.INFERENCE_MODE


@pytest.mark.parametrize("change", [{"run.threads": 0}, {"run.mod": "grad"}, {"run": 3}])
def test_replace_validates(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        make().replace(change)


@pytest.mark.parametrize(
    "transform",
    [
        "softmax",
        ["mean_pool", "normalize"],
        {"sent": "softmax"},
        {"sent": "softmax", "topic": ["topk"], "pooled": ["mean_pool", "normalize"]},
    ],
)
def test_transforms_survive_a_dump(transform: Any) -> None:
    output = {"path": "out", "transform": transform}
    base = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "synthetic", "inputs": {"x": {"shape": [2]}}, "samples": 4},
    }
    config = load_config(base | {"output": output}).config
    dumped = config.model_dump(mode="json")
    assert load_config(dumped).config == config
    if isinstance(transform, dict):
        assert dumped["output"]["transform"].keys() == transform.keys()


# --- model.compile -----------------------------------------------------------------------------


def with_compile(value: object, **sections: object) -> RunConfig:
    return make(model=GOOD["model"] | {"compile": value}, **sections)


def test_true_compiles_with_the_defaults_and_false_and_null_do_not():
    section = with_compile(True).model.compile
    assert section is not None
    assert section.model_dump() == {
        "backend": "inductor",
        "mode": None,
        "freezing": False,
        "dynamic": None,
    }
    assert with_compile({}).model.compile == section
    assert with_compile(False).model.compile is with_compile(None).model.compile is None


@pytest.mark.parametrize("value", [False, True, {"freezing": True, "dynamic": False}])
def test_the_compile_options_survive_json_and_a_replaced_key(value):
    config = with_compile(value)
    dumped = config.model_dump(mode="json")
    assert RunConfig.model_validate(dumped, strict=False) == config
    assert config.replace({"run.seed": 3}).model.compile == config.model.compile
    if not value:
        assert dumped["model"]["compile"] is False


@pytest.mark.parametrize("mode", ["mode", "freezing"])
def test_options_of_inductor_are_refused_for_other_backends(mode):
    value = {"mode": "max-autotune", "freezing": True}[mode]
    with pytest.raises(ValidationError, match=f"{mode} is an option of the backend inductor"):
        with_compile({"backend": "eager", mode: value})


def test_freezing_is_refused_in_grad_mode():
    with pytest.raises(ValidationError, match=r"mode grad cannot be combined with .*freezing"):
        with_compile({"freezing": True}, run={"mode": "grad"})
    assert with_compile({"freezing": True}, run={"mode": "no_grad"}).model.compile.freezing


def test_another_value_of_compile_is_refused_with_an_example():
    with pytest.raises(ValidationError, match="'yes' is not true, false or a map, such as"):
        with_compile("yes")
