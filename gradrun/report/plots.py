"""Plots of a result as SVG in the colours and type of the page around it."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from gradrun.core.errors import ConfigError
from gradrun.core.grad_mode import GradMode
from gradrun.core.units import (
    BYTE_UNITS,
    SECOND_UNITS,
    format_bytes,
    format_number,
    format_seconds,
    pluralize,
)
from gradrun.report.escaping import escape_control_chars
from gradrun.results.result import (
    AnyResult,
    CheckResult,
    CompareResult,
    Comparison,
    InferResult,
    Measurement,
    TuneResult,
)

SERIES = 6
"""Colours of the page; further series repeat them."""

_WIDTH = 4.4
"""Inches: readable on a phone; a wide page shows two plots in a row."""
_MAX_DOTS = 400
_MAX_MATRIX = 30
"""Most classes of a confusion matrix whose names can be read."""
_MAX_RANGES = 100
"""Most ranges of a worker whose ends can be seen."""
_MAX_NUMBERS = 8
"""Most classes of a confusion matrix with numbers in its cells."""
INK, SOFT, GRID = "#0a0b00", "#0a0b01", "#0a0b02"
"""Placeholders of the colours of text, axes and grid."""
_PAGE_COLOURS = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--line)"} | {
    f"#0a0c0{i}": f"var(--series-{i})" for i in range(SERIES)
}
"""Placeholder colours for matplotlib -> CSS variables of the page."""
_RC_PARAMS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.axisbelow": True,
    "lines.solid_capstyle": "butt",  # a bar ends exactly at the end of its interval
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Plot:
    """An SVG with its title, its legend (colour number, name, text) and a note."""

    title: str
    svg: str
    key: tuple[tuple[int, str, str], ...] = ()
    note: str = ""


def plots(result: AnyResult, prefix: str = "") -> list[Plot]:
    """Draw all plots of a result; `prefix` keeps their SVG ids unique on a page.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    kinds = (confusion, ratios, distribution, latency, workers, memory)
    drawn = (draw(result, prefix) for draw in kinds)
    return [plot for plot in drawn if plot]


class _Ratio(NamedTuple):
    """A row of the plot of ratios; `candidate` gives its colour."""

    name: str
    candidate: str
    value: float
    low: float
    high: float


def ratios(result: AnyResult, prefix: str) -> Plot | None:
    """Draw the ratios of a comparison or a check, as in its table, with their intervals."""
    match result:
        case CompareResult() | TuneResult() if result.comparisons:
            first = result.comparisons[0]
            rows = [_Ratio(c.candidate, *_speed(c)) for c in result.comparisons]
            title, axis = "Speed", f"times as fast as {shorten(first.baseline)}"
            meaning = "Right of 1 is faster."
        case CheckResult(comparisons=(_, *_)):
            rows = [_checked_ratio(c) for c in result.comparisons]
            title, axis, meaning = "Ratios of times", "ratio", "Values as in the table."
        case _:
            return None
    colours = _colours(result)

    def draw(axes: Any) -> None:
        axes.axvline(1, color=SOFT, linewidth=1)
        for y, row in enumerate(rows):
            colour = placeholder(colours.get(row.candidate, 1))
            if row.low > 0 and row.high < 100 * row.value:
                axes.plot([row.low, row.high], [y, y], color=colour, linewidth=3)
            axes.plot([row.value], [y], "o", color=colour, markersize=7)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        _label_rows(axes, [row.name for row in rows])
        axes.margins(x=0.15)
        axes.set_xlabel(axis)

    note = f"Dots: ratios. Bars: 95 % confidence intervals over processes. {meaning}"
    height = 0.9 + 0.35 * len(rows)
    return Plot(title, draw_svg(draw, height, f"{prefix}speed"), note=note)


def _speed(c: Comparison) -> tuple[str, float, float, float]:
    return c.candidate, c.ratio, c.low, c.high


