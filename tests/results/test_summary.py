"""The one sentence under a comparison, from results made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from gradrun.results.result import CompareResult, Comparison, Equivalence
from gradrun.results.stats import Verdict
from gradrun.results.summary import ratio_digits, summarize_comparison
from tests.support.run_results import MEMORY, measurement, run_result

KIB = 1024


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


def test_the_faster_mode_is_named_with_its_interval() -> None:
    assert summarize_comparison(result(FASTER)) == (
        "Use inference_mode: 1.31 times as fast as grad (1.30 to 1.32)."
    )


def test_what_it_saves_in_memory_is_told_with_it() -> None:
    assert summarize_comparison(result(FASTER, peaks={"inference_mode": 16 * KIB})) == (
        "Use inference_mode: 1.31 times as fast as grad (1.30 to 1.32), and its forward peak is "
        "16.00 KiB, not 64.00 KiB."
    )


@pytest.mark.parametrize("peak", [64 * KIB, 64 * KIB - 1023, 70 * KIB, None])
def test_no_saving_is_claimed_where_there_is_none_worth_a_word(peak: int | None) -> None:
    assert "peak" not in summarize_comparison(result(FASTER, peaks={"inference_mode": peak}))
    assert "peak" not in summarize_comparison(
        result(FASTER, peaks={"grad": peak, "inference_mode": None})
    )


def test_of_two_that_are_faster_the_surer_one_is_advised() -> None:
    wide = against("no_grad", "faster", 1.1, 1.9)
    assert summarize_comparison(result(wide, FASTER)).startswith("Use inference_mode")


def test_faster_counts_more_than_lean() -> None:
    text = summarize_comparison(result(LEVEL, FASTER, peaks={"no_grad": 0}))
    assert text.startswith("Use inference_mode")


def test_with_no_difference_in_time_the_leaner_mode_is_advised() -> None:
    assert summarize_comparison(result(LEVEL, peaks={"no_grad": 16 * KIB})) == (
        "Use no_grad: no difference in time above 0.4% to grad, and its forward peak is 16.00 KiB, "
        "not 64.00 KiB."
    )


def test_with_no_difference_at_all_any_mode_will_do() -> None:
    wider = against("inference_mode", "no_difference", 0.992, 1.001)
    assert summarize_comparison(result(LEVEL, wider)) == (
        "No difference in time above 0.8% could be seen: any will do."
    )


@pytest.mark.parametrize(("low", "high"), [(0.9999, 1.0001), (0.9956, 1.0044)])
def test_the_difference_that_could_be_seen_is_never_told_too_small(low: float, high: float) -> None:
    text = summarize_comparison(result(against("no_grad", "no_difference", low, high)))
    told = float(text.partition("above ")[2].partition("%")[0])
    assert told / 100 >= high - 1


def test_where_all_others_are_slower_the_baseline_stays() -> None:
    assert summarize_comparison(result(SLOWER)) == "Stay with grad: it is the fastest."


@pytest.mark.parametrize("others", [(UNSURE,), (SLOWER, UNSURE)])
def test_a_noisy_machine_is_said_to_be_one_and_what_to_do(others: tuple[Comparison, ...]) -> None:
    unsure = UNSURE.replace(candidate="inference_mode")
    text = summarize_comparison(result(*others[:-1], unsure))
    assert text.startswith("This machine was too noisy to tell: inference_mode / grad lies")
    assert "0.7 to 1.4" in text
    assert "measure.budget" in text


def test_where_fewer_than_two_ran_nothing_is_compared() -> None:
    assert "fewer than two" in summarize_comparison(result())


def test_a_faster_mode_with_other_outputs_is_not_advised() -> None:
    found = outputs("inference_mode", equal=False, difference=0.012, module="blocks.0 (Linear)")
    text = summarize_comparison(result(SLOWER, FASTER, equivalence=(found,)))
    assert text == (
        "Stay with grad: it is the fastest with these outputs. inference_mode gives other outputs "
        "than grad (by up to "
        "0.012, first in blocks.0 (Linear)): use it only if that is what you want."
    )


def test_where_the_only_other_mode_differs_that_alone_is_said() -> None:
    text = summarize_comparison(
        result(FASTER, equivalence=(outputs("inference_mode", equal=False, difference=1.0),))
    )
    assert text.startswith("inference_mode gives other outputs than grad (by up to 1)")
    assert "Use inference" not in text


def test_outputs_within_the_tolerance_are_no_reason_against_a_mode() -> None:
    found = outputs("inference_mode", equal=True, difference=3e-7)
    assert summarize_comparison(result(FASTER, equivalence=(found,))).startswith(
        "Use inference_mode"
    )


@pytest.mark.parametrize(
    ("low", "high", "digits"),
    [(1.3, 1.309, 3), (1.3, 1.32, 2), (1.25, 1.34, 2), (1.2, 1.4, 1), (0.5, 2.0, 1)],
)
def test_a_ratio_has_no_more_digits_than_its_interval_supports(
    low: float, high: float, digits: int
) -> None:
    assert ratio_digits(against("no_grad", "faster", low, high)) == digits
