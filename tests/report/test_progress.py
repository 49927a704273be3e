"""The progress bar: on a terminal only, in the caller's thread, and gone at the end."""

from __future__ import annotations

import io
import re
import threading
from typing import Any

import pytest
from rich.console import Console

from gradrun.core.progress import Progress, ignore
from gradrun.report.progress import progress_bar


def console(*, terminal: bool, **settings: Any) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=100,
        _environ={},
        **settings,
    )


def test_without_a_terminal_there_is_no_progress_bar() -> None:
    pipe = console(terminal=False)
    with progress_bar(pipe) as progress:
        assert progress is ignore
    assert pipe.file.getvalue() == ""


def test_the_bar_shows_share_rate_and_time_left() -> None:
    done = 0
    screen = console(terminal=True, get_time=lambda: done / 4)
    with progress_bar(screen) as progress:
        for done in (0, 100, 200, 300):
            progress(Progress("predicting", done, 1000))
        last = screen.file.getvalue().rpartition("predicting")[2]
    last = re.sub(r"\x1b\[[\d;]*m", "", last)
    assert last.endswith("30% 300 of 1,000 4.00 /s 0:02:55 left")


def test_a_stage_of_unknown_length_has_neither_a_bar_nor_a_share() -> None:
    screen = console(terminal=True)
    with progress_bar(screen) as progress:
        progress(Progress("loading the model"))
        drawn = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", screen.file.getvalue())
    assert set(drawn.split("\r")) - {""} == {"loading the model …"}


def test_without_colors_the_line_overwrites_itself_without_escape_codes() -> None:
    screen = console(terminal=True, no_color=True, color_system=None)
    with progress_bar(screen) as progress:
        progress(Progress("loading the model"))
        progress(Progress("predicting", 300, 1000))
    _, loading, predicting, erased, end = screen.file.getvalue().split("\r")
    assert loading.rstrip() == "loading the model …"
    assert predicting.startswith("predicting ━")
    assert predicting.rstrip().endswith("30% 300 of 1,000")
    assert {len(line) for line in (loading, predicting, erased)} == {99}
    assert not erased.strip() + end


@pytest.mark.parametrize("fails", [False, True])
def test_the_bar_is_erased_at_the_end(fails: bool) -> None:
    screen = console(terminal=True)
    try:
        with progress_bar(screen) as progress:
            progress(Progress("predicting", 1, 2))
            drawn = len(screen.file.getvalue())
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    rest = screen.file.getvalue()[drawn:]
    assert "\x1b[2K" in rest, "the line is erased"
    assert "\x1b[?25h" in rest, "the cursor is back"
    assert "%" not in rest.rpartition("\x1b[2K")[2]


def test_the_bar_draws_in_the_callers_thread() -> None:
    before = threading.active_count()
    with progress_bar(console(terminal=True)) as progress:
        progress(Progress("predicting", 1, 2))
        assert threading.active_count() == before


def test_quiet_draws_nothing() -> None:
    screen = console(terminal=True, quiet=True)
    with progress_bar(screen) as progress:
        progress(Progress("predicting", 1, 2))
    assert screen.file.getvalue() == ""
