"""Fingerprints of runs, and messages about their differences."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradrun.config.load import load_config
from gradrun.output.fingerprint import differences, fingerprint
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
        ({"output.transform": "argmax"}, "output.transform changed from none to argmax"),
        ({"model.args": {"width": 4}}, "model.args.width changed from missing to 4"),
    ],
)
def test_a_changed_key_is_reported_with_both_values(
    source: Path, changes: dict[str, Any], message: str
) -> None:
    assert differences(head(source), head(source, **changes)) == [message]


def test_a_changed_number_of_samples_is_reported(source: Path) -> None:
    message = ["the number of samples changed from 10 to 1,100"]
    assert differences(head(source), head(source, samples=1100)) == message


@pytest.mark.parametrize("place", [0, 128, 200_000, -1])
def test_changed_content_is_detected_in_the_sampled_blocks(source: Path, place: int) -> None:
    """First and last bytes always; in between 64 blocks of 4 KiB."""
    before, status = head(source), source.stat()
    data = bytearray(source.read_bytes())
    for offset in (0,) if place in {0, 128, -1} else range(0, 40_000, 4096):
        data[place + offset] ^= 1
    source.write_bytes(data)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert differences(before, head(source)) == [f"{source} changed (content)"]


def test_a_changed_time_or_size_is_reported(source: Path) -> None:
    before = head(source)
    os.utime(source, (1, 1))
    assert differences(before, head(source)) == [f"{source} changed (time)"]
    source.write_bytes(source.read_bytes() + b"x")
    assert "size" in differences(before, head(source))[0]


def test_a_changed_python_model_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("class Net: pass\n")

    def now() -> JournalHeader:
        config = {
            "model": {"source": "python", "target": f"{tmp_path / 'net.py'}:Net"},
            "data": {"source": "synthetic", "inputs": {"x": {"shape": [1]}}, "samples": 2},
            "output": {"path": str(tmp_path / "out")},
        }
        return fingerprint(load_config(config).config, 2, "0.1.0")

    before = now()
    (tmp_path / "net.py").write_text("class Net: 'another'\n")
    (message,) = differences(before, now())
    assert "net.py changed" in message


def test_a_header_survives_a_round_trip_through_json(source: Path) -> None:
    before = head(source)
    assert (
        differences(JournalHeader.model_validate_json(before.model_dump_json()), head(source)) == []
    )
