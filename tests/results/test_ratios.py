"""Ratios of times over processes: coverage of their intervals, and verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradrun.results import stats

EXPERIMENTS, ROUNDS = 2_000, 25


def experiments(processes: int, true_ratio: float) -> list[list[float]]:
    """For each experiment one ratio a process, from rounds as `gradrun compare` makes them.

    Both sides of a round share what the machine did then; each has noise of its own with a long
    tail; and a process shifts the ratio by a per cent, as memory layout does.
    """
    draw = np.random.default_rng(20261121)
    shape = (EXPERIMENTS, processes, ROUNDS)
    layout = draw.normal(0.0, 0.01, size=(EXPERIMENTS, processes, 1))
    moment = draw.lognormal(0.0, 0.3, size=shape)

    def noise() -> np.ndarray:
        return 1 + draw.exponential(0.02, size=shape)

    base = (1e-4 * moment * true_ratio * np.exp(layout) * noise()).tolist()
    other = (1e-4 * moment * noise()).tolist()
    return [
        [stats.paired_ratio(one, two) for one, two in zip(ones, twos, strict=True)]
        for ones, twos in zip(base, other, strict=True)
    ]


@pytest.mark.parametrize(("processes", "true_ratio"), [(5, 1.0), (5, 1.31), (9, 1.31)])
def test_the_interval_over_processes_covers_the_truth_in_95_of_100_experiments(
    processes: int, true_ratio: float
) -> None:
    found = [stats.mean_over_processes(ratios) for ratios in experiments(processes, true_ratio)]
    covered = sum(e.low <= true_ratio <= e.high for e in found) / EXPERIMENTS
    assert 0.93 <= covered <= 0.97


def test_equal_variants_differ_in_at_most_1_of_20_experiments() -> None:
    found = [stats.mean_over_processes(ratios) for ratios in experiments(5, 1.0)]
    called = [stats.verdict(e, 0.01) for e in found]
    assert sum(word in {"faster", "slower"} for word in called) <= 0.05 * EXPERIMENTS
    assert called.count("no_difference") > 0


def test_the_interval_is_students_t_on_the_logarithms() -> None:
    values = [1.20, 1.25, 1.31, 1.22, 1.27]
    logs = np.log(values)
    half = 2.776 * logs.std(ddof=1) / math.sqrt(5)
    found = stats.mean_over_processes(values)
    assert found.value == pytest.approx(math.exp(logs.mean()))
    assert found.low == pytest.approx(math.exp(logs.mean() - half))
    assert found.high == pytest.approx(math.exp(logs.mean() + half))


def test_swapping_the_variants_inverts_the_ratio() -> None:
    values = [1.20, 1.25, 1.31]
    ahead, back = (
        stats.mean_over_processes(values),
        stats.mean_over_processes([1 / v for v in values]),
    )
    assert (back.value, back.low, back.high) == pytest.approx(
        (1 / ahead.value, 1 / ahead.high, 1 / ahead.low)
    )


def test_two_processes_have_a_much_wider_interval_than_five() -> None:
    two, five = (
        stats.mean_over_processes([1.0, 1.1]),
        stats.mean_over_processes([1.0, 1.1, 1.0, 1.1, 1.05]),
    )
    assert two.high - two.low > 8 * (five.high - five.low)


def test_more_processes_than_the_t_table_have_an_interval() -> None:
    found = stats.mean_over_processes([1.0, 1.02] * 100)
    assert found.high - found.low == pytest.approx(2 * 2.042 * 0.01 / math.sqrt(200), rel=0.03)


def test_one_process_has_an_open_interval() -> None:
    found = stats.mean_over_processes([1.3])
    assert (found.value, found.low, found.high) == (pytest.approx(1.3), 0.0, math.inf)
    assert stats.verdict(found, 0.01) == "inconclusive"


def test_identical_processes_have_an_empty_interval() -> None:
    found = stats.mean_over_processes([1.5, 1.5, 1.5])
    assert (found.low, found.value, found.high) == pytest.approx((1.5, 1.5, 1.5))


# --- pairs -------------------------------------------------------------------------------------


def test_a_common_slowdown_of_a_round_cancels_out() -> None:
    slow = [1.0, 3.0, 10.0, 2.0, 1.0]
    assert stats.paired_ratio([1.25 * s for s in slow], slow) == pytest.approx(1.25)


def test_an_outlier_round_is_ignored() -> None:
    assert stats.paired_ratio([1.25, 1.25, 99.0, 1.25, 1.25], [1.0] * 5) == 1.25


def test_a_ratio_above_one_means_the_candidate_is_faster() -> None:
    assert stats.paired_ratio([2.0, 2.0], [1.0, 1.0]) == 2.0


# --- verdicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (1.2, 1.3, "faster"),
        (0.7, 0.8, "slower"),
        (0.995, 1.005, "no_difference"),
        (0.99, 1.01, "no_difference"),
        (1.002, 1.008, "no_difference"),
        (0.9899, 1.01, "inconclusive"),
        (0.99, 1.0101, "inconclusive"),
        (1.0001, 1.0101, "faster"),
        (0.98, 0.9999, "slower"),
        (1.0, 1.0101, "inconclusive"),
        (0.98, 1.0, "inconclusive"),
        (0.5, 2.0, "inconclusive"),
        (0.0, math.inf, "inconclusive"),
    ],
)
def test_the_verdict_follows_from_the_interval(low: float, high: float, word: str) -> None:
    assert stats.verdict(stats.Estimate(1.0, low, high), 0.01) == word


@pytest.mark.parametrize(("precision", "word"), [(0.05, "no_difference"), (0.01, "faster")])
def test_the_precision_determines_no_difference(precision: float, word: str) -> None:
    assert stats.verdict(stats.Estimate(1.03, 1.02, 1.04), precision) == word
