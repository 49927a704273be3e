"""Format seconds and bytes, with no more digits than an uncertainty supports."""

from __future__ import annotations

import math
from collections.abc import Sequence

SECOND_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
BYTE_UNITS = ((1024**4, "TiB"), (1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"))
"""(size, name), largest first."""


def format_seconds(seconds: float, uncertainty: float | None = None) -> str:
    """Format 0.0001034 as "103 µs": three digits, or two if `uncertainty` (seconds) is large."""
    if seconds == 0 or not math.isfinite(seconds):
        return f"{seconds:g} s"
    text = ""
    for scale, unit in reversed(SECOND_UNITS):
        number = format_number(seconds / scale, uncertainty and uncertainty / scale)
        text = f"{number} {unit}"
        if abs(_parse(number)) < 1000:  # as displayed: 999.6 µs is 1.00 ms
            break
    return text


def format_seconds_range(low: float, high: float, uncertainty: float | None = None) -> str:
    """Format (0.001, 0.002) as "1.00 to 2.00 ms", with the unit once if it is the same."""
    first, last = format_seconds(low, uncertainty), format_seconds(high, uncertainty)
    value, unit = first.rsplit(" ", 1)
    return f"{value if unit == last.rsplit(' ', 1)[1] else first} to {last}"


def seconds_shown(seconds: float, uncertainty: float) -> float:
    """Return the value that `format_seconds` displays, in seconds."""
    text, unit = format_seconds(seconds, uncertainty).rsplit(" ", 1)
    return _parse(text) * {name: scale for scale, name in SECOND_UNITS}[unit]


def seconds_within(seconds: float, uncertainty: float) -> str:
    """Format (0.000375, 0.000002) as "375 ± 2 µs", with the same unit and digits."""
    text, unit = format_seconds(seconds, uncertainty).rsplit(" ", 1)
    scale = next(scale for scale, name in SECOND_UNITS if name == unit)
    decimals = len(text.partition(".")[2])
    return f"{text} ± {uncertainty / scale:,.{decimals}f} {unit}"


def format_number(value: float, uncertainty: float | None = None) -> str:
    """Format three significant digits, or two if `uncertainty` (same unit) is large."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = _decimals(round(value, _decimals(value)))  # 9.996 is 10.0, with one decimal
    if uncertainty:
        # With one digit, rounding could change the value by a third.
        two_digits = _decimals(round(value, decimals - 1)) - 1
        decimals = min(decimals, max(two_digits, -math.floor(math.log10(uncertainty))))
    rounded = round(value, decimals)
    return f"{rounded:,.{max(decimals, 0)}f}"


def _parse(text: str) -> float:
    return float(text.replace(",", ""))


def _decimals(value: float) -> int:
    return 2 - math.floor(math.log10(abs(value)))


def format_bytes(count: int) -> str:
    """Format 9437184 as "9.00 MiB"; below 1 KiB the exact count."""
    for scale, unit in BYTE_UNITS:
        if abs(count) >= scale - scale * 0.005 / 1024:  # 1,024.00 otherwise
            return f"{count / scale:,.2f} {unit}"
    return f"{count} B"


def format_score(value: float) -> str:
    """Format 0.98765 as "0.9877", with four digits; "–" if it is not a number."""
    if math.isnan(value):
        return "–"
    return f"{value:.4f}" if 0.001 <= abs(value) <= 1 else f"{value:.4g}"


def pluralize(count: int, noun: str) -> str:
    """Format (1, "batch") as "1 batch" and (1250, "batch") as "1,250 batches"."""
    ending = "es" if noun.endswith(("ch", "s", "x")) else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def list_names(names: Sequence[str], most: int = 20) -> str:
    """Return the first `most` names, with ", ..." if there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def first_names(names: Sequence[str], most: int) -> str:
    """Format the first `most` names, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def count_of(done: int, samples: int | None) -> str:
    """Format (2, 1250) as "2 of 1,250 samples", and (2, None) as "2 samples"."""
    if samples is None:
        return pluralize(done, "sample")
    return f"{done:,} of {pluralize(samples, 'sample')}"


def format_count(value: float) -> str:
    """Format 3638059008 as "3.64 G": three digits and a decimal prefix."""
    prefixes = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    for scale, prefix in prefixes:
        if abs(value) >= scale * 0.9995:
            return f"{format_number(value / scale)} {prefix}"
    return format_number(value) if value % 1 else f"{value:.0f}"
