"""Reports on generated text: tokens per second, and the times of the first and later tokens."""

from __future__ import annotations

import csv
import io

import pytest

from gradrun import report
from gradrun.report import tables
from gradrun.report.figures import figures
from gradrun.report.side_by_side import side_by_side
from gradrun.results.result import CompareResult, Generation
from tests.support.run_results import measurement, run_result

# 3 batches: 8 + 8 + 2 texts; the last has one token each.
TEXTS = Generation(
    first_token_seconds=(0.02, 0.03, 0.04),
    batch_seconds=(0.12, 0.33, 0.05),
    batch_tokens=(60, 88, 2),
    batch_steps=(11, 16, 1),
)


def test_the_table_of_a_run_shows_the_rate_and_the_times_of_tokens() -> None:
    rows = {row[0]: row[1:] for row in tables.timing(measurement(generation=TEXTS)).rows}
    assert rows["tokens"] == ("300 /s", "150 new tokens, in generate()")
    assert rows["first token"][0] == "30.0 ms"
    assert rows["later tokens"][0] == "15.0 ms"  # of 10 and 20
    plain = {row[0] for row in tables.timing(measurement()).rows}
    assert not plain & {"tokens", "first token", "later tokens"}


def test_a_comparison_joins_the_texts_of_all_processes() -> None:
    faster = Generation(
        first_token_seconds=(0.01,), batch_seconds=(0.11,), batch_tokens=(66,), batch_steps=(11,)
    )
    result = run_result(
        cls=CompareResult,
        measurements=(
            measurement(variant="slow", generation=TEXTS),
            measurement(variant="fast", generation=faster),
            measurement(variant="fast", process=1, generation=faster),
        ),
    )
    table = tables.generated(result)
    assert table.rows == (
        ("slow", "300", "30.0 ms", "15.0 ms"),
        ("fast", "600", "10.0 ms", "10.0 ms"),
    )


def test_the_figures_and_the_columns_of_several_runs_have_them_too() -> None:
    result = run_result(measurement(generation=TEXTS))
    found = {figure.metric: figure.value for figure in figures(result)}
    assert found["tokens_per_second"] == pytest.approx(300)
    assert found["new_tokens"] == 150
    assert found["first_token"] == pytest.approx(0.03)
    assert found["later_token"] == pytest.approx(0.015)
    rows = csv.DictReader(io.StringIO(report.render([("a", result)], "csv")))
    (row,) = (row for row in rows if row["metric"] == "tokens_per_second")
    assert float(row["tokens_per_second"]) == pytest.approx(300)
    (table, *_) = side_by_side([("a", result), ("b", run_result())])
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["tokens"] == ("300 /s", tables.DASH)
