"""Journals with complete, torn and damaged lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradrun.core import files
from gradrun.core.errors import GradrunError
from gradrun.output import journal
from gradrun.output.journal import CommittedRange, Journal, JournalHeader

HEAD = JournalHeader(gradrun="0.1.0", samples=100, config={"run": {"seed": 0}}, files={})


def commits(*stops: int) -> list[CommittedRange]:
    starts = [0, *stops[:-1]][: len(stops)]
    return [
        CommittedRange(start=start, stop=stop, files={"predictions.npy": start * 7})
        for start, stop in zip(starts, stops, strict=True)
    ]


def written(folder: Path, *stops: int) -> Path:
    lines = Journal(folder / "journal.jsonl", HEAD)
    for committed in commits(*stops):
        lines.append(committed)
    lines.close()
    return lines.path


def test_appended_ranges_are_read_back_in_order(tmp_path: Path) -> None:
    state = journal.read(written(tmp_path, 10, 30, 100))
    assert state.header == HEAD
    assert state.ranges == commits(10, 30, 100)
    assert (state.committed, state.complete, state.torn) == (100, True, False)


def test_a_journal_without_ranges_has_no_committed_samples(tmp_path: Path) -> None:
    state = journal.read(written(tmp_path))
    assert (state.committed, state.complete, state.ranges) == (0, False, [])


def test_a_journal_cut_off_anywhere_has_its_complete_lines(tmp_path: Path) -> None:
    path = written(tmp_path, 10, 30)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for length in range(ends[0], len(data)):
        path.write_bytes(data[:length])
        state = journal.read(path)
        assert len(state.ranges) == sum(end <= length for end in ends) - 1
        assert state.torn is (length not in ends)
        assert state.size == max(end for end in ends if end <= length)


@pytest.mark.parametrize("tail", [b"{}\n", b"\x00\xff\n", b'{"start": 30, "stop": 20}\n', b"[]\n"])
def test_a_damaged_last_line_is_ignored(tmp_path: Path, tail: bytes) -> None:
    path = written(tmp_path, 10, 30)
    path.write_bytes(path.read_bytes() + tail)
    state = journal.read(path)
    assert (state.committed, state.torn) == (30, True)


@pytest.mark.parametrize("line", [0, 1])
def test_a_damaged_earlier_line_is_an_error(tmp_path: Path, line: int) -> None:
    path = written(tmp_path, 10, 30)
    lines = path.read_bytes().split(b"\n")
    lines[line] = b"x" + lines[line]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(GradrunError, match=f":{line + 1}  the journal is damaged"):
        journal.read(path)


@pytest.mark.parametrize("stops", [(10, 10), (10, 101), (0,)])
def test_ranges_that_are_not_consecutive_are_an_error(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    path = written(tmp_path, *stops)
    path.write_bytes(path.read_bytes() + b'{"start": 0, "stop": 1, "files": {}}\n')
    with pytest.raises(GradrunError, match="damaged"):
        journal.read(path)


@pytest.mark.parametrize("content", [b"", b'{"journal": 1'])
def test_an_incomplete_first_line_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(GradrunError, match="not a journal of a run"):
        journal.read(tmp_path / "journal.jsonl")


def test_a_missing_journal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GradrunError, match="cannot be read: No such file"):
        journal.read(tmp_path / "journal.jsonl")


def test_a_resume_appends_after_the_last_whole_batch(tmp_path: Path) -> None:
    path = written(tmp_path, 8, 30)
    path.write_bytes(path.read_bytes() + b'{"start": 30, "st')
    state = journal.read(path).whole_batches(8)
    assert state.committed == 8, "30 is the middle of a batch of 8"
    again = Journal(path, HEAD, state)
    again.append(CommittedRange(start=8, stop=16, files={}))
    again.close()
    found = journal.read(path)
    assert [c.stop for c in found.ranges] == [8, 16]
    assert not found.torn


def test_the_end_of_a_run_counts_as_the_end_of_a_batch(tmp_path: Path) -> None:
    assert journal.read(written(tmp_path, 96, 100)).whole_batches(8).committed == 100


def test_a_line_that_cannot_be_synced_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Journal(tmp_path / "journal.jsonl", HEAD)
    lines.append(commits(10)[0])

    def refuse(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "sync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        lines.append(CommittedRange(start=10, stop=20, files={}))
    lines.close()
    assert journal.read(lines.path).committed == 10


def test_a_file_name_may_have_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    head = HEAD.model_copy(update={"files": {"/tmp/\udcff.npy": {"size": 1}}})
    Journal(tmp_path / "journal.jsonl", head).close()
    assert journal.read(tmp_path / "journal.jsonl").header == head


def test_each_line_is_json(tmp_path: Path) -> None:
    first, *others = map(json.loads, written(tmp_path, 10).read_text().splitlines())
    assert first["samples"] == 100
    assert others[0]["start"] == 0
    assert others[0]["files"] == {"predictions.npy": 0}


def test_a_removed_journal_is_an_error_of_the_next_commit(tmp_path: Path) -> None:
    header = JournalHeader(gradrun="0", samples=4, config={}, files={})
    journal = Journal(tmp_path / "journal.jsonl", header)
    (tmp_path / "journal.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="the output folder was removed while"):
        journal.append(CommittedRange(start=0, stop=4, files={}))
    journal.close()


def grown(folder: Path, *stops: int, end: int | None = None) -> Path:
    lines = Journal(folder / "journal.jsonl", HEAD.model_copy(update={"samples": None}))
    for committed in commits(*stops):
        lines.append(committed)
    if end is not None:
        lines.end(end)
    lines.close()
    return lines.path


def test_a_run_of_unknown_length_is_complete_once_its_journal_has_the_number(
    tmp_path: Path,
) -> None:
    state = journal.read(grown(tmp_path, 10, 33))
    assert (state.samples, state.committed, state.complete) == (None, 33, False)
    assert state.whole_batches(10).committed == 10, "the last batch may have been cut short"
    (tmp_path / "ended").mkdir()
    state = journal.read(grown(tmp_path / "ended", 10, 33, end=33))
    assert (state.samples, state.committed, state.complete) == (33, 33, True)
    assert state.whole_batches(10).committed == 33


def test_the_end_of_a_run_is_written_again_by_a_resume(tmp_path: Path) -> None:
    path = grown(tmp_path, 10, 33, end=33)
    expected, state = path.read_bytes(), journal.read(path)
    again = Journal(path, state.header, state)
    again.end(33)
    again.close()
    assert path.read_bytes() == expected


@pytest.mark.parametrize("end", [20, 40])
def test_an_end_that_does_not_match_the_ranges_is_ignored(tmp_path: Path, end: int) -> None:
    state = journal.read(grown(tmp_path, 10, 33, end=end))
    assert (state.samples, state.complete, state.torn) == (None, False, True)


def test_the_number_of_samples_is_written_once_if_it_is_known(tmp_path: Path) -> None:
    lines = Journal(tmp_path / "journal.jsonl", HEAD)
    for committed in commits(100):
        lines.append(committed)
    lines.end(100)
    lines.close()
    assert len(lines.path.read_text().splitlines()) == 2
    assert journal.read(lines.path).complete
