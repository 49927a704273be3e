"""Tables that compare several results of the same kind, one column each."""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import chain

from gradrun.core.units import (
    format_bytes,
    format_number,
    format_score,
    format_seconds,
    seconds_within,
)
from gradrun.report.figures import Figure, figures
from gradrun.report.tables import DASH, Column, Table
from gradrun.report.wording import machine
from gradrun.results.result import AnyResult, Statement
from gradrun.results.summary import decimals

Named = tuple[str, AnyResult]
"""A result and its name, such as the path of its folder."""

_SHOWN = {
    "cold_start", "forward_pass", "batch_median", "batch_p90", "batch_p95", "batch_p99",
    "throughput", "bound_by", "first_token", "ratio", "weights", "forward_peak", "retained",
    "process_peak",
}  # fmt: skip
_LABELS = {name: name.replace("_", " ") for name in _SHOWN} | {
    "tokens_per_second": "tokens",
    "later_token": "later tokens",
    "device_allocated": "device peak",
    "max_abs_diff": "outputs",
}
_MODULE = "time of "
"""Start of the names of the times of modules."""

_TITLES = {
    "infer": "Run",
    "compare": "Comparison",
    "audit": "Audit",
    "check": "Check",
    "tune": "Tuning",
    "profile": "Profile",
}


def side_by_side(results: Sequence[Named]) -> list[Table]:
    """Build one table per kind of result, and one of the interpretations that differ."""
    kinds = dict.fromkeys(result.kind for _, result in results)
    tables = [_table([named for named in results if named[1].kind == kind]) for kind in kinds]
    interpretation = _interpretation(results)
    return [*tables, interpretation] if interpretation.rows else tables


def _table(results: Sequence[Named]) -> Table:
    every = [figures(result) for _, result in results]
    large = {f.metric for f in chain(*every) if f.status and f.metric.startswith(_MODULE)}
    shown = [[(label, f) for f in column if (label := _label(f, large))] for column in every]
    # Results of one mode each share their rows, whatever the mode.
    single_mode = all(len({f.mode for _, f in column if f.mode}) < 2 for column in shown)
    columns = [_column(column, single_mode=single_mode) for column in shown]
    rows = []
    for label in dict.fromkeys(label for column in columns for label in column):
        cells = [column.get(label, DASH) for column in columns]
        if set(cells) != {DASH}:
            rows.append((label, *cells))
    return Table(
        _TITLES[results[0][1].kind],
        tuple(Column(name) for name, _ in results),
        tuple(rows),
        note=_differences([result for _, result in results]),
    )


def _interpretation(results: Sequence[Named]) -> Table:
    """Build a row per topic whose interpretation differs between results that have any."""
    stated = [
        (name, _by_topic(result.interpretation))
        for name, result in results
        if result.interpretation
    ]
    topics = dict.fromkeys(topic for _, texts in stated for topic in texts)
    rows = [(topic, *(texts.get(topic, DASH) for _, texts in stated)) for topic in topics]
    return Table(
        "Different interpretation",
        tuple(Column(name, "text") for name, _ in stated),
        tuple(row for row in rows if len(set(row[1:])) > 1),
    )


def _by_topic(statements: Sequence[Statement]) -> dict[str, str]:
    texts: dict[str, list[str]] = {}
    for statement in statements:
        texts.setdefault(statement.topic, []).append(statement.text)
    return {topic: "; ".join(parts) for topic, parts in texts.items()}


def _column(shown: list[tuple[str, Figure]], *, single_mode: bool) -> dict[str, str]:
    modes = [figure.mode for _, figure in shown if single_mode and figure.mode]
    cells = {"mode": modes[0]} if modes else {}
    for label, figure in shown:
        label = label if single_mode or not figure.mode else f"{figure.mode}, {label}"
        cells[label] = _cell(figure)
    return cells


def _label(figure: Figure, large: Set[str]) -> str:
    """Return the row name of a figure; empty if it is not shown.

    The time of a module is shown in all results if it is `large` in one.
    """
    if figure.metric.startswith(_MODULE):
        return figure.metric.removeprefix(_MODULE) if figure.metric in large else ""
    return _LABELS.get(figure.metric, "" if figure.mode else figure.metric)


def _cell(figure: Figure) -> str:
    if figure.unit == "words":
        return f"{figure.status}: {figure.text}"
    value, low, high = figure.value, figure.low, figure.high
    if value is None:
        return figure.status or DASH
    half_width = (high - low) / 2 if high and low else None
    match figure.unit:
        case "seconds":
            if half_width and 2 * half_width < value:
                return seconds_within(value, half_width)
            return format_seconds(value, half_width)
        case "bytes":
            return format_bytes(int(value))
        case "samples_per_second" | "tokens_per_second":
            return f"{format_number(value, half_width)} /s"
        case "ratio" if figure.metric == "bound_by":
            return f"{figure.status} {value:.0%}"
        case "ratio":
            digits = decimals(half_width or value)
            if low is None or high is None:
                return f"{value:.{digits}f} {figure.status}"
            return f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
        case "score":
            return format_score(value)
        case "absolute":
            return figure.status
        case _:
            return format_number(value)


def _differences(results: Sequence[AnyResult]) -> str:
    """Name the settings and machine properties that differ between results."""
    settings = [
        {"model": r.info.model, "batch size": str(r.info.batch_size or DASH)}
        | {name: value for name, value in machine(r) if name != "started"}
        for r in results
    ]
    differing = [
        f"{name} ({' | '.join(values)})"
        for name in settings[0]
        if len(values := dict.fromkeys(one[name] for one in settings)) > 1
    ]
    if not differing:
        return ""
    return f"Different {', '.join(differing)}: this may explain differences between the figures."
