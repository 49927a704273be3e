"""What `gradrun verify` found, in a few lines.

Knows Rich and what was found; reads no file.
"""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.text import Text

from gradrun.core.units import pluralize
from gradrun.report.escaping import escape_control_chars
from gradrun.report.terminal import display_path, hanging
from gradrun.results.result import DamagedRange

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
    def damaged(self) -> tuple[DamagedRange, ...]: ...
    @property
    def torn(self) -> bool: ...


def show(found: Found, console: Console) -> None:
    """Print what is there, what is not, and what to do."""
    for fault in found.damaged[:_SHOWN]:
        text = f"samples {fault.start:,} to {fault.stop - 1:,} in {fault.file}: {fault.what}"
        console.print(hanging("x", text, "bold red"))
    if len(found.damaged) > _SHOWN:
        console.print(f"and {pluralize(len(found.damaged) - _SHOWN, 'range')} more")
    if found.torn:
        console.print(hanging("!", "the journal's last line was cut off and does not count"))
    name = escape_control_chars(display_path(str(found.folder)))
    checked = f"{found.committed:,} of {pluralize(found.samples, 'sample')}"
    if found.damaged:
        bad = pluralize(len(found.damaged), "range")
        say, style = f"{name}: {bad} damaged; infer --overwrite makes them anew", "bold red"
    elif found.committed < found.samples:
        say = f"{name}: unfinished, {checked} are there and whole; infer --resume goes on"
        style = "bold yellow"
    else:
        say = f"{name}: {checked} are there and whole ({pluralize(found.ranges, 'range')})"
        style = "bold green"
    console.print(Text(say, style))
