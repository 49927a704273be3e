"""The page of `gradrun modes`: golden files of fixed facts, and properties of any facts.

GRADRUN_GOLDEN=1 rewrites the golden files.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from gradrun.core.grad_mode import GradMode
from gradrun.report.document import describe_modes
from gradrun.report.escaping import escape_control_chars
from gradrun.report.terminal import TABLE_WIDTH, show
from gradrun.results.result import Fact, ModeFacts
from tests.support.run_results import MACHINE

GOLDEN = Path(__file__).parents[1] / "golden"
MARK = "✗"


def fact(question: str, expected: str, observed: str | None = "", **changes: Any) -> Fact:
    """One that holds, unless something else was observed."""
    given: dict[str, Any] = {
        "topic": "r after the block",
        "question": question,
        "expected": expected,
        "observed": expected if observed == "" else observed,
        "why": f"This is why {question} matters.",
    }
    return Fact(**(given | changes))


def row(question: str, *expected: str, **changes: Any) -> tuple[Fact, ...]:
    """The same question in all three modes."""
    asked = zip(GradMode, expected, strict=True)
    return tuple(fact(question, text, mode=mode, **changes) for mode, text in asked)


def proven(*facts: Fact, **changes: Any) -> ModeFacts:
    given: dict[str, Any] = {"gradrun": "0.1.0", "environment": MACHINE, "facts": facts}
    return ModeFacts(**(given | changes))


AFTER = (
    *row("r.add_(1)", "works", "works", "RuntimeError"),
    *row("r.clone()", "normal", "normal", "normal"),
)
NESTED = (
    fact("enable_grad() inside no_grad()", "on", topic="Blocks within blocks: gradients are"),
    fact(
        "set_grad_enabled(False) called in a function that has returned",
        "off",
        topic="Blocks within blocks: gradients are",
    ),
)
COMPILED = row(
    "gradrun's guard, fullgraph=True", "1 graph", "1 graph", "1 graph", topic="torch.compile"
)
NO_COMPILE = tuple(
    known.replace(observed=None, unavailable="torch.compile is turned off here")
    for known in COMPILED
)
WORKS_NOW = fact("r.add_(1)", "RuntimeError", "works", mode="inference_mode")
BROKEN = fact(
    "r.clone()", "normal", "raises TypeError: clone() is no more: use copy()", mode="no_grad"
)
OFF = fact("no_grad() inside enable_grad()", "off", "on", topic=NESTED[0].topic)
RESULTS = {
    "proven": proven(*AFTER, *NESTED, *COMPILED),
    "differs": proven(
        *AFTER[:2], WORKS_NOW, AFTER[3], BROKEN, AFTER[5], NESTED[0], OFF, *NO_COMPILE
    ),
    "gpu": proven(
        *AFTER,
        environment=MACHINE.replace(device="cuda", device_name="NVIDIA H200"),
    ),
    "mixed": proven(*AFTER, fact("alone", "yes")),
    "unavailable": proven(*AFTER, *NO_COMPILE),
}


def shown(result: ModeFacts, width: int = 80, *, terminal: bool = False, **environ: str) -> str:
    """What `show` prints; plain unless it is to look like a terminal."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        _environ=environ,
    )
    show(describe_modes(result), console)
    return console.file.getvalue()


@pytest.mark.parametrize("name", RESULTS)
def test_the_page_is_that_of_the_golden_file(name: str) -> None:
    golden = GOLDEN / f"modes-{name}-80.txt"
    text = "\n".join(line.rstrip() for line in shown(RESULTS[name]).splitlines()) + "\n"
    if os.environ.get("GRADRUN_GOLDEN") == "1":
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "if it is meant: GRADRUN_GOLDEN=1"


@pytest.mark.parametrize("width", [40, 60, 79, 80, 120, 200])
@pytest.mark.parametrize("name", RESULTS)
def test_no_line_is_longer_than_the_terminal_and_no_table_than_a_page(
    name: str, width: int
) -> None:
    text = shown(RESULTS[name], width)
    assert max(map(cell_len, text.splitlines())) <= width
    rules = [line for line in text.splitlines() if line.startswith("─")]
    assert {cell_len(rule) for rule in rules} == {min(width, TABLE_WIDTH)}


def line(text: str, start: str) -> list[str]:
    """The cells of the table's row that begins with `start`, without it."""
    (found,) = [row for row in text.splitlines() if row.startswith(f"{start} ")]
    return re.split(r"\s{2,}", found.removeprefix(start).strip())


