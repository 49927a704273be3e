"""Seconds, bytes and counts as people read them."""

from __future__ import annotations

import math

import pytest

from gradrun.core.units import (
    first_names,
    format_bytes,
    format_number,
    format_score,
    format_seconds,
    format_seconds_range,
    pluralize,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (1.034e-4, "103 µs"),
        (1.25e-9, "1.25 ns"),
        (4e-13, "0.000400 ns"),
        (0.052, "52.0 ms"),
        (1.0, "1.00 s"),
        (59.96, "60.0 s"),
        (86_400, "86,400 s"),
        (-0.5, "-500 ms"),
        (999.4e-6, "999 µs"),
        (999.6e-6, "1.00 ms"),
        (0.9996, "1.00 s"),
        (999.96e-9, "1.00 µs"),
        (9.996e-3, "10.0 ms"),
        (99.96e-3, "100 ms"),
        (-999.6e-6, "-1.00 ms"),
    ],
)
def test_seconds_have_three_digits_and_a_suitable_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "uncertainty", "text"),
    [
        (1.2345e-3, 1e-7, "1.23 ms"),
        (1.2345e-3, 0.04e-3, "1.23 ms"),
        (1.2345e-3, 0.2e-3, "1.2 ms"),
        (1.2345e-3, 2e-3, "1.2 ms"),
        (999.7e-6, 1e-3, "1.0 ms"),
        (994e-6, 1e-3, "990 µs"),
        (1.51, 2.3, "1.5 s"),
        (1.2345e-3, 0.0, "1.23 ms"),
        (123e-6, 50e-6, "120 µs"),
        (123e-6, 500e-6, "120 µs"),
        (4.7e-3, 0.45, "4.7 ms"),
    ],
)
def test_uncertainty_removes_all_digits_but_two(
    seconds: float, uncertainty: float, text: str
) -> None:
    assert format_seconds(seconds, uncertainty) == text


def test_times_that_round_to_the_same_value_are_shown_in_the_same_unit() -> None:
    shown = {format_seconds(seconds, seconds) for seconds in (996e-6, 999.7e-6, 1e-3, 1.04e-3)}
    assert shown == {"1.0 ms"}


@pytest.mark.parametrize(
    ("low", "high", "uncertainty", "text"),
    [
        (1.2, 5.8, 2.3, "1.2 to 5.8 s"),
        (0.9e-3, 1.2e-3, 0.2e-3, "900 µs to 1.2 ms"),
        (101e-6, 104e-6, 2e-6, "101 to 104 µs"),
    ],
)
def test_a_range_names_its_unit_once(low: float, high: float, uncertainty: float, text: str):
    assert format_seconds_range(low, high, uncertainty) == text


@pytest.mark.parametrize(
    ("value", "uncertainty", "text"),
    [
        (0, None, "0"),
        (0.0, 1.0, "0"),
        (1_234_567, None, "1,230,000"),
        (1234.5, None, "1,230"),
        (9.996, None, "10.0"),
        (0.00123456, None, "0.00123"),
        (-12.345, None, "-12.3"),
        (1e20, None, "100,000,000,000,000,000,000"),
        (56.789, 3, "57"),
        (math.inf, None, "inf"),
    ],
)
def test_numbers_have_three_digits(value: float, uncertainty: float | None, text: str) -> None:
    assert format_number(value, uncertainty) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (9_437_184, "9.00 MiB"),
        (182_042_624, "173.61 MiB"),
        (1024**2 - 1, "1.00 MiB"),
        (1024**2 - 6, "1,023.99 KiB"),
        (1024**3 - 1, "1.00 GiB"),
        (1024**4, "1.00 TiB"),
        (5000 * 1024**4, "5,000.00 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_bytes_are_in_binary_units_with_two_decimals(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_scores_have_four_digits_and_nan_is_a_dash() -> None:
    values = (0.98765, 1, 0, 0.0000123, 1234.5, -0.5, math.inf, math.nan)
    assert [format_score(value) for value in values] == [
        "0.9877", "1.0000", "0", "1.23e-05", "1234", "-0.5000", "inf", "–",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "batch", "1 batch"),
        (1250, "batch", "1,250 batches"),
        (0, "sample", "0 samples"),
        (2, "process", "2 processes"),
    ],
)
def test_counts_pluralize_the_noun(count: int, noun: str, text: str) -> None:
    assert pluralize(count, noun) == text


def test_names_beyond_the_most_are_counted() -> None:
    names = ["a", "b", "c"]
    assert first_names(names, 3) == "a, b, c"
    assert first_names(names, 2) == "a, b and 1 more"
    assert first_names([], 2) == ""
