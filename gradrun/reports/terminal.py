"""A result as tables in the terminal: time, peak memory, and the warnings below.

Knows Rich and the result; imports no torch and measures nothing.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradrun.result import Measurement, Memory, Padding, RunResult
from gradrun.stats import Estimate
from gradrun.units import bytes_text, count_text, number_text, seconds_text

DASH = "–"
TABLE_WIDTH = 79
_QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_SHOWN_FILES = 3

Row = tuple[str, str, str]
"""A figure's name, its value, and what to know about it."""


def show(result: RunResult, console: Console) -> None:
    """Print everything that a person wants to know of a run."""
    measured = result.measurements[0]
    console.print()
    console.print(_headline(result, measured))
    console.print()
    width = min(console.width, TABLE_WIDTH)
    console.print(timing_table(measured, width))
    console.print()
    console.print(memory_table(measured.memory, width))
    console.print()
    for warning in result.warnings:
        console.print(hanging("!", warning.text))
    if result.warnings:
        console.print()
    console.print(_closing(result, measured))


def timing_table(measured: Measurement, width: int = TABLE_WIDTH) -> Table:
    """Cold start, latency, throughput and what the run is bound by."""
    phases = measured.phases
    cold = (phases.load_model, phases.open_data, phases.first_batch)
    load, opened, first = map(seconds_text, cold)
    bound, shares = measured.bound_by
    asked = measured.batch_limit
    rows: list[Row] = [
        *([("batch size", f"{asked}", "cut down: memory ran out")] if asked else []),
        (
            "cold start",
            seconds_text(measured.cold_start),
            f"model {load}, data {opened}, first batch {first}",
        ),
        *(_latency(name, q, measured.latency(q)) for name, q in _QUANTILES.items()),
    ]
    if measured.padding:
        rows.append(_padding(measured.padding))
    if measured.samples:
        whole = f"{count_text(measured.samples, 'sample')} in {seconds_text(measured.seconds)}"
        split = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        rows += [
            ("throughput", f"{number_text(measured.throughput)} /s", f"{whole}, read to written"),
            ("bound by", bound, split),
        ]
    return _table("Time", rows, width)


def _padding(padding: Padding) -> Row:
    """What was computed for nothing, and what grouping by length has saved of it."""
    share = 1 - padding.tokens / max(1, padding.run)
    if padding.run == padding.ungrouped:
        return "padding", f"{share:.0%}", f"of {padding.run:,} tokens"
    before = padding.ungrouped - padding.tokens
    less = 1 - (padding.run - padding.tokens) / max(1, before)
    fewer = 1 - padding.run / max(1, padding.ungrouped)
    return (
        "padding",
        f"{share:.0%}",
        f"of {padding.run:,} tokens; grouped by length: {less:.0%} less padding, "
        f"{fewer:.0%} fewer tokens",
    )


def _latency(name: str, q: float, estimate: Estimate | None) -> Row:
    if estimate is None:
        return f"batch {name}", DASH, f"takes {round(1 / (1 - q))} batches to tell"
    value, low, high = (
        seconds_text(seconds, estimate.uncertainty)
        for seconds in (estimate.value, estimate.low, estimate.high)
    )
    above, below = estimate.low > 0, math.isfinite(estimate.high)
    if above and below:
        bounds = f"{low} to {high} (95 %)"
    else:
        bounds = f"{low} or more (95 %)" if above else f"{high} or less (95 %)" if below else ""
    return f"batch {name}", value, bounds


def memory_table(memory: Memory, width: int = TABLE_WIDTH) -> Table:
    """What is held, and the peaks; exact bytes beside the readable figure."""
    rows = [
        _bytes("weights", memory.weights),
        _bytes("inputs", memory.inputs, "one batch"),
        _bytes("forward peak", memory.forward_peak, "above what was live before"),
        _bytes("retained", memory.retained, "outputs, and in grad their graph"),
        _bytes("process peak", memory.process_peak, f"whole process ({memory.process_method})"),
    ]
    if memory.device_allocated is None and memory.device_reserved is None:
        rows.append(("device peak", DASH, "no accelerator in use"))
    else:
        rows.append(_bytes("device peak", memory.device_allocated, "allocated"))
        rows.append(_bytes("device pool", memory.device_reserved, "reserved, at its peak"))
    return _table("Peak memory", rows, width)


def _bytes(name: str, count: int | None, note: str = "") -> Row:
    if count is None:
        return name, DASH, "not measured"
    return name, bytes_text(count), ", ".join(part for part in (f"{count:,} bytes", note) if part)


def _table(title: str, rows: list[Row], width: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", width=width
    )
    table.add_column(title, no_wrap=True, min_width=12)
    table.add_column(justify="right", style="bold", no_wrap=True, min_width=11)
    table.add_column(style="dim", ratio=1)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _headline(result: RunResult, measured: Measurement) -> Text:
    machine = result.environment
    batches = count_text(len(measured.batch_seconds), "batch")
    facts = (
        machine.device_name or machine.device,
        count_text(machine.threads, "thread"),
        f"{batches} of {max(measured.batch_sizes, default=0)}",
    )
    return Text.assemble(
        (model_name(result), "bold"),
        f"  {measured.mode.value}",
        (printable("  " + ", ".join(facts)), "dim"),
    )


def model_name(result: RunResult) -> str:
    """What the model is called: by its config, without folders."""
    model = result.config["model"]
    name = str(model.get("name") or model.get("target") or model.get("path") or model["source"])
    return printable(Path(name).name)


def hanging(mark: str, text: str, style: str = "bold yellow") -> Table:
    """A marked paragraph whose further lines stand under its first word."""
    grid = Table.grid(padding=(0, 1))
    grid.add_row(Text(mark, style), Text(printable(text)))
    return grid


def _closing(result: RunResult, measured: Measurement) -> Table:
    folder = Path(nearest(result.config["output"]["path"]))
    files = [str(folder / file) for file in result.files[:_SHOWN_FILES]]
    more = len(result.files) - len(files)
    grid = Table.grid(padding=(0, 3))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    count = measured.samples if result.predictions is None else result.predictions
    grid.add_row(
        Text(count_text(count, "prediction"), "bold green"),
        Text(printable("\n".join(files) + (f"\nand {more} more" if more else ""))),
    )
    if result.resumed_at:
        earlier = f"the first {result.resumed_at:,} by the run before"
        grid.add_row("resumed", Text(earlier))
    grid.add_row("every figure", Text(printable(str(folder / "result.json"))))
    return grid


def nearest(path: str | Path) -> str:
    """A path as one would type it here: relative where that is shorter."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive
        return str(path)
    return min(relative, str(path), key=len)


def printable(text: str) -> str:
    """`text` with control characters written out, so that no name can drive the terminal."""
    return "".join(
        char if char in "\n\t" or char.isprintable() else repr(char)[1:-1] for char in text
    )
