"""An audit as tables in the terminal: the modes, the findings, and where the memory goes.

Knows Rich and the result; imports no torch and runs no model.
"""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradrun.gradmode import GradMode
from gradrun.reports.comparison import outputs_text
from gradrun.reports.terminal import DASH, model_name, nearest, printable
from gradrun.result import Finding, Measurement, RunResult
from gradrun.safety import errors_in, verdict
from gradrun.units import bytes_text, count_text

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_MOST_MODULES = 12


def show(result: RunResult, console: Console) -> None:
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
    if result.kept:
        console.print(_kept_table(result))
        console.print()
    console.print(Text(printable(verdict(result)), "bold"))
    folder = Path(nearest(result.config["output"]["path"]))
    console.print(Text(printable(f"every figure in {folder / 'result.json'}"), "dim"))


def _headline(result: RunResult) -> Text:
    machine = result.environment
    where = machine.device_name or machine.device
    facts = f"  audit, {where}, torch {machine.torch}"
    return Text.assemble((model_name(result), "bold"), (printable(facts), "dim"))


def _modes_table(result: RunResult) -> Table:
    table = _table("Mode", "safe", "forward peak", "retained", "outputs")
    agreed = {e.candidate: e for e in result.equivalence}
    measured = {m.mode: m for m in result.measurements}
    for mode, found in measured.items():
        errors = errors_in(result, mode)
        safe = Text("yes", "green")
        if errors:
            safe = Text(count_text(len(errors), "error"), "bold red")
        table.add_row(
            Text(mode.value),
            safe,
            *(Text(_bytes(found, f)) for f in ("forward_peak", "retained")),
            outputs_text(agreed.get(mode.value)),
        )
    for mode in GradMode:
        if mode not in measured:
            failed = Text("cannot run", "bold red")
            table.add_row(Text(mode.value), failed, DASH, DASH, DASH)
    return table


def _bytes(measured: Measurement, field: str) -> str:
    count = getattr(measured.memory, field)
    return DASH if count is None else bytes_text(count)


def _heading(finding: Finding) -> Text:
    modes = ", ".join(finding.modes)
    return Text.assemble(
        (finding.severity, _STYLES[finding.severity]),
        ("  " + printable(finding.module) if finding.module else "", "bold"),
        (f"  in {modes}" if modes and len(finding.modes) < 3 else "", "dim"),
        (printable(f"\n  {_source(finding.source)}") if finding.source else ""),
    )


def _source(source: str) -> str:
    file, _, line = source.rpartition(":")
    return f"{nearest(file)}:{line}"


def _body(finding: Finding) -> Text:
    advice = f" {finding.advice}." if finding.advice else ""
    return Text.assemble(printable(f"{finding.text}."), (printable(advice), "dim"))


def _kept_table(result: RunResult) -> Table:
    """The modules that keep most, and under them what the memory meter found on its own."""
    grad = next(m for m in result.measurements if m.mode is GradMode.GRAD)
    total = sum(kept.bytes for kept in result.kept)
    table = _table("Kept after a batch in grad", "one batch", "share")
    retained = grad.memory.retained
    whole = total if retained is None else retained
    shown, rest = result.kept[:_MOST_MODULES], result.kept[_MOST_MODULES:]
    for kept in shown:
        _row(table, kept.module, kept.bytes, whole)
    if rest:
        _row(table, f"{len(rest)} more", sum(kept.bytes for kept in rest), whole)
    if whole != total:
        _row(table, "(elsewhere)", whole - total, whole)
    table.add_section()
    title = "together" if retained is None else "together, as retained above"
    table.add_row(Text(title, "bold"), Text(bytes_text(whole), "bold"), "")
    return table


def _row(table: Table, name: str, count: int, total: int) -> None:
    path, _, kind = name.rpartition(" ")
    label = Text.assemble(printable(path or kind), (f" {printable(kind)}" if path else "", "dim"))
    table.add_row(label, bytes_text(count), f"{count / total:.0%}" if total else DASH)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column(title, min_width=14, overflow="fold")
    for column in columns:
        table.add_column(column, justify="left" if column == "outputs" else "right", no_wrap=True)
    return table
