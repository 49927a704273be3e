"""Missing predictions: the values that mark them, and masks of finite rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from gradrun.output.transforms import Outputs

MISSING_CLASS = -(2**63)
"""Class number of a sample whose greatest score is NaN or infinite."""


def fill_missing(outputs: Outputs, valid: torch.Tensor | None) -> Outputs:
    """Set the rows of invalid samples to the missing value of each output's type.

    Args:
        outputs: tensors [n, ...]; not changed in place.
        valid: mask [n], false for samples without a prediction; None if all have one.
    """
    if valid is None:
        return outputs
    filled = {name: tensor.clone() for name, tensor in outputs.items()}
    for row in (~valid).nonzero().flatten().tolist():
        for tensor in filled.values():
            tensor[row].fill_(missing_value(tensor.dtype))
    return filled


def missing_value(dtype: torch.dtype) -> Any:
    """NaN for floats, false for booleans, the least integer, or the greatest if that is 0."""
    import torch

    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype == torch.bool:
        return False
    return torch.iinfo(dtype).min or torch.iinfo(dtype).max


def finite_rows(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mask [n] of the rows without NaN, infinity or MISSING_CLASS in any of the tensors [n, ...].

    Integers other than int64 and booleans are always finite.
    """
    import torch

    mask: torch.Tensor | None = None
    for tensor in tensors:
        if tensor.dtype == torch.int64:
            finite = tensor != MISSING_CLASS
        elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            finite = is_finite(tensor)
        else:
            finite = torch.ones(len(tensor), dtype=torch.bool)
        rows = finite.reshape(len(finite), -1).all(1)
        mask = rows if mask is None else mask & rows
    return torch.ones(0, dtype=torch.bool) if mask is None else mask


def count_nonfinite(tensors: Iterable[torch.Tensor], valid: torch.Tensor | None = None) -> int:
    """Number of rows that are not finite, among the valid ones."""
    nonfinite = ~finite_rows(tensors)
    return int((nonfinite if valid is None else nonfinite & valid).sum())


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise; also for float8, which lacks isfinite."""
    return (tensor if tensor.element_size() > 1 else tensor.float()).isfinite()
