"""When commits come, in which order the sink and the journal are asked, and what a fault ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from gradrun.output import checkpointer
from gradrun.output.checkpointer import Checkpointer
from gradrun.output.journal import CommittedRange


@dataclass
class Paper:
    """A sink and a journal that note what they are asked."""

    said: list[str] = field(default_factory=list)
    written: int = 0
    told: int = 0
    fails: str = ""

    def _do(self, what: str) -> None:
        self.said.append(what)
        if what == self.fails:
            raise OSError(5, "Input/output error")

    def commit(self) -> list[CommittedRange]:
        self._do("commit")
        return self._range()

    def close(self) -> list[CommittedRange]:
        self._do("close")
        return self._range()

    def _range(self) -> list[CommittedRange]:
        start, self.told = self.told, self.written
        return (
            [CommittedRange(start=start, stop=self.written, files={})]
            if self.written > start
            else []
        )

    @property
    def journal(self) -> Any:
        return SimpleNamespace(
            add=lambda commits: self._do(f"journal to {commits[0].stop}"),
            close=lambda: self._do("journal closed"),
        )


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(checkpointer, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


def keeper(paper: Paper, row_bytes: int = 4) -> Checkpointer:
    return Checkpointer(paper, paper.journal, batch_size=4, row_bytes=row_bytes)


def test_nothing_is_committed_before_a_second_has_gone(now: SimpleNamespace) -> None:
    paper = Paper()
    kept = keeper(paper)
    paper.written, now.seconds = 40, 100.9
    kept.look()
    assert paper.said == []
    now.seconds = 101.0
    kept.look()
    assert paper.said == ["commit", "journal to 40"], "the data first, then the line"
    paper.written, now.seconds = 80, 101.5
    kept.look()
    assert len(paper.said) == 2


def test_much_data_does_not_wait_for_the_second(now: SimpleNamespace) -> None:
    paper = Paper()
    kept = keeper(paper, row_bytes=1024 * 1024)
    paper.written = 60
    kept.look()
    assert paper.said == []
    paper.written = 64
    kept.look()
    assert paper.said == ["commit", "journal to 64"]


def test_a_commit_waits_for_the_end_of_a_batch(now: SimpleNamespace) -> None:
    paper = Paper(written=6)
    kept = keeper(Paper())
    kept.sink = paper
    now.seconds = 200.0
    kept.look()
    assert paper.said == []
    paper.written = 8
    kept.look()
    assert paper.said == ["commit"]


def test_on_a_slow_disk_commits_come_less_often(now: SimpleNamespace) -> None:
    paper = Paper(written=4)
    kept = keeper(paper)
    kept.sink = slow = SimpleNamespace(written=4, commit=lambda: _takes(now, 0.1))
    now.seconds = 101.0
    kept.look()
    slow.commit = paper.commit
    now.seconds = 101.1 + 9.9
    kept.look()
    assert paper.said == []
    now.seconds = 101.1 + 10.1
    kept.look()
    assert paper.said[:1] == ["commit"], "a tenth of a second is a hundredth of ten"


def _takes(now: SimpleNamespace, seconds: float) -> list[CommittedRange]:
    now.seconds += seconds
    return []


def test_the_end_commits_the_rest_and_closes_both() -> None:
    paper = Paper(written=7)
    kept = keeper(Paper())
    kept.sink, kept.journal = paper, paper.journal
    kept.close()
    assert paper.said == ["close", "journal to 7", "journal closed"]


@pytest.mark.parametrize("fails", ["commit", "journal to 8"])
def test_after_a_fault_nothing_more_is_promised(now: SimpleNamespace, fails: str) -> None:
    paper = Paper(fails=fails)
    kept = keeper(paper)
    paper.written, now.seconds = 8, 200.0
    with pytest.raises(OSError, match="Input/output"):
        kept.look()
    paper.fails, paper.written = "", 12
    kept.close()
    assert paper.said[-2:] == ["close", "journal closed"]


def test_a_fault_at_the_end_still_closes_the_journal() -> None:
    paper = Paper(fails="close")
    with pytest.raises(OSError, match="Input/output"):
        keeper(paper).close()
    assert paper.said[-1] == "journal closed"
