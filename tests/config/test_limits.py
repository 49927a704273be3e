"""Parsing of limits."""

from __future__ import annotations

import pytest

from gradrun.config.limits import Limit, byte_limit, number_limit, percentage


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("60 MiB", 60 * 1024**2),
        ("60MiB", 60 * 1024**2),
        ("<= 1.5 GiB", 1.5 * 1024**3),
        ("1048576", 1048576),
        ("1_048_576 B", 1048576),
        ("1 MB", 1_000_000),
        ("2 kB", 2000),
        ("2 KB", 2000),
        ("0", 0),
    ],
)
def test_bytes_have_units(text, value):
    assert byte_limit(text) == Limit(value, at_least=False)


@pytest.mark.parametrize("text", ["", "60 MoB", ">= 1 MiB", "-1", "1 %", "MiB", "1 mib", "1e3e3"])
def test_an_invalid_byte_limit_raises_with_an_example(text):
    with pytest.raises(ValueError, match="60 MiB"):
        byte_limit(text)


def test_number_limits_need_a_direction():
    assert number_limit(">= 0.97") == Limit(0.97, at_least=True)
    assert number_limit("<=1e-3") == Limit(0.001, at_least=False)
    for text in ("0.97", "> 1", ">= 1 MiB", ">= x", ""):
        with pytest.raises(ValueError, match="not a limit"):
            number_limit(text)


def test_percentages_need_a_percent_sign():
    assert percentage("5%") == 0.05
    assert percentage(" 0.5 % ") == 0.005
    for text in ("5", "-5%", "0.05", "%"):
        with pytest.raises(ValueError, match="5%"):
            percentage(text)


@pytest.mark.parametrize(
    ("limit", "low", "high", "status"),
    [
        (Limit(1.05, at_least=False), 0.9, 1.05, "pass"),
        (Limit(1.05, at_least=False), 1.04, 1.06, "inconclusive"),
        (Limit(1.05, at_least=False), 1.0501, 1.06, "fail"),
        (Limit(1.0, at_least=True), 1.0, 1.2, "pass"),
        (Limit(1.0, at_least=True), 0.9, 1.2, "inconclusive"),
        (Limit(1.0, at_least=True), 0.9, 0.99, "fail"),
        (Limit(1.0, at_least=True), 0.0, float("inf"), "inconclusive"),
    ],
)
def test_status_is_inconclusive_if_the_interval_includes_the_limit(limit, low, high, status):
    assert limit.status(low, high) == status
