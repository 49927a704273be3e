"""Evaluation of limits and references: pass, fail and inconclusive."""

from __future__ import annotations

import math

import pytest

from gradrun.checks import evaluate
from gradrun.config.check import CheckSection
from gradrun.config.run import MetricSection
from gradrun.core.grad_mode import GradMode
from gradrun.core.units import format_bytes
from gradrun.results.result import CheckResult, Equivalence, InferResult, Metric, Output, Warning
from gradrun.results.stats import Estimate
from tests.support.run_results import MACHINE, MEMORY, measurement, run_result


def section_of(**sections: object) -> CheckSection:
    return CheckSection.model_validate(sections)


def by_name(outcomes):
    return {outcome.check: outcome for outcome in outcomes}


def predicted(*warnings: Warning, mode: str = "inference_mode", rows: int = 498) -> InferResult:
    return run_result(measurement(mode=mode), predictions=rows, warnings=warnings)


# --- smoke ---------------------------------------------------------------------------------------


def test_a_sound_run_passes_every_smoke_check():
    same = Equivalence(
        baseline="inference_mode", candidate="grad", bitwise=True, max_abs_diff=0, equal=True
    )
    outcomes = by_name(evaluate.smoke(predicted(), [same]))
    assert [*outcomes] == [
        "model runs",
        "predictions complete",
        "predictions finite",
        "no retained graph",
        "independent of batch",
        "outputs match grad",
    ]
    assert {outcome.status for outcome in outcomes.values()} == {"pass"}
    assert outcomes["predictions complete"].value == "498 rows"


@pytest.mark.parametrize(
    ("code", "check"),
    [
        ("nonfinite", "predictions finite"),
        ("quarantined", "predictions complete"),
        ("graph_kept", "no retained graph"),
        ("batch_dependent", "independent of batch"),
    ],
)
def test_a_warning_of_the_run_fails_its_smoke_check(code, check):
    found = by_name(evaluate.smoke(predicted(Warning(code=code, text="12 of them")), []))
    assert {name for name, outcome in found.items() if outcome.status == "fail"} == {check}
    assert found[check].reason == "12 of them"


def test_a_missing_prediction_fails():
    found = by_name(evaluate.smoke(predicted(rows=497), []))
    assert found["predictions complete"].status == "fail"
    assert "498" in found["predictions complete"].reason


def test_batch_independence_is_no_check_where_it_was_not_tested():
    alone = run_result(measurement(batches=10, last=1).replace(batch_sizes=(1,) * 10))
    assert "independent of batch" not in by_name(evaluate.smoke(alone, []))
    untested = evaluate.smoke(predicted(), [], batch_independence=False)
    assert "independent of batch" not in by_name(untested)


def test_a_graph_is_allowed_in_grad():
    assert "no retained graph" not in by_name(evaluate.smoke(predicted(mode="grad"), []))


def test_a_mode_with_different_outputs_fails_and_names_the_module():
    other = Equivalence(
        baseline="inference_mode", candidate="grad", bitwise=False, max_abs_diff=0.25,
        equal=False, first_module="drop (Dropout)",
    )  # fmt: skip
    found = by_name(evaluate.smoke(predicted(), [other]))["outputs match grad"]
    assert found.status == "fail"
    assert "0.25" in found.reason
    assert "drop (Dropout)" in found.reason


# --- limits --------------------------------------------------------------------------------------


def test_memory_limits_are_exact_to_the_byte():
    limits = {"forward_peak": "66048", "retained": "159", "device_allocated": "1 GiB"}
    found = by_name(evaluate.memory_limits(section_of(limits=limits), MEMORY))
    assert found["forward peak"].status == "pass"
    assert found["retained"].status == "fail"
    assert found["retained"].reason == "1 B above the limit (160 bytes)"
    assert found["retained"].key == "check.limits.retained"
    assert found["device allocated"].status == "inconclusive", "not measured"


def processes(mode: str, scale: float, spread: float = 0.001):
    """Five processes of a mode; `scale` is the time per batch."""
    return [
        measurement(
            mode=mode,
            variant=mode,
            process=process,
            batch_seconds=(scale * (1 + spread * process),) * 5,
            batch_sizes=(4,) * 5,
        )
        for process in range(5)
    ]


