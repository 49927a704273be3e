"""A progress bar on a terminal.

It draws in the caller's thread: another thread would take time from the measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
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


@contextmanager
def progress_bar(console: Console) -> Iterator[ProgressCallback]:
    """Yield a callback that draws a bar per stage, erased at the end; on a terminal only."""
    if not console.is_terminal or console.no_color:
        yield ignore
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with RichProgress(*columns, console=console, auto_refresh=False, transient=True) as display:
        tasks: dict[str, TaskID] = {}

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                for finished in tasks.values():
                    display.update(finished, visible=False)
                tasks[progress.stage] = display.add_task(progress.stage, total=progress.total)
            task = tasks[progress.stage]
            display.update(task, completed=progress.done, total=progress.total)
            display.refresh()

        yield show
