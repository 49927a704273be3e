"""What the gradient modes do, as tables in the terminal: one a topic, and why where one differs.

Knows Rich and the facts; imports no torch and asks nothing.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradrun.core.grad_mode import GradMode
from gradrun.core.units import pluralize
from gradrun.report.escaping import escape_control_chars
from gradrun.report.terminal import TABLE_WIDTH, hanging
from gradrun.results.result import Fact, ModeFacts

_MARK = "✗"
_DIFFERS = "bold red"
_CELL, _LAST = 14, 16
"""The width of a cell: "RuntimeError" with its mark; the last has "inference_mode"."""

Questions = dict[str, dict[GradMode | None, Fact]]
"""question -> mode -> fact, in the order of asking."""


def show(proven: ModeFacts, console: Console) -> None:
    """Print all facts, what differs with its reason, and a sentence that says how many hold."""
    width = min(console.width, TABLE_WIDTH)
    console.print()
    console.print(_headline(proven))
    for topic, rows in _topics(proven).items():
        # A row that chooses no mode has one cell, and a table of its own.
        for questions in _split(rows):
            console.print()
            console.print(_table(topic, questions, width))
    console.print()
    for fact in proven.differing:
        console.print(hanging(_MARK, _explanation(fact, proven.environment.torch), _DIFFERS))
    for reason in dict.fromkeys(fact.unavailable for fact in proven.facts if fact.observed is None):
        console.print(hanging("!", f"not available: {reason}"))
    if any(fact.observed != fact.expected for fact in proven.facts):
        console.print()
    console.print(_closing(proven))


def _topics(proven: ModeFacts) -> dict[str, Questions]:
    topics: dict[str, Questions] = {}
    for fact in proven.facts:
        topics.setdefault(fact.topic, {}).setdefault(fact.question, {})[fact.mode] = fact
    return topics


def _split(rows: Questions) -> list[Questions]:
    """The questions that choose a mode, and those that choose none, where there are any."""
    in_modes = {question: cells for question, cells in rows.items() if None not in cells}
    alone = {question: cells for question, cells in rows.items() if None in cells}
    return [questions for questions in (in_modes, alone) if questions]


def _headline(proven: ModeFacts) -> Text:
    machine = proven.environment
    device = machine.device_name or machine.device
    return Text.assemble(
        (escape_control_chars(f"torch {machine.torch}"), "bold"),
        (escape_control_chars(f"  {device}, python {machine.python}"), "dim"),
    )


def _table(topic: str, questions: Questions, width: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
        header_style="bold",
        width=width,
    )
    modes = list(GradMode) if any(None not in cells for cells in questions.values()) else [None]
    table.add_column(Text(escape_control_chars(topic)), ratio=1, overflow="fold")
    for mode in modes:
        last = mode is modes[-1]
        table.add_column(mode or "", width=_LAST if last else _CELL, overflow="fold")
    for question, cells in questions.items():
        table.add_row(
            Text(escape_control_chars(question)),
            *(_cell(cells[mode]) if mode in cells else Text() for mode in modes),
        )
    return table


def _cell(fact: Fact) -> Text:
    if fact.observed is None:
        return Text("not available", "yellow")
    if fact.holds:
        return Text(
            escape_control_chars(fact.observed), "yellow" if fact.observed.endswith("Error") else ""
        )
    # What an error says stands below the tables.
    short = fact.observed.partition(":")[0].removeprefix("raises ")
    return Text(escape_control_chars(f"{_MARK} {short}"), _DIFFERS)


def _explanation(fact: Fact, torch: str) -> str:
    where = " > ".join(filter(None, (fact.topic, fact.question, fact.mode)))
    got = (fact.observed or "").removeprefix("raises ")
    return f'{where}: expected "{fact.expected}", got "{got}" on torch {torch}. {fact.why}'


def _closing(proven: ModeFacts) -> Text:
    torch, differing = proven.environment.torch, len(proven.differing)
    unavailable = sum(fact.observed is None for fact in proven.facts)
    tried = len(proven.facts) - unavailable
    if differing:
        text = f"{differing} of {pluralize(tried, 'fact')} differ on torch {torch}"
    else:
        text = f"{pluralize(tried, 'fact')} proven on torch {torch}, each by running it just now"
    if unavailable:
        text += f"; {unavailable} could not be tried"
    return Text(escape_control_chars(f"{text}."), _DIFFERS if differing else "bold green")