@pytest.mark.parametrize(
    ("seconds", "limit", "status"),
    [(1.25, ">= 1.2", "pass"), (1.25, ">= 1.3", "fail"), (1.25, "<= 1.3", "pass")],
)
def test_a_speedup_is_the_time_of_the_other_mode_over_that_of_the_checked_mode(
    seconds, limit, status
):
    measured = [*processes("inference_mode", 1.0), *processes("grad", seconds)]
    section = section_of(limits={"speedup_over_grad": limit})
    (found,) = evaluate.speedup_limits(section, GradMode.INFERENCE_MODE, measured)
    assert (found.status, found.check) == (status, "speedup over grad")
    assert found.value.startswith("1.25")


def test_an_interval_that_includes_the_limit_is_inconclusive():
    noisy = [m.replace(batch_seconds=(1.0 + 0.1 * m.process,) * 5) for m in processes("grad", 1.0)]
    section = section_of(limits={"speedup_over_grad": ">= 1.15"})
    measured = [*processes("inference_mode", 1.0), *noisy]
    (found,) = evaluate.speedup_limits(section, GradMode.INFERENCE_MODE, measured)
    assert found.status == "inconclusive"
    assert "includes the limit" in found.reason


@pytest.mark.parametrize(
    ("value", "limit", "status"),
    [(0.98, ">= 0.97", "pass"), (0.96, ">= 0.97", "fail"), (0.2, "<= 0.3", "pass"),
     (math.nan, ">= 0.97", "fail"), (None, ">= 0.97", "fail")],
)  # fmt: skip
def test_a_metric_is_compared_with_its_limit_and_a_missing_one_fails(value, limit, status):
    metrics = [] if value is None else [Metric(name="accuracy", value=value, samples=9)]
    (found,) = evaluate.metric_limits(section_of(limits={"accuracy": limit}), metrics)
    assert (found.check, found.status) == ("accuracy", status)


def test_a_small_metric_is_not_shown_as_zero():
    metrics = [Metric(name="mse", value=0.00001234, samples=9)]
    (found,) = evaluate.metric_limits(section_of(limits={"mse": "<= 0.00005"}), metrics)
    assert found.value == "1.234e-05"


# --- regression ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "was", "now", "status"),
    [("accuracy", 0.98, 0.975, "pass"), ("accuracy", 0.98, 0.95, "fail"),
     ("accuracy", 0.9, 0.99, "pass"), ("mse", 1.0, 1.005, "pass"), ("mse", 1.0, 1.2, "fail"),
     ("mse", 1.0, 0.1, "pass"), ("r2", -0.5, -0.6, "fail"), ("mae", 0.0, 0.1, "fail"),
     ("accuracy", math.nan, 0.9, "inconclusive"), ("accuracy", None, 0.9, "inconclusive")],
)  # fmt: skip
def test_a_metric_fails_if_it_became_worse_than_allowed(name, was, now, status):
    before = [] if was is None else [Metric(name=name, value=was, samples=9)]
    section = section_of(regression={name: "1%"})
    metrics = [MetricSection(name=name)]
    after = [Metric(name=name, value=now, samples=9)]
    (found,) = evaluate.metric_regression(section, "main", before, after, metrics)
    assert (found.check, found.limit, found.status) == (
        f"{name} vs main",
        "at most 1% worse",
        status,
    )
    assert found.key == f"check.regression.{name}"
    assert "inf" not in f"{found.value} {found.reason}", "a change from 0 has no percentage"


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [(0.9, 1.0, "pass"), (1.02, 1.05, "pass"), (1.04, 1.06, "inconclusive"), (1.06, 1.2, "fail")],
)
def test_time_fails_only_if_the_whole_interval_is_outside(low, high, status):
    slowdown = Estimate((low + high) / 2, low, high)
    (found,) = evaluate.time_regression(section_of(), "main", slowdown)
    assert (found.status, found.check) == (status, "time vs main")


@pytest.mark.parametrize(
    ("high", "value", "reason"),
    [
        (2.0, "+20.0% (-50.0% to +100.0%)", "the confidence interval includes the limit"),
        (5.0, "about +20%", "the confidence interval, -50% to +400%, includes the limit"),
        (float("inf"), "about +20%", "one process gives no confidence interval"),
    ],
)
def test_an_inconclusive_check_shows_the_interval_that_decides(high, value, reason):
    (found,) = evaluate.time_regression(section_of(), "main", Estimate(1.2, 0.5, high))
    assert (found.status, found.value) == ("inconclusive", value)
    assert found.reason.startswith(reason)


