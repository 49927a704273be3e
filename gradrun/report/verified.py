"""What `gradrun verify` found, in a few lines.

Knows Rich and what was found; reads no file.
"""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.text import Text

from gradrun.core.units import count_text
from gradrun.report.escaping import printable
from gradrun.report.terminal import hanging, nearest
from gradrun.results.result import Fault

_SHOWN = 20


class Found(Protocol):
    """A folder's answer."""

    @property
    def folder(self) -> object: ...
    @property
    def samples(self) -> int: ...
    @property
    def committed(self) -> int: ...
    @property
    def ranges(self) -> int: ...
    @property
    def faults(self) -> tuple[Fault, ...]: ...
    @property
    def torn(self) -> bool: ...


def show(found: Found, console: Console) -> None:
    """Print what is there, what is not, and what to do."""
    for fault in found.faults[:_SHOWN]:
        text = f"samples {fault.start:,} to {fault.stop - 1:,} in {fault.file}: {fault.what}"
        console.print(hanging("x", text, "bold red"))
    if len(found.faults) > _SHOWN:
        console.print(f"and {count_text(len(found.faults) - _SHOWN, 'range')} more")
    if found.torn:
        console.print(hanging("!", "the journal's last line was cut off and does not count"))
    name = printable(nearest(str(found.folder)))
    checked = f"{found.committed:,} of {count_text(found.samples, 'sample')}"
    if found.faults:
        bad = count_text(len(found.faults), "range")
        say, style = f"{name}: {bad} damaged; infer --overwrite makes them anew", "bold red"
    elif found.committed < found.samples:
        say = f"{name}: unfinished, {checked} are there and whole; infer --resume goes on"
        style = "bold yellow"
    else:
        say = f"{name}: {checked} are there and whole ({count_text(found.ranges, 'range')})"
        style = "bold green"
    console.print(Text(say, style))
