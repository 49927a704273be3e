"""A progress bar with rate and time left, on a terminal only.

Knows Rich and counts of samples. It draws when it is told to, in the caller's thread: a thread of
its own would take time from what is being measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text

from gradrun.core.units import format_number


class _Rate(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: RichTask) -> Text:
        return Text(f"{format_number(task.speed)} /s" if task.speed else "")


class Bar:
    """Called with (samples done, samples in all)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("predicting", total=0)

    def __call__(self, done: int, samples: int) -> None:
        self._progress.update(self._task, completed=done, total=samples)
        self._progress.refresh()


@contextmanager
def bar(console: Console) -> Iterator[Bar | None]:
    """A bar that is gone when the block ends; None where the console shows plain text only."""
    if not console.is_terminal or console.no_color:
        yield None
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
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        yield Bar(progress)


@contextmanager
def status(console: Console) -> Iterator[Callable[[str, int, int], None] | None]:
    """One line that says what a comparison is doing; None where the console is no terminal."""
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[of]}"))
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", of="")

        def tell(doing: str, done: int, wanted: int) -> None:
            of = f"process {done + 1} of {wanted}" if doing == "timing" else ""
            progress.update(task, description=doing, completed=done, total=wanted, of=of)
            progress.refresh()

        yield tell
