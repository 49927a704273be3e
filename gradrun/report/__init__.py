"""Reports on results, in the terminal or as text.

A renderer is imported when it is used: JSON needs no Rich, and only HTML needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from gradrun.results.result import AnyResult

_RENDERERS = {
    "markdown": "markdown:render",
    "csv": "export:render_csv",
    "json": "export:render_json",
    "html": "html_page:render",
}
FORMATS = ("table", *_RENDERERS)
SUFFIXES = {
    ".txt": "table",
    ".md": "markdown",
    ".csv": "csv",
    ".json": "json",
    ".html": "html",
    ".htm": "html",
}


def render(results: Sequence[tuple[str, AnyResult]], format: str, width: int = 100) -> str:
    """Render named results as text; `width` is the number of columns of a table.

    Raises:
        ConfigError: the format needs a package that is not installed.
    """
    if format == "table":
        return _render_table(results, width)
    module, _, function = _RENDERERS[format].partition(":")
    return str(getattr(import_module(f"gradrun.report.{module}"), function)(results))


def show(results: Sequence[tuple[str, AnyResult]], console: Console) -> None:
    """Print one result as its command did, or several side by side."""
    from gradrun.report.document import describe
    from gradrun.report.terminal import show, show_side_by_side

    if len(results) > 1:
        show_side_by_side(results, console)
        return
    for _, result in results:
        show(describe(result), console)


def _render_table(results: Sequence[tuple[str, AnyResult]], width: int) -> str:
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    show(results, Console(file=file, width=width, color_system=None))
    return file.getvalue()
