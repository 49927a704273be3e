"""Format seconds and bytes, with no more digits than an uncertainty supports."""

from __future__ import annotations

import math

SECOND_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
BYTE_UNITS = ((1024**4, "TiB"), (1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"))
"""(size, name), largest first."""
_ROUNDED_UP = 0.9995
"""Fraction of a unit that rounds to the unit: 999.6 µs is formatted as 1.00 ms."""


def format_seconds(seconds: float, uncertainty: float | None = None) -> str:
    """Format 0.0001034 as "103 µs": three digits, or fewer if `uncertainty` (seconds) is large."""
    if seconds == 0 or not math.isfinite(seconds):
        return f"{seconds:g} s"
    scale, unit = next(
        ((scale, unit) for scale, unit in SECOND_UNITS if abs(seconds) >= scale * _ROUNDED_UP),
        SECOND_UNITS[-1],
    )
    value = seconds / scale
    return f"{format_number(value, None if uncertainty is None else uncertainty / scale)} {unit}"


def seconds_shown(seconds: float, uncertainty: float) -> float:
    """Return the value that `format_seconds` displays, in seconds."""
    text, unit = format_seconds(seconds, uncertainty).rsplit(" ", 1)
    return float(text.replace(",", "")) * {name: scale for scale, name in SECOND_UNITS}[unit]


def seconds_within(seconds: float, uncertainty: float) -> str:
    """Format (0.000375, 0.000002) as "375 ± 2 µs", with the same unit and digits."""
    text, unit = format_seconds(seconds, uncertainty).rsplit(" ", 1)
    scale = next(scale for scale, name in SECOND_UNITS if name == unit)
    decimals = len(text.partition(".")[2])
    return f"{text} ± {uncertainty / scale:,.{decimals}f} {unit}"


def format_number(value: float, uncertainty: float | None = None) -> str:
    """Format three significant digits, or fewer if `uncertainty` (same unit) is large."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = _decimals(round(value, _decimals(value)))  # 9.996 is 10.0, with one decimal
    if uncertainty:
        # Keep one digit for any uncertainty: 0 would not be the measured value.
        decimals = min(decimals, max(decimals - 2, -math.floor(math.log10(uncertainty))))
    rounded = round(value, decimals)
    return f"{rounded:,.{max(decimals, 0)}f}"


def _decimals(value: float) -> int:
    return 2 - math.floor(math.log10(abs(value)))


def format_bytes(count: int) -> str:
    """Format 9437184 as "9.00 MiB"; below 1 KiB the exact count."""
    for scale, unit in BYTE_UNITS:
        if abs(count) >= scale - scale * 0.005 / 1024:  # 1,024.00 otherwise
            return f"{count / scale:,.2f} {unit}"
    return f"{count} B"


def pluralize(count: int, noun: str) -> str:
    """Format (1, "batch") as "1 batch" and (1250, "batch") as "1,250 batches"."""
    ending = "es" if noun.endswith(("ch", "s", "x")) else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"
