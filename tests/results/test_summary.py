"""Conclusions from comparisons and audits, from hand-made results."""

from __future__ import annotations

from typing import Any

import pytest

from gradrun.core.grad_mode import GradMode
from gradrun.results.result import AuditResult, CompareResult, Comparison, Equivalence
from gradrun.results.stats import Verdict
from gradrun.results.summary import (
    errors_in,
    has_errors,
    lowest_memory_safe_mode,
    ratio_digits,
    summarize_audit,
    summarize_comparison,
)
from tests.support.run_results import MEMORY, measurement, run_result
from tests.support.saved_results import GRAD, INFERENCE, NO_GRAD, audit, finding, in_mode

KIB, MIB = 1024, 1024**2


def side(name: str, peak: int | None = 64 * KIB, mode: str = "grad") -> Any:
    memory = MEMORY.replace(forward_peak=peak)
    return measurement(5, last=4, mode=mode, variant=name, memory=memory)


def against(name: str, verdict: Verdict, low: float, high: float) -> Comparison:
    return Comparison(
        baseline="grad",
        candidate=name,
        ratio=(low * high) ** 0.5,
        low=low,
        high=high,
        verdict=verdict,
    )


def outputs(name: str, *, equal: bool, difference: float = 0.0, module: str = "") -> Equivalence:
    return Equivalence(
        baseline="grad",
        candidate=name,
        bitwise=not difference,
        max_abs_diff=difference,
        equal=equal,
        first_module=module or None,
    )


def result(
    *comparisons: Comparison, peaks: dict[str, int | None] | None = None, **changes: Any
) -> CompareResult:
    peaks = {"grad": 64 * KIB} | {c.candidate: 64 * KIB for c in comparisons} | (peaks or {})
    return run_result(
        cls=CompareResult,
        measurements=tuple(side(name, peak) for name, peak in peaks.items()),
        comparisons=comparisons,
        **changes,
    )


FASTER = against("inference_mode", "faster", 1.30, 1.32)
LEVEL = against("no_grad", "no_difference", 0.996, 1.004)
SLOWER = against("no_grad", "slower", 0.80, 0.82)
UNSURE = against("no_grad", "inconclusive", 0.7, 1.4)


def test_faster_mode_is_recommended_with_its_interval() -> None:
    assert summarize_comparison(result(FASTER)) == (
        "Use inference_mode: 1.31 times as fast as grad (1.30 to 1.32)."
    )


def test_recommendation_includes_the_saved_memory() -> None:
    assert summarize_comparison(result(FASTER, peaks={"inference_mode": 16 * KIB})) == (
        "Use inference_mode: 1.31 times as fast as grad (1.30 to 1.32), with a forward peak of "
        "16.00 KiB instead of 64.00 KiB."
    )


@pytest.mark.parametrize("peak", [64 * KIB, 64 * KIB - 1023, 70 * KIB, None])
def test_negligible_or_unknown_savings_are_omitted(peak: int | None) -> None:
    assert "peak" not in summarize_comparison(result(FASTER, peaks={"inference_mode": peak}))
    assert "peak" not in summarize_comparison(
        result(FASTER, peaks={"grad": peak, "inference_mode": None})
    )


def test_the_faster_mode_with_the_higher_lower_bound_is_recommended() -> None:
    wide = against("no_grad", "faster", 1.1, 1.9)
    assert summarize_comparison(result(wide, FASTER)).startswith("Use inference_mode")


def test_time_takes_precedence_over_memory() -> None:
    text = summarize_comparison(result(LEVEL, FASTER, peaks={"no_grad": 0}))
    assert text.startswith("Use inference_mode")


def test_with_equal_times_the_mode_with_less_memory_is_recommended() -> None:
    assert summarize_comparison(result(LEVEL, peaks={"no_grad": 16 * KIB})) == (
        "Use no_grad: no difference in time to grad above 0.4%, with a forward peak of 16.00 KiB "
        "instead of 64.00 KiB."
    )


def test_without_any_difference_every_mode_is_recommended() -> None:
    wider = against("inference_mode", "no_difference", 0.992, 1.001)
    assert summarize_comparison(result(LEVEL, wider)) == (
        "Use any variant: no difference in time above 0.8%."
    )