def test_memory_but_not_time_is_compared_across_machines():
    before = MACHINE.replace(cpu="Xeon", threads=8)
    differs = evaluate.machine_differences(before, MACHINE)
    assert differs == ["cpu Xeon, here AMD EPYC", "threads 8, here 2"]
    (found,) = evaluate.time_regression(section_of(), "b.json", Estimate(2, 1.9, 2.1), differs)
    assert found.status == "inconclusive"
    assert "against=REFERENCE" in found.reason
    grown = MEMORY.replace(forward_peak=67_400)
    (found,) = evaluate.memory_regression(section_of(), "b.json", MEMORY, grown)
    assert found.status == "fail"


def test_another_batch_size_is_inconclusive():
    before, now = [measurement(3, 4)], [measurement(3, 8, batch_sizes=(8, 8, 8))]
    assert evaluate.batch_size_difference(before, before) == []
    differs = evaluate.batch_size_difference(before, now)
    assert differs == ["batch size 4, here 8"]
    grown = MEMORY.replace(forward_peak=132_096)
    (found,) = evaluate.memory_regression(section_of(), "base", MEMORY, grown, differs)
    assert (found.status, found.value) == ("inconclusive", "–")
    assert (
        "measured with batch size 4, here 8; create a new baseline with save_baseline=PATH"
        in found.reason
    )


def test_a_baseline_of_one_process_gives_no_interval():
    before, now = processes("grad", 1.0)[:1], processes("grad", 2.0)
    (found,) = evaluate.time_regression(
        section_of(), "b.json", evaluate.unpaired_slowdown(before, now)
    )
    assert found.status == "inconclusive"
    assert "save_baseline=PATH" in found.reason


@pytest.mark.parametrize(
    ("grown", "status"), [(0, "pass"), (660, "pass"), (661, "fail"), (-5000, "pass")]
)
def test_memory_growth_is_limited_to_the_byte(grown, status):
    now = MEMORY.replace(forward_peak=66_048 + grown)
    (found,) = evaluate.memory_regression(section_of(), "main", MEMORY, now)
    assert found.status == status


def test_growth_from_zero_fails_and_zero_to_zero_passes():
    none = MEMORY.replace(retained=0)
    section = section_of(regression={"retained": "10%", "forward_peak": None})
    grown = next(evaluate.memory_regression(section, "m", none, MEMORY))
    assert (grown.status, grown.value) == ("fail", format_bytes(MEMORY.retained))
    assert grown.reason == "was 0 B", "growth from 0 has no percentage"
    assert next(evaluate.memory_regression(section, "m", none, none)).status == "pass"


def test_memory_that_one_side_lacks_is_inconclusive():
    unknown = MEMORY.replace(forward_peak=None)
    (found,) = evaluate.memory_regression(section_of(), "m", unknown, MEMORY)
    assert found.status == "inconclusive"


OUTPUT = Output(name="prediction", dtype="float32", shape=(10,), mean=0.5, spread=0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mean": 0.50001}, ""),
        ({"mean": 0.6}, "mean was 0.5 and is 0.6"),
        ({"spread": math.nan}, "spread was 0.1 and is nan"),
        ({"shape": (5,)}, r"was float32 [10] and is float32 [5]"),
        ({"dtype": "float16"}, "is float16"),
        ({"name": "other"}, "prediction is missing; other is new"),
    ],
)
def test_outputs_are_compared_by_dtype_shape_mean_and_spread(change, reason):
    now = OUTPUT.replace(**change)
    (found,) = evaluate.outputs_regression(section_of(), "b.json", [OUTPUT], [now])
    assert found.status == ("fail" if reason else "pass")
    assert reason in found.reason


def test_a_disabled_regression_is_not_evaluated():
    section = section_of(regression={"time": None, "forward_peak": None, "outputs": False})
    assert not [*evaluate.time_regression(section, "m", Estimate(9, 8, 10))]
    assert not [*evaluate.memory_regression(section, "m", MEMORY, MEMORY)]
    assert not [*evaluate.outputs_regression(section, "m", [OUTPUT], [])]


# --- status -----------------------------------------------------------------------------------


def test_status_is_fail_then_inconclusive_then_pass():
    good = evaluate.smoke(predicted(), [])
    bad = evaluate.model_failed("model runs", "no")
    (unclear,) = evaluate.time_regression(section_of(), "m", None)
    for outcomes, status in (
        (good, "pass"),
        ([*good, unclear], "inconclusive"),
        ([unclear, bad], "fail"),
    ):
        result = run_result(cls=CheckResult, outcomes=tuple(outcomes))
        assert result.status == status
