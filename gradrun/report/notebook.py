"""Results and progress in a notebook."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from gradrun.core.errors import ConfigError
from gradrun.core.progress import Progress, ProgressCallback, ignore
from gradrun.results.result import AnyResult

_HEIGHT = 640
"""Pixels of the frame with a page."""


def render(result: AnyResult) -> str:
    """Return a result for the output of a cell: its page in a frame, whose style is its own.

    Without matplotlib, which the page needs, the tables as text.
    """
    from gradrun import report

    named = [(result.info.model, result)]
    try:
        page = report.render(named, "html")
    except ConfigError:
        return f"<pre>{escape(report.render(named, 'table'))}</pre>"
    return (
        f'<iframe srcdoc="{escape(page)}" sandbox width="100%" height="{_HEIGHT}" '
        'style="border: 0" title="gradrun"></iframe>'
    )


@contextmanager
def progress_display(callback: ProgressCallback | None) -> Iterator[ProgressCallback]:
    """Yield the callback; None: one that shows progress below the cell of a notebook, if any."""
    if callback is not None or not _in_notebook():
        yield callback or ignore
        return
    ipython = importlib.import_module("IPython.display")
    handle = ipython.display(ipython.HTML(""), display_id=True)

    def show(progress: Progress) -> None:
        share = f' value="{progress.done}" max="{progress.total}"' if progress.total else ""
        count = f"{progress.done:,} of {progress.total:,}" if progress.total else ""
        handle.update(
            ipython.HTML(f"{escape(progress.stage)} <progress{share}></progress> {count}")
        )

    try:
        yield show
    finally:
        handle.update(ipython.HTML(""))


def _in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config
