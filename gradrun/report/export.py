"""Results as records for programs: CSV with a row for each mode and metric, and JSON.

Knows rows and the two formats; nothing of what the figures mean.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gradrun.report import wording
from gradrun.report.escaping import escape_control_chars
from gradrun.report.rows import Row, rows
from gradrun.report.side_by_side import Outputs

_UNITS = ("seconds", "bytes", "samples_per_second", "ratio", "count", "output_units", "score")
_WORDS = ("status", "text", "limit")
_HEADER = ("result", "kind", "mode", "metric", *_UNITS, "low_95", "high_95", *_WORDS)
"""A figure stands in the column of its unit; its interval is in the same unit."""


def csv_text(results: Sequence[Outputs]) -> str:
    """A row for each result, mode and metric; a cell is empty where nothing was measured."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_HEADER)
    for name, result in results:
        for row in rows(result):
            writer.writerow([_word(name), result.kind, *_cells(row)])
    return file.getvalue()


def _cells(row: Row) -> list[Any]:
    values = [row.value if row.unit == unit else None for unit in _UNITS]
    words = [_word(getattr(row, name)) for name in _WORDS]
    return [_word(row.mode), _word(row.metric), *values, row.low, row.high, *words]


def _word(word: str) -> str:
    """Text that no spreadsheet runs as a formula."""
    line = escape_control_chars(word)
    return f"'{line}" if line.startswith(("=", "+", "-", "@", "\t")) else line


def json_text(results: Sequence[Outputs]) -> str:
    """Figures and words of each result, in the order given; raw times stay in the result."""
    told = [
        {
            "result": name,
            "kind": result.kind,
            "model": wording.model_name(result),
            "verdict": wording.verdict(result),
            "figures": [asdict(row) for row in rows(result)],
            "notices": wording.notices(result),
            "environment": result.environment.as_dict(),
            "started_at": result.started_at,
        }
        for name, result in results
    ]
    return json.dumps({"format": 1, "reports": told}, indent=1, default=str) + "\n"