def test_each_mode_has_a_column() -> None:
    text = shown(RESULTS["proven"])
    assert line(text, "r after the block") == ["grad", "no_grad", "inference_mode"]
    assert line(text, "r.add_(1)") == ["works", "works", "RuntimeError"]
    assert line(text, "enable_grad() inside no_grad()") == ["on"]


def test_a_topic_of_both_kinds_has_a_table_for_each() -> None:
    text = shown(RESULTS["mixed"])
    assert text.count("r after the block") == 2
    assert line(text, "alone") == ["yes"]


@pytest.mark.parametrize("name", ["proven", "gpu", "mixed", "unavailable"])
def test_expected_answers_are_not_marked(name: str) -> None:
    text = shown(RESULTS[name])
    assert MARK not in text
    assert "This is why" not in text


def test_a_cell_that_differs_is_marked_and_no_other() -> None:
    text = shown(RESULTS["differs"])
    assert line(text, "r.add_(1)") == ["works", "works", f"{MARK} works"]
    assert line(text, "r.clone()") == ["normal", f"{MARK} TypeError", "normal"]
    assert line(text, "no_grad() inside enable_grad()") == [f"{MARK} on"]


def test_each_different_cell_is_explained_once() -> None:
    text = shown(RESULTS["differs"], 400)
    told = [line for line in text.splitlines() if line.startswith(f"{MARK} ")]
    assert told == [
        f'{MARK} r after the block > r.add_(1) > inference_mode: expected "RuntimeError", got '
        '"works" on torch 2.13.0+cpu. This is why r.add_(1) matters.',
        f'{MARK} r after the block > r.clone() > no_grad: expected "normal", got "TypeError: '
        'clone() is no more: use copy()" on torch 2.13.0+cpu. This is why r.clone() matters.',
        f"{MARK} Blocks within blocks: gradients are > no_grad() inside enable_grad(): expected "
        '"off", got "on" on torch 2.13.0+cpu. This is why no_grad() inside enable_grad() matters.',
    ]


def test_unavailable_questions_are_explained_and_counted_separately() -> None:
    text = shown(RESULTS["unavailable"])
    assert line(text, "gradrun's guard, fullgraph=True") == ["not available"] * 3
    assert text.count("! not available: torch.compile is turned off here") == 1
    assert " ".join(text.split()).endswith("on torch 2.13.0+cpu; 3 not available.")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("proven", "11 behaviors verified on torch 2.13.0+cpu."),
        ("differs", "3 of 8 behaviors differ on torch 2.13.0+cpu; 3 not available."),
    ],
)
def test_the_last_sentence_counts(name: str, sentence: str) -> None:
    assert shown(RESULTS[name]).rstrip().splitlines()[-1] == sentence


def test_the_headline_names_torch_and_device() -> None:
    assert shown(RESULTS["gpu"]).split("\n")[1] == "torch 2.13.0+cpu  NVIDIA H200, python 3.11.9"


# --- plain, coloured and harmless --------------------------------------------------------------


@pytest.mark.parametrize("name", RESULTS)
def test_a_pipe_gets_plain_text(name: str) -> None:
    text = shown(RESULTS[name])
    assert "\x1b" not in text
    assert escape_control_chars(text) == text


def test_differences_are_red_on_a_terminal_and_marked_without_color() -> None:
    red, escape = "\x1b[1;31m", re.compile(r"\x1b\[[\d;]*m")
    coloured = shown(RESULTS["differs"], terminal=True)
    assert f"{red}{MARK} works" in coloured
    assert f"{red}{MARK} TypeError" in coloured
    assert red not in shown(RESULTS["proven"], terminal=True)
    assert escape.sub("", coloured) == shown(RESULTS["differs"])
    without = shown(RESULTS["differs"], terminal=True, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*3\dm", without)
    assert f"{MARK} works" in escape.sub("", without)


EVIL = "[bold red]x[red]y\x1b]0;gone\x07\x1b[2J\x9b2J\u202e"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "result",
    [
        proven(fact("r", "works", EVIL, mode="grad")),
        proven(fact("r", "works", f"raises E: {EVIL}")),
        proven(fact(EVIL, "works")),
        proven(fact("r", "works", topic=EVIL)),
        proven(fact("r", "works", None, unavailable=EVIL)),
        proven(*AFTER, environment=MACHINE.replace(torch=EVIL)),
    ],
    ids=["seen", "raised", "question", "topic", "unavailable", "torch"],
)
def test_no_text_can_drive_the_terminal(result: ModeFacts, terminal: bool) -> None:
    text = re.sub(r"\x1b\[[\d;]*m", "", shown(result, 300, terminal=terminal))
    assert escape_control_chars(text) == text
    assert "[bold red]x" in "".join(text.split("\n")), "markup is text like any other"
