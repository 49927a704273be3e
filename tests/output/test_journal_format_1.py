"""Run folders of journal format 1: verified, but not resumed.

The folders in tests/golden were written by development version 3957152: a finished npy run, and
runs that were killed after 16 of 23 samples, in which shards have 10 rows.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import gradrun
from gradrun.core.errors import ConfigError
from gradrun.output.run_folder import RunFolder
from tests.conftest import ROOT

FOLDERS = ROOT / "tests" / "golden" / "journal-format-1"


def config(folder: Path, form: str) -> dict[str, object]:
    """The config of these runs."""
    return {
        "model": {"source": "layers", "layers": [{"Linear": [8, 3]}]},
        "data": {
            "source": "synthetic",
            "inputs": {"x": {"shape": [8]}},
            "samples": 23,
            "batch_size": 4,
        },
        "run": {"warmup": 0, "threads": 1, "device": "cpu"},
        "measure": {"memory": False},
        "output": {"path": str(folder), "format": form},
    }


@pytest.mark.parametrize(
    ("form", "committed"), [("npy", 23), ("jsonl", 16), ("safetensors", 16), ("parquet", 16)]
)
def test_the_checksums_are_verified(form: str, committed: int) -> None:
    verification = gradrun.verify(FOLDERS / form)
    assert (verification.damaged, verification.committed) == ((), committed)


@pytest.mark.parametrize("form", ["npy", "jsonl", "safetensors", "parquet"])
def test_a_changed_byte_is_reported(tmp_path: Path, form: str) -> None:
    shutil.copytree(FOLDERS / form, tmp_path / form)
    *_, last = sorted((tmp_path / form).glob("predictions*"))  # .rest: an incomplete shard
    data = bytearray(last.read_bytes())
    data[-2] ^= 1
    last.write_bytes(data)
    (damaged,) = gradrun.verify(tmp_path / form).damaged
    assert last.name.startswith(damaged.file)


@pytest.mark.parametrize("form", ["jsonl", "safetensors", "parquet"])
def test_a_resume_is_refused_in_one_sentence_and_changes_nothing(tmp_path: Path, form: str) -> None:
    folder = tmp_path / form
    shutil.copytree(FOLDERS / form, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    message = (
        r"has a run of an earlier version of gradrun \(journal format 1\), which .*overwrite=True"
    )
    for options in ({"resume": True}, {}):
        with pytest.raises(ConfigError, match=message):
            gradrun.infer(config(folder, form), **options)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    gradrun.infer(config(folder, form), overwrite=True)
    assert not list(folder.glob("*.rest"))
    assert gradrun.verify(folder).complete


def test_a_finished_run_is_not_resumed_either(tmp_path: Path) -> None:
    shutil.copytree(FOLDERS / "npy", tmp_path / "npy")
    with pytest.raises(ConfigError, match="earlier version of gradrun"):
        RunFolder(tmp_path / "npy", resume=True)