def _checked_ratio(c: Comparison) -> _Ratio:
    """The ratio that a check evaluates: the speedup over a mode, or the time to a reference.

    The checked model is the baseline of the comparison.
    """
    if c.candidate not in set(GradMode):
        return _Ratio(f"time vs {c.candidate}", *_speed(c))
    low, high = 1 / c.high if c.high else math.inf, 1 / c.low if c.low > 0 else math.inf
    return _Ratio(f"speedup over {c.candidate}", c.candidate, 1 / c.ratio, low, high)


def distribution(result: AnyResult, prefix: str) -> Plot | None:
    """Draw a histogram of the batch times of each variant."""
    times = _times(result)
    if not times:
        return None
    everything = sorted(seconds for series in times.values() for seconds in series)
    # A few slow batches would squeeze all others into one bar; the note counts them instead.
    percentiles_95 = (sorted(s)[int(0.95 * (len(s) - 1))] for s in times.values())
    low, high = everything[0], 1.25 * max(percentiles_95)
    scale, unit = _unit(median(everything), SECOND_UNITS)
    colours = _colours(result)

    def draw(axes: Any) -> None:
        for row, (name, series) in enumerate(reversed(times.items())):
            counts, edges = _histogram([s for s in series if s <= high], low, high, len(series))
            peak = max(*counts, 1)
            axes.stairs(
                [row + 0.8 * count / peak for count in counts],
                [edge / scale for edge in edges],
                baseline=row,
                fill=True,
                color=placeholder(colours[name]),
            )
            axes.plot([median(series) / scale] * 2, [row, row + 0.8], color=INK, linewidth=1)
        axes.set_ylim(-0.05, len(times))
        _label_rows(axes, [*reversed(times)])
        axes.set_xlabel(f"{unit} per {_work_unit(result)}")

    note = "Lines are medians."
    if beyond := sum(seconds > high for seconds in everything):
        note += f" Not drawn: {pluralize(beyond, 'time')} above {format_seconds(high)}, up to "
        note += f"{format_seconds(everything[-1])}."
    title = "Batch times" if _work_unit(result) == "batch" else "Times per sample"
    height = max(1.8, 0.9 + 0.5 * len(times))
    return Plot(title, draw_svg(draw, height, f"{prefix}distribution"), note=note)


def _histogram(
    times: Sequence[float], low: float, high: float, total: int
) -> tuple[list[int], list[float]]:
    bins = min(40, max(8, round(2 * total**0.5)))
    width = (high - low) / bins or low or 1.0
    counts = [0] * bins
    for seconds in times:
        counts[min(bins - 1, int((seconds - low) / width))] += 1
    return counts, [low + i * width for i in range(bins + 1)]


