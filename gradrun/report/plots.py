"""A result's plots as SVG that takes its colours and its type from the page around it.

The only importer of matplotlib. Knows raw times, ratios and timelines; not the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from gradrun.core.errors import ConfigError
from gradrun.core.units import (
    BYTE_UNITS,
    SECOND_UNITS,
    format_bytes,
    format_number,
    format_seconds,
    pluralize,
)
from gradrun.report.escaping import escape_control_chars
from gradrun.report.tables import batch_sizes, by_variant
from gradrun.results.result import AnyResult, CheckResult, CompareResult, Measurement

SERIES = 6
"""Colours that the page has; further series begin anew."""

_WIDTH = 4.4
"""Inches: as wide as a phone, so that the type is readable there; a wide page has two beside each
other."""
_MOST_DOTS = 400
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
_INK, _SOFT, _GRID = "#0a0b00", "#0a0b01", "#0a0b02"
_ROLES = {_INK: "var(--ink)", _SOFT: "var(--soft)", _GRID: "var(--line)"} | {
    f"#0a0c0{i}": f"var(--series-{i})" for i in range(SERIES)
}
"""Colours that matplotlib is told -> those of the page."""


@dataclass(frozen=True)
class Plot:
    """A drawing with its title, the series in it (number, name, what to know), and a note."""

    title: str
    svg: str
    key: tuple[tuple[int, str, str], ...] = ()
    note: str = ""


def plots(result: AnyResult, salt: str = "") -> list[Plot]:
    """Whatever there is to draw of a result; `salt` tells its names from others on the page.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    draw = (ratios, distribution, latency, memory)
    return [plot for plot in (one(result, salt) for one in draw) if plot]


def ratios(result: AnyResult, salt: str) -> Plot | None:
    """Each variant's speed beside the baseline's, with its interval over processes."""
    compared = result.comparisons if isinstance(result, CompareResult | CheckResult) else ()
    if not compared:
        return None
    numbers = _numbers(result)
    baseline = compared[0].baseline

    def draw(axes: Any) -> None:
        axes.axvline(1, color=_SOFT, linewidth=1)
        for place, found in enumerate(compared):
            colour = _colour(numbers.get(found.candidate, 1))
            if found.low > 0 and found.high < 100 * found.ratio:
                axes.plot([found.low, found.high], [place] * 2, color=colour, linewidth=3)
            axes.plot([found.ratio], [place], "o", color=colour, markersize=7)
        axes.set_ylim(len(compared) - 0.4, -0.6)
        _names(axes, range(len(compared)), [c.candidate for c in compared])
        axes.margins(x=0.15)
        axes.set_xlabel(f"times as fast as {_short(baseline)}")

    height = 0.9 + 0.35 * len(compared)
    note = "Dots are ratios, bars their 95 % intervals over processes; right of 1 is faster."
    return Plot("Speed", _drawn(draw, height, f"{salt}speed"), note=note)


def distribution(result: AnyResult, salt: str) -> Plot | None:
    """How the times of the batches lie, each variant on a line of its own."""
    times = _times(result)
    if not times:
        return None
    everything = sorted(seconds for many in times.values() for seconds in many)
    # A few slow batches would press the others into one bar; they are told of in words.
    low, high = everything[0], 1.25 * max(_near_the_end(many) for many in times.values())
    beyond = sum(seconds > high for seconds in everything)
    scale, unit = _unit(median(everything), SECOND_UNITS)
    numbers = _numbers(result)

    def draw(axes: Any) -> None:
        for place, (name, many) in enumerate(times.items()):
            bins = min(40, max(8, round(2 * len(many) ** 0.5)))
            width = (high - low) / bins or low or 1.0
            edges = [low + i * width for i in range(bins + 1)]
            counts = [0] * bins
            for seconds in many:
                if seconds <= high:
                    counts[min(bins - 1, int((seconds - low) / width))] += 1
            floor, most = len(times) - 1 - place, max(max(counts), 1)
            axes.stairs(
                [floor + 0.8 * count / most for count in counts],
                [edge / scale for edge in edges],
                baseline=floor,
                fill=True,
                color=_colour(numbers[name]),
            )
            axes.plot([median(many) / scale] * 2, [floor, floor + 0.8], color=_INK, linewidth=1)
        axes.set_ylim(-0.05, len(times))
        _names(axes, [len(times) - 1 - i for i in range(len(times))], list(times))
        axes.set_xlabel(f"{unit} a {_of(result)}")

    note = "Lines are medians."
    if beyond:
        what = pluralize(beyond, "time")
        note += f" Not drawn: {what} above {format_seconds(high)}, up to "
        note += f"{format_seconds(everything[-1])}."
    height = 0.9 + 0.5 * len(times)
    title = "Batch times" if _of(result) == "batch" else "Times a sample"
    return Plot(title, _drawn(draw, max(height, 1.8), f"{salt}distribution"), note=note)


