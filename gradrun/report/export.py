"""Figures of results for programs: CSV with one row per mode and metric, and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from gradrun.report import wording
from gradrun.report.escaping import escape_control_chars
from gradrun.report.figures import Figure, Unit, figures
from gradrun.report.side_by_side import Named

_UNITS = tuple(unit for unit in get_args(Unit) if unit != "words")
_WORDS = ("status", "text", "limit")
_HEADER = ("result", "kind", "mode", "metric", *_UNITS, "low_95", "high_95", *_WORDS)


def render_csv(results: Sequence[Named]) -> str:
    """Write each figure in the column of its unit; its interval has the same unit."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_HEADER)
    for name, result in results:
        for figure in figures(result):
            writer.writerow([_no_formula(name), result.kind, *_cells(figure)])
    return file.getvalue()


def _cells(figure: Figure) -> list[Any]:
    values = [figure.value if figure.unit == unit else None for unit in _UNITS]
    words = [_no_formula(getattr(figure, name)) for name in _WORDS]
    names = [_no_formula(figure.mode), _no_formula(figure.metric)]
    return [*names, *values, figure.low, figure.high, *words]


def _no_formula(text: str) -> str:
    """Quote text that a spreadsheet would run as a formula."""
    line = escape_control_chars(text)
    return f"'{line}" if line.startswith(("=", "+", "-", "@", "\t")) else line


def render_json(results: Sequence[Named]) -> str:
    """Write figures and texts of each result; raw samples are in the results themselves."""
    reports = [
        {
            "result": name,
            "kind": result.kind,
            "model": result.info.model,
            "verdict": wording.verdict(result),
            "figures": [asdict(figure) for figure in figures(result)],
            "interpretation": [one.as_dict() for one in result.interpretation],
            "notices": [note.text for note in wording.notes(result)],
            "environment": result.environment.as_dict(),
            "started_at": result.started_at,
        }
        for name, result in results
    ]
    return json.dumps({"format": 1, "reports": reports}, indent=1, default=str) + "\n"
