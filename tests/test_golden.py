"""Golden outputs: written, read back, and what is told where they differ."""

from __future__ import annotations

import numpy as np
import pytest

from gradrun import golden
from gradrun.errors import ConfigError, GradrunError

RNG = np.random.default_rng(0)


def test_what_was_written_is_no_different(tmp_path):
    outputs = {
        "floats": RNG.standard_normal((50, 3, 2)).astype(np.float32),
        "halves": RNG.standard_normal((50, 3)).astype(np.float16),
        "classes": RNG.integers(0, 9, 50),
        "flags": RNG.integers(0, 2, (50, 1)).astype(bool),
        "holes": np.where(RNG.integers(0, 2, 50), np.nan, 1.0),
        "nothing": np.zeros((50, 0), np.float32),
    }
    golden.write(tmp_path / "new" / "g.safetensors", outputs)
    assert golden.differences(tmp_path / "new" / "g.safetensors", outputs, 0, 0) == {}
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["g.safetensors"]


def test_differences_name_the_first_sample_how_many_and_how_far(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "_WINDOW_BYTES", 7 * 12)
    rows = RNG.standard_normal((50, 3)).astype(np.float32)
    golden.write(tmp_path / "g.safetensors", {"a": rows, "b": rows, "c": np.arange(50)})
    changed, classes = rows.copy(), np.arange(50)
    changed[[13, 40], 1] += 0.5
    changed[3] *= 1 + 1e-6
    classes[49] = 0
    now = {"a": changed, "d": rows, "c": classes}
    found = golden.differences(tmp_path / "g.safetensors", now, 1e-4, 1e-5)
    assert found == {
        "a": "differs in 2 samples of 50, first 13, by 0.5",
        "b": "is missing",
        "c": "differs in 1 sample of 50, first 49, by 49",
        "d": "is new",
    }


@pytest.mark.parametrize("now", [np.zeros((49, 3), np.float32), np.zeros((50, 3))])
def test_another_shape_or_type_is_told_as_such(tmp_path, now):
    golden.write(tmp_path / "g.safetensors", {"a": np.zeros((50, 3), np.float32)})
    (said,) = golden.differences(tmp_path / "g.safetensors", {"a": now}, 1, 1).values()
    assert "where [50, 3] float32 is expected" in said


def test_a_file_that_is_none_is_a_sentence(tmp_path):
    (tmp_path / "g.safetensors").write_bytes(b"no header at all")
    with pytest.raises(ConfigError, match="no safetensors file"):
        golden.differences(tmp_path / "g.safetensors", {}, 0, 0)
    (tmp_path / "file").touch()
    with pytest.raises(GradrunError, match="cannot be written"):
        golden.write(tmp_path / "file" / "g.safetensors", {})


def test_outputs_are_described_in_windows_as_in_one(monkeypatch):
    rows = RNG.standard_normal((1000, 4)).astype(np.float32)
    (whole,) = golden.described({"a": rows})
    monkeypatch.setattr(golden, "_WINDOW_BYTES", 48)
    (parts,) = golden.described({"a": rows})
    assert (whole.dtype, whole.shape) == ("float32", (4,))
    assert whole.mean == pytest.approx(rows.mean(dtype=np.float64))
    assert whole.spread == pytest.approx(rows.std(dtype=np.float64))
    assert (parts.mean, parts.spread) == pytest.approx((whole.mean, whole.spread))
