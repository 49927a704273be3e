"""Fingerprints of runs, and messages about their differences."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradrun.config.load import load_config
from gradrun.output.fingerprint import assumed_unchanged, differences, fingerprint
from gradrun.output.journal import JournalHeader


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.zeros((100_000, 4), np.float32))
    return tmp_path / "x.npy"


def head(source: Path, samples: int = 10, **changes: Any) -> JournalHeader:
    config = {
        "model": {"source": "zoo", "name": "mlp"},
        "data": {"source": "arrays", "path": str(source)},
        "output": {"path": str(source.parent / "out")},
    }
    return fingerprint(load_config(config, changes).config, samples, "0.1.0")


def test_the_same_run_has_no_differences(source: Path) -> None:
    assert differences(head(source), head(source)) == []


@pytest.mark.parametrize(
    "changes", [{"measure.memory": False}, {"output.path": "elsewhere"}, {"run.warmup": 3}]
)
def test_settings_that_do_not_affect_predictions_are_ignored(
    source: Path, changes: dict[str, Any]
) -> None:
    assert differences(head(source), head(source, **changes)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run.mode": "grad"}, "run.mode changed from inference_mode to grad"),
        ({"run.seed": 3}, "run.seed changed from 0 to 3"),
        ({"output.transform": "argmax"}, "output.transform changed from auto to argmax"),
        ({"model.args": {"width": 4}}, "model.args.width changed from missing to 4"),
    ],
)
def test_a_changed_key_is_reported_with_both_values(
    source: Path, changes: dict[str, Any], message: str
) -> None:
    assert differences(head(source), head(source, **changes)) == [message]


def test_the_modules_of_a_sentence_transformers_folder_are_part_of_the_model(
    source: Path,
) -> None:
    weights = source.parent / "st/2_Dense/model.safetensors"
    weights.parent.mkdir(parents=True)
    (source.parent / "st/modules.json").write_text("[]")
    config = {
        "model": {"source": "huggingface", "path": str(source.parent / "st")},
        "data": {"source": "arrays", "path": str(source)},
        "output": {"path": str(source.parent / "out")},
    }
    weights.write_bytes(b"a")
    before = fingerprint(load_config(config).config, 10, "0.1.0")
    weights.write_bytes(b"b")
    (change,) = differences(before, fingerprint(load_config(config).config, 10, "0.1.0"))
    assert "2_Dense/model.safetensors changed" in change


def test_a_changed_number_of_samples_is_reported(source: Path) -> None:
    message = ["the number of samples changed from 10 to 1,100"]
    assert differences(head(source), head(source, samples=1100)) == message


@pytest.mark.parametrize("place", [0, 100_000, 1_600_127])
def test_changed_content_is_detected_although_size_and_time_are_the_same(
    source: Path, place: int
) -> None:
    before, status = head(source), source.stat()
    data = bytearray(source.read_bytes())
    data[place] ^= 1
    source.write_bytes(data)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert differences(before, head(source)) == [f"{source} changed (content)"]


def test_a_changed_size_is_reported(source: Path) -> None:
    before = head(source)
    source.write_bytes(source.read_bytes() + b"x")
    assert differences(before, head(source)) == [f"{source} changed (size, content)"]


def test_another_time_with_the_same_content_is_no_change(source: Path) -> None:
    before = head(source)
    os.utime(source, (1, 1))
    assert differences(before, head(source)) == []
    assert assumed_unchanged(before, head(source)) == [], "the file was read whole"


def test_another_time_of_a_file_that_is_too_large_to_read_whole_is_listed(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradrun.output.fingerprint._BLOCKS", 4)
    before = head(source)
    assert assumed_unchanged(before, head(source)) == []
    os.utime(source, (1, 1))
    assert differences(before, head(source)) == []
    assert assumed_unchanged(before, head(source)) == [str(source)]
    data = source.read_bytes()
    source.write_bytes(data[:-1] + b"x")  # the first and the last block are always read
    assert differences(before, head(source)) == [f"{source} changed (content)"]


def test_a_file_in_another_place_is_the_same_input_if_its_content_is(
    source: Path, tmp_path: Path
) -> None:
    before = head(source)
    moved = tmp_path / "elsewhere" / "y.npy"
    moved.parent.mkdir()
    moved.write_bytes(source.read_bytes())
    assert differences(before, head(moved)) == []
    np.save(moved, np.ones((100_000, 4), np.float32))
    assert differences(before, head(moved)) == [f"data.path changed from {source} to {moved}"]


def pictures(folder: Path) -> JournalHeader:
    config = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "images", "path": str(folder)},
        "output": {"path": str(folder / "out")},
    }
    listed = sorted(folder.rglob("*.png"))
    return fingerprint(load_config(config).config, len(listed), "0.1.0", listed=listed)


def test_a_folder_of_images_that_moved_is_the_same_input(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "a").mkdir(parents=True)
    for name in ("a/1.png", "2.png"):
        Image.new("L", (4, 4)).save(first / name)
    before = pictures(first)
    shutil.copytree(first, second)
    os.utime(second / "2.png", (1, 1))
    assert differences(before, pictures(second)) == []
    data = bytearray((second / "2.png").read_bytes())
    data[-20] ^= 1
    (second / "2.png").write_bytes(data)
    assert differences(before, pictures(second)) == ["the files in data.path changed (content)"]
    (second / "2.png").rename(second / "3.png")
    (change,) = differences(before, pictures(second))
    assert "names and sizes" in change


def test_files_below_a_folder_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    def now() -> JournalHeader:
        config = {
            "model": {"source": "huggingface", "path": str(tmp_path / "model")},
            "data": {"source": "synthetic", "inputs": {"x": {"shape": [1]}}, "samples": 2},
            "output": {"path": str(tmp_path / "out")},
        }
        return fingerprint(load_config(config).config, 2, "0.1.0")

    pooling = tmp_path / "model" / "1_Pooling" / "config.json"
    pooling.parent.mkdir(parents=True)
    pooling.write_text("{}")
    before = now()
    (tmp_path / "model" / ".cache").write_text("not part of the model")
    assert differences(before, now()) == []
    pooling.write_text('{"pooling_mode": "cls"}')
    assert differences(before, now()) == [f"{pooling} changed (size, content)"]


def test_a_header_survives_a_round_trip_through_json(source: Path) -> None:
    before = head(source)
    assert (
        differences(JournalHeader.model_validate_json(before.model_dump_json()), head(source)) == []
    )
