"""Saved results in all formats: golden files, figures from raw samples, and malicious text.

GRADRUN_GOLDEN=1 rewrites the golden files.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from statistics import median
from typing import Any

import pytest
from rich.cells import cell_len

from gradrun import report
from gradrun.checks import evaluate
from gradrun.config.check import CheckSection
from gradrun.core.grad_mode import GradMode
from gradrun.report import tables
from gradrun.report.document import describe
from gradrun.report.escaping import escape_control_chars
from gradrun.report.plots import _draw_series, plots
from gradrun.results.ratios import compare_measured, recompute, time_ratio
from gradrun.results.result import Comparison, ConfusionMatrix, Metric, MetricChange, RunResult
from tests.support.reporting import assert_golden, printed
from tests.support.run_results import MEMORY, measurement
from tests.support.saved_results import MIB, NASTY, OUTCOMES, RESULTS, audit, check, hostile

GROUPS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in RESULTS},
    "two runs": ("run", "short run"),
    "every kind": ("run", "comparison", "noisy", "audit", "check"),
}


def named(*names: str) -> list[tuple[str, RunResult]]:
    return [(f"runs/{name.replace(' ', '-')}", RESULTS[name]) for name in names]


def rows(*names: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(report.render(named(*names), "csv"))))


@pytest.mark.parametrize(
    ("group", "format"),
    [
        *((group, "markdown") for group in GROUPS),
        *((group, "csv") for group in ("run", "noisy", "audit", "check", "profile")),
        *((group, "json") for group in ("one process", "check")),
        *(
            (group, "html")
            for group in ("run", "comparison", "audit", "check", "profile", "every kind")
        ),
    ],
)
def test_text_matches_the_golden_file(group: str, format: str) -> None:
    text = report.render(named(*GROUPS[group]), format)
    # What matplotlib draws differs from version to version, and the style is a file of its own.
    text = re.sub(
        r"(<svg[^>]*aria-label[^>]*?)( xmlns| viewBox).*?</svg>", r"\1/>", text, flags=re.S
    )
    text = re.sub(r"<style>.*?</style>", "<style/>", text, flags=re.DOTALL)
    assert_golden(f"{format}-{group}", text)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("group", ["two runs", "every kind", "check", "empty check"])
def test_tables_match_the_golden_file(group: str, width: int) -> None:
    text = printed(report.show, named(*GROUPS[group]), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert_golden(f"table-{group}-{width}", text)


# --- figures -----------------------------------------------------------------------------------


def test_each_mode_and_metric_has_one_row_with_its_unit() -> None:
    found = {(row["mode"], row["metric"]): row for row in rows("comparison")}
    assert len(found) == len(rows("comparison"))
    peak = found["no_grad", "forward_peak"]
    assert (peak["bytes"], peak["seconds"], peak["ratio"]) == (str(3 * 1024**2), "", "")
    speed = found["no_grad", "ratio"]
    assert float(speed["low_95"]) < float(speed["ratio"]) < float(speed["high_95"])
    assert speed["status"] == "faster"
    assert found["grad", "device_allocated"]["bytes"] == "", "not measured is empty, never 0"


def test_figures_are_computed_from_raw_samples() -> None:
    measured = RESULTS["run"].measurements[0]
    (row,) = (row for row in rows("run") if row["metric"] == "batch_median")
    assert float(row["seconds"]) == pytest.approx(median(measured.batch_seconds))


def test_ratios_in_a_file_are_recomputed() -> None:
    honest = RESULTS["comparison"]
    claim = Comparison(
        baseline="grad", candidate="no_grad", ratio=9, low=9, high=9, verdict="faster"
    )
    forged = honest.replace(comparisons=(claim,))
    assert recompute(forged) == honest


def test_an_open_interval_end_is_empty() -> None:
    (row,) = (row for row in rows("one process") if row["metric"] == "ratio")
    assert (row["low_95"], row["high_95"]) == ("", "")
    text = report.render(named(*RESULTS), "json")
    told = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [one["result"] for one in told["reports"]] == [name for name, _ in named(*RESULTS)]


@pytest.mark.parametrize("format", ["markdown", "json", "html", "csv"])
def test_a_check_shows_limit_value_and_reason(format: str) -> None:
    text = report.render(named("check"), format).replace("&gt;", ">").replace("\\>", ">")
    for outcome in OUTCOMES:
        for word in (outcome.check, outcome.limit, outcome.value, outcome.status):
            assert word in text or json.dumps(word)[1:-1] in text
    if format != "csv":
        assert "2 passed, 1 failed, 1 inconclusive" in text
        assert OUTCOMES[2].reason in text


@pytest.mark.parametrize("format", ["markdown", "html"])
def test_the_verdict_precedes_all_figures(format: str) -> None:
    text = report.render(named("comparison"), format)
    assert text.index("Use inference_mode") < text.index("913")


def test_side_by_side_shows_equal_kinds_and_differences_of_config() -> None:
    other = RESULTS["short run"].environment.replace(cpu="another", threads=1)
    pair = [
        ("a", RESULTS["run"]),
        ("b", RESULTS["short run"].replace(environment=other)),
    ]
    text = " ".join(printed(report.show, pair, 120).split())
    assert "batch median 685 ± 9 µs 680 ± 48 µs" in text
    assert "Different processor (AMD EPYC | another), threads (2 | 1)" in text
    assert "Different" not in printed(report.show, named("run", "run"), 120)


# --- plots -------------------------------------------------------------------------------------


def drawn(name: str) -> dict[str, Any]:
    return {plot.title: plot for plot in plots(RESULTS[name])}


def test_the_plots_show_the_measured_values() -> None:
    assert list(drawn("comparison")) == ["Speed", "Batch times", "Over the run"]
    assert list(drawn("run")) == ["Batch times", "Over the run", "Memory over a forward pass"]
    assert list(drawn("nothing")) == []
    assert "times as fast as grad" in drawn("comparison")["Speed"].svg
    ((_, name, said),) = drawn("run")["Memory over a forward pass"].key
    assert (name, said) == ("inference_mode", "peak 64.50 KiB in stage2.0 (Conv2d)")


def test_the_plot_of_a_check_has_the_names_and_values_of_its_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The checked model takes 4 s, grad 5 s and the reference 3.2 s: 1.25 times as fast as grad,
    # and 25 % slower than the reference.
    measured = tuple(
        measurement(
            3, variant=name, process=process, batch_seconds=(seconds,) * 3, batch_sizes=(4,) * 3
        )
        for process in range(3)
        for name, seconds in (("no_grad", 4.0), ("grad", 5.0), ("origin/main", 3.2))
    )
    comparisons = tuple(compare_measured(measured, 0.01))
    section = CheckSection.model_validate(
        {"limits": {"speedup_over_grad": ">= 1"}, "regression": {"time": "50%"}}
    )
    slowdown = time_ratio(measured, "no_grad", "origin/main")
    outcomes = (
        *evaluate.speedup_limits(section, GradMode.NO_GRAD, measured),
        *evaluate.time_regression(section, "origin/main", slowdown),
    )
    assert [o.value.split(" ")[0] for o in outcomes] == ["1.25", "+25.0%"]
    rows: list[tuple[str, float]] = []
    monkeypatch.setattr("gradrun.report.plots._label_rows", lambda axes, names: rows.extend(names))
    checked = check(*outcomes, measurements=measured, comparisons=comparisons)
    plot = next(plot for plot in plots(checked) if plot.title == "Ratios of times")
    assert rows[:2] == [outcome.check for outcome in outcomes]
    dots = [float(x) for x in re.findall(r'<use xlink:href="#[^"]*" x="([\d.]+)"', plot.svg)]
    # Equal ratios, so equal places on the axis.
    assert len(set(dots[-2:])) == 1


def test_modes_with_equal_memory_share_a_line_and_a_key() -> None:
    small = (0, MIB, 0)
    memories = {"grad": (0, 8 * MIB, 8 * MIB), "no_grad": small, "inference_mode": small}
    measured = tuple(
        measurement(3, mode=mode, variant=mode, memory=MEMORY.replace(timeline=timeline))
        for mode, timeline in memories.items()
    )
    (plot,) = (p for p in plots(audit(measurements=measured)) if p.title.startswith("Memory"))
    assert [(name, text) for _, name, text in plot.key] == [
        ("grad", "peak 8.00 MiB"),
        ("no_grad and inference_mode", "peak 1.00 MiB"),
    ]
    widths = re.findall(r"stroke: var\(--series-\d\); stroke-width: ([\d.]+)", plot.svg)
    assert sorted(map(float, widths), reverse=True) == list(map(float, widths)), "wider below"
    assert len(set(widths)) > 1


@pytest.mark.parametrize("name", RESULTS)
def test_a_plot_has_the_colours_and_type_of_the_page(name: str) -> None:
    for plot in plots(RESULTS[name]):
        assert not re.search(r"#[0-9a-f]{6}", plot.svg)
        assert not re.search(r"font-family|<style|<metadata", plot.svg)
        assert "var(--" in plot.svg
        assert plot.svg.count("<svg") == plot.svg.count("</svg>") == 1


def test_batches_outside_of_the_plot_are_mentioned() -> None:
    run = RESULTS["run"]
    slow = (*run.measurements[0].batch_seconds[:-1], 0.5)
    measured = run.measurements[0].replace(batch_seconds=slow)
    one, *_ = plots(run.replace(measurements=(measured,)))
    assert "Not drawn: 1 time above" in one.note
    assert "up to 500 ms" in one.note


class Drawn:
    """Axes that record the lines and bands that are drawn on them."""

    def __init__(self) -> None:
        self.lines: list[list[list[float]]] = []
        self.bands: list[list[list[float]]] = []

    def plot(self, x: Any, y: Any, *_: Any, **__: Any) -> None:
        self.lines.append([[*x], [*y]])

    def fill_between(self, x: Any, low: Any, high: Any, **_: Any) -> None:
        self.bands.append([[*x], [*low], [*high]])


def test_many_batches_are_drawn_as_medians_with_a_band_from_minimum_to_maximum() -> None:
    times = [0.001 * (1 + number * 7 % 11) for number in range(1003)]
    groups = [times[begin : begin + 6] for begin in range(0, 1003, 6)]  # 200 groups at most
    first = [1 + 6 * number for number in range(168)]
    many, few = Drawn(), Drawn()
    _draw_series(many, times, "red")
    assert many.lines == [[first, [median(group) for group in groups]]]
    assert many.bands == [
        [first, [min(group) for group in groups], [max(group) for group in groups]]
    ]
    _draw_series(few, times[:400], "red")
    assert (few.lines, few.bands) == ([[[*range(1, 401)], times[:400]]], [])
    measured = RESULTS["run"].measurements[0].replace(
        batch_seconds=tuple(times), batch_sizes=(4,) * len(times)
    )  # fmt: skip
    found = plots(RESULTS["run"].replace(measurements=(measured,)))
    note = next(plot.note for plot in found if plot.title == "Over the run")
    assert note == "Lines: medians of neighbours. Bands: minimum to maximum."


# --- hostile names -----------------------------------------------------------------------------


class Tags(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


KINDS = ("run", "comparison", "audit", "check", "profile", "profiled modes")


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_escaped_in_html(kind: str) -> None:
    evil = [(NASTY, hostile(kind)), ("b", hostile(kind))]
    page = report.render(evil, "html")
    tags = Tags(page).found
    assert not {"script", "img", "iframe", "link", "a", "object", "image"} & {t for t, _ in tags}
    assert not [a for _, attributes in tags for a in attributes if a.startswith("on")]
    assert escape_control_chars(page) == page
    assert "&lt;script&gt;" in page
    for _, attributes in tags:
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href"}:
                assert str(value).startswith("#")
            assert re.sub(r"url\(#", "", str(value)).count("url(") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_escaped_in_markdown(kind: str) -> None:
    text = report.render([(NASTY, hostile(kind)), ("b", hostile(kind))], "markdown")
    plain = re.sub(r"\\.", "", text)
    assert escape_control_chars(text) == text
    ours = re.sub(r"</?(details|summary)>|<!-- -->", "", plain)
    assert not re.search(r"[<`]", ours)
    assert "](" not in ours
    assert not re.search(r"@\w", text)
    assert not re.search(r"https?://\w", text)
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()]
    tables = "".join("x" if width else " " for width in widths).split()
    assert tables, "there are tables, none of them cut by a bar in a name"
    assert {width for width in widths if width} <= set(range(3, 10))


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_not_a_formula_and_has_no_control_characters(kind: str) -> None:
    evil = [(f"={NASTY}", hostile(kind)), ("@b", hostile(kind))]
    text = report.render(evil, "csv")
    assert escape_control_chars(text) == text
    for row in csv.reader(io.StringIO(text)):
        assert len(row) == 17
        assert not any(cell.startswith(("=", "+", "@")) for cell in row)
    for console in (printed(report.show, evil, 120), printed(report.show, evil[:1], 120)):
        assert escape_control_chars(console) == console
    json.loads(report.render(evil, "json"))


def test_two_profiles_are_compared_by_their_large_modules() -> None:
    names = ("profile", "profile")
    text = printed(report.show, named(*names), 110)
    assert re.search(r"forward pass +629 ± 5 µs +629 ± 5 µs", text)
    assert re.search(r"blocks\.1\.first \(Linear\) +350 ± 3 µs +350 ± 3 µs", text)
    assert "act (ReLU)" not in text, "less than 5 % of the forward pass"


def test_a_module_that_is_large_in_one_profile_has_its_time_in_all() -> None:
    profiled = RESULTS["profile"]
    (one,) = profiled.profiles
    target = next(i for i, m in enumerate(one.modules) if m.type == "ReLU")
    longer = tuple(
        m.replace(seconds=tuple(10 * s for s in m.seconds)) if i == target else m
        for i, m in enumerate(one.modules)
    )
    other = profiled.replace(profiles=(one.replace(modules=longer),))
    text = printed(report.show, [("a", profiled), ("b", other)], 200)
    (line,) = (line for line in text.splitlines() if "(ReLU)" in line)
    assert line.count("µs") == 2, line


def test_a_metric_without_a_value_has_no_difference() -> None:
    changes = tuple(
        MetricChange(name="auroc", baseline="a", candidate=name, before=math.nan, value=value)
        for name, value in (("b", 0.5), ("c", math.nan))
    )
    rows = tables.metric_changes(changes).rows
    assert [row[3] for row in rows] == ["", tables.DASH, tables.DASH]


def test_classes_whose_names_start_alike_stay_distinct() -> None:
    classes = ("retriever, golden", "retriever, labrador", *"abcde")
    counts = ((0, 3, *[0] * 5), *[(0,) * 7] * 6)
    matrix = ConfusionMatrix(classes=classes, counts=counts)
    table = tables.confusion(Metric(name="matrix", value=1.0, samples=3, matrix=matrix))
    assert table.rows == (("retriever, golden", "retriever, labrador", "3", "100%"),)
    few = ConfusionMatrix(classes=classes[:2], counts=((1, 3), (0, 2)))
    table = tables.confusion(Metric(name="matrix", value=1.0, samples=6, matrix=few))
    assert [column.title for column in table.columns] == ["retriever…"] * 2


def test_an_address_in_an_object_store_is_shown_as_it_was_given() -> None:
    stored = RESULTS["run"].replace(info=RESULTS["run"].info.replace(output_path="s3://b/runs/a"))
    paths = [path for _, path in describe(stored).files]
    assert paths[-1] == "s3://b/runs/a/result.json"
    assert paths[0].startswith("s3://b/runs/a/predictions")


def test_metrics_are_figures() -> None:
    scored = RESULTS["run"].replace(metrics=(Metric(name="accuracy", value=0.9731, samples=498),))
    text = report.render([("a", scored)], "csv")
    (row,) = (row for row in csv.DictReader(io.StringIO(text)) if row["metric"] == "accuracy")
    assert (row["score"], row["ratio"], row["mode"]) == ("0.9731", "", "")
    beside = printed(report.show, [("a", scored), ("b", scored)], 100)
    assert re.search(r"accuracy +0\.9731 +0\.9731", beside)
    for format in ("markdown", "html"):
        assert "0.9731" in report.render([("a", scored)], format)
