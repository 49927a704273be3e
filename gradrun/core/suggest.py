"""Suggest a valid name for a mistyped one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Format `"nograd"` against the modes as "did you mean no_grad? (allowed: grad, ...)"."""
    names = list(allowed)
    close = did_you_mean(given, names)
    listed = "allowed: " + ", ".join(names)
    return f"{close} ({listed})" if close else listed


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Format the closest name as "did you mean Linear?"; empty if no name is close."""
    by_lower = {name.lower(): name for name in allowed}
    close = get_close_matches(given.lower(), by_lower, n=1, cutoff=0.6)
    return f"did you mean {by_lower[close[0]]}?" if close else ""
