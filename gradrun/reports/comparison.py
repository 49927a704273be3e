"""A comparison as tables in the terminal: time, then memory and outputs, then what to do.

Knows Rich and the result; imports no torch and measures nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradrun import stats
from gradrun.conclusion import conclusion, ratio_digits
from gradrun.reports.terminal import DASH, hanging, model_name, nearest, printable
from gradrun.result import Comparison, Equivalence, Measurement, RunResult
from gradrun.units import bytes_text, count_text, number_text, seconds_text, seconds_within

_VERDICTS = {
    "faster": ("faster", "bold green"),
    "slower": ("slower", "bold red"),
    "no_difference": ("no difference", ""),
    "inconclusive": ("inconclusive", "bold yellow"),
}
_MEMORY = ("forward peak", "retained", "process peak", "device peak", "reserved")


def show(result: RunResult, console: Console) -> None:
    """Print everything that a person wants to know of a comparison."""
    by_variant: dict[str, list[Measurement]] = {}
    for measured in result.measurements:
        by_variant.setdefault(measured.variant, []).append(measured)
    console.print()
    if by_variant:
        console.print(_headline(result, by_variant))
        console.print()
        console.print(_time_table(result, by_variant))
        if result.comparisons:
            console.print(Text("± and 95 % are over processes; ratios are within each", "dim"))
        console.print()
        console.print(_memory_table(result, by_variant))
        console.print()
    for warning in result.warnings:
        console.print(hanging("!", warning.text))
    if result.warnings:
        console.print()
    console.print(Text(printable(conclusion(result)), "bold"))
    console.print(Text(f"every figure in {_saved_in(result)}", "dim"))


def _headline(result: RunResult, by_variant: dict[str, list[Measurement]]) -> Text:
    first = next(iter(by_variant.values()))
    machine = result.environment
    processes = count_text(len(first), "fresh process")
    rounds = sum(len(measured.batch_seconds) for measured in first)
    sizes, threads = _batch_sizes(by_variant), any("threads=" in name for name in by_variant)
    facts = (
        machine.device_name or machine.device,
        "" if threads else count_text(machine.threads, "thread"),
        f"batches of {sizes.pop()}" if rounds and len(sizes) == 1 else "",
        f"{count_text(rounds, 'round')} in {processes}",
    )
    told = printable("  " + ", ".join(filter(None, facts)))
    return Text.assemble((model_name(result), "bold"), (told, "dim"))


def _batch_sizes(by_variant: dict[str, list[Measurement]]) -> set[int]:
    return {size for measured in by_variant.values() for size in measured[0].batch_sizes[:1]}


def _time_table(result: RunResult, by_variant: dict[str, list[Measurement]]) -> Table:
    # A ratio is of samples; beside batches of several sizes, a batch's time would contradict it.
    alike = len(_batch_sizes(by_variant)) == 1
    table = _table("Time", "a batch" if alike else "a sample", "ratio", "95 %", "samples/s", "")
    compared = {c.candidate: c for c in result.comparisons}
    for name, measured in by_variant.items():
        size = measured[0].batch_sizes[0] if alike else 1
        values = [median(m.batch_seconds if alike else m.seconds_per_sample) for m in measured]
        time = stats.over_processes(values)
        table.add_row(
            Text(printable(name)),
            _seconds(time),
            *_ratio(compared.get(name)),
            Text(number_text(size / time.value, size / time.value * time.relative)),
            _verdict(compared.get(name), baseline=not compared.get(name)),
        )
    return table


def _seconds(time: stats.Estimate) -> Text:
    if time.uncertainty < time.value:
        return Text(seconds_within(time.value, time.uncertainty), "bold")
    return Text(f"about {seconds_text(time.value, time.value)}", "bold")


def _ratio(comparison: Comparison | None) -> tuple[Text, Text]:
    if comparison is None:
        return Text("1"), Text("")
    digits = ratio_digits(comparison)
    interval = DASH  # one process supports none
    if math.isfinite(comparison.high) and comparison.relative_width < 1:
        interval = f"{comparison.low:.{digits}f}–{comparison.high:.{digits}f}"
    return Text(f"{comparison.ratio:.{digits}f}", "bold"), Text(interval, "dim")


def _verdict(comparison: Comparison | None, *, baseline: bool) -> Text:
    if baseline or comparison is None:
        return Text("baseline", "dim")
    return Text(*_VERDICTS[comparison.verdict])


def _memory_table(result: RunResult, by_variant: dict[str, list[Measurement]]) -> Table:
    fields = ["forward_peak", "retained", "process_peak", "device_allocated", "device_reserved"]
    seen = {f for f in fields for m in result.measurements if getattr(m.memory, f) is not None}
    on_device = "device_allocated" in seen
    # A terminal has room for either the tensors that we count or those that a device counts.
    off = {"forward_peak", "retained"} - seen if on_device else set(fields[3:])
    shown = {f: title for f, title in zip(fields, _MEMORY, strict=True) if f not in off}
    table = _table("Memory", *shown.values(), "outputs")
    agreed = {e.candidate: e for e in result.equivalence}
    for name, measured in by_variant.items():
        counts = [getattr(measured[0].memory, f) for f in shown]
        table.add_row(
            Text(printable(name)),
            *(Text(DASH if count is None else bytes_text(count)) for count in counts),
            outputs_text(agreed.get(name)),
        )
    return table


def outputs_text(found: Equivalence | None) -> Text:
    """How far a variant's outputs are from the baseline's."""
    if found is None:
        return Text("baseline", "dim")
    if found.bitwise:
        return Text("same to the bit")
    text = f"within tolerance (±{found.max_abs_diff:.1g})"
    if not found.equal:
        text = f"differ by {found.max_abs_diff:.2g}"
    return Text(text, "" if found.equal else "bold yellow")


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column(title, no_wrap=True, min_width=14)
    for column in columns[:-1]:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(columns[-1])
    return table


def _saved_in(result: RunResult) -> str:
    return printable(str(Path(nearest(result.config["output"]["path"])) / "result.json"))
