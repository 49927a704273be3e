"""Traces in the JSON format of Chrome, which Perfetto opens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BATCH = "gradrun batch"
"""Name of the range of a batch."""


@dataclass(frozen=True)
class Span:
    """A range of a trace: an operator, a module call or a batch; times in nanoseconds."""

    name: str
    module: int
    """Index of the module that runs it, or is it; -1 outside of the model."""
    start: int
    duration: int
    own: int
    """Without the operators that it calls."""
    shapes: str
    is_operator: bool


@dataclass(frozen=True)
class Trace:
    """Ranges of some batches, and the live bytes after each allocation."""

    spans: tuple[Span, ...]
    labels: tuple[str, ...]
    """One per module."""
    memory: tuple[tuple[int, int], ...]
    """Nanoseconds and bytes."""

    def to_json(self, title: str) -> str:
        """Return the trace as an object with `traceEvents`; times are in microseconds."""
        return json.dumps({"traceEvents": list(self._events(title)), "displayTimeUnit": "ms"})

    def _events(self, title: str) -> Iterator[dict[str, Any]]:
        place = {"pid": 1, "tid": 1}
        for name, text in (
            ("process_name", f"gradrun profile {title}"),
            ("thread_name", "forward"),
        ):
            yield {"name": name, "ph": "M", "ts": 0, **place, "args": {"name": text}}
        # A range precedes the ranges inside of it.
        for span in sorted(self.spans, key=lambda span: (span.start, -span.duration)):
            label = self.labels[span.module] if span.module >= 0 else ""
            times = {"ph": "X", "ts": span.start / 1e3, "dur": span.duration / 1e3, **place}
            if span.is_operator:
                details = {"module": label, "shapes": span.shapes}
                yield {"name": span.name, "cat": "operator", **times, "args": details}
            elif span.name == BATCH:
                yield {"name": "batch", "cat": "batch", **times}
            else:
                yield {"name": label, "cat": "module", **times}
        for at, live in self.memory:
            sizes = {"name": "tensor memory", "ph": "C", "ts": at / 1e3, **place}
            yield {**sizes, "args": {"bytes": live}}
