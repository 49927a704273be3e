"""Results to text, for people or programs. Knows results and units; never what made them.

A format is one module and one line in a table here. Nothing is imported before it is wanted: a
table in the terminal needs no template, and JSON no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from gradrun.results.result import AnyResult

_WRITERS = {
    "markdown": "markdown:text",
    "csv": "export:csv_text",
    "json": "export:json_text",
    "html": "html_page:text",
}
"""format -> what makes one text of results: a sequence of (name, AnyResult)."""

_SHOWS = {
    "infer": "terminal:show",
    "compare": "comparison:show",
    "audit": "audit:show",
    "check": "check:show",
}
"""kind of result -> what prints one to a console."""

FORMATS = ("table", *_WRITERS)
SUFFIXES = {
    ".txt": "table",
    ".md": "markdown",
    ".csv": "csv",
    ".json": "json",
    ".html": "html",
    ".htm": "html",
}


def written(results: Sequence[tuple[str, AnyResult]], format: str) -> str:
    """Named results as one text in any format but table.

    Raises:
        ConfigError: the format needs a package that is not installed.
    """
    return str(_found(_WRITERS[format])(results))


def show(results: Sequence[tuple[str, AnyResult]], console: Console) -> None:
    """Print named results: one as its run did, several side by side."""
    if len(results) > 1:
        _found("plain:show_side_by_side")(results, console)
        return
    for _, result in results:
        _found(_SHOWS[result.kind])(result, console)


def table(results: Sequence[tuple[str, AnyResult]], width: int = 100) -> str:
    """What `show` prints, as plain text."""
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    show(results, Console(file=file, width=width, color_system=None))
    return file.getvalue()


def _found(place: str) -> Callable[..., object]:
    module, _, name = place.partition(":")
    found: Callable[..., object] = getattr(import_module(f"gradrun.report.{module}"), name)
    return found
