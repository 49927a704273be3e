"""Limits as people write them: "60 MiB", ">= 0.97", "5%"; and whether a value keeps one.

Knows numbers, bytes and intervals; not what they are of.
"""

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
_BOUND = re.compile(r"(>=|<=)?\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z]*)")
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


@dataclass(frozen=True)
class Limit:
    """A value that something may reach and not pass, from above or from below."""

    value: float
    at_least: bool

    def status(self, low: float, high: float) -> Status:
        """Whether a value that lies somewhere from `low` to `high` keeps it."""
        if self.at_least:
            return "pass" if low >= self.value else "fail" if high < self.value else "inconclusive"
        return "pass" if high <= self.value else "fail" if low > self.value else "inconclusive"


def bytes_bound(text: str) -> Limit:
    """`"60 MiB"` or `"<= 1048576"` as a Bound in bytes.

    Raises:
        ValueError: it is none; says how one is written.
    """
    found = _BOUND.fullmatch(text.strip())
    unit = found[3] or "B" if found else ""
    most = 2.0**63
    if not found or unit not in _BYTES or found[1] == ">=" or float(found[2]) * _BYTES[unit] > most:
        raise ValueError(f"{text!r} is no limit of bytes, which is written 60 MiB or 1048576")
    return Limit(float(found[2]) * _BYTES[unit], at_least=False)


def number_bound(text: str) -> Limit:
    """`">= 0.97"` or `"<= 0.1"` as a Bound.

    Raises:
        ValueError: it is none; says how one is written.
    """
    found = _BOUND.fullmatch(text.strip())
    if not found or not found[1] or found[3]:
        raise ValueError(f"{text!r} is no limit; one is written '>= 0.97' or '<= 0.1'")
    return Limit(float(found[2]), at_least=found[1] == ">=")


def percentage(text: str) -> float:
    """`"5%"` as 0.05.

    Raises:
        ValueError: it is none.
    """
    found = _SHARE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is no share, which is written 5%")
    return float(found[1]) / 100