def latency(result: AnyResult, salt: str) -> Plot | None:
    """Whether the time a batch changes while the run goes on."""
    times = {name: many for name, many in _times(result).items() if len(many) > 1}
    if not times:
        return None
    everything = [seconds for many in times.values() for seconds in many]
    scale, unit = _unit(median(everything), SECOND_UNITS)
    numbers = _numbers(result)

    def draw(axes: Any) -> None:
        for name, many in times.items():
            colour, scaled = _colour(numbers[name]), [seconds / scale for seconds in many]
            if len(many) <= _MOST_DOTS:
                places = range(1, len(many) + 1)
                axes.plot(places, scaled, "o", color=colour, markersize=2.4, markeredgewidth=0)
                continue
            step = -(-len(many) // 200)
            pieces = [scaled[i : i + step] for i in range(0, len(many), step)]
            places = range(1, len(many) + 1, step)
            lows, highs = [min(p) for p in pieces], [max(p) for p in pieces]
            axes.fill_between(places, lows, highs, color=colour, alpha=0.25, linewidth=0)
            axes.plot(places, [median(p) for p in pieces], color=colour, linewidth=1.2)
        if min(everything) > 0 and max(everything) > 10 * median(everything):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: format_number(value))
            axes.yaxis.set_minor_formatter("")
        axes.set_xlabel("batch" if result.kind == "infer" else "round, processes one after another")
        axes.set_ylabel(f"{unit} a {_of(result)}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)

    thinned = any(len(many) > _MOST_DOTS for many in times.values())
    note = "Lines are medians of neighbours, bands their least and greatest." if thinned else ""
    key = tuple((numbers[name], name, "") for name in times)
    return Plot(
        "Over the run", _drawn(draw, 2.4, f"{salt}latency"), key if len(key) > 1 else (), note
    )


def memory(result: AnyResult, salt: str) -> Plot | None:
    """Bytes live while one forward pass ran, and which module made the peak."""
    found = {
        name: measured[0].memory
        for name, measured in _variants(result).items()
        if measured[0].memory.timeline
    }
    if not found:
        return None
    numbers = _numbers(result)
    scale, unit = _unit(max(max(m.timeline or (0,)) for m in found.values()), BYTE_UNITS)

    def draw(axes: Any) -> None:
        for (name, one), dashes in zip(found.items(), _repeated(_DASHES, len(found)), strict=True):
            line = [count / scale for count in one.timeline or ()]
            places = [i / max(1, len(line) - 1) for i in range(len(line))]
            colour, top = _colour(numbers[name]), max(range(len(line)), key=line.__getitem__)
            axes.step(places, line, where="post", color=colour, linewidth=1.6, linestyle=dashes)
            axes.plot([places[top]], [line[top]], "o", color=colour, markersize=6)
        axes.set_xticks([0, 1], ["call", "return"])
        axes.set_ylabel(unit)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)

    key = []
    for name, one in found.items():
        where = f" in {one.peak_module}" if one.peak_module else ""
        key.append((numbers[name], name, f"peak {format_bytes(max(one.timeline or (0,)))}{where}"))
    note = "Tensor bytes after each allocation of one batch, above weights and inputs."
    return Plot("Memory over a forward pass", _drawn(draw, 2.4, f"{salt}memory"), tuple(key), note)


# --- what the plots share ----------------------------------------------------------------------


def _times(result: AnyResult) -> dict[str, list[float]]:
    """Seconds a batch of each variant, processes one after another; a sample's where sizes differ.

    The last batch of a run, which may be smaller, counts as any other.
    """
    alike = _of(result) == "batch"

    def seconds(measured: Measurement) -> Sequence[float]:
        return measured.batch_seconds if alike else measured.seconds_per_sample

    found = {
        name: [one for measured in many for one in seconds(measured)]
        for name, many in _variants(result).items()
    }
    return {name: many for name, many in found.items() if many}


def _near_the_end(times: list[float]) -> float:
    """The time that 19 of 20 do not exceed."""
    return sorted(times)[int(0.95 * (len(times) - 1))]


def _of(result: AnyResult) -> str:
    return "batch" if len(batch_sizes(result)) == 1 else "sample"


def _variants(result: AnyResult) -> dict[str, list[Measurement]]:
    """By the name that a reader knows: a run of its own has its mode's."""
    return {name or many[0].mode.value: many for name, many in by_variant(result).items()}


def _numbers(result: AnyResult) -> dict[str, int]:
    """The series' colours: the baseline has the quiet one, and a run of its own does not."""
    names = list(_variants(result))
    first = 0 if len(names) > 1 else 1
    return {name: (place + first) % SERIES for place, name in enumerate(names)}


def _colour(number: int) -> str:
    return f"#0a0c0{number % SERIES}"


def _repeated(kinds: Sequence[Any], count: int) -> list[Any]:
    return [kinds[i % len(kinds)] for i in range(count)]


def _unit(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The unit in which a value has one to three digits before the point."""
    return next(((scale, unit) for scale, unit in units if value >= scale), (1, "B"))


def _names(axes: Any, places: Sequence[float], names: Sequence[str]) -> None:
    axes.set_yticks(places, [_short(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _short(name: str) -> str:
    line = escape_control_chars(name)
    return line if len(line) <= 24 else f"{line[:23]}…"


def _drawn(draw: Callable[[Any], None], height: float, name: str) -> str:
    """An SVG of one pair of axes: text as text, colours by role, no word of when it was made."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "an HTML report draws with matplotlib: pip install 'gradrun[report]'"
        ) from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks is the page's to draw
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": name,
                "text.parse_math": False,
                "font.size": 10,
                "text.color": _INK,
                "axes.labelcolor": _SOFT,
                "axes.edgecolor": _GRID,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "xtick.color": _SOFT,
                "ytick.color": _SOFT,
                "axes.axisbelow": True,
                "lines.solid_capstyle": "butt",  # a bar ends where its interval does
                "axes.formatter.useoffset": False,
            }
        )
        figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        draw(axes)
        file = io.StringIO()
        figure.savefig(
            file,
            format="svg",
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"), None),
            transparent=True,
        )
    return _of_the_page(file.getvalue())


def _of_the_page(svg: str) -> str:
    """Without what would rule the page around it: size, type, styles for all, names of groups."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r"#0a0[bc]0\d", lambda found: _ROLES.get(found[0], found[0]), svg)
    return re.sub(r"\n *", "\n", svg).strip()
