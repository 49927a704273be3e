"""A run's folder: when it may be written, and what of an earlier run goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradrun.errors import ConfigError, RunFailed
from gradrun.result import RunResult
from gradrun.store import RunFolder
from tests.results import run_result


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_made_with_its_parents_only_when_the_run_begins(
    tmp_path: Path, overwrite: bool
) -> None:
    folder = RunFolder(tmp_path / "a" / "b", overwrite=overwrite)
    assert names(tmp_path) == set()
    with folder.writing():
        assert names(tmp_path / "a") == {"b"}


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    with RunFolder(tmp_path, overwrite=False).writing():
        pass
    assert names(tmp_path) == set(), "the lock is gone with its holder"


def test_a_folder_in_use_is_an_error_that_names_overwrite(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="--overwrite") as caught:
        RunFolder(tmp_path, overwrite=False)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.key == "output.path"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_folders_place_is_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    file = tmp_path / "out"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(file, overwrite=overwrite)
    assert file.read_text() == "mine"


def test_overwriting_removes_the_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    ours = [
        "result.json", "result.json.tmp", "journal.jsonl", "quarantine.jsonl", "predictions.npy",
        "predictions.logits.npy", "predictions.jsonl", "predictions-00000.safetensors",
        "predictions-00001.safetensors.tmp",
    ]  # fmt: skip
    theirs = {"notes.txt", "result.json.bak", "my-predictions.npy", "labels.npy"}
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    folder = RunFolder(tmp_path, overwrite=True)
    assert names(tmp_path) == {*ours, *theirs}, "nothing goes before the run begins"
    with folder.writing():
        folder.clear()
    assert names(tmp_path) == theirs


def test_a_result_is_saved_under_its_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", overwrite=False)
    with folder.writing():
        folder.save(run_result())
    assert names(tmp_path / "out") == {"result.json"}
    assert RunResult.load(tmp_path / "out") == run_result()


def test_a_folder_that_cannot_be_made_fails_the_run_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = RunFolder(tmp_path / "file" / "out", overwrite=False)
    with (
        pytest.raises(RunFailed, match="cannot be written: Not a directory"),
        folder.writing(),
    ):
        pass


def test_a_folder_that_cannot_be_read_fails_the_run_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RunFailed, match=r"cannot be read: Permission denied"):
        RunFolder(tmp_path, overwrite=True)


def test_a_result_that_cannot_be_saved_fails_the_run_in_a_sentence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", overwrite=False)
    with pytest.raises(RunFailed, match=r"result\.json cannot be written: No such file"):
        folder.save(run_result())
