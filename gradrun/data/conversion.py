"""Convert stored rows to the dtype, scale, axis order and shape of an input."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import torch

from gradrun.config.data import ArrayInput, RecordInput
from gradrun.core.errors import ConfigError

Problems = dict[int, str]
"""Row -> the reason why it cannot be converted; its values are 0."""

_MAX_PERMUTED = 6
"""Number of axes up to which all orders are tried for an error message."""


class Conversion:
    """Converts rows [n, *stored] in this order: dtype, scale, permute, shape."""

    def __init__(
        self,
        spec: ArrayInput | RecordInput,
        stored: tuple[int, ...],
        dtype: torch.dtype,
        key: str,
    ) -> None:
        """Check an input's section against the stored rows.

        Args:
            stored: shape of a stored row.

        Raises:
            ConfigError: the section does not match the stored shape, or shape would mix the axes.
        """
        self.spec, self.stored, self.key = spec, stored, key
        self._from = dtype
        self.dtype: torch.dtype = getattr(torch, spec.dtype) if spec.dtype else dtype
        if spec.scale is not None and not self.dtype.is_floating_point:
            if spec.dtype:
                raise ConfigError(
                    f"scale needs a floating-point dtype, not {spec.dtype}", f"{key}.scale"
                )
            self.dtype = torch.float32
        self._check_permute()
        permuted = tuple(stored[axis] for axis in spec.permute) if spec.permute else stored
        self.shape = permuted if spec.shape is None else spec.shape
        if math.prod(self.shape) != math.prod(stored):
            raise ConfigError(
                f"cannot reshape {math.prod(stored)} values per sample (shape {list(stored)}) to "
                f"{list(self.shape)}, which has {math.prod(self.shape)}",
                f"{key}.shape",
            )
        if spec.permute is None:
            self._check_order()

    @property
    def sample_bytes(self) -> int:
        """Size of one converted row."""
        return math.prod(self.stored) * self.dtype.itemsize

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, Problems]:
        """Return rows [n, *shape], and the rows with a value that the dtype cannot represent."""
        spec, problems = self.spec, {}
        count = len(rows)
        if rows.dtype != self.dtype:
            given, rows = rows, rows.to(self.dtype)
            wrong = _misrepresented(given, rows)
            if wrong is not None and wrong.any():
                problems = self._describe(given, wrong)
                rows[list(problems)] = 0
        if spec.scale is not None:
            rows = rows * spec.scale
        if spec.permute is not None:
            rows = rows.reshape(count, *self.stored)
            rows = rows.permute(0, *(axis + 1 for axis in spec.permute)).contiguous()
        return rows.reshape(count, *self.shape), problems

    def describe(self, *, origin: bool = True) -> str:
        """Describe the conversion in a few words; with `origin`, also the stored dtype."""
        spec = self.spec
        name = str(self.dtype).removeprefix("torch.")
        stored = str(self._from).removeprefix("torch.")
        steps = [
            f"{name} {list(self.shape)}",
            f"from {stored}" if origin and self._from != self.dtype else "",
            f"x {spec.scale:g}" if spec.scale is not None else "",
            f"axes {list(spec.permute)} of {list(self.stored)}" if spec.permute else "",
            f"reshaped from {list(self.stored)}"
            if not spec.permute and self.shape != self.stored
            else "",
        ]
        return ", ".join(step for step in steps if step)

    def _check_permute(self) -> None:
        permute = self.spec.permute
        if permute is not None and sorted(permute) != [*range(len(self.stored))]:
            raise ConfigError(
                f"a sample has the shape {list(self.stored)}, so permute must list each axis from "
                f"0 to {len(self.stored) - 1} once",
                f"{self.key}.permute",
            )

    def _check_order(self) -> None:
        """Refuse a shape that is reached by another order of the stored axes.

        A reshape to [3, 8, 8] scrambles pictures that are stored as [8, 8, 3].
        """
        permute = _meant_order(self.stored, self.shape)
        if permute is None:
            return
        moved = tuple(self.stored[axis] for axis in permute)
        also = "" if moved == self.shape else f" before shape: {list(self.shape)}"
        raise ConfigError(
            f"a sample is stored with the shape {list(self.stored)}, and a reshape to "
            f"{list(self.shape)} would mix its axes; to move the axes, set permute: "
            f"{list(permute)}{also}; to reshape nevertheless, set permute: "
            f"{[*range(len(self.stored))]}",
            f"{self.key}.shape",
        )

    def _describe(self, given: torch.Tensor, wrong: torch.Tensor) -> Problems:
        """Name the first value of each row that does not fit."""
        flat, marks = given.reshape(len(given), -1), wrong.reshape(len(wrong), -1)
        name = str(self.dtype).removeprefix("torch.")
        problems = {}
        for row in marks.any(1).nonzero().flatten().tolist():
            value = flat[row, int(marks[row].int().argmax())].item()
            text = f"{value:.9g}" if isinstance(value, float) else str(value)
            problems[row] = f"the value {text} does not fit in {name}"
        return problems


def _misrepresented(given: torch.Tensor, converted: torch.Tensor) -> torch.Tensor | None:
    """Mask of the values that a conversion changed by more than rounding; None if none can be."""
    source, target = given.dtype, converted.dtype
    if source.is_complex:
        return given.imag != 0
    if source == torch.bool or (target.is_floating_point and _holds(target, source)):
        return None
    if source.is_floating_point and source.itemsize == 1:
        given = given.float()  # torch compares no float8
    elif source in {torch.uint16, torch.uint32, torch.uint64}:
        given = given.long()  # nor these; uint64 beyond int64 becomes negative
    if target == torch.bool:
        return (given != 0) & (given != 1)
    if target.is_floating_point:
        return converted.isinf() & ~given.isinf()
    limits = torch.iinfo(target)
    if source.is_floating_point:
        inside = (given >= limits.min) & (given < float(limits.max + 1))
        return (given != given.trunc()) | ~inside
    if _holds(target, source):
        return None
    own = torch.iinfo(given.dtype)
    # Only limits within the range of the values' own dtype can be compared with them.
    low = given < max(limits.min, own.min, 0 if not source.is_signed else own.min)
    return low | (given > limits.max) if own.max > limits.max else low


def _holds(target: torch.dtype, source: torch.dtype) -> bool:
    """Whether the range of one dtype contains that of another."""
    wide = torch.finfo(target) if target.is_floating_point else torch.iinfo(target)
    own = torch.finfo(source) if source.is_floating_point else torch.iinfo(source)
    return bool(wide.min <= own.min and own.max <= wide.max)


def _meant_order(stored: Sequence[int], shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return the order of the stored axes from which `shape` follows by splits and merges.

    None if the axes are in that order already, or if there is no such order.
    """
    if len(stored) > _MAX_PERMUTED or math.prod(stored) == 0 or _is_split_or_merge(stored, shape):
        return None
    for order in itertools.permutations(range(len(stored))):
        if _is_split_or_merge([stored[axis] for axis in order], shape):
            return order
    return None


def _is_split_or_merge(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether a reshape only splits or merges neighboring axes, which keeps their meaning."""
    before_ends, after_ends = (
        {*itertools.accumulate(sizes, operator.mul)} for sizes in (before, after)
    )
    common = sorted(before_ends & after_ends)
    low = 0
    for high in common:
        splits = sum(low < end < high for end in before_ends)
        merges = sum(low < end < high for end in after_ends)
        if splits and merges:
            return False
        low = high
    return True
