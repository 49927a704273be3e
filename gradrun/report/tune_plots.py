"""Plots of a tuning: the speed of the settings against their error and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gradrun.report.plots import SOFT, Plot, draw_svg, placeholder
from gradrun.results.result import TuneResult


def plots(result: TuneResult, prefix: str) -> list[Plot]:
    """Draw the speed of the settings that were tried against their error and their memory."""
    drawn = (_by_error(result, prefix), _by_memory(result, prefix))
    return [plot for plot in drawn if plot]


def _by_error(result: TuneResult, prefix: str) -> Plot | None:
    points = [
        _Tried(t.ratio, max(t.max_rel or 0.0, _NO_ERROR), t.name)
        for t in result.trials
        if t.ratio and t.max_rel is not None and math.isfinite(t.max_rel)
    ]
    return _front(points, "Speed and error", "max_rel", f"{prefix}error", logarithmic=True)


def _by_memory(result: TuneResult, prefix: str) -> Plot | None:
    points = [
        _Tried(t.ratio, t.process_peak / 2**20, t.name)
        for t in result.trials
        if t.ratio and t.process_peak
    ]
    return _front(points, "Speed and memory", "process peak in MiB", f"{prefix}peak")


class _Tried(NamedTuple):
    """A setting in a plot."""

    speed: float
    cost: float
    name: str


_NO_ERROR = 1e-9
"""Place of bitwise equal outputs on a logarithmic axis."""


def _front(
    points: Sequence[_Tried], title: str, axis: str, salt: str, *, logarithmic: bool = False
) -> Plot | None:
    """Draw settings, and mark those that no other beats in both speed and cost."""
    if not points:
        return None
    front = sorted(
        (p for p in points if not any(o.speed > p.speed and o.cost <= p.cost for o in points)),
        key=lambda p: p.cost,
    )

    def draw(axes: Any) -> None:
        axes.axhline(1, color=SOFT, linewidth=1)
        axes.step(
            [p.cost for p in front],
            [p.speed for p in front],
            where="post",
            color=placeholder(1),
            linewidth=1.2,
        )
        for chosen, colour in ((points, 0), (front, 1)):
            axes.plot(
                [p.cost for p in chosen],
                [p.speed for p in chosen],
                "o",
                color=placeholder(colour),
                markersize=6,
            )
        if logarithmic:
            axes.set_xscale("log")
        axes.margins(x=0.1, y=0.15)
        axes.set_xlabel(axis)
        axes.set_ylabel("times as fast as the baseline")

    key = tuple((1, p.name, f"{p.speed:.2f} x") for p in front)
    note = "Line: the settings that no other beats in both. Ratios of the search."
    if logarithmic and any(p.cost == _NO_ERROR for p in points):
        note += " Far left: bitwise equal outputs."
    return Plot(title, draw_svg(draw, 2.8, salt), key, note)
