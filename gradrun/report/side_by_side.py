"""Several results beside each other, one column each: like beside like, and what else differs.

Knows results, their figures and their words; not how a table is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradrun.core.units import format_bytes, format_number, format_seconds, seconds_within
from gradrun.report.rows import Row, rows
from gradrun.report.tables import DASH, Table
from gradrun.report.wording import environment, model_name
from gradrun.results.result import AnyResult
from gradrun.results.summary import decimals

Outputs = tuple[str, AnyResult]

_SHOWN = {
    "cold_start": "cold start",
    "batch_median": "batch median",
    "batch_p90": "batch p90",
    "batch_p95": "batch p95",
    "batch_p99": "batch p99",
    "throughput": "throughput",
    "bound_by": "bound by",
    "ratio": "ratio",
    "weights": "weights",
    "forward_peak": "forward peak",
    "retained": "retained",
    "process_peak": "process peak",
    "device_allocated": "device peak",
    "greatest_difference": "outputs",
}
_TITLES = {"infer": "Run", "compare": "Comparison", "audit": "Audit", "check": "Check"}
_PASSING = ("started",)
"""What differs between any two runs, and says nothing."""


def side_by_side(results: Sequence[Outputs]) -> list[Table]:
    """A table for each kind of result."""
    kinds = dict.fromkeys(result.kind for _, result in results)
    return [_table([one for one in results if one[1].kind == kind]) for kind in kinds]


def _table(results: Sequence[Outputs]) -> Table:
    found = [{(row.mode, _label(row)): row for row in rows(r) if _label(row)} for _, r in results]
    # Runs of one mode each stand in the same rows, whatever the mode.
    alone = all(len({mode for mode, _ in cells if mode}) < 2 for cells in found)
    columns = [_column(cells, alone=alone) for cells in found]
    labels = dict.fromkeys(label for cells in columns for label in cells)
    return Table(
        _TITLES[results[0][1].kind],
        tuple(name for name, _ in results),
        tuple(
            (label, *cells)
            for label in labels
            for cells in [[column.get(label, DASH) for column in columns]]
            if set(cells) != {DASH}
        ),
        words=0,
        note=_differences(results),
    )


def _column(cells: dict[tuple[str, str], Row], *, alone: bool) -> dict[str, str]:
    modes = [mode for mode, _ in cells if alone and mode]
    told = {"mode": modes[0]} if modes else {}
    for (mode, label), row in cells.items():
        told[label if alone or not mode else f"{mode}, {label}"] = _cell(row)
    return told


def _label(row: Row) -> str:
    """What a row is called beside others; empty where it is not shown."""
    return _SHOWN.get(row.metric, "" if row.mode else row.metric)


def _cell(row: Row) -> str:
    if row.unit == "words":
        return f"{row.status}: {row.text}"
    if row.value is None:
        return row.status or DASH
    around = (row.high - row.low) / 2 if row.high and row.low else None
    match row.unit:
        case "seconds":
            if around and around < row.value:
                return seconds_within(row.value, around)
            return format_seconds(row.value, around)
        case "bytes":
            return format_bytes(int(row.value))
        case "samples_per_second":
            return f"{format_number(row.value, around)} /s"
        case "ratio" if row.metric == "ratio":
            digits = decimals(around or row.value)
            if row.low is None or row.high is None:
                return f"{row.value:.{digits}f} {row.status}"
            return f"{row.value:.{digits}f} ({row.low:.{digits}f}–{row.high:.{digits}f})"
        case "ratio":
            return f"{row.status} {row.value:.0%}"
        case "score":
            return f"{row.value:.4g}"
        case "output_units":
            return row.status
        case _:
            return format_number(row.value)


def _differences(results: Sequence[Outputs]) -> str:
    """What else is not the same, in a sentence; empty where all is."""
    settings = [
        {"model": model_name(r)}
        | {"batch size": str(_batch_size(r))}
        | {name: value for name, value in environment(r) if name not in _PASSING}
        for _, r in results
    ]
    differing = [
        f"{name} ({' | '.join(dict.fromkeys(one[name] for one in settings))})"
        for name in settings[0]
        if len({one[name] for one in settings}) > 1
    ]
    if not differing:
        return ""
    return (
        f"These differ in {', '.join(differing)}: what differs in the figures may come from that."
    )


def _batch_size(result: AnyResult) -> object:
    return DASH if result.info.batch_size is None else result.info.batch_size
