"""Missing predictions: the values that mark them, and masks of finite rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gradrun.output.columns import ValueColumn
from gradrun.output.kept_columns import is_kept

if TYPE_CHECKING:
    import torch

    from gradrun.output.columns import Column
    from gradrun.output.transforms import Outputs

MISSING_CLASS = -(2**63)
"""Class number of a sample whose greatest score is NaN or infinite."""


def fill_missing(outputs: Outputs, valid: torch.Tensor | None) -> Outputs:
    """Set the rows of invalid samples to the missing value of each output's type, or to None.

    The columns are not changed in place. `valid` is a mask [n]; None if all samples are valid.
    """
    if valid is None:
        return outputs
    filled = {name: column.clone() for name, column in outputs.items()}
    predicted = [column for name, column in filled.items() if not is_kept(name)]
    for row in (~valid).nonzero().flatten().tolist():
        for column in predicted:
            if isinstance(column, ValueColumn):
                column.values[row] = None
            else:
                column[row].fill_(missing_value(column.dtype))
    return filled


def missing_value(dtype: torch.dtype) -> Any:
    """NaN for floats, false for booleans, the least integer, or the greatest if that is 0."""
    import torch

    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype == torch.bool:
        return False
    return torch.iinfo(dtype).min or torch.iinfo(dtype).max


def finite_rows(columns: Iterable[Column]) -> torch.Tensor:
    """Mask [n] of the rows without NaN, infinity or MISSING_CLASS in any of the columns.

    Integers other than int64 and booleans are always finite.
    """
    import torch

    mask: torch.Tensor | None = None
    for tensor in columns:
        if isinstance(tensor, ValueColumn):
            finite = torch.tensor(tensor.finite(), dtype=torch.bool)
        elif tensor.dtype == torch.int64:
            finite = tensor != MISSING_CLASS
        elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            finite = is_finite(tensor)
        else:
            finite = torch.ones(len(tensor), dtype=torch.bool)
        rows = finite.reshape(len(finite), -1).all(1)
        mask = rows if mask is None else mask & rows
    return torch.ones(0, dtype=torch.bool) if mask is None else mask


def count_nonfinite(outputs: Outputs, valid: torch.Tensor | None = None) -> int:
    """Number of rows that are not finite, among the valid ones; kept columns do not count."""
    nonfinite = ~finite_rows(column for name, column in outputs.items() if not is_kept(name))
    return int((nonfinite if valid is None else nonfinite & valid).sum())


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise; also for float8, which lacks isfinite."""
    return (tensor if tensor.element_size() > 1 else tensor.float()).isfinite()
