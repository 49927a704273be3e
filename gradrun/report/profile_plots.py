"""Plots of a profile as SVG: a flame graph of modules and the roofline of the machine."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gradrun.core.units import format_count, format_number, format_seconds
from gradrun.report.escaping import escape_html as _text
from gradrun.report.plots import GRID, INK, SERIES, SOFT, Plot, draw_svg, placeholder, shorten
from gradrun.report.profile_tables import name_of
from gradrun.results.profile import ModuleFigures, ProfileFigures
from gradrun.results.result import ProfileResult
from gradrun.results.work import MachinePeaks

_WIDTH, _ROW, _LETTER = 317.0, 17.0, 4.3
"""Width of the flame graph, height of a row and mean width of a letter, in the units of the SVG."""
_LEAST_WIDTH = 0.5
"""Narrower modules are not drawn."""
_MAX_FLAMES = 3
_NAMED_DOTS = 3
_NEAR = 0.2
"""Decades of the rate within which the names of two dots would overlap."""
_DECADES = 2
"""The roofline plot extends this many decades to each side of the dots, at most."""


def plots(result: ProfileResult, prefix: str = "") -> list[Plot]:
    """Draw the flame graph of each variant, and the roofline plot of the first.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    profiles = [ProfileFigures(profile) for profile in result.profiles[:_MAX_FLAMES]]
    drawn = [flame(figures) for figures in profiles]
    roof = roofline(profiles[0], prefix)
    return [*drawn, roof] if roof else drawn


def _colours(figures: ProfileFigures) -> dict[str, int]:
    """Number the types of modules by their self time, from 1; the others share the grey 0."""
    names = enumerate(figures.self_seconds_by_type, 1)
    return {name: number if number < SERIES else 0 for number, name in names}


def flame(figures: ProfileFigures) -> Plot:
    """Draw each module below its caller, as wide as its share of the forward pass."""
    colours = _colours(figures)
    boxes = list(_boxes(figures, 0, 0.0, _WIDTH))
    rows = 1 + max((depth for _, depth, _, _ in boxes), default=0)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH:g} {rows * _ROW:g}" xmlns="http://www.w3.org/2000/svg">',
        *(
            _box(figures, module, depth, left, width, colours)
            for module, depth, left, width in boxes
        ),
        "</svg>",
    ]
    seconds, whole = figures.self_seconds_by_type, figures.modules[0].time.value or 1.0
    key = tuple(
        (number, name, f"{seconds[name] / whole:.0%}") for name, number in colours.items() if number
    )
    hidden = len(figures.modules) - len(boxes)
    note = "Callers above, as wide as their time. Space below a module is its self time."
    note += f" {hidden} modules are too narrow to be drawn." if hidden else ""
    variant = figures.profile.variant
    title = f"Time by module, {variant}" if variant else "Time by module"
    return Plot(title, "\n".join(parts), key, note)


def _boxes(
    figures: ProfileFigures, index: int, left: float, width: float
) -> Iterator[tuple[ModuleFigures, int, float, float]]:
    """Yield the modules from one on with their depth, left edge and width."""
    module = figures.modules[index]
    if width < _LEAST_WIDTH:
        return
    yield module, module.depth, left, width
    children = [figures.modules[child] for child in module.children]
    times = [max(0.0, child.time.value) for child in children]
    # Noise can make children longer than their caller, which they must not exceed.
    whole = max(module.time.value, sum(times)) or 1.0
    for child, seconds in zip(children, times, strict=True):
        part = width * seconds / whole
        yield from _boxes(figures, child.index, left, part)
        left += part


def _box(
    figures: ProfileFigures,
    module: ModuleFigures,
    depth: int,
    left: float,
    width: float,
    colours: Mapping[str, int],
) -> str:
    name = module.calls.type if not depth else name_of(figures, module)
    share = f"{max(0.0, module.share.value):.0%}"
    time = format_seconds(max(0.0, module.time.value))
    title = _text(f"{module.calls.label}: {time}, {share}")
    letters = int((width - 4) / _LETTER)
    label = next((one for one in (f"{name} {share}", name) if len(one) <= letters), name)
    label = label if len(label) <= letters else f"{label[: letters - 1]}…" if letters > 3 else ""
    y = depth * _ROW
    text = f'<text x="{left + 2:.2f}" y="{y + 11:.2f}">{_text(label)}</text>' if label else ""
    return (
        f'<g style="font-size: 8px; fill: var(--ink)"><title>{title}</title>'
        f'<rect x="{left:.2f}" y="{y:.2f}" width="{max(width - 0.6, 0.3):.2f}" '
        f'height="{_ROW - 1:g}" style="fill: var(--series-{colours[module.calls.type]}); '
        f'fill-opacity: .35"/>{text}</g>'
    )


