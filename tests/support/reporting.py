"""Helpers for tests of reports: a console to print on, and golden files to compare with.

GRADRUN_GOLDEN=1 rewrites the golden files.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

GOLDEN = Path(__file__).parents[1] / "golden"
EVIL = "[bold red]x[red]y\x1b]0;gone\x07\x1b[2J\x9b2J\u202e.py"
"""A name with terminal control characters and Rich markup, which must not be interpreted."""

_ESCAPE = re.compile(r"\x1b\[[\d;]*m")


def printed(
    show: Callable[[Any, Console], None],
    result: Any,
    width: int = 80,
    *,
    terminal: bool = False,
    **environ: str,
) -> str:
    """Return the output of `show`, as plain text unless `terminal` is set."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        _environ=environ,
    )
    show(result, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def without_style(text: str) -> str:
    """Remove the colors set by a report."""
    return _ESCAPE.sub("", text)


def assert_golden(name: str, text: str) -> None:
    """Compare with a golden file, ignoring spaces at the ends of lines."""
    golden = GOLDEN / f"{name.replace(' ', '-')}.txt"
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    if os.environ.get("GRADRUN_GOLDEN") == "1":
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), (
        "if the change is intended, run with GRADRUN_GOLDEN=1"
    )
