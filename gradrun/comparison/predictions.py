"""Compare the predictions that two runs have written, value by value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gradrun.output.formats import FORMATS

_NUMBER = object()
"""Stands for a number in the rest of a value."""

_CHUNK = 1024
"""Samples that are compared at once."""


def compare_predictions(
    folders: tuple[Path, Path], form: str, *, rtol: float, atol: float
) -> tuple[bool, float, bool]:
    """Compare the predictions of two runs of one format.

    Returns:
        Whether all numbers are the same, their greatest difference, and whether it is within the
        tolerance; the difference is infinite if texts, or the number of values of a sample, differ.
    """
    greatest, equal = 0.0, True
    for one, other in zip_longest(*(_rows(folder, form) for folder in folders)):
        if one is None or other is None or one.other != other.other:
            return False, math.inf, False
        if not same_values(one.numbers, other.numbers).all():
            greatest = max(greatest, float(distances(one.numbers, other.numbers).max()))
            close = torch.allclose(one.numbers, other.numbers, rtol=rtol, atol=atol, equal_nan=True)
            equal &= close
    return not greatest, greatest, equal


def same_values(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Compare elementwise; NaN equals NaN."""
    return (one == other) | (one.isnan() & other.isnan())


def distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the absolute differences of values; infinite where one of them is NaN."""
    # Equal infinities do not differ, although inf - inf is NaN.
    gaps = (one - other).abs().masked_fill(same_values(one, other), 0.0)
    return gaps.nan_to_num(nan=math.inf, posinf=math.inf)


class _Rows(NamedTuple):
    """Predictions of some samples, divided into numbers and the rest."""

    numbers: torch.Tensor
    other: Any
    """Texts, names, and the number of values in each list."""


def _rows(folder: Path, form: str) -> Iterator[_Rows]:
    """Yield the predictions of a run, some samples at a time."""
    records = FORMATS[form].records
    if records is None:
        for positions, columns in FORMATS[form].read(folder, ()):
            shapes = [(name, rows.shape, rows.dtype) for name, rows in columns.items()]
            tensors = map(torch.from_numpy, columns.values())
            real = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
            numbers = torch.cat([tensor.flatten().double() for tensor in real])
            yield _Rows(numbers, [positions.tolist(), shapes])
        return
    rows = records(folder)
    while chunk := [*islice(rows, _CHUNK)]:
        leaves: list[float] = []
        other = take_numbers(chunk, leaves)
        yield _Rows(torch.tensor(leaves, dtype=torch.float64), other)


def take_numbers(value: Any, numbers: list[float], kinds: tuple[type, ...] = (float, int)) -> Any:
    """Move the numbers of a value to a list; returns the value with a mark in their place.

    Args:
        kinds: types of numbers; others stay.
    """
    if isinstance(value, dict):
        return {key: take_numbers(item, numbers, kinds) for key, item in value.items()}
    if isinstance(value, list):
        return [take_numbers(item, numbers, kinds) for item in value]
    if isinstance(value, kinds):
        numbers.append(value)  # type: ignore[arg-type]
        return _NUMBER
    return value