def roofline(figures: ProfileFigures, prefix: str) -> Plot | None:
    """Draw the rate of each module over its intensity, below the roofs of the machine."""
    peaks = figures.profile.peaks
    dots = _dots(figures)
    if peaks is None or not dots:
        return None
    colours = _colours(figures)
    types = dict.fromkeys(module.calls.type for module, _, _ in dots)
    dtypes = {one.dtype for module, _, _ in dots for one in _flops(module)}
    roofs = {peak.dtype: peak.rate for peak in peaks.products if peak.dtype in dtypes}
    if not roofs:
        return None

    named = _apart(dots)

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        left, right = _range(dots, peaks, max(roofs.values()))
        for dtype, rate in roofs.items():
            ridge = rate / peaks.copy
            x = [left, ridge, right] if left < ridge < right else [left, right]
            axes.plot(x, [min(rate, at * peaks.copy) for at in x], color=SOFT, linewidth=1.2)
            text = {"ha": "right", "va": "bottom", "fontsize": 8, "color": SOFT}
            axes.text(right, rate * 1.05, f"{dtype} {format_number(rate / 1e9)} GFLOP/s", **text)
        for rank, (module, intensity, rate) in enumerate(dots):
            colour = placeholder(colours[module.calls.type])
            share = max(0.0, module.self_time.value) / (figures.modules[0].time.value or 1.0)
            axes.plot([intensity], [rate], "o", color=colour, markersize=4 + 10 * share**0.5)
            if rank in named:
                name = shorten(module.calls.path or module.calls.type)
                at = {"xytext": (6, -9), "textcoords": "offset points", "fontsize": 7.5}
                axes.annotate(name, (intensity, rate), color=INK, **at)
        axes.set_xlim(left, right)
        axes.set_ylim(bottom=min(rate for _, _, rate in dots) / 2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: _round(value))
            axis.set_minor_formatter("")
        axes.set_xlabel("FLOP per byte")
        axes.set_ylabel("FLOP/s")
        axes.grid(color=GRID, linewidth=0.6)

    key = tuple((colours[name], name, "") for name in types)
    note = (
        "A dot per module, without the modules that it calls; larger dots take more time. Lines: "
        f"the peaks of {peaks.threads} threads, and copies of {format_number(peaks.copy / 1e9)} "
        "GB/s. Above the sloped line, tensors come from caches."
    )
    svg = draw_svg(draw, 3.4, f"{prefix}roofline")
    return Plot("Roofline", svg, key if len(key) > 1 else (), note)


def _dots(figures: ProfileFigures) -> list[tuple[ModuleFigures, float, float]]:
    """Return the modules with operations, their intensity and rate, longest self time first."""
    ordered = sorted(figures.modules, key=lambda module: -module.self_time.value)
    return [
        (module, work.intensity, work.total_flops / module.self_time.value)
        for module in ordered
        if (work := module.calls.work) and work.intensity and module.self_time.value > 0
    ]


def _apart(dots: list[tuple[ModuleFigures, float, float]]) -> list[int]:
    """Return the ranks of the dots to name: the first ones that are far from each other."""
    named: list[int] = []
    for rank, (_, intensity, rate) in enumerate(dots):
        near = any(
            abs(math.log10(rate / dots[other][2])) < _NEAR
            and abs(math.log10(intensity / dots[other][1])) < 4 * _NEAR
            for other in named
        )
        if not near and len(named) < _NAMED_DOTS:
            named.append(rank)
    return named


def _round(value: float) -> str:
    return re.sub(r"\.0+(?= |$)", "", format_count(value))


def _flops(module: ModuleFigures) -> Any:
    return module.calls.work.flops if module.calls.work else ()


def _range(
    dots: list[tuple[ModuleFigures, float, float]], peaks: MachinePeaks, rate: float
) -> tuple[float, float]:
    """Return the range of intensities: all dots and the point where the roofs meet."""
    values = [intensity for _, intensity, _ in dots]
    ridge = rate / peaks.copy
    low, high = min(values), max(values)
    low = min(low, max(ridge, low / 10**_DECADES))
    high = max(high, min(ridge, high * 10**_DECADES))
    return low / 2, high * 3
