"""Records of a tuning: settings that were tried, and the keys that were changed."""

from __future__ import annotations

from typing import Any, Literal

from gradrun.core.record import Record
from gradrun.results.bounds import Count, Seconds

Outcome = Literal["faster", "no_gain", "differs", "over_limit", "failed", "not_tried"]


class Trial(Record, frozen=True, kw_only=True):
    """A setting that was tried; ratios are to the baseline, and above 1 is faster."""

    step: str
    """The part of the search."""
    changes: dict[str, Any]
    """Dotted keys and their values, against the baseline."""
    outcome: Outcome
    reason: str = ""
    """Why it was dropped."""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval of the search, which is not that of a confirmed setting."""
    start_seconds: Seconds | None = None
    process_peak: Count | None = None
    bitwise: bool | None = None
    """None if its outputs were not compared."""
    max_abs: float | None = None
    max_rel: float | None = None
    cosine: float | None = None
    top1: float | None = None

    @property
    def name(self) -> str:
        """The changes as text, such as "run.allocator: retain"."""
        return describe_changes(self.changes)


class TunePhases(Record, frozen=True, kw_only=True):
    """Seconds that the parts of a tuning took."""

    starts: Seconds = 0.0
    """Starting processes: imports, loading, compiling, warm-up."""
    gates: Seconds = 0.0
    """Outputs, memory and latency."""
    races: Seconds = 0.0
    confirmation: Seconds = 0.0


class TunedKey(Record, frozen=True, kw_only=True):
    """A key that was changed."""

    key: str
    before: Any
    value: Any
    gain: float | None = None
    """Times as fast with it as without it, with all other changes; None if not measured."""
    low: float | None = None
    high: float | None = None
    max_rel: float | None = None
    """Difference of the outputs with all changes from the baseline's."""


def describe_changes(changes: dict[str, Any]) -> str:
    """Return changes as text, such as "run.allocator: retain"."""
    return ", ".join(f"{key}: {describe_value(value)}" for key, value in changes.items())


def describe_value(value: Any) -> str:
    """Return a value as it is written in YAML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {describe_value(v)}" for key, v in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
