"""Golden outputs: writing, reading and describing differences."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gradrun.checks import golden
from gradrun.core.errors import ConfigError, GradrunError

RNG = np.random.default_rng(0)


def test_written_outputs_compare_equal(tmp_path):
    outputs = {
        "floats": RNG.standard_normal((50, 3, 2)).astype(np.float32),
        "halves": RNG.standard_normal((50, 3)).astype(np.float16),
        "classes": RNG.integers(0, 9, 50),
        "flags": RNG.integers(0, 2, (50, 1)).astype(bool),
        "holes": np.where(RNG.integers(0, 2, 50), np.nan, 1.0),
        "nothing": np.zeros((50, 0), np.float32),
    }
    golden.write(tmp_path / "new" / "g.safetensors", outputs)
    assert golden.compare_with_file(tmp_path / "new" / "g.safetensors", outputs, 0, 0) == {}
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["g.safetensors"]


def test_a_difference_has_its_first_sample_count_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "_CHUNK_BYTES", 7 * 12)
    rows = RNG.standard_normal((50, 3)).astype(np.float32)
    golden.write(tmp_path / "g.safetensors", {"a": rows, "b": rows, "c": np.arange(50)})
    changed, classes = rows.copy(), np.arange(50)
    changed[[13, 40], 1] += 0.5
    changed[3] *= 1 + 1e-6
    classes[49] = 0
    now = {"a": changed, "d": rows, "c": classes}
    found = golden.compare_with_file(tmp_path / "g.safetensors", now, 1e-4, 1e-5)
    assert found == {
        "a": "differs in 2 samples of 50, first at 13, by up to 0.5",
        "b": "is missing",
        "c": "differs in 1 sample of 50, first at 49, by up to 49",
        "d": "is new",
    }


@pytest.mark.parametrize("now", [np.zeros((49, 3), np.float32), np.zeros((50, 3))])
def test_another_shape_or_dtype_is_a_difference(tmp_path, now):
    golden.write(tmp_path / "g.safetensors", {"a": np.zeros((50, 3), np.float32)})
    (text,) = golden.compare_with_file(tmp_path / "g.safetensors", {"a": now}, 1, 1).values()
    assert "expected [50, 3] float32" in text


FILES = ("predictions.a.npy", "predictions.b.npy")


def test_runs_are_compared_file_by_file(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    rows = RNG.standard_normal((50, 3)).astype(np.complex64)
    for folder in (one, other):
        folder.mkdir()
        np.save(folder / "predictions.a.npy", rows)
    assert golden.compare_runs(other, one, FILES[:1], 0, 0) == {}
    rows[17] *= 1j  # the same absolute value
    np.save(one / "predictions.a.npy", rows)
    np.save(one / "predictions.b.npy", rows)
    found = golden.compare_runs(other, one, FILES, 1e-4, 1e-5)
    assert found["a"].startswith("differs in 1 sample of 50, first at 17, by up to ")
    assert not found["a"].endswith("by up to 0")
    assert found["b"] == "is new"


LINES = [
    {"id": 0, "prediction": [1.0, 2.0]},
    {"id": 1, "prediction": [3.0], "label": "cat"},
    {"id": 2, "prediction": None},
]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"id": 1, "prediction": [3.0000001], "label": "cat"}, ""),
        ({"id": 1, "prediction": [3.1], "label": "cat"}, "differs in 1 sample of 3, first at 1"),
        (
            {"id": 1, "prediction": [3.0, 0.0], "label": "cat"},
            "differs in 1 sample of 3, first at 1",
        ),
        ({"id": 1, "prediction": [3.0], "label": "dog"}, "differs in 1 sample of 3, first at 1"),
        ({"id": 1, "prediction": None, "label": "cat"}, "differs in 1 sample of 3, first at 1"),
        ({"id": 1, "prediction": [3.0]}, "differs in 1 sample of 3, first at 1"),
        (None, "has fewer samples than the reference"),
    ],
)
def test_rows_of_different_shapes_are_compared_line_by_line(tmp_path, line, text):
    changed = [LINES[0], *([line] if line else []), LINES[2]]
    for name, lines in (("one", changed), ("other", LINES)):
        (tmp_path / name).mkdir()
        content = "".join(json.dumps(each) + "\n" for each in lines)
        (tmp_path / name / "predictions.jsonl").write_text(content)
    found = golden.compare_runs(
        tmp_path / "other", tmp_path / "one", ("predictions.jsonl",), 1e-4, 1e-5
    )
    assert found == ({"predictions.jsonl": text} if text else {})


def test_an_invalid_or_unwritable_file_is_an_error(tmp_path):
    (tmp_path / "g.safetensors").write_bytes(b"no header at all")
    with pytest.raises(ConfigError, match="not a valid safetensors file"):
        golden.compare_with_file(tmp_path / "g.safetensors", {}, 0, 0)
    (tmp_path / "file").touch()
    with pytest.raises(GradrunError, match="cannot be written"):
        golden.write(tmp_path / "file" / "g.safetensors", {})


def test_a_summary_does_not_depend_on_the_chunk_size(monkeypatch):
    rows = RNG.standard_normal((1000, 4)).astype(np.float32)
    (whole,) = golden.summarize({"a": rows})
    monkeypatch.setattr(golden, "_CHUNK_BYTES", 48)
    (parts,) = golden.summarize({"a": rows})
    assert (whole.dtype, whole.shape) == ("float32", (4,))
    assert whole.mean == pytest.approx(rows.mean(dtype=np.float64))
    assert whole.spread == pytest.approx(rows.std(dtype=np.float64))
    assert (parts.mean, parts.spread) == pytest.approx((whole.mean, whole.spread))
