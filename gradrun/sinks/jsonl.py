"""One JSON object a sample and line: its id and its outputs as numbers or lists.

Knows JSON; a float is written so that reading it gives the same bits. NaN and infinities are
written as Python reads them (NaN, Infinity), for which JSON proper has no word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from gradrun.sinks.lines import Columns, LineSink


class JsonlSink(LineSink):
    """predictions.jsonl; a row may have any shape, and each its own."""

    suffix = "jsonl"

    def lines(self, columns: Columns, ids: Sequence[int | str]) -> str:
        lines = [
            json.dumps({"id": name, **{key: values[row] for key, values in columns.items()}})
            for row, name in enumerate(ids)
        ]
        return "\n".join(lines) + "\n"
