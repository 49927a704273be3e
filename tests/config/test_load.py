"""Loading configs: locations of errors, YAML, paths and overrides."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode

CONFIG = """\
model:
  source: layers
  layers: [{Linear: [4, 3]}, ReLU]
data:
  source: synthetic
  inputs: {x: {shape: [4]}}
  samples: 7
run:
  mode: no_grad
output:
  path: out
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(old: str = "", new: str = "") -> str:
    assert CONFIG.count(old) == 1 or not old
    Path("c.yaml").write_text(CONFIG.replace(old, new) if old else CONFIG, encoding="utf-8")
    return "c.yaml"


def errors(old: str = "", new: str = "", *sets: str) -> str:
    """Return the errors of loading the config with `old` replaced by `new`."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(old, new), sets)
    return str(caught.value)


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


# --- YAML --------------------------------------------------------------------


def test_anchors_and_aliases_work():
    config = load_config(write("samples: 7", "samples: &n 7\n  batch_size: *n")).config
    assert (config.data.samples, config.data.batch_size) == (7, 7)


@pytest.mark.parametrize("kind", ["list", "map"])
def test_an_alias_bomb_is_rejected_quickly(kind):
    level = "[{}]" if kind == "list" else "{{{}}}"
    text = "a0: &a0 x\n"
    for i in range(1, 40):
        items = [f"k{j}: *a{i - 1}" if kind == "map" else f"*a{i - 1}" for j in range(9)]
        text += f"a{i}: &a{i} {level.format(', '.join(items))}\n"
    Path("c.yaml").write_text(text)
    began = time.perf_counter()
    with pytest.raises(ConfigError, match="recursive aliases"):
        load_config("c.yaml")
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("text", ["[" * 5000, "[" * 900 + "]" * 900, "a: " + "{a: " * 3000])
def test_deep_nesting_is_rejected(text):
    Path("c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^c\.yaml"):
        load_config("c.yaml")


def test_a_long_config_is_read_quickly():
    began = time.perf_counter()
    errors("ReLU", "[x], " * 9_000)
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("~", None),
        ("null", None),
        ("|\n    two\n    lines", "two\nlines\n"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    zoo = f"source: zoo\n  name: mlp\n  args:\n   v: {text}"
    config = load_config(write("source: layers\n  layers: [{Linear: [4, 3]}, ReLU]", zoo)).config
    found = config.model.args["v"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "---\n", "%YAML 1.2\n---\n"])
def test_byte_order_marks_and_crlf_are_accepted(start, ending):
    Path("c.yaml").write_bytes((start + CONFIG).replace("\n", ending).encode())
    assert load_config("c.yaml").config.data.samples == 7


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"model:\n  \xff", "c.yaml: byte 9 is not UTF-8 text"),
        (CONFIG.encode("utf-16"), "c.yaml: byte 0 is not UTF-8 text"),
        (CONFIG.encode() + b"#" + b"x" * 2**20, "c.yaml: larger than 1 MiB"),
        (b"", "c.yaml  the file is empty; `gradrun init` writes a starter"),
        (b"# only words\n", "c.yaml  the file is empty; `gradrun init` writes a starter"),
        (b"hello", "c.yaml:1:1  a config is a mapping with the sections"),
        (b"- a\n- b\n", "c.yaml:1:1  a config is a mapping with the sections"),
    ],
)
def test_a_file_that_is_not_a_config_is_rejected_with_one_sentence(raw, text):
    Path("c.yaml").write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        load_config("c.yaml")
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("name", ["none.yaml", ".", "x" * 300, "a\0b"])
def test_a_config_that_cannot_be_opened_is_an_error(name):
    with pytest.raises(ConfigError, match=r"cannot be read|is a folder, not a YAML file"):
        load_config(name)


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


# --- --set -------------------------------------------------------------------------------------


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
