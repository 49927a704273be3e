"""Missing values of each dtype, and masks of finite rows."""

from __future__ import annotations

import math

import pytest
import torch

from gradrun.output.missing import MISSING_CLASS, count_nonfinite, fill_missing, finite_rows

VALID = torch.tensor([True, False, True])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "complex64"])
def test_a_missing_float_is_nan(dtype: str) -> None:
    rows = torch.ones(3, 2).to(getattr(torch, dtype))
    filled = fill_missing({"a": rows}, VALID)["a"]
    assert filled.to(torch.complex64).isnan().any(1).tolist() == [False, True, False]
    assert filled.dtype == rows.dtype


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("int64", MISSING_CLASS), ("int8", -128), ("uint8", 255), ("bool", False)],
)
def test_a_missing_integer_is_the_least_or_the_greatest(dtype: str, value: int) -> None:
    rows = torch.ones(3).to(getattr(torch, dtype))
    filled = fill_missing({"a": rows}, VALID)["a"]
    assert filled.tolist() == [1, value, 1]
    assert rows.tolist() == [1, 1, 1], "the outputs of the model are not changed"


def test_without_a_mask_nothing_is_filled() -> None:
    outputs = {"a": torch.ones(3)}
    assert fill_missing(outputs, None) is outputs


def test_a_row_is_finite_if_all_outputs_are() -> None:
    columns = [
        torch.tensor([[1.0, 2.0], [math.nan, 1.0], [1.0, 1.0], [math.inf, 1.0]]),
        torch.tensor([0, 0, MISSING_CLASS, 0]),
        torch.tensor([-128, -128, -128, -128], dtype=torch.int8),
    ]
    outputs = dict(zip("abc", columns, strict=True))
    assert finite_rows(columns).tolist() == [True, False, False, False]
    assert count_nonfinite(outputs) == 3
    assert count_nonfinite(outputs, torch.tensor([True, False, True, True])) == 2