def test_modes_with_equal_time_are_recommended_together_with_the_baseline() -> None:
    slower = SLOWER.replace(candidate="inference_mode")
    assert summarize_comparison(result(LEVEL, slower)) == (
        "Use grad or no_grad: no difference in time above 0.4%."
    )


@pytest.mark.parametrize(("low", "high"), [(0.9999, 1.0001), (0.9956, 1.0044)])
def test_the_bound_on_the_difference_is_rounded_up(low: float, high: float) -> None:
    text = summarize_comparison(result(against("no_grad", "no_difference", low, high)))
    bound = float(text.partition("above ")[2].partition("%")[0])
    assert bound / 100 >= high - 1


def test_the_baseline_is_kept_if_all_others_are_slower() -> None:
    assert summarize_comparison(result(SLOWER)) == "Keep grad: it is the fastest."


@pytest.mark.parametrize("others", [(UNSURE,), (SLOWER, UNSURE)])
def test_an_inconclusive_comparison_names_the_interval_and_a_remedy(
    others: tuple[Comparison, ...],
) -> None:
    unsure = UNSURE.replace(candidate="inference_mode")
    text = summarize_comparison(result(*others[:-1], unsure))
    assert text.startswith(
        "Inconclusive: inference_mode is 0.7 to 1.4 times as fast as grad (95 %). "
    )
    assert "measure.budget" in text


def test_a_variant_that_is_slower_for_sure_does_not_explain_an_inconclusive_comparison() -> None:
    slower = against("no_grad", "slower", 0.1, 0.9)
    unsure = against("inference_mode", "inconclusive", 0.9, 1.1)
    text = summarize_comparison(result(slower, unsure))
    assert text.startswith("Inconclusive: inference_mode is 0.9 to 1.1 times as fast as grad")


def test_fewer_than_two_variants_are_not_compared() -> None:
    assert "fewer than two" in summarize_comparison(result())


def test_a_faster_mode_with_different_outputs_is_not_recommended() -> None:
    differing = outputs("inference_mode", equal=False, difference=0.012, module="blocks.0 (Linear)")
    text = summarize_comparison(result(SLOWER, FASTER, equivalence=(differing,)))
    assert text == (
        "Keep grad: it is the fastest variant with these outputs. Outputs of inference_mode differ "
        "from grad (by up to 0.012, first in blocks.0 (Linear)): use it only if this is intended."
    )


def test_a_single_candidate_with_different_outputs_is_not_recommended() -> None:
    text = summarize_comparison(
        result(FASTER, equivalence=(outputs("inference_mode", equal=False, difference=1.0),))
    )
    assert text.startswith("Outputs of inference_mode differ from grad (by up to 1)")
    assert "Use inference" not in text


def test_outputs_within_the_tolerance_do_not_prevent_a_recommendation() -> None:
    close = outputs("inference_mode", equal=True, difference=3e-7)
    assert summarize_comparison(result(FASTER, equivalence=(close,))).startswith(
        "Use inference_mode"
    )


@pytest.mark.parametrize(
    ("low", "high", "digits"),
    [(1.3, 1.309, 3), (1.3, 1.32, 2), (1.25, 1.34, 2), (1.2, 1.4, 1), (0.5, 2.0, 1)],
)
def test_a_ratio_has_only_the_digits_that_its_interval_supports(
    low: float, high: float, digits: int
) -> None:
    assert ratio_digits(against("no_grad", "faster", low, high)) == digits


# --- audits ------------------------------------------------------------------------------------


def best(result: AuditResult) -> str | None:
    chosen = lowest_memory_safe_mode(result)
    return None if chosen is None else chosen.mode.value


def test_with_equal_memory_inference_mode_has_the_least_overhead() -> None:
    assert best(audit()) == "inference_mode"
    assert best(audit(measurements=(GRAD, NO_GRAD))) == "no_grad"


def test_the_mode_with_the_lowest_peak_is_best() -> None:
    larger = in_mode("inference_mode", forward_peak=4 * MIB, retained=MIB)
    assert best(audit(measurements=(GRAD, NO_GRAD, larger))) == "no_grad"


