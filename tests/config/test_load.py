"""Loading configs: values, locations of errors, paths and mappings."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode
from tests.support.config_files import CONFIG, errors, write


def test_a_valid_config_has_its_values_and_defaults():
    config = load_config(write()).config
    assert config.data.samples == 7
    assert config.run.mode is GradMode.NO_GRAD
    assert config.output.format == "npy"


# --- locations ------------------------------------------------------------------------------------

UNKNOWN = "unknown key; did you mean"
PLACED = {
    "an unknown key": ("samples:", "smples:", "7:3", f"data.smples: {UNKNOWN} samples?"),
    "an unknown section": ("run:", "runs:", "8:1", f"runs: {UNKNOWN} run?"),
    "a missing key": ("\n  samples: 7", "", "4:1", "data.samples: is missing"),
    "a missing source": ("  source: layers\n", "", "1:1", "model.source: is missing; one of zoo,"),
    "a source of another section": (
        "source: layers",
        "source: layer",
        "2:11",
        "model.source: unknown source 'layer'; did you mean layers?",
    ),
    "a duplicate key": (
        "  samples: 7",
        "  samples: 7\n  samples: 8",
        "8:3",
        "data.samples: duplicate key (first in line 7)",
    ),
    "text for a number": ("7", "seven", "7:12", "data.samples: 'seven' is not an integer"),
    "a quoted number": ("7", "'7'", "7:12", "data.samples: '7' is not an integer"),
    "a fraction": ("7", "7.5", "7:12", "data.samples: 7.5 is not an integer"),
    "a list": ("7", "[7]", "7:12", "data.samples: a list is not an integer"),
    "a section": ("7", "{a: 7}", "7:12", "data.samples: a section is not an integer"),
    "nothing": ("samples: 7", "samples:", "7:11", "data.samples: null is not an integer"),
    "a boolean": ("7", "true", "7:12", "data.samples: true is not an integer"),
    "too small a number": ("7", "0", "7:12", "data.samples: 0 must be more than 0"),
    "too great a number": ("7", "9" * 30, "7:12", f"data.samples: {'9' * 30} must be at most"),
    "no number at all": ("7", ".inf", "7:12", "data.samples: inf is not an integer"),
    "an unknown mode": ("no_grad", "nograd", "9:9", "'nograd'; did you mean no_grad? (allowed: g"),
    "an unknown device": (
        "mode: no_grad",
        "device: gpu",
        "9:11",
        "allowed: auto, cpu, cuda, cuda:",
    ),
    "an unknown input key": ("shape: [4]", "shap: [4]", "6:16", f"data.inputs.x.shap: {UNKNOWN} "),
    "a bad item of a list": ("[4]}}", "[4, -1]}}", "6:27", "data.inputs.x.shape.1: -1 must be mo"),
    "a bad layer": ("ReLU", "[a]", "3:30", "model.layers.1: a layer is a name"),
    "no layers": ("[{Linear: [4, 3]}, ReLU]", "[]", "3:11", "has 0 entries; allowed: at least 1"),
    "an output that climbs": ("path: out", "path: a/../../b", "11:9", "contains '..'"),
    "an unknown home": ("path: out", "path: ~nobody-here/b", "11:9", "is not a valid path"),
    "a path with a NUL": ("path: out", 'path: "a\\0b"', "11:9", "is not a valid path"),
    "a path too long": (
        "path: out",
        "path: " + "x" * 300,
        "11:9",
        "valid path: File name too",
    ),
    "half a character": (
        "path: out",
        'path: "\\ud800"',
        "11:9",
        "half of a surrogate pair",
    ),
    "a tab": ("  samples", "\tsamples", "7:1", "invalid YAML: a tab; YAML is indented with spaces"),
    "an open bracket": ("[4]}}", "[4}}", "6:25", "invalid YAML: expected ',' or ']', but got '}'"),
    "an undefined alias": ("7", "*n", "7:12", "invalid YAML: found undefined alias 'n'"),
    "a recursive alias": ("7", "&n [*n]", "7:12", "recursive aliases (*name)"),
    "an own tag": ("7", "!mine 7", "7:12", "tag !mine is not allowed"),
    "a binary tag": ("7", "!!binary aGk=", "7:12", "tag !!binary is not allowed"),
    "a tag on a key": (
        "samples:",
        "!!python/name:os.system samples:",
        "7:3",
        "tag !!python/na",
    ),
    "a key of two words": ("samples:", "? [a, b]\n  :", "7:5", "a key must be a single word"),
    "a control character": ("samples", "s\x1bmples", "7:4", r"'\x1b' is not allowed"),
    "another document": ("run:", "---\nrun:", "8:1", "invalid YAML: but found another document"),
}


@pytest.mark.parametrize(("old", "new", "location", "text"), PLACED.values(), ids=PLACED.keys())
def test_an_error_has_line_column_and_caret(old, new, location, text):
    message = errors(old, new)
    first = next(line for line in message.splitlines() if line.startswith(f"c.yaml:{location}  "))
    assert text in first
    line, column = map(int, location.split(":"))
    shown = message.splitlines()[message.splitlines().index(first) + 1 :][:2]
    written = Path("c.yaml").read_text(encoding="utf-8").split("\n")[line - 1]
    assert shown == ["    " + written[:120].replace("\t", " "), "    " + " " * (column - 1) + "^"]


def test_all_errors_are_reported_in_the_order_of_lines():
    text = CONFIG.replace("mode: no_grad", "mode: nograd").replace("samples: 7", "samples: 7.5")
    Path("c.yaml").write_text(text.replace("path: out", "pth: out").replace("ReLU", "[]"))
    with pytest.raises(ConfigError) as caught:
        load_config("c.yaml")
    lines = [line for line in str(caught.value).splitlines() if line.startswith("c.yaml")]
    places = [line.split()[0] for line in lines]
    assert places == [f"c.yaml:{at}" for at in ("3:30", "7:12", "9:9", "10:1", "11:3")]


def test_long_lines_are_truncated_around_the_caret():
    message = errors("{x: {shape: [4]}}", "{x: {shape: [4]}}" + " " * 300 + "junk")
    line, caret = message.splitlines()[1:3]
    assert len(line) < 130
    assert line[caret.index("^") :].startswith("junk")


def test_a_python_tag_runs_nothing():
    message = errors("7", '!!python/object/apply:os.system ["touch marker"]')
    assert message.startswith("c.yaml:7:12  tag !!python/object/apply:os.system is")
    assert not Path("marker").exists()


# --- paths -------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_config(tmp_path, monkeypatch):
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "x.npy").write_bytes(b"")
    data = "source: arrays\n  path: x.npy"
    write("source: synthetic\n  inputs: {x: {shape: [4]}}\n  samples: 7", data)
    Path("c.yaml").rename(folder / "c.yaml")
    for place, name in [
        (tmp_path, "deep/c.yaml"),
        (folder, "c.yaml"),
        (Path("/"), folder / "c.yaml"),
    ]:
        monkeypatch.chdir(place)
        config = load_config(name).config
        assert config.data.path == folder / "x.npy"
        assert config.output.path == folder / "out"


def test_a_missing_data_file_is_reported_with_its_absolute_path(tmp_path):
    data = "source: arrays\n  path: sub/x.npy"
    message = errors("source: synthetic\n  inputs: {x: {shape: [4]}}\n  samples: 7", data)
    missing = tmp_path / "sub/x.npy"
    assert message.startswith(f"c.yaml:6:9  data.path: file {missing} does not exist")


def test_an_absolute_output_path_is_accepted(tmp_path):
    assert load_config(write("out\n", f"{tmp_path}/b\n")).config.output.path == tmp_path / "b"


def test_a_tilde_expands_to_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_config(write("out\n", "~/b\n")).config.output.path == tmp_path / "home/b"


# --- mappings -------------------------------------------------------------------------

MAPPING = {
    "model": {"source": "layers", "layers": ("ReLU",)},
    "data": {"source": "synthetic", "inputs": {"x": {"shape": (4,)}}, "samples": 7},
    "output": {"path": Path("out")},
}


def test_paths_of_a_mapping_are_relative_to_the_current_folder(tmp_path):
    config = load_config(MAPPING).config
    assert config.output.path == tmp_path / "out"
    assert config.data.inputs["x"].shape == (4,)


@pytest.mark.parametrize(
    "overrides",
    [["run.seed=3"], {"run.seed": 3}, {"run": {"seed": 3}}],
    ids=["texts", "dotted keys", "sections"],
)
def test_overrides_can_be_texts_or_a_mapping(overrides):
    before = repr(MAPPING)
    config = load_config(MAPPING | {"run": {"mode": "grad"}}, overrides).config
    assert (config.run.seed, config.run.mode) == (3, GradMode.GRAD)
    assert repr(MAPPING) == before


def test_an_unknown_key_in_overrides_is_reported():
    with pytest.raises(
        ConfigError, match=r"^override:1:1  run\.md: unknown key; did you mean mode"
    ):
        load_config(MAPPING, {"run": {"md": 1}})


def test_a_later_error_gets_the_location_of_its_key():
    loaded = load_config(write())
    with (
        pytest.raises(ConfigError, match=r"^c\.yaml:3:30  model\.layers\.1: odd\n"),
        loaded.error_locations(),
    ):
        raise ConfigError("odd", "model.layers.1")


def test_a_later_error_without_a_key_is_not_changed():
    with pytest.raises(ConfigError, match=r"^odd$"), load_config(write()).error_locations():
        raise ConfigError("odd")
