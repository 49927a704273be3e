"""The tuned file keeps the original's comments and order."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrun.config.load import load_config
from gradrun.tuning.facts import apply
from gradrun.tuning.rewrite import rewrite, write_tuned

BLOCK = """\
# My run.
model:
  source: layers        # no user code
  layers: [{Linear: [8, 4]}]
# The inputs.
data:
  source: synthetic
  inputs:
    x: {shape: [8]}     # features
  samples: 96
  batch_size: 8  # small

run:
  mode: grad

output: {path: runs/a}  # here
"""


def test_keys_are_changed_in_place_and_comments_stay() -> None:
    changes = {"run.mode": "no_grad", "run.allocator": "retain", "data.batch_size": 32}
    comments = {key: f"about {key}" for key in changes}
    text = rewrite(BLOCK, changes, comments, ["made by a test"])
    assert (
        text
        == """\
# made by a test
# My run.
model:
  source: layers        # no user code
  layers: [{Linear: [8, 4]}]
# The inputs.
data:
  source: synthetic
  inputs:
    x: {shape: [8]}     # features
  samples: 96
  # about data.batch_size
  batch_size: 32  # small

run:
  # about run.mode
  mode: no_grad
  # about run.allocator
  allocator: retain

output: {path: runs/a}  # here
"""
    )


def test_flow_sections_and_new_sections_get_their_keys() -> None:
    text = rewrite(
        "run: {mode: grad}\noutput: {path: a}\n",
        {"run.mode": "no_grad", "run.threads": 1, "tune.machine": {"torch": "2.13", "cpu": "A: B"}},
        {},
        [],
    )
    assert yaml.safe_load(text) == {
        "run": {"mode": "no_grad", "threads": 1},
        "output": {"path": "a"},
        "tune": {"machine": {"torch": "2.13", "cpu": "A: B"}},
    }
    assert text.startswith("run: {mode: no_grad, threads: 1}\n")


@pytest.mark.parametrize(
    "text",
    [
        "run:\noutput: {path: a}\n", "run: {}\noutput: {path: a}\n", "output: {path: a}",
        "run:\n  # nothing yet\noutput: {path: a}\n", "run: null\noutput: {path: a}\n",
    ],
)  # fmt: skip
def test_empty_and_missing_sections_are_filled(text: str) -> None:
    made = rewrite(text, {"run.allocator": "retain"}, {"run.allocator": "why"}, [])
    assert yaml.safe_load(made)["run"] == {"allocator": "retain"}
    assert yaml.safe_load(made)["output"] == {"path": "a"}


def test_a_scalar_becomes_a_map_and_a_block_map_a_value() -> None:
    change = {"model.compile": {"freezing": True}}
    made = rewrite("model:\n  compile: true # fast\n", change, {}, [])
    assert made == "model:\n  compile: {freezing: true} # fast\n"
    block = "model:\n  compile:\n    backend: inductor\n  dtype: float32\n"
    again = rewrite(block, change, {"model.compile": "why"}, [])
    expected = {"compile": {"freezing": True}, "dtype": "float32"}
    assert yaml.safe_load(again)["model"] == expected


def test_a_key_below_a_new_key_is_nested() -> None:
    made = rewrite(
        "model: {source: zoo}\n",
        {"model.compile": {"freezing": True}, "model.compile.mode": "max-autotune"},
        {},
        [],
    )
    assert yaml.safe_load(made)["model"]["compile"] == {"freezing": True, "mode": "max-autotune"}


_NAMES = st.sampled_from(["mode", "threads", "autocast", "allocator"])
_VALUES = st.one_of(st.booleans(), st.integers(0, 9), st.sampled_from(["a", "no", "1", "x: y", ""]))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(_NAMES, _VALUES, max_size=3),
    st.dictionaries(_NAMES, _VALUES, min_size=1, max_size=3),
    st.booleans(),
)
def test_any_change_of_any_section_reads_back(
    before: dict[str, object], changes: dict[str, object], flow: bool
) -> None:
    text = yaml.safe_dump({"first": 1, "run": before, "last": {"b": 2}}, default_flow_style=flow)
    made = rewrite(
        text, {f"run.{k}": v for k, v in changes.items()}, {f"run.{k}": "c" for k in changes}, []
    )
    assert yaml.safe_load(made) == {"first": 1, "run": before | changes, "last": {"b": 2}}


def test_relative_paths_are_kept_valid_in_another_folder(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", np.zeros((16, 8), np.float32))
    source = tmp_path / "c.yaml"
    source.write_text(
        "model: {source: layers, layers: [{Linear: [8, 4]}]}\n"
        "data: {source: arrays, path: x.npy, batch_size: 8}\noutput: {path: out}\n"
    )
    config = load_config(source).config
    changes = {"run.allocator": "system"}
    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "t.yaml"
    expected = apply(config, changes)
    target.write_text(write_tuned(source, target, config, expected, changes, {}, ["h"]))
    loaded = load_config(target).config
    assert loaded.input_files()[0].samefile(tmp_path / "x.npy")
    assert loaded.output.path == tmp_path / "out"
    assert target.read_text().startswith("# h\nmodel: {source: layers")


def test_comments_stay_where_code_beside_the_config_is_used(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\nclass Net(nn.Identity): pass\n")
    source = tmp_path / "c.yaml"
    source.write_text(
        "# mine\nmodel: {source: python, target: 'net.py:Net'}  # the code\noutput: {path: out}\n"
        "data: {source: synthetic, inputs: {x: {shape: [8]}}, samples: 8, batch_size: 8}\n"
    )
    config = load_config(source).config
    changes = {"data.batch_size": 4}
    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "t.yaml"
    made = write_tuned(source, target, config, apply(config, changes), changes, {}, ["h"])
    assert "model: {source: python, target: ../net.py:Net}  # the code\n" in made
    target.write_text(made)
    loaded = load_config(target).config
    file = loaded.model.target.rpartition(":")[0]  # type: ignore[union-attr]
    assert Path(file).samefile(tmp_path / "net.py")


def test_anchors_fall_back_to_the_whole_config(tmp_path: Path) -> None:
    source = tmp_path / "c.yaml"
    source.write_text(
        "model: {source: layers, layers: [{Linear: [8, 4]}]}\n"
        "data: {source: synthetic, inputs: {x: {shape: [8]}}, samples: &n 8, batch_size: *n}\n"
        "output: {path: out}\n"
    )
    config = load_config(source).config
    changes = {"data.batch_size": 4}
    expected = apply(config, changes)
    target = tmp_path / "t.yaml"
    why = {"data.batch_size": "tune: 8 before"}
    target.write_text(write_tuned(source, target, config, expected, changes, why, ["h"]))
    lines = target.read_text().splitlines()
    assert lines[0] == "# h"
    assert "could not be changed in place" in lines[1]
    assert lines[2] == "# data.batch_size: tune: 8 before"
    assert load_config(target).config.model_dump() == expected.model_dump()
    assert not list(tmp_path.glob(".*draft"))
