"""An audit as tables in the terminal: the modes, the findings, and where the memory goes.

Knows Rich and the result; imports no torch and runs no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from gradrun.report import tables, wording
from gradrun.report.comparison import words_text
from gradrun.report.escaping import escape_control_chars
from gradrun.report.tables import Table
from gradrun.report.terminal import display_path, model_name
from gradrun.results.result import AuditResult, Finding
from gradrun.results.safety import verdict

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}


def show(result: AuditResult, console: Console) -> None:
    """Print everything that a person wants to know of an audit."""
    console.print()
    console.print(_headline(result))
    console.print()
    console.print(_modes_table(result))
    console.print()
    for finding in result.findings:
        console.print(_heading(finding))
        console.print(Padding(_body(finding), (0, 0, 1, 2)))
    if not result.findings:
        console.print(Text("Nothing was found.", "green"))
        console.print()
    if result.saved_for_backward:
        console.print(_kept_table(tables.kept(result)))
        console.print()
    console.print(Text(escape_control_chars(verdict(result)), "bold"))
    folder = Path(display_path(result.info.output_path))
    console.print(Text(escape_control_chars(f"every figure in {folder / 'result.json'}"), "dim"))


def _headline(result: AuditResult) -> Text:
    told = escape_control_chars(f"  {wording.facts(result)}")
    return Text.assemble((model_name(result), "bold"), (told, "dim"))


def _modes_table(result: AuditResult) -> RichTable:
    told = tables.modes(result)
    table = _table(told)
    for mode, safe, *figures, outputs in told.rows:
        style = "green" if safe == "yes" else "bold red"
        cells = (Text(figure) for figure in figures)
        table.add_row(Text(mode), Text(safe, style), *cells, words_text(outputs))
    return table


def _heading(finding: Finding) -> Text:
    modes = ", ".join(finding.modes)
    return Text.assemble(
        (finding.severity, _STYLES[finding.severity]),
        ("  " + escape_control_chars(finding.module) if finding.module else "", "bold"),
        (f"  in {modes}" if modes and len(finding.modes) < 3 else "", "dim"),
        (escape_control_chars(f"\n  {_source(finding.source)}") if finding.source else ""),
    )


def _source(source: str) -> str:
    file, _, line = source.rpartition(":")
    return f"{display_path(file)}:{line}"


def _body(finding: Finding) -> Text:
    advice = f" {finding.advice}." if finding.advice else ""
    return Text.assemble(
        escape_control_chars(f"{finding.text}."), (escape_control_chars(advice), "dim")
    )


def _kept_table(told: Table) -> RichTable:
    table = _table(told)
    *parts, (title, total, _) = told.rows
    for name, count, share in parts:
        path, _, kind = name.rpartition(" ")
        kind = f" {escape_control_chars(kind)}" if path else ""
        label = Text.assemble(escape_control_chars(path or name), (kind, "dim"))
        table.add_row(label, count, share)
    table.add_section()
    table.add_row(Text(title, "bold"), Text(total, "bold"), "")
    return table


def _table(told: Table) -> RichTable:
    table = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold"
    )
    table.add_column(told.title, min_width=14, overflow="fold")
    for column in told.columns:
        justify: Literal["left", "right"] = "left" if column == "outputs" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    return table
