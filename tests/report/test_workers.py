"""Tables and plots of the workers of an engine."""

from __future__ import annotations

import re

from gradrun.report import plots, tables
from gradrun.results.result import WorkerRange, WorkerStats
from gradrun.results.run_warnings import run_warnings
from tests.support.run_results import measurement, run_result

SPAN = WorkerRange(start=0, stop=300, began=0.0, ended=2.0)
WORKERS = (
    WorkerStats(
        worker=1,
        node="a",
        cold_start=2.5,
        samples=300,
        forward=1.0,
        busy=2.0,
        process_peak=2**20,
        ranges=(SPAN,),
        repeated=2,
    ),
    WorkerStats(worker=2, node="b", cold_start=2.0, lost="was killed by SIGKILL", lost_at=1.0),
    WorkerStats(
        worker=3, node="c", cold_start=2.0, lost="its torch differs", lost_at=0.0, rejected=True
    ),
)
MEASURED = measurement().replace(batch_seconds=(0.1,) * 3, batch_sizes=(100,) * 3, workers=WORKERS)


def test_a_worker_that_was_lost_is_named_with_its_end() -> None:
    rows = [[str(cell) for cell in row] for row in tables.workers(MEASURED).rows]
    assert rows == [
        ["1 on a", "300", "100%", "150", "50%", "1.00 MiB", "2", ""],
        ["2 on b", "0", "0%", "–", "–", "–", "–", "lost"],
        ["3 on c", "0", "0%", "–", "–", "–", "–", "rejected"],
    ]
    undisturbed = MEASURED.replace(workers=(WORKERS[0].replace(repeated=0),))
    (row,) = tables.workers(undisturbed).rows
    assert [*map(str, row)] == ["1", "300", "100%", "150", "50%", "1.00 MiB", ""]
    timing = {row[0]: [*map(str, row[1:])] for row in tables.timing(MEASURED).rows}
    assert timing["workers"] == ["2.50 s", "cold start of the slowest worker"]


def test_the_plot_has_a_lane_per_worker_and_marks_a_loss() -> None:
    plot = plots.workers(run_result().replace(measurements=(MEASURED,)), "")
    assert plot
    assert "worker 1" in plot.svg
    assert "worker 2" in plot.svg
    assert "× marks the loss" in plot.note
    assert plots.workers(run_result(), "") is None


def test_the_ranges_of_a_long_run_become_bars_with_its_pauses() -> None:
    before = [WorkerRange(start=n, stop=n + 1, began=float(n), ended=n + 0.99) for n in range(3000)]
    after = [span.replace(began=span.began + 4000, ended=span.ended + 4000) for span in before]
    busy = WORKERS[0].replace(ranges=(*before, *after))
    result = run_result().replace(measurements=(MEASURED.replace(workers=(busy,)),))
    plot = plots.workers(result, "")
    assert plot
    bars = re.findall(r'<path d="[^"]*" clip-path', plot.svg)
    assert len(bars) == 2
    assert plot.note == "Bars are the time of work."


def test_a_loss_is_a_warning_with_its_cause() -> None:
    environment = run_result().environment
    warnings = run_warnings(MEASURED, environment, training=False)
    assert [w.text for w in warnings if w.code.startswith("workers_")] == [
        "1 worker lost, and their samples were run again: worker 2 on b was killed by SIGKILL",
        "1 worker rejected, and the others did the work: worker 3 on c, because its torch differs",
    ]
