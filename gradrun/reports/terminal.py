"""A result as tables in the terminal: time, peak memory, and the warnings below.

Knows Rich and the result; imports no torch and measures nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradrun.result import Measurement, Memory, RunResult
from gradrun.stats import Estimate
from gradrun.units import bytes_text, count_text, number_text, seconds_text

DASH = "–"


def show(result: RunResult, console: Console) -> None:
    """Print everything that a person wants to know of a run."""
    measured = result.measurements[0]
    console.print()
    console.print(_headline(result, measured))
    console.print()
    console.print(timing_table(measured))
    console.print(memory_table(measured.memory))
    for warning in result.warnings:
        console.print(
            Text.assemble(("! ", "bold yellow"), (warning.text, "")), soft_wrap=False
        )
    if result.warnings:
        console.print()
    console.print(_closing(result, measured))


def timing_table(measured: Measurement) -> Table:
    """Cold start, latency, throughput and what the run is bound by."""
    table = _table("Time")
    phases = measured.phases
    table.add_row(
        "cold start",
        seconds_text(measured.cold_start),
        f"load model {seconds_text(phases.load_model)}, open data "
        f"{seconds_text(phases.open_data)}, first batch {seconds_text(phases.first_batch)}",
    )
    for name, q in (("median", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        estimate = measured.latency(q)
        batches = count_text(len(measured.batch_seconds), "batch")
        note = f"forward, {batches} of {max(measured.batch_sizes, default=0)}"
        table.add_row(
            f"batch {name}",
            seconds_text(estimate.value, estimate.uncertainty) if estimate else DASH,
            _interval(estimate, note if q == 0.5 else "", q),
        )
    table.add_row(
        "throughput",
        f"{number_text(measured.throughput)} /s" if measured.samples else DASH,
        f"{count_text(measured.samples, 'sample')} in {seconds_text(measured.seconds)}, "
        "read to written",
    )
    bound, shares = measured.bound_by
    split = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    table.add_row("bound by", bound if measured.samples else DASH, split)
    return table


def _interval(estimate: Estimate | None, note: str, q: float) -> str:
    if estimate is None:
        return f"takes {round(1 / (1 - q))} batches to tell"
    low, high = (seconds_text(v, estimate.uncertainty) for v in (estimate.low, estimate.high))
    interval = f"{low} to {high}" if low != high else ""
    return ", ".join(part for part in (interval, note) if part)


def memory_table(memory: Memory) -> Table:
    """What is held, and the peaks; exact bytes beside the readable figure."""
    table = _table("Peak memory")
    exact = "{:,} bytes{}".format

    def add(name: str, count: int | None, note: str) -> None:
        known = count is not None
        table.add_row(name, bytes_text(count) if count is not None else DASH, note if known else "")

    add("weights", memory.weights, exact(memory.weights, ""))
    add("inputs", memory.inputs, exact(memory.inputs, ", one batch"))
    peak, kept = memory.forward_peak, memory.retained
    add("forward peak", peak, exact(peak or 0, " above what was live before"))
    add("retained", kept, exact(kept or 0, ": outputs, and their graph in grad"))
    add("process peak", memory.process_peak, f"{memory.process_method}, the whole process")
    if memory.device_allocated is not None or memory.device_reserved is not None:
        add("device peak", memory.device_allocated, "allocated by tensors")
        add("", memory.device_reserved, "reserved from the device")
    else:
        table.add_row("device", DASH, "no accelerator in use")
    return table


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column(title, style="", no_wrap=True, min_width=14)
    table.add_column("", justify="right", style="bold cyan", no_wrap=True, min_width=10)
    table.add_column("", style="dim")
    return table


def _headline(result: RunResult, measured: Measurement) -> Text:
    model = result.config["model"]
    name = str(model.get("name") or model.get("target") or model.get("path") or model["source"])
    machine = result.environment
    where = f"{machine.device_name or machine.device}, {count_text(machine.threads, 'thread')}"
    return Text.assemble(
        (Path(name).name, "bold"), f"  {measured.mode.value}", (f"  {where}", "dim")
    )


def _closing(result: RunResult, measured: Measurement) -> Text:
    folder = nearest(result.config["output"]["path"])
    files = ", ".join(result.files[:3]) + (" ..." if len(result.files) > 3 else "")
    return Text.assemble(
        (f"{measured.samples:,} predictions", "bold green"),
        f" in {os.path.join(folder, files)}",
        ("   figures in result.json", "dim"),
    )


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
