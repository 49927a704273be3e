"""When commits happen, in which order writer and journal are called, and errors in both."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from gradrun.output import checkpointer
from gradrun.output.checkpointer import Checkpointer
from gradrun.output.journal import CommittedRange


@dataclass
class FakeOutput:
    """A writer and a journal that record their calls."""

    calls: list[str] = field(default_factory=list)
    written: int = 0
    reported: int = 0
    fails: str = ""

    def _do(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails:
            raise OSError(5, "Input/output error")

    def commit(self) -> list[CommittedRange]:
        self._do("commit")
        return self._range()

    def close(self) -> list[CommittedRange]:
        self._do("close")
        return self._range()

    def _range(self) -> list[CommittedRange]:
        start, self.reported = self.reported, self.written
        return (
            [CommittedRange(start=start, stop=self.written, files={})]
            if self.written > start
            else []
        )

    @property
    def journal(self) -> Any:
        return SimpleNamespace(
            append=lambda committed: self._do(f"journal to {committed.stop}"),
            close=lambda: self._do("journal closed"),
        )


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(checkpointer, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


def new_checkpointer(output: FakeOutput, row_bytes: int = 4) -> Checkpointer:
    return Checkpointer(output, output.journal, batch_size=4, row_bytes=row_bytes)


def test_nothing_is_committed_within_the_first_second(now: SimpleNamespace) -> None:
    output = FakeOutput()
    target = new_checkpointer(output)
    output.written, now.seconds = 40, 100.9
    target.commit_if_due()
    assert output.calls == []
    now.seconds = 101.0
    target.commit_if_due()
    assert output.calls == ["commit", "journal to 40"], "first the data, then the line"
    output.written, now.seconds = 80, 101.5
    target.commit_if_due()
    assert len(output.calls) == 2


def test_much_data_is_committed_within_the_second(now: SimpleNamespace) -> None:
    output = FakeOutput()
    target = new_checkpointer(output, row_bytes=1024 * 1024)
    output.written = 60
    target.commit_if_due()
    assert output.calls == []
    output.written = 64
    target.commit_if_due()
    assert output.calls == ["commit", "journal to 64"]


def test_a_commit_waits_for_the_end_of_a_batch(now: SimpleNamespace) -> None:
    output = FakeOutput(written=6)
    target = new_checkpointer(FakeOutput())
    target.writer = output
    now.seconds = 200.0
    target.commit_if_due()
    assert output.calls == []
    output.written = 8
    target.commit_if_due()
    assert output.calls == ["commit"]


def test_commits_are_less_frequent_on_a_slow_disk(now: SimpleNamespace) -> None:
    output = FakeOutput(written=4)
    target = new_checkpointer(output)
    target.writer = slow = SimpleNamespace(written=4, commit=lambda: _takes(now, 0.1))
    now.seconds = 101.0
    target.commit_if_due()
    slow.commit = output.commit
    now.seconds = 101.1 + 9.9
    target.commit_if_due()
    assert output.calls == []
    now.seconds = 101.1 + 10.1
    target.commit_if_due()
    assert output.calls[:1] == ["commit"], "a tenth of a second is a hundredth of ten"


def _takes(now: SimpleNamespace, seconds: float) -> list[CommittedRange]:
    now.seconds += seconds
    return []


def test_closing_commits_the_rest_and_closes_writer_and_journal() -> None:
    output = FakeOutput(written=7)
    target = new_checkpointer(FakeOutput())
    target.writer, target.journal = output, output.journal
    target.close()
    assert output.calls == ["close", "journal to 7", "journal closed"]


@pytest.mark.parametrize("fails", ["commit", "journal to 8"])
def test_nothing_is_committed_after_a_failed_commit(now: SimpleNamespace, fails: str) -> None:
    output = FakeOutput(fails=fails)
    target = new_checkpointer(output)
    output.written, now.seconds = 8, 200.0
    with pytest.raises(OSError, match="Input/output"):
        target.commit_if_due()
    output.fails, output.written = "", 12
    target.close()
    assert output.calls[-2:] == ["close", "journal closed"]


def test_a_failed_close_still_closes_the_journal() -> None:
    output = FakeOutput(fails="close")
    with pytest.raises(OSError, match="Input/output"):
        new_checkpointer(output).close()
    assert output.calls[-1] == "journal closed"
