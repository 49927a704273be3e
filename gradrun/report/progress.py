"""Progress of a command: the stage, a bar where the total is known, and the part of each worker.

It draws in the caller's thread: another thread would take time from the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from gradrun.core.progress import Progress, ProgressCallback
from gradrun.core.units import format_number
from gradrun.report.escaping import escape_control_chars

_MAX_WORKERS = 16
"""Lines of workers: more may not fit on a screen."""

_LINE_SECONDS = 30.0
"""Between two lines of a log."""


class _Rate(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        speed = task.speed or 0.0
        return Text(f"{format_number(speed)} /s" if speed >= 1 else "")


class _TimeLeft(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        left = task.time_remaining
        return Text("" if left is None else _format_left(left))


class _Stages(RichProgress):
    """Draws the current stage, without a bar while its total is unknown, and its workers."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
            _Rate(),
            _TimeLeft(),
        )
        self._current = Progress("")
        self._stages: dict[str, TaskID] = {}
        super().__init__(*columns, console=console, auto_refresh=False, transient=True)

    def set_progress(self, progress: Progress) -> None:
        """Draw this progress from now on."""
        if progress.stage not in self._stages:
            for finished in self._stages.values():
                self.update(finished, visible=False)
            self._stages[progress.stage] = self.add_task(progress.stage, total=None)
        total = progress.total or None
        self.update(self._stages[progress.stage], completed=progress.done, total=total)
        self._current = progress

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.get_whole()
        if self._current.workers:
            yield _worker_table(self._current)

    def get_whole(self) -> RenderableType:
        """Return the line of the stage, without its workers."""
        for task in self.tasks:
            if task.visible and task.total:
                return self.make_tasks_table([task])
            if task.visible:
                return _without_total(task)
        return Text("")


def _without_total(task: RichTask) -> Text:
    """Describe a stage of unknown length: "predicting … 1,250 (410 /s)"."""
    text = f"{task.description} …"
    if task.completed:
        text += f" {task.completed:,.0f}"
    if task.speed and task.speed >= 1:
        text += f" ({format_number(task.speed)} /s)"
    return Text(text)


def _worker_table(progress: Progress) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for worker in progress.workers[:_MAX_WORKERS]:
        busy = "waiting" if worker.busy is None else f"in a range for {worker.busy:.0f} s"
        rate = f"{format_number(worker.rate)} /s" if worker.rate else ""
        table.add_row(
            Text(f"  {escape_control_chars(worker.name)}"), f"{worker.done:,}", rate, busy
        )
    more = len(progress.workers) - _MAX_WORKERS
    rest = [f"{more:,} more" if more > 0 else "", progress.other_workers]
    if any(rest):
        table.add_row(f"  {', '.join(filter(None, rest))}")
    return table


class _LogLines:
    """Prints the whole progress as a line of text, first after a while: for logs of long jobs."""

    def __init__(self, console: Console) -> None:
        self._console, self._printed = console, console.get_time()
        self._stage, self._began, self._begin = "", 0.0, 0

    def show(self, progress: Progress) -> None:
        """Print a line if the last one is old."""
        now = self._console.get_time()
        if progress.stage != self._stage:
            self._stage, self._began, self._begin = progress.stage, now, progress.done
        if now - self._printed < _LINE_SECONDS:
            return
        self._printed = now
        line = f"{progress.stage} …" + (f" {progress.done:,}" if progress.done else "")
        if progress.total:
            share = f"{progress.done / progress.total:.0%}"
            line = f"{progress.stage}: {share}, {progress.done:,} of {progress.total:,}"
        if (done := progress.done - self._begin) > 0 and now > self._began:
            rate = done / (now - self._began)
            line += f", {format_number(rate)} /s"
            if progress.total:
                line += f", {_format_left((progress.total - progress.done) / rate)}"
        self._console.print(Text(line), soft_wrap=True)


def _format_left(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} left"


@contextmanager
def progress_bar(console: Console) -> Iterator[ProgressCallback]:
    """Yield a callback that draws the progress on a terminal, and erases it at the end.

    Elsewhere it prints a line every half minute.
    """
    if not console.is_terminal or console.is_dumb_terminal:
        yield _LogLines(console).show
        return
    display = _Stages(console)
    if console.no_color:  # without escape codes: a line that overwrites itself
        try:
            yield _callback(display, lambda: _overwrite_line(console, display.get_whole()))
        finally:
            _overwrite_line(console, Text(""))
            print("", end="\r", file=console.file)
        return
    with display:
        yield _callback(display, display.refresh)


def _callback(display: _Stages, draw: Callable[[], None]) -> ProgressCallback:
    def show(progress: Progress) -> None:
        display.set_progress(progress)
        draw()

    return show


def _overwrite_line(console: Console, content: RenderableType) -> None:
    width = console.width - 1  # a cursor in the last column would start another line
    with console.capture() as capture:
        console.print(content, width=width, no_wrap=True)
    line = capture.get().rstrip("\n")[:width]
    print(f"\r{line:<{width}}", end="", file=console.file, flush=True)
