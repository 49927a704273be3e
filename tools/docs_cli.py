"""The command reference, generated from the Typer commands."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer.main

from gradrun.cli.app import app

_INTRODUCTION = """\
# Commands

This page is generated from the commands themselves; `gradrun COMMAND --help` prints the same text.
[Exit codes and errors](errors.md) explains how commands end. `gradrun --install-completion`
installs tab completion for your shell.
"""


def cli_page() -> str:
    """The page as Markdown."""
    # Any: Typer brings click under a module name that depends on its version.
    group: Any = typer.main.get_command(app)
    lines = [_INTRODUCTION]
    for name, command in group.commands.items():
        lines += [f"## gradrun {name}", "", *_command(command, name)]
    return "\n".join(lines) + "\n"


def _command(command: Any, name: str) -> Iterator[str]:
    yield inspect.cleandoc(command.help or "")
    yield ""
    context = command.context_class(command, info_name=f"gradrun {name}")
    yield "```text"
    yield f"gradrun {name} {' '.join(command.collect_usage_pieces(context))}"
    yield "```"
    yield ""
    for title in ("argument", "option"):
        params = (p for p in command.params if p.param_type_name == title)
        records = [record for p in params if (record := p.get_help_record(context))]
        if records:
            yield from _rows(title, records)


def _rows(title: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    yield f"| {title} | description |"
    yield "|---|---|"
    for name, text in rows:
        cells = (f"`{name}`", text)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
