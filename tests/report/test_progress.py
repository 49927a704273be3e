"""The progress: a bar in the caller's thread, gone at the end; lines where there is no terminal."""

from __future__ import annotations

import io
import re
import threading
from typing import Any

import pytest
from rich.console import Console

from gradrun.core.progress import Progress, WorkerProgress
from gradrun.report.progress import progress_bar


def console(*, terminal: bool, **settings: Any) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=100,
        _environ={},
        **settings,
    )


def test_without_a_terminal_a_line_of_the_whole_is_printed_every_half_minute() -> None:
    now = 0.0
    pipe = console(terminal=False, get_time=lambda: now)
    with progress_bar(pipe) as progress:
        for now in (0.0, 10.0, 29.0, 40.0, 50.0, 69.0, 70.0):
            progress(Progress("predicting", 100 + int(2 * now), 1000, WORKERS))
        now = 100.0
        progress(Progress("measuring memory"))
    assert pipe.file.getvalue().splitlines() == [
        "predicting: 18%, 180 of 1,000, 2.00 /s, 0:06:50 left",
        "predicting: 24%, 240 of 1,000, 2.00 /s, 0:06:20 left",
        "measuring memory …",
    ]


WORKERS = (
    WorkerProgress("worker 1 on [red]a[/red]", 1234, 12.5, 3.4),
    WorkerProgress("worker 3 on b\x1b[2J", 7, 0.0, None),
)


def test_each_worker_has_a_line_below_the_bar() -> None:
    screen = console(terminal=True)
    many = tuple(WorkerProgress(f"worker {n}", n, 1.0, 0.0) for n in range(20))
    with progress_bar(screen) as progress:
        progress(Progress("predicting", 0, 9000, many))
        assert "  4 more" in screen.file.getvalue()
        progress(Progress("predicting", 1241, 9000, WORKERS, "2 lost, 1 starting"))
        drawn = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", screen.file.getvalue())
    lines = [line.split() for line in drawn.rpartition("predicting")[2].splitlines()]
    assert lines[1:] == [
        "worker 1 on [red]a[/red] 1,234 12.5 /s in a range for 3 s".split(),
        ["worker", "3", "on", "b\\x1b[2J", "7", "waiting"],
        ["2", "lost,", "1", "starting"],
    ]


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


def test_a_stage_of_unknown_length_shows_its_count_and_rate() -> None:
    done = 0
    screen = console(terminal=True, get_time=lambda: done / 400)
    with progress_bar(screen) as progress:
        for done in (0, 400, 800, 1200):
            progress(Progress("predicting", done))
        drawn = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", screen.file.getvalue())
    assert drawn.split("\r")[-1] == "predicting … 1,200 (400 /s)"


def test_without_colors_the_line_overwrites_itself_without_escape_codes() -> None:
    screen = console(terminal=True, no_color=True, color_system=None)
    with progress_bar(screen) as progress:
        progress(Progress("loading the model"))
        progress(Progress("predicting", 300, 1000, WORKERS))
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
