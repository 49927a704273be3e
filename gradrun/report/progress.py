"""Progress of a command on a terminal: the stage, and a bar where the total is known.

It draws in the caller's thread: another thread would take time from the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.core.units import format_number


class _Rate(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: RichTask) -> Text:
        speed = task.speed or 0.0
        return Text(f"{format_number(speed)} /s" if speed >= 1 else "")


class _TimeLeft(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: RichTask) -> Text:
        if task.time_remaining is None:
            return Text("")
        minutes, seconds = divmod(int(task.time_remaining), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")


class _Stages(RichProgress):
    """Draws the current stage; without a bar while its total is unknown."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            if task.visible:
                yield self.make_tasks_table([task]) if task.total else Text(f"{task.description} …")


@contextmanager
def progress_bar(console: Console) -> Iterator[ProgressCallback]:
    """Yield a callback that draws the progress, erased at the end; on a terminal only."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield ignore
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        _Rate(),
        _TimeLeft(),
    )
    display = _Stages(*columns, console=console, auto_refresh=False, transient=True)
    if console.no_color:  # without escape codes: a line that overwrites itself
        try:
            yield _updater(display, lambda: _overwrite_line(console, display.get_renderable()))
        finally:
            _overwrite_line(console, Text(""))
            print("", end="\r", file=console.file)
        return
    with display:
        yield _updater(display, display.refresh)


def _updater(display: RichProgress, draw: Callable[[], None]) -> ProgressCallback:
    tasks: dict[str, TaskID] = {}

    def show(progress: Progress) -> None:
        if progress.stage not in tasks:
            for finished in tasks.values():
                display.update(finished, visible=False)
            tasks[progress.stage] = display.add_task(progress.stage, total=progress.total)
        display.update(tasks[progress.stage], completed=progress.done, total=progress.total)
        draw()

    return show


def _overwrite_line(console: Console, content: RenderableType) -> None:
    width = console.width - 1  # a cursor in the last column would start another line
    with console.capture() as capture:
        console.print(content, width=width, no_wrap=True)
    line = capture.get().rstrip("\n")[:width]
    print(f"\r{line:<{width}}", end="", file=console.file, flush=True)
