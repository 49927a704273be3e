"""Reading YAML."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError
from tests.support.config_files import CONFIG, errors, write


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
