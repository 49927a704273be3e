"""HTML reports in a browser: rendering, network requests and width."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gradrun import report
from gradrun.core.errors import ConfigError
from gradrun.data.thumbnails import thumbnail_of_array
from gradrun.report import html_page
from gradrun.results.result import (
    ClassDistribution,
    ClassValue,
    ConfusionMatrix,
    Example,
    Metric,
    PredictedClass,
    Statement,
    Warning,
)
from tests.support.browser import CHROMIUM, Browser
from tests.support.saved_results import NASTY, RESULTS, hostile

PAGES = {
    "run": ["run"],
    "comparison": ["comparison"],
    "audit": ["audit"],
    "check": ["check"],
    "profile": ["profile"],
    "all": list(RESULTS),
}
TITLES = {
    "run": ["Batch times", "Over the run", "Memory over a forward pass", "stage2.0 (Conv2d)"],
    "comparison": ["Speed", "times as fast as grad", "Use inference_mode", "bitwise equal"],
    "audit": ["Use no_grad", "Saved for backward in grad", "mine.py:41"],
    "profile": ["Time by module", "Roofline", "blocks.1.first", "GFLOP/s in float32"],
    "check": ["2 passed, 1 failed, 1 inconclusive", "at most 500 µs"],
    "all": ["Side by side", "Machine", "AMD EPYC"],
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("there is no Chromium here; `make tools` installs it where apt can")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def written(folder: Path, name: str) -> Path:
    path = folder / f"{name}.html"
    text = report.render([(f"runs/{one}", RESULTS[one]) for one in PAGES[name]], "html")
    path.write_text(text, encoding="utf-8")
    return path


def pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (1280, True)])
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.slow
def test_the_page_is_rendered_without_requests_and_fits(
    browser: Browser, tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    rendered = browser.render(written(tmp_path, name), width, 900, dark=dark)
    assert (rendered.requests, rendered.errors) == ([], [])
    for words in TITLES[name]:
        assert words in rendered.text
    assert rendered.width <= width, "nothing to scroll sideways to but a table in its own frame"
    if name != "all":  # results side by side have a column each
        assert rendered.cut_off == []
    picture = pixels(rendered.screenshot)
    assert picture.shape[:2] == (900, width)
    paper = picture[0, 0]
    assert (paper.mean() < 60) if dark else (paper.mean() > 240)
    written_on = (np.abs(picture.astype(int) - paper).max(axis=2) > 60).mean()
    assert 0.005 < written_on < 0.5
    if name in {"run", "comparison"}:
        spread = picture.max(axis=2).astype(int) - picture.min(axis=2)
        assert (spread > 80).mean() > 0.0005, "a plot has colours"


def test_warnings_come_first_and_then_the_verdict_the_predictions_and_their_cost() -> None:
    warned = RESULTS["run"].replace(
        warnings=(Warning(code="x", text="the weights are random"),),
        metrics=(Metric(name="accuracy", value=0.97, samples=498),),
        interpretation=(Statement(topic="weights", text="random (seed 0)"),),
    )
    page = html_page.render([("a", warned)])
    order = ["the weights are random", "samples per second", "0.9700", "Batch times", "cold start"]
    order += ["forward peak</th>", "random (seed 0)", "Machine"]
    places = [page.index(words) for words in order]
    assert places == sorted(places)


@pytest.mark.parametrize("count", [3, 12])
def test_a_confusion_matrix_has_a_table_and_a_plot(count: int) -> None:
    counts = [[7 if i == j else 0 for j in range(count)] for i in range(count)]
    counts[0][2] = 5
    classes = tuple(f"class{i}" for i in range(count))
    matrix = ConfusionMatrix(classes=classes, counts=tuple(map(tuple, counts)))
    value = ClassValue(name="class1", value=0.5)
    metrics = (
        Metric(name="matrix", value=0.9, samples=498, matrix=matrix),
        Metric(name="f1", value=0.8, samples=498, per_class=(value,), note="macro over 3 classes"),
    )
    page = html_page.render([("a", RESULTS["run"].replace(metrics=metrics))])
    assert "macro over 3 classes" in page
    assert re.search(r"class1\b.*?0\.5000", page, re.DOTALL)
    assert "matrix: true" in page
    figure = re.search(r"<figure>.*?Confusion matrix.*?</figure>", page, re.DOTALL)
    assert figure
    assert ">predicted<" in figure[0]
    table = re.search(r"matrix: true.*?</table>", page, re.DOTALL)
    assert table
    cells = re.findall(r">([^<>\n]+)<", table[0])
    if count > 6:  # the most frequent confusion, and its share of 12 samples
        assert [cell for cell in cells if cell in {"class0", "class2", "5", "42%"}] == [
            "class0",
            "class2",
            "5",
            "42%",
        ]
    else:
        row = cells[cells.index("class0", cells.index("class2") + 1) :][:4]
        assert row == ["class0", "7", "0", "5"]


EXAMPLES = (
    Example(
        position=0,
        input="pictures/a.jpg",
        picture=thumbnail_of_array(torch.rand(3, 60, 90)),
        prediction="cat (0.93)",
        label="dog",
        correct=False,
    ),
    Example(position=5, input="a/very_long_name_without_a_place_to_break_it" * 4, prediction="2"),
    Example(position=9, input="<b>A long text</b> " * 9, picture=b"no JPEG", prediction="1"),
)
DISTRIBUTION = ClassDistribution(
    output="prediction",
    predictions=400,
    samples=400,
    distinct=13,
    classes=20,
    most_frequent=tuple(PredictedClass(name=f"class {i}", count=100 - 8 * i) for i in range(12)),
)


@pytest.mark.parametrize("width", [1280, 390])
def test_examples_are_shown_with_thumbnails_and_texts(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    result = RESULTS["run"].replace(examples=EXAMPLES, class_distribution=(DISTRIBUTION,))
    page = tmp_path / "a.html"
    page.write_text(report.render([("a", result)], "html"), encoding="utf-8")
    assert page.read_text().count("<img ") == 1, "only a JPEG is a picture"
    rendered = browser.render(page, width, 900)
    assert (rendered.requests, rendered.errors, rendered.cut_off) == ([], [], [])
    assert rendered.width <= width
    assert rendered.pictures == [[90, 60]]
    for words in ("cat (0.93)", "dog", "<b>A long text</b> <b>", "13 of 20 classes predicted"):
        assert words in rendered.text
    # The last row has the classes after the tenth.
    shown = sum(c.count for c in DISTRIBUTION.most_frequent[:10])
    assert re.search(rf"3 more\s+{400 - shown}", rendered.text)


@pytest.mark.parametrize("kind", ["run", "comparison", "audit", "check", "profile"])
def test_a_malicious_result_runs_no_script_and_makes_no_request(
    browser: Browser, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "evil.html"
    path.write_text(report.render([(NASTY, hostile(kind))], "html"), encoding="utf-8")
    rendered = browser.render(path, 390, 900)
    assert (rendered.requests, rendered.errors) == ([], [])
    assert "<script>document.title='no'</script>" in rendered.text
    assert rendered.width <= 390


def test_missing_matplotlib_is_an_error_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'gradrun\[report\]'"):
        html_page.render([("a", RESULTS["run"])])
    for format in ("markdown", "csv", "json"):
        assert report.render([("a", RESULTS["run"])], format)


def test_the_page_forbids_loading_anything() -> None:
    text = html_page.render([("a", RESULTS["run"])])
    assert "default-src 'none'" in text
    assert text.index("Content-Security-Policy") < text.index("<style>")


def test_the_same_result_makes_the_same_page() -> None:
    one = [("a", RESULTS["comparison"])]
    assert html_page.render(one) == html_page.render(one)
