"""Tests of the tolerance, memory and latency that a tuned setting must keep."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats

from gradrun.cli.tune import _parse_within
from gradrun.comparison.lanes import Deviation
from gradrun.config.run import MeasureSection
from gradrun.config.tune import TuneSection
from gradrun.core.errors import ConfigError
from gradrun.tuning.constraints import Constraints, share_bound


def constraints(**tune: Any) -> Constraints:
    return Constraints(TuneSection.model_validate(tune), MeasureSection())


def deviation(**values: Any) -> Deviation:
    given = {
        "samples": 1000, "bitwise": False, "close": False, "max_abs": 0.02, "max_rel": 0.004,
        "cosine": 0.9995, "top1": 0.99,
    }  # fmt: skip
    return Deviation(**given | values)


@pytest.mark.parametrize(
    ("within", "wrong", "described"),
    [
        (None, "outputs differ by 0.02, over measure.rtol", "rtol 1.3e-06, atol 1e-05"),
        ("bitwise", "outputs differ by 0.02", "bitwise equal"),
        ({"max_abs": 0.01}, "outputs differ by 0.02", "max_abs <= 0.01"),
        ({"max_rel": 0.003}, "outputs differ by 0.004 of the greatest", "max_rel <= 0.003"),
        ({"cosine": 0.9999}, "cosine similarity 0.999500", "cosine >= 0.9999"),
        ({"top1": 0.995}, "1.00% of the samples have another greatest output", "top1 >= 0.995"),
        ({"max_abs": 0.03, "max_rel": 0.01, "cosine": 0.999, "top1": 0.98}, "", "max_abs <= 0.03"),
        ({"metric": "accuracy", "drop": 0.1}, "", "accuracy drops by at most 0.1"),
    ],
)
def test_outputs_beyond_the_tolerance_are_named(within: Any, wrong: str, described: str) -> None:
    given = constraints(within=within) if within else constraints()
    found = given.violation(deviation())
    assert found.startswith(wrong) if wrong else found == ""
    assert given.describe().startswith(described)
    equal = deviation(bitwise=True, close=True, max_abs=0.0, max_rel=0.0, cosine=1.0, top1=1.0)
    assert given.violation(equal) == ""


@pytest.mark.parametrize(("count", "total"), [(0, 2000), (1, 50), (7, 300), (50, 50)])
def test_the_bound_of_a_share_is_that_of_clopper_and_pearson(count: int, total: int) -> None:
    expected = scipy.stats.beta.ppf(0.95, count + 1, total - count) if count < total else 1.0
    assert share_bound(count, total) == pytest.approx(expected, abs=1e-9)


def test_too_few_samples_cannot_decide_a_share() -> None:
    given = constraints(within={"top1": 0.998})
    few = deviation(top1=1.0, samples=1000)
    text = "0 of 1,000 samples have another greatest output, so up to 0.30% may (95 %); at least "
    assert given.undecided(few) == f"{text}1,497 samples are needed"
    assert given.undecided(deviation(top1=1.0, samples=1497)) == ""
    assert given.least_samples == 1497
    # The 95 % bound of 2 in 2,000 is 0.31 %: more samples than the least do not decide it.
    some = given.undecided(deviation(top1=0.999, samples=2000))
    assert some == "2 of 2,000 samples have another greatest output, so up to 0.31% may (95 %)"
    assert constraints(within={"top1": 1.0}).least_samples == 0


def test_memory_and_latency_over_the_limit_are_named() -> None:
    given = constraints(memory="100 MiB", p99="50ms")
    assert given.memory_violation(100 * 2**20) == ""
    assert given.memory_violation(None) == "the process peak was not measured"
    assert given.memory_violation(150 * 2**20) == "process peak 150.00 MiB"
    assert given.latency_violation([0.01] * 400) == ""
    assert given.latency_violation([0.06, 0.07, 0.04]) == "median batch 60.0 ms"
    slow = given.latency_violation([0.01] * 380 + [0.08] * 20)
    assert slow == "99th percentile up to 80.0 ms"
    assert given.describe().endswith("process peak <= 100 MiB, p99 <= 50ms")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bitwise"], {"bitwise": True}),
        (["max_rel=1e-2", "cosine=0.999"], {"max_rel": 0.01, "cosine": 0.999}),
        (["metric=accuracy,drop=0.002"], {"metric": "accuracy", "drop": 0.002}),
    ],
)
def test_the_option_within_is_parsed(words: list[str], expected: dict[str, Any]) -> None:
    assert _parse_within(words) == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("max_rel=much", "--within max_rel=much: 'much' is not a number"),
        ("exact", "--within exact: expected bitwise or NAME=NUMBER, as max_rel=0.01"),
    ],
)
def test_an_unusable_tolerance_is_an_error(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _parse_within([word])
    assert str(caught.value) == message
