"""Quantiles, their intervals and steadiness."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from gradrun.results import stats

EXPERIMENTS = 2_000


@pytest.mark.parametrize("q", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("count", [100, 101, 1_000])
def test_quantiles_are_those_of_numpy(q: float, count: int) -> None:
    samples = np.random.default_rng(1).lognormal(size=count).tolist()
    found = stats.quantile(samples, q)
    assert found
    assert found.value == pytest.approx(np.quantile(samples, q), rel=1e-12)
    assert min(samples) <= found.low <= found.value <= found.high


def coverage(draw: str, q: float, count: int) -> float:
    """How often the interval of `count` samples holds the true quantile."""
    truth = {
        "lognormal": math.exp(NormalDist().inv_cdf(q)),
        "exponential": -math.log(1 - q),
    }[draw]
    samples = getattr(np.random.default_rng(20261121), draw)(size=(EXPERIMENTS, count))
    found = [stats.quantile(row, q) for row in samples.tolist()]
    return sum(e.low <= truth <= e.high for e in found if e) / EXPERIMENTS


@pytest.mark.parametrize("draw", ["lognormal", "exponential"])
@pytest.mark.parametrize(("q", "count"), [(0.5, 30), (0.5, 201), (0.9, 63), (0.9, 200)])
def test_the_interval_covers_the_true_quantile_in_95_of_100_runs(
    draw: str, q: float, count: int
) -> None:
    assert 0.93 <= coverage(draw, q, count) <= 0.98


@pytest.mark.parametrize(("q", "count"), [(0.9, 10), (0.9, 20), (0.95, 20), (0.99, 125)])
def test_the_interval_is_correct_with_few_samples_beyond_the_quantile(q: float, count: int) -> None:
    assert coverage("lognormal", q, count) >= 0.91


@pytest.mark.parametrize(("q", "enough"), [(0.5, 2), (0.9, 10), (0.95, 20), (0.99, 100)])
def test_a_quantile_needs_a_sample_beyond_it(q: float, enough: int) -> None:
    samples = [float(i) for i in range(enough)]
    assert stats.quantile(samples, q)
    assert stats.quantile(samples[1:], q) is None


def test_an_empty_sample_has_no_quantile() -> None:
    assert stats.quantile([], 0.5) is None


def test_the_order_of_the_samples_does_not_matter_and_stays_as_it_was() -> None:
    samples = [3.0, 1.0, 2.0] * 10
    found = stats.quantile(samples, 0.5)
    assert found == stats.quantile(sorted(samples), 0.5)
    assert found
    assert found.value == 2.0
    assert samples == [3.0, 1.0, 2.0] * 10


def test_uncertainty_is_half_the_interval() -> None:
    assert stats.Estimate(5.0, 4.0, 7.0).uncertainty == 1.5


FALLING = [1.0 * 0.9**i for i in range(30)]


@pytest.mark.parametrize(
    ("samples", "steady"),
    [
        ([1.0] * 10, True),
        ([1.0] * 9, False),
        ([], False),
        (FALLING, False),
        (FALLING[::-1], False),
        (FALLING + [FALLING[-1]] * 10, True),
        ([1.0] * 5 + [1.04] * 5, True),
        ([1.0] * 5 + [1.06] * 5, False),
        ([1.0] * 5 + [0.94] * 5, False),
        ([1.0, 1.0, 9.0, 1.0, 1.0] * 2, True),
        ([9.0] * 20 + [1.0] * 10, True),
    ],
    ids=[
        "flat", "too few", "none", "falling", "rising", "fell and stopped", "within 5 %",
        "6 % up", "6 % down", "one outlier", "long settled",
    ],
)  # fmt: skip
def test_times_are_steady_when_they_have_stopped_falling(
    samples: list[float], steady: bool
) -> None:
    assert stats.is_steady(samples) is steady