def latency(result: AnyResult, prefix: str) -> Plot | None:
    """Draw the batch times in the order of the run."""
    times = {name: series for name, series in _times(result).items() if len(series) > 1}
    if not times:
        return None
    everything = [seconds for series in times.values() for seconds in series]
    scale, unit = _unit(median(everything), SECOND_UNITS)
    colours = _colours(result)

    def draw(axes: Any) -> None:
        for name, series in times.items():
            _draw_series(axes, [s / scale for s in series], placeholder(colours[name]))
        if min(everything) > 0 and max(everything) > 10 * median(everything):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: format_number(value))
            axes.yaxis.set_minor_formatter("")
        axes.set_xlabel("batch" if result.kind == "infer" else "round, one process after another")
        axes.set_ylabel(f"{unit} per {_work_unit(result)}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color=GRID, linewidth=0.8)

    thinned = any(len(series) > _MAX_DOTS for series in times.values())
    note = "Lines: medians of neighbours. Bands: minimum to maximum." if thinned else ""
    key = tuple((colours[name], name, "") for name in times) if len(times) > 1 else ()
    return Plot("Over the run", draw_svg(draw, 2.4, f"{prefix}latency"), key, note)


def _draw_series(axes: Any, series: Sequence[float], colour: str) -> None:
    if len(series) <= _MAX_DOTS:
        x = range(1, len(series) + 1)
        axes.plot(x, series, "o", color=colour, markersize=2.4, markeredgewidth=0)
        return
    step = -(-len(series) // 200)
    groups = [series[i : i + step] for i in range(0, len(series), step)]
    x = range(1, len(series) + 1, step)
    lows, highs = [min(group) for group in groups], [max(group) for group in groups]
    axes.fill_between(x, lows, highs, color=colour, alpha=0.25, linewidth=0)
    axes.plot(x, [median(group) for group in groups], color=colour, linewidth=1.2)


def memory(result: AnyResult, prefix: str) -> Plot | None:
    """Draw the live bytes during one forward pass, with the peak of each variant."""
    lines: dict[tuple[tuple[int, ...], str | None], list[str]] = {}
    """Timeline and module at the peak -> the variants that have them."""
    for name, measured in _variants(result).items():
        if timeline := (memory := measured[0].memory).timeline:
            lines.setdefault((timeline, memory.peak_module), []).append(name)
    if not lines:
        return None
    colours = _colours(result)
    scale, unit = _unit(max(max(line) for line, _ in lines), BYTE_UNITS)

    def draw(axes: Any) -> None:
        for i, ((line, _), names) in enumerate(lines.items()):
            y = [count / scale for count in line]
            x = [i / max(1, len(y) - 1) for i in range(len(y))]
            colour, peak = placeholder(colours[names[0]]), y.index(max(y))
            above = len(lines) - 1 - i  # wider than the lines drawn above it, which may be close
            axes.step(x, y, where="post", color=colour, linewidth=1.6 + 2 * above)
            axes.plot([x[peak]], [y[peak]], "o", color=colour, markersize=6 + 2 * above)
        axes.set_xticks([0, 1], ["call", "return"])
        axes.set_ylabel(unit)
        axes.grid(axis="y", color=GRID, linewidth=0.8)

    key = tuple(
        (
            colours[names[0]],
            " and ".join(names),
            f"peak {format_bytes(max(line))}{f' in {module}' if module else ''}",
        )
        for (line, module), names in lines.items()
    )
    note = "Tensor bytes of one batch after each allocation, excluding weights and inputs."
    return Plot("Memory over a forward pass", draw_svg(draw, 2.4, f"{prefix}memory"), key, note)


def confusion(result: AnyResult, prefix: str) -> Plot | None:
    """Draw the first confusion matrix: the share of each true class by predicted class."""
    metrics = result.metrics if isinstance(result, InferResult | CheckResult) else ()
    matrix = next((m.matrix for m in metrics if m.matrix), None)
    if matrix is None or len(matrix.classes) > _MAX_MATRIX:
        return None
    count, names = len(matrix.classes), [shorten(name) for name in matrix.classes]

    def draw(axes: Any) -> None:
        for true, counts in enumerate(matrix.counts):
            for predicted, number in enumerate(counts):
                share = number / (sum(counts) or 1)
                place = {"left": predicted - 0.5, "height": 1.0, "alpha": share, "linewidth": 0}
                axes.barh(true, 1.0, color=placeholder(0), **place)
                if number and count <= _MAX_NUMBERS:
                    text = {"ha": "center", "va": "center", "fontsize": 8, "color": INK}
                    axes.text(predicted, true, f"{number:,}", **text)
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_xticks(range(count), names, rotation=90 if count > _MAX_NUMBERS else 0)
        axes.set_yticks(range(count), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")

    note = "Darker: a larger share of the true class."
    height = min(4.4, 1.2 + 0.4 * count)
    return Plot("Confusion matrix", draw_svg(draw, height, f"{prefix}confusion"), (), note)


def workers(result: AnyResult, prefix: str) -> Plot | None:
    """Draw the ranges of each worker of an engine over time, and where workers were lost."""
    lanes = result.measurements[0].workers if result.measurements else ()
    if not lanes:
        return None

    ended = max((span.ended for worker in lanes for span in worker.ranges), default=0.0)
    single = max(len(worker.ranges) for worker in lanes) <= _MAX_RANGES

    def draw(axes: Any) -> None:
        for y, worker in enumerate(lanes):
            spans = [(span.began, span.ended) for span in worker.ranges]
            spans = spans if single else _merge(spans, ended / _MAX_RANGES)
            bars = [(began, end - began) for began, end in spans]
            for first, alpha in ((0, 1.0), (1, 0.6)):
                # Merged spans need no second shade: a gap separates them.
                style = {"facecolors": placeholder(1), "alpha": alpha if single else 1.0}
                axes.broken_barh(bars[first::2], (y - 0.3, 0.6), linewidth=0, **style)
            if worker.lost_at is not None:
                axes.plot([worker.lost_at], [y], "x", color=INK, markersize=9)
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        _label_rows(axes, [f"worker {worker.worker}" for worker in lanes])
        axes.set_xlabel("seconds since the first worker was ready")

    lost = " × marks the loss of a worker." if any(worker.lost for worker in lanes) else ""
    bars = "ranges of samples, in alternating shades" if single else "the time of work"
    note = f"Bars are {bars}.{lost}"
    height = 1.0 + 0.3 * len(lanes)
    return Plot("Workers", draw_svg(draw, height, f"{prefix}workers"), (), note)


def _merge(spans: Sequence[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Join spans between which there is less than `gap`."""
    merged: list[tuple[float, float]] = []
    for began, ended in spans:
        if merged and began - merged[-1][1] < gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], ended))
        else:
            merged.append((began, ended))
    return merged


# --- shared by the plots -----------------------------------------------------------------------


def _times(result: AnyResult) -> dict[str, list[float]]:
    """Concatenate the seconds of each variant's processes, per batch or per sample."""
    per_batch = _work_unit(result) == "batch"
    times = {
        name: [
            s for m in measured for s in (m.batch_seconds if per_batch else m.seconds_per_sample)
        ]
        for name, measured in _variants(result).items()
    }
    return {name: series for name, series in times.items() if series}


def _work_unit(result: AnyResult) -> str:
    return "batch" if len(result.batch_sizes) == 1 else "sample"


def _variants(result: AnyResult) -> Mapping[str, list[Measurement]]:
    """Group measurements by variant, named by the mode if there is only one."""
    return {
        name or measured[0].mode.value: measured for name, measured in result.by_variant().items()
    }


def _colours(result: AnyResult) -> dict[str, int]:
    """Number the series; a baseline has the grey colour 0."""
    names = list(_variants(result))
    first = 0 if len(names) > 1 else 1
    return {name: (i + first) % SERIES for i, name in enumerate(names)}


def placeholder(number: int) -> str:
    """Return the colour that stands for a series."""
    return f"#0a0c0{number % SERIES}"


def _unit(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    return next(((scale, unit) for scale, unit in units if value >= scale), (1, "B"))


def _label_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shorten(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def shorten(name: str) -> str:
    """Shorten a name to fit beside an axis."""
    line = escape_control_chars(name)
    return line if len(line) <= 24 else f"{line[:23]}…"


def draw_svg(draw: Callable[[Any], None], height: float, salt: str) -> str:
    """Draw on one pair of axes; the same input gives the same SVG."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("HTML reports need matplotlib: pip install 'gradrun[report]'") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the browser draws glyphs that matplotlib's font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC_PARAMS | {"svg.hashsalt": salt})
        figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="none")
        draw(figure.add_subplot(facecolor="none"))
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"), None)
        figure.savefig(file, format="svg", metadata=metadata, transparent=True)
    return _embed(file.getvalue())


def _embed(svg: str) -> str:
    """Remove sizes, fonts, styles and ids that would affect the page; map the colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r"#0a0[bc]0\d", lambda match: _PAGE_COLOURS.get(match[0], match[0]), svg)
    return re.sub(r"\n *", "\n", svg).strip()
