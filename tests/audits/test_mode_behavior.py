"""`gradrun modes` as a user types it: what it prints where, and how it ends."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gradrun.audits.behavior import questions
from tests.conftest import Command

TOPIC = "r after the block"
ROWS = tuple(question for question in questions.QUESTIONS if question.topic == TOPIC)


@pytest.fixture
def one_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a few questions only."""
    monkeypatch.setattr(questions, "QUESTIONS", ROWS)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect a wrong answer to one question in inference mode."""
    first = dataclasses.replace(ROWS[0], expected=("works",) * 3)
    monkeypatch.setattr(questions, "QUESTIONS", (first, *ROWS[1:]))


def test_the_page_goes_to_stdout(cli: Command, one_topic: None) -> None:
    answer = cli("modes", "--device", "cpu")
    assert (answer.code, answer.err) == (0, "")
    assert "27 behaviors verified" in answer.out


def test_a_difference_is_exit_code_3_and_is_saved(
    cli: Command, wrong: None, tmp_path: Path
) -> None:
    answer = cli("modes", "--device", "cpu", "--json", tmp_path / "modes.json")
    assert answer.code == 3
    assert "✗ RuntimeError" in answer.out
    told = " ".join(answer.out.split())
    assert f'{TOPIC} > r.add_(1) > inference_mode: expected "works", got "RuntimeError"' in told
    assert "read-only outside inference mode" in told
    assert "1 of 27 behaviors differ" in told
    facts = json.loads((tmp_path / "modes.json").read_text())["facts"]
    assert sum(fact["expected"] != fact["observed"] for fact in facts) == 1


def test_quiet_reports_by_exit_code_only(cli: Command, wrong: None) -> None:
    answer = cli("modes", "--device", "cpu", "--quiet")
    assert (answer.code, answer.text) == (3, "")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_an_unavailable_device_is_exit_code_2(cli: Command, device: str) -> None:
    answer = cli("modes", "--device", device)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith(("error: device cuda:99 is not", "error: unknown device"))
    assert "cpu" in answer.err


def test_json_into_a_folder_that_is_not_there_is_an_error_before_anything_runs(
    cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "QUESTIONS", None)  # iterating it would fail
    answer = cli("modes", "--json", "nowhere/modes.json")
    assert answer.code == 2
    assert "folder nowhere does not exist" in answer.err
