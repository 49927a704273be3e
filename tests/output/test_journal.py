"""The journal says what is there, cut off anywhere too, and is never believed too far."""

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
    lines.add(commits(*stops))
    lines.close()
    return lines.path


def test_what_was_added_is_read_back_in_order(tmp_path: Path) -> None:
    kept = journal.read(written(tmp_path, 10, 30, 100))
    assert kept.head == HEAD
    assert kept.commits == commits(10, 30, 100)
    assert (kept.stop, kept.complete, kept.torn) == (100, True, False)


def test_without_a_commit_nothing_is_there(tmp_path: Path) -> None:
    kept = journal.read(written(tmp_path))
    assert (kept.stop, kept.complete, kept.commits) == (0, False, [])


def test_cut_off_anywhere_it_tells_of_whole_lines_only(tmp_path: Path) -> None:
    path = written(tmp_path, 10, 30)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for length in range(ends[0], len(data)):
        path.write_bytes(data[:length])
        kept = journal.read(path)
        assert len(kept.commits) == sum(end <= length for end in ends) - 1
        assert kept.torn is (length not in ends)
        assert kept.size == max(end for end in ends if end <= length)


@pytest.mark.parametrize("tail", [b"{}\n", b"\x00\xff\n", b'{"start": 30, "stop": 20}\n', b"[]\n"])
def test_a_last_line_that_makes_no_sense_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = written(tmp_path, 10, 30)
    path.write_bytes(path.read_bytes() + tail)
    kept = journal.read(path)
    assert (kept.stop, kept.torn) == (30, True)


@pytest.mark.parametrize("line", [0, 1])
def test_a_line_that_makes_no_sense_before_the_last_is_damage(tmp_path: Path, line: int) -> None:
    path = written(tmp_path, 10, 30)
    lines = path.read_bytes().split(b"\n")
    lines[line] = b"x" + lines[line]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(GradrunError, match=f":{line + 1}  the journal is damaged here"):
        journal.read(path)


@pytest.mark.parametrize("stops", [(10, 10), (10, 101), (0,)])
def test_ranges_that_do_not_follow_one_another_are_not_believed(
    tmp_path: Path, stops: tuple[int, ...]
) -> None:
    path = written(tmp_path, *stops)
    path.write_bytes(path.read_bytes() + b'{"start": 0, "stop": 1, "files": {}}\n')
    with pytest.raises(GradrunError, match="damaged"):
        journal.read(path)


@pytest.mark.parametrize("content", [b"", b'{"journal": 1'])
def test_without_a_whole_first_line_it_is_no_journal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(GradrunError, match="no journal of a run"):
        journal.read(tmp_path / "journal.jsonl")


def test_one_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GradrunError, match="cannot be read: No such file"):
        journal.read(tmp_path / "journal.jsonl")


def test_a_resume_adds_behind_what_is_kept_and_drops_what_is_not(tmp_path: Path) -> None:
    path = written(tmp_path, 8, 30)
    path.write_bytes(path.read_bytes() + b'{"start": 30, "st')
    kept = journal.read(path).without_part_of_a_batch(8)
    assert kept.stop == 8, "30 is the middle of a batch of 8"
    again = Journal(path, HEAD, kept)
    again.add([CommittedRange(start=8, stop=16, files={})])
    again.close()
    found = journal.read(path)
    assert [c.stop for c in found.commits] == [8, 16]
    assert not found.torn


def test_the_end_of_a_run_counts_as_the_end_of_a_batch(tmp_path: Path) -> None:
    assert journal.read(written(tmp_path, 96, 100)).without_part_of_a_batch(8).stop == 100


def test_a_line_that_could_not_be_synced_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Journal(tmp_path / "journal.jsonl", HEAD)
    lines.add(commits(10))

    def refuse(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "sync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        lines.add([CommittedRange(start=10, stop=20, files={})])
    lines.close()
    assert journal.read(lines.path).stop == 10


def test_a_name_that_is_no_utf_8_goes_through(tmp_path: Path) -> None:
    head = HEAD.model_copy(update={"files": {"/tmp/\udcff.npy": {"size": 1}}})
    Journal(tmp_path / "journal.jsonl", head).close()
    assert journal.read(tmp_path / "journal.jsonl").head == head


def test_each_line_is_json_for_whoever_wants_to_look(tmp_path: Path) -> None:
    first, *others = map(json.loads, written(tmp_path, 10).read_text().splitlines())
    assert first["samples"] == 100
    assert others[0]["start"] == 0
    assert others[0]["files"] == {"predictions.npy": 0}
