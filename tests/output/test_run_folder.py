"""When a run folder may be written, and which files of an earlier run are removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gradrun.core.errors import ConfigError, GradrunError, RunFailed
from gradrun.output.journal import CommittedRange, JournalHeader
from gradrun.output.run_folder import RunFolder
from gradrun.results.result import RunResult
from tests.support.run_results import run_result


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_and_its_parents_are_created_when_the_run_starts(
    tmp_path: Path, overwrite: bool
) -> None:
    folder = RunFolder(tmp_path / "a" / "b", overwrite=overwrite)
    assert names(tmp_path) == set()
    with folder.locked():
        assert names(tmp_path / "a") == {"b"}


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    with RunFolder(tmp_path, overwrite=False).locked():
        pass
    assert names(tmp_path) == set(), "the lock file is removed"


def test_a_folder_with_files_is_an_error_that_suggests_overwrite(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="overwrite=True") as caught:
        RunFolder(tmp_path, overwrite=False)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.key == "output.path"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_at_the_output_path_is_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    file = tmp_path / "out"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(file, overwrite=overwrite)
    assert file.read_text() == "mine"


def test_overwriting_removes_only_the_files_of_the_earlier_run(tmp_path: Path) -> None:
    ours = [
        "result.json", "result.json.tmp", "journal.jsonl", "quarantine.jsonl", "predictions.npy",
        "predictions.logits.npy", "predictions.jsonl", "predictions-00000.safetensors",
        "predictions-00001.safetensors.tmp",
    ]  # fmt: skip
    theirs = {"notes.txt", "result.json.bak", "my-predictions.npy", "labels.npy"}
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    folder = RunFolder(tmp_path, overwrite=True)
    assert names(tmp_path) == {*ours, *theirs}, "nothing is removed before the run starts"
    with folder.locked():
        folder.clear()
    assert names(tmp_path) == theirs


def test_a_result_is_saved_under_its_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", overwrite=False)
    with folder.locked():
        folder.save(run_result())
    assert names(tmp_path / "out") == {"result.json"}
    assert RunResult.load(tmp_path / "out") == run_result()


def test_a_folder_that_cannot_be_created_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = RunFolder(tmp_path / "file" / "out", overwrite=False)
    with (
        pytest.raises(RunFailed, match="cannot be written: Not a directory"),
        folder.locked(),
    ):
        pass


def test_a_folder_that_cannot_be_read_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RunFailed, match=r"cannot be read: Permission denied"):
        RunFolder(tmp_path, overwrite=True)


def test_a_result_that_cannot_be_saved_fails_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", overwrite=False)
    with pytest.raises(RunFailed, match=r"result\.json cannot be written: No such file"):
        folder.save(run_result())


# --- an earlier run ----------------------------------------------------------------------------

HEAD = JournalHeader(gradrun="0.1.0", samples=498, config={"run": {"seed": 0}}, files={})


def earlier(path: Path, *stops: int, result: int | None = None) -> Path:
    """The folder of a run that committed up to each stop and saved a result of so many samples."""
    folder, start = RunFolder(path), 0
    with folder.locked():
        journal, ranges = folder.open_journal(HEAD, batch_size=4)
        assert ranges == []
        for stop in stops:
            journal.append(CommittedRange(start=start, stop=stop, files={}))
            start = stop
        journal.close()
        (path / "predictions.npy").write_text("of the earlier run")
        if result is not None:
            folder.save(run_result(predictions=result))
    return path


def resumed_ranges(path: Path, head: JournalHeader = HEAD) -> list[int]:
    """Stops of the ranges that a resume continues."""
    folder = RunFolder(path, resume=True)
    with folder.locked():
        journal, ranges = folder.open_journal(head, batch_size=4)
        journal.close()
    return [committed.stop for committed in ranges]


@pytest.mark.parametrize(
    ("stops", "result", "message"),
    [
        ((), None, r"has an unfinished run \(0 of 498 samples\); use resume=True .*, or overwrite"),
        (
            (8, 16),
            16,
            r"has an unfinished run \(16 of 498 samples\); use resume=True",
        ),
        ((8, 498), None, r"has an unfinished run \(498 of 498 samples\); use resume=True"),
        ((8, 498), 498, r"already exists; use overwrite=True to replace it"),
    ],
)
def test_an_earlier_run_is_an_error_that_suggests_resume_or_overwrite(
    tmp_path: Path, stops: tuple[int, ...], result: int | None, message: str
) -> None:
    earlier(tmp_path, *stops, result=result)
    with pytest.raises(ConfigError, match=message) as caught:
        RunFolder(tmp_path)
    assert caught.value.key == "output.path"
    assert (tmp_path / "predictions.npy").exists()


def test_a_resume_continues_after_the_last_whole_batch_and_removes_nothing(tmp_path: Path) -> None:
    earlier(tmp_path, 8, 16, 18)
    assert resumed_ranges(tmp_path) == [8, 16]
    assert (tmp_path / "predictions.npy").read_text() == "of the earlier run"
    assert resumed_ranges(tmp_path) == [8, 16], "the journal was truncated"


@pytest.mark.parametrize("stops", [(), (3,)])
def test_a_resume_starts_over_without_a_committed_batch(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    earlier(tmp_path, *stops)
    assert resumed_ranges(tmp_path) == []
    assert names(tmp_path) == {"journal.jsonl"}


@pytest.mark.parametrize(
    "left", [(), (".gradrun.output.lock",), (".gradrun.output.lock", "journal.jsonl.tmp")]
)
@pytest.mark.parametrize("resume", [False, True])
def test_files_of_a_process_that_died_at_startup_are_ignored(
    tmp_path: Path, left: tuple[str, ...], resume: bool
) -> None:
    for name in left:
        (tmp_path / name).write_text("{")
    folder = RunFolder(tmp_path, resume=resume)
    assert folder.previous is None
    with folder.locked():
        folder.open_journal(HEAD, batch_size=4)[0].close()
    assert names(tmp_path) == {"journal.jsonl"}


def test_a_resume_ignores_files_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert resumed_ranges(tmp_path) == []
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "journal.jsonl").unlink()
    (tmp_path / "predictions.npy").write_text("of a version without a journal")
    with pytest.raises(ConfigError, match="already exists"):
        RunFolder(tmp_path, resume=True)


def test_overwriting_invalidates_the_earlier_run_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier(tmp_path, 8, 498, result=498)
    folder = RunFolder(tmp_path, overwrite=True)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with folder.locked(), monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            folder.open_journal(HEAD.model_copy(update={"samples": 7}), batch_size=4)
    monkeypatch.undo()
    # The files remain, but no journal refers to them.
    assert (tmp_path / "predictions.npy").exists()
    previous = RunFolder(tmp_path, resume=True).previous
    assert previous
    assert (previous.committed, previous.header.samples) == (0, 7)


@pytest.mark.parametrize("predictions", [498, 490, None])
def test_a_run_is_finished_if_journal_and_result_have_all_samples(
    tmp_path: Path, predictions: int | None
) -> None:
    earlier(tmp_path, 8, 498)
    folder = RunFolder(tmp_path, resume=True)
    assert folder.finished_result() is None
    with folder.locked():
        folder.save(run_result(predictions=predictions))
    # A smaller result is from an earlier part of the run.
    assert (folder.finished_result() is not None) is (predictions == 498)


def test_a_run_with_an_incomplete_journal_is_unfinished(tmp_path: Path) -> None:
    earlier(tmp_path, 8, result=498)
    assert RunFolder(tmp_path, resume=True).finished_result() is None


def test_a_damaged_result_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    earlier(tmp_path, 498, result=498)
    (tmp_path / "result.json").write_text('{"format": 1')
    message = r"result\.json .*; .* remove this file, and resume=True"
    with pytest.raises(GradrunError, match=message):
        RunFolder(tmp_path, resume=True).finished_result()
    (tmp_path / "result.json").unlink()
    assert resumed_ranges(tmp_path) == [498]


def test_a_different_run_is_not_resumed(tmp_path: Path) -> None:
    earlier(tmp_path, 8)
    folder = RunFolder(tmp_path, resume=True)
    folder.check_resumable(HEAD)
    other = HEAD.model_copy(update={"config": {"run": {"seed": 3}}, "samples": 500})
    message = (
        r"cannot resume .*: since the run started, run\.seed changed from 0 to 3; the number of "
        r"samples changed from 498 to 500\. Undo the change, .* overwrite=True"
    )
    with pytest.raises(ConfigError, match=message):
        folder.check_resumable(other)
    with folder.locked(), pytest.raises(ConfigError, match=message):
        folder.open_journal(other, batch_size=4)
    RunFolder(tmp_path, overwrite=True).check_resumable(other)
    assert resumed_ranges(tmp_path) == [8]


# --- two at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_locked_folder_refuses_every_other_run(tmp_path: Path, options: dict[str, bool]) -> None:
    before = RunFolder(tmp_path, **options)
    with RunFolder(tmp_path).locked():
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            RunFolder(tmp_path, **options)
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"), before.locked():
            pass
        assert names(tmp_path) == {".gradrun.output.lock"}
    with before.locked():
        pass


def test_a_run_that_finished_in_the_meantime_is_not_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    earlier(tmp_path, 498, result=498)
    with pytest.raises(ConfigError, match="already exists"), folder.locked():
        folder.open_journal(HEAD, batch_size=4)
    assert RunResult.load(tmp_path).predictions == 498
    assert (tmp_path / "predictions.npy").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RunFailed])
def test_the_folder_is_unlocked_after_any_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), RunFolder(tmp_path).locked():
        raise error("failed")
    with RunFolder(tmp_path).locked():
        pass


def test_a_removed_folder_can_be_unlocked(tmp_path: Path) -> None:
    path = tmp_path / "a" / "out"
    with RunFolder(path).locked():
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").write_text("a file now")
    assert (tmp_path / "a").read_text() == "a file now"


def test_overwriting_does_not_remove_a_folder_of_inputs(tmp_path: Path) -> None:
    images = tmp_path / "predictions"
    images.mkdir()
    (images / "0.png").touch()
    with pytest.raises(ConfigError, match=r"would remove .*predictions, which is an input"):
        RunFolder(tmp_path, overwrite=True, inputs=[images])
    RunFolder(tmp_path, overwrite=True, inputs=[tmp_path / "model"])
    assert names(images) == {"0.png"}
