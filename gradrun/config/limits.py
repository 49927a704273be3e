"""Limits as text: "60 MiB", ">= 0.97", "5%"; and whether a value satisfies one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "inconclusive"]

_BYTES = {
    "B": 1,
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", start=1)},
    "KB": 1000,
}
_LIMIT = re.compile(r"(>=|<=)?\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z]*)")
_PERCENTAGE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


@dataclass(frozen=True)
class Limit:
    """An inclusive minimum or maximum."""

    value: float
    at_least: bool

    def status(self, low: float, high: float) -> Status:
        """Compare with the interval [low, high]; inconclusive if it includes the limit."""
        if self.at_least:
            return "pass" if low >= self.value else "fail" if high < self.value else "inconclusive"
        return "pass" if high <= self.value else "fail" if low > self.value else "inconclusive"


def byte_limit(text: str) -> Limit:
    """Parse `"60 MiB"` or `"<= 1048576"`; the value is in bytes.

    Raises:
        ValueError: the text is not a maximum in bytes.
    """
    match = _LIMIT.fullmatch(text.strip())
    unit = match[3] or "B" if match else ""
    if match and unit in _BYTES and match[1] != ">=":
        value = float(match[2]) * _BYTES[unit]
        if value <= 2.0**63:
            return Limit(value, at_least=False)
    raise ValueError(f"{text!r} is not a limit in bytes; write 60 MiB or 1048576")


def number_limit(text: str) -> Limit:
    """Parse `">= 0.97"` or `"<= 0.1"`.

    Raises:
        ValueError: the text is not a limit.
    """
    match = _LIMIT.fullmatch(text.strip())
    if not match or not match[1] or match[3]:
        raise ValueError(f"{text!r} is not a limit; write '>= 0.97' or '<= 0.1'")
    return Limit(float(match[2]), at_least=match[1] == ">=")


def percentage(text: str) -> float:
    """Parse `"5%"` as 0.05.

    Raises:
        ValueError: the text is not a percentage.
    """
    match = _PERCENTAGE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a percentage; write 5%")
    return float(match[1]) / 100
