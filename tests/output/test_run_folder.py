"""A run's folder: when it may be written, and what of an earlier run goes."""

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
def test_a_folder_is_made_with_its_parents_only_when_the_run_begins(
    tmp_path: Path, overwrite: bool
) -> None:
    folder = RunFolder(tmp_path / "a" / "b", overwrite=overwrite)
    assert names(tmp_path) == set()
    with folder.locked():
        assert names(tmp_path / "a") == {"b"}


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    with RunFolder(tmp_path, overwrite=False).locked():
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
    with folder.locked():
        folder.clear()
    assert names(tmp_path) == theirs


def test_a_result_is_saved_under_its_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", overwrite=False)
    with folder.locked():
        folder.save(run_result())
    assert names(tmp_path / "out") == {"result.json"}
    assert RunResult.load(tmp_path / "out") == run_result()


def test_a_folder_that_cannot_be_made_fails_the_run_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = RunFolder(tmp_path / "file" / "out", overwrite=False)
    with (
        pytest.raises(RunFailed, match="cannot be written: Not a directory"),
        folder.locked(),
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


# --- an earlier run ----------------------------------------------------------------------------

HEAD = JournalHeader(gradrun="0.1.0", samples=498, config={"run": {"seed": 0}}, files={})


def earlier(path: Path, *stops: int, result: int | None = None) -> Path:
    """A folder in which a run has committed up to each stop, and left a result of so many."""
    folder, start = RunFolder(path), 0
    with folder.locked():
        journal, kept = folder.journal(HEAD, batch_size=4)
        assert kept == []
        for stop in stops:
            journal.add([CommittedRange(start=start, stop=stop, files={})])
            start = stop
        journal.close()
        (path / "predictions.npy").write_text("of the earlier run")
        if result is not None:
            folder.save(run_result(predictions=result))
    return path


def gone_on_with(path: Path, head: JournalHeader = HEAD) -> list[int]:
    """The stops of the commits that a resume goes on behind."""
    folder = RunFolder(path, resume=True)
    with folder.locked():
        journal, kept = folder.journal(head, batch_size=4)
        journal.close()
    return [committed.stop for committed in kept]


@pytest.mark.parametrize(
    ("stops", "result", "told"),
    [
        ((), None, r"holds an unfinished run \(0 of 498 samples\); --resume .*, --overwrite"),
        ((8, 16), 16, r"holds an unfinished run \(16 of 498 samples\); --resume .*, --overwrite"),
        ((8, 498), None, r"holds an unfinished run \(498 of 498 samples\); --resume"),
        ((8, 498), 498, r"exists already; --overwrite replaces the run in it"),
    ],
)
def test_an_earlier_run_is_an_error_that_says_how_to_go_on(
    tmp_path: Path, stops: tuple[int, ...], result: int | None, told: str
) -> None:
    earlier(tmp_path, *stops, result=result)
    with pytest.raises(ConfigError, match=told) as caught:
        RunFolder(tmp_path)
    assert caught.value.key == "output.path"
    assert (tmp_path / "predictions.npy").exists()


def test_a_resume_goes_on_behind_the_last_whole_batch_and_removes_nothing(tmp_path: Path) -> None:
    earlier(tmp_path, 8, 16, 18)
    assert gone_on_with(tmp_path) == [8, 16]
    assert (tmp_path / "predictions.npy").read_text() == "of the earlier run"
    assert gone_on_with(tmp_path) == [8, 16], "the journal was cut back"


@pytest.mark.parametrize("stops", [(), (3,)])
def test_where_nothing_whole_was_committed_a_resume_begins_anew(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    earlier(tmp_path, *stops)
    assert gone_on_with(tmp_path) == []
    assert names(tmp_path) == {"journal.jsonl"}


@pytest.mark.parametrize(
    "left", [(), (".gradrun.output.lock",), (".gradrun.output.lock", "journal.jsonl.tmp")]
)
@pytest.mark.parametrize("resume", [False, True])
def test_what_a_process_leaves_that_died_before_its_run_began_is_nothing(
    tmp_path: Path, left: tuple[str, ...], resume: bool
) -> None:
    for name in left:
        (tmp_path / name).write_text("{")
    folder = RunFolder(tmp_path, resume=resume)
    assert folder.kept is None
    with folder.locked():
        folder.journal(HEAD, batch_size=4)[0].close()
    assert names(tmp_path) == {"journal.jsonl"}


def test_a_resume_minds_files_that_are_ours_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert gone_on_with(tmp_path) == []
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "journal.jsonl").unlink()
    (tmp_path / "predictions.npy").write_text("of an older gradrun, which kept no journal")
    with pytest.raises(ConfigError, match="exists already"):
        RunFolder(tmp_path, resume=True)


def test_overwriting_gives_up_the_earlier_run_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier(tmp_path, 8, 498, result=498)
    folder = RunFolder(tmp_path, overwrite=True)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with folder.locked(), monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            folder.journal(HEAD.model_copy(update={"samples": 7}), batch_size=4)
    monkeypatch.undo()
    # Its files are there, but no journal speaks for them any more: they count for nothing.
    assert (tmp_path / "predictions.npy").exists()
    kept = RunFolder(tmp_path, resume=True).kept
    assert kept
    assert (kept.stop, kept.head.samples) == (0, 7)


@pytest.mark.parametrize("predictions", [498, 490, None])
def test_finished_is_what_committed_all_and_has_a_result_of_all(
    tmp_path: Path, predictions: int | None
) -> None:
    earlier(tmp_path, 8, 498)
    folder = RunFolder(tmp_path, resume=True)
    assert folder.finished() is None
    with folder.locked():
        folder.save(run_result(predictions=predictions))
    # A result of fewer is of the run before the one that was killed at its end.
    assert (folder.finished() is not None) is (predictions == 498)


def test_an_unfinished_run_is_not_finished_whatever_its_result_says(tmp_path: Path) -> None:
    earlier(tmp_path, 8, result=498)
    assert RunFolder(tmp_path, resume=True).finished() is None


def test_a_result_that_is_damaged_is_told_with_what_to_do(tmp_path: Path) -> None:
    earlier(tmp_path, 498, result=498)
    (tmp_path / "result.json").write_text('{"format": 1')
    told = r"result\.json is not a gradrun result: .*; .* remove that file, and --resume"
    with pytest.raises(GradrunError, match=told):
        RunFolder(tmp_path, resume=True).finished()
    (tmp_path / "result.json").unlink()
    assert gone_on_with(tmp_path) == [498]


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    earlier(tmp_path, 8)
    folder = RunFolder(tmp_path, resume=True)
    folder.check_same(HEAD)
    other = HEAD.model_copy(update={"config": {"run": {"seed": 3}}, "samples": 500})
    told = (
        r"cannot be resumed, because this is another run: run\.seed was 0 and is 3; there were 498 "
        r"samples and are 500\. Put that back .* --overwrite"
    )
    with pytest.raises(ConfigError, match=told):
        folder.check_same(other)
    with folder.locked(), pytest.raises(ConfigError, match=told):
        folder.journal(other, batch_size=4)
    RunFolder(tmp_path, overwrite=True).check_same(other)
    assert gone_on_with(tmp_path) == [8]


# --- two at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_where_one_writes_no_other_may_whatever_it_asks_for(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    before = RunFolder(tmp_path, **options)
    with RunFolder(tmp_path).locked():
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            RunFolder(tmp_path, **options)
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"), before.locked():
            pass
        assert names(tmp_path) == {".gradrun.output.lock"}
    with before.locked():
        pass


def test_a_run_that_began_and_ended_meanwhile_is_not_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    earlier(tmp_path, 498, result=498)
    with pytest.raises(ConfigError, match="exists already"), folder.locked():
        folder.journal(HEAD, batch_size=4)
    assert RunResult.load(tmp_path).predictions == 498
    assert (tmp_path / "predictions.npy").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RunFailed])
def test_the_folder_is_free_again_however_the_writing_ended(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), RunFolder(tmp_path).locked():
        raise error
    with RunFolder(tmp_path).locked():
        pass


def test_a_folder_that_is_gone_lets_its_lock_go(tmp_path: Path) -> None:
    path = tmp_path / "a" / "out"
    with RunFolder(path).locked():
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").write_text("a file now")
    assert (tmp_path / "a").read_text() == "a file now"
