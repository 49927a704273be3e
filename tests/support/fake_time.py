"""A clock that tests move."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FakeTime:
    """Replaces the time module; moves only in passes(), or where a test sets `now`."""

    now: int = 0
    """Nanoseconds."""

    def perf_counter_ns(self) -> int:
        return self.now

    def perf_counter(self) -> float:
        return self.now * 1e-9

    def passes(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)