def test_with_equal_peaks_the_retained_memory_decides() -> None:
    retaining = in_mode("inference_mode", forward_peak=3 * MIB, retained=2 * MIB)
    assert best(audit(measurements=(GRAD, NO_GRAD, retaining))) == "no_grad"


def test_without_measured_memory_the_overhead_decides() -> None:
    unknown = tuple(in_mode(m, forward_peak=None, retained=None) for m in ("grad", "no_grad"))
    result = audit(measurements=unknown)
    assert best(result) == "no_grad"
    assert summarize_audit(result) == (
        "Use no_grad, the safe mode with the least overhead; memory was not measured."
    )
    one = (in_mode("no_grad", forward_peak=None, retained=None), GRAD)
    assert best(audit(measurements=one)) == "grad", "an unknown peak is not 0"


def test_an_error_makes_only_its_modes_unsafe() -> None:
    result = audit(findings=(finding("error", modes=("inference_mode",)),))
    assert [len(errors_in(result, mode)) for mode in GradMode] == [0, 0, 1]
    assert best(result) == "no_grad"
    assert summarize_audit(result).endswith("Do not use inference_mode: 1 error.")


def test_an_error_without_modes_makes_all_modes_unsafe() -> None:
    result = audit(findings=(finding("error", modes=()),))
    assert best(result) is None
    assert summarize_audit(result) == "No mode is safe. Fix the 1 error first."


@pytest.mark.parametrize(("severity", "fails"), [("error", True), ("warning", False)])
def test_only_errors_fail_an_audit(severity: str, fails: bool) -> None:
    result = audit(findings=(finding(severity),))
    assert has_errors(result) is fails
    assert best(result) == ("no_grad" if fails else "inference_mode")
    assert not has_errors(audit())


def test_the_summary_of_an_audit_names_the_peaks() -> None:
    assert summarize_audit(audit()) == (
        "Use inference_mode, the safe mode with the lowest memory (forward peak 3.00 MiB, "
        "9.00 MiB in grad)."
    )
    same = tuple(in_mode(m, forward_peak=MIB, retained=0) for m in ("grad", "inference_mode"))
    assert "(forward peak 1.00 MiB, as in grad)" in summarize_audit(audit(measurements=same))
    assert summarize_audit(audit(measurements=(INFERENCE,))).endswith("lowest memory.")


def of_size(name: str, size: int, seconds: float, peak: int | None) -> Any:
    return side(name, peak).replace(batch_sizes=(size,) * 5, batch_seconds=(seconds,) * 5)


def test_a_batch_size_is_recommended_with_its_time_and_memory_per_batch() -> None:
    compared = result(
        against("64", "faster", 1.80, 1.84), against("256", "faster", 1.79, 1.90)
    ).replace(
        measurements=(
            of_size("grad", 16, 0.004, 3 * MIB),
            of_size("64", 64, 0.009, 12 * MIB),
            of_size("256", 256, 0.036, 48 * MIB),
        )
    )
    assert summarize_comparison(compared) == (
        "Use 64: 1.82 times as fast per sample as grad (1.80 to 1.84). One batch takes 9.00 ms "
        "instead of 4.00 ms, with a forward peak of 12.00 MiB instead of 3.00 MiB."
    )
    *others, last = compared.measurements
    unknown = last.replace(memory=MEMORY.replace(forward_peak=None))
    assert summarize_comparison(compared.replace(measurements=(*others, unknown))).startswith(
        "Use 64:"
    )


@pytest.mark.parametrize(
    ("verdict", "low", "high", "digits"),
    [
        ("faster", 1.04, 2.8, 2),
        ("faster", 1.2, 2.8, 1),
        ("faster", 1.0004, 1.5, 4),
        ("slower", 0.4, 0.97, 2),
        ("inconclusive", 0.96, 2.8, 1),
    ],
)
def test_a_decided_interval_does_not_look_undecided(
    verdict: Verdict, low: float, high: float, digits: int
) -> None:
    assert ratio_digits(against("a", verdict, low, high)) == digits
