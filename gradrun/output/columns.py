"""Columns of predictions: one tensor for all samples, or one value of any size per sample."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradrun.core.value_types import TypeMismatch, ValueType, merged, type_of

if TYPE_CHECKING:
    import torch

_OBJECT_BYTES = 64
"""Estimated size of a value in memory besides its content."""


class ValueColumn:
    """One value per sample: a CPU tensor of any shape, a text or another JSON value.

    None marks a missing value. The values are not shared with the model.
    """

    def __init__(self, values: Iterable[Any], declared: ValueType | None = None) -> None:
        """Store one value per sample; `declared` is a type that covers other batches too."""
        self.values = list(values)
        self._declared = declared

    @property
    def type(self) -> ValueType:
        """The declared type, or the one that covers the values.

        Raises:
            TypeMismatch: no type covers them.
        """
        return self._declared or merged(map(_value_type, self.values))

    @property
    def has_integers(self) -> bool:
        """Whether the values are tensors of integers."""
        tensor = next((value for value in self.values if not _is_json(value)), None)
        if tensor is None:
            return False
        return not (tensor.is_floating_point() or str(tensor.dtype) == "torch.bool")

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the numbers in each value, padded with 0 to [n, most], and their counts [n].

        A text becomes the numbers of its characters.
        """
        import torch

        rows = [
            [number for leaf in _leaves(value) for number in _numbers(leaf)]
            for value in self.values
        ]
        counts = torch.tensor([len(row) for row in rows])
        most = max(map(len, rows), default=0)
        padded = [row + [0.0] * (most - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.float64).reshape(len(rows), most), counts

    @property
    def nbytes(self) -> int:
        """Size of the values in memory."""
        return sum(map(value_bytes, self.values))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> ValueColumn:
        """Select rows by a slice, a list of positions or a tensor (positions or a mask)."""
        if isinstance(index, slice):
            return ValueColumn(self.values[index], self._declared)
        if not isinstance(index, list):
            index = index.tolist()
            if index and isinstance(index[0], bool):
                return ValueColumn(itertools.compress(self.values, index), self._declared)
        return ValueColumn([self.values[i] for i in index], self._declared)

    def __setitem__(self, index: slice, rows: ValueColumn) -> None:
        self.values[index] = rows.values

    def replaced(self, values: Iterable[Any]) -> ValueColumn:
        """Return a column with the same declared type and other values."""
        return ValueColumn(values, self._declared)

    def clone(self) -> ValueColumn:
        """Return a column with the same values, which never change."""
        return self[:]

    def tolist(self) -> list[Any]:
        """Return the values as JSON values; a tensor as nested lists."""
        return [value if _is_json(value) else value.tolist() for value in self.values]

    def finite(self) -> list[bool]:
        """Report for each value whether it is free of NaN and infinity."""
        return [all(map(_is_finite, _leaves(value))) for value in self.values]

    def checksum(self, crc: int) -> int:
        """Return the CRC-32 of the values, and of whatever came before."""
        for value in self.values:
            if _is_json(value):
                crc = zlib.crc32(json.dumps(value).encode(), crc)
            else:
                crc = zlib.crc32(f"{value.dtype} {list(value.shape)}".encode(), crc)
                crc = zlib.crc32(json.dumps(value.tolist()).encode(), crc)
        return crc


if TYPE_CHECKING:
    Column = torch.Tensor | ValueColumn
    """A tensor [n, ...] on the CPU without a gradient, or n values."""


def blank(column: Column, rows: int) -> Column:
    """Return a column of the same layout for `rows` samples: zeros, or missing values."""
    import torch

    if isinstance(column, ValueColumn):
        return ValueColumn([None] * rows, column._declared)
    return torch.zeros((rows, *column.shape[1:]), dtype=column.dtype)


def join(columns: Sequence[Column]) -> Column:
    """Concatenate columns of one layout."""
    import torch

    first = columns[0]
    if isinstance(first, ValueColumn):
        parts = [column.values for column in columns if isinstance(column, ValueColumn)]
        return first.replaced(itertools.chain.from_iterable(parts))
    return torch.cat([column for column in columns if not isinstance(column, ValueColumn)])


def tensors_of(outputs: Mapping[str, Column]) -> dict[str, torch.Tensor]:
    """Return the columns that are tensors."""
    return {name: c for name, c in outputs.items() if not isinstance(c, ValueColumn)}


def as_tensors(outputs: Mapping[str, Column]) -> dict[str, torch.Tensor]:
    """Return columns as tensors; values become two, their numbers and how many there are."""
    tensors: dict[str, torch.Tensor] = {}
    for name, column in outputs.items():
        if isinstance(column, ValueColumn):
            tensors[name], tensors[f"{name} (count)"] = column.padded()
        else:
            tensors[name] = column
    return tensors


def check_storable(outputs: Mapping[str, Column], form: str) -> None:
    """Check that a format with a column of ids and without complex numbers can store outputs.

    Raises:
        ValueError: it cannot.
    """
    if "id" in outputs:
        raise ValueError("the output name 'id' is reserved for sample ids; use format: npy")
    if any(tensor.is_complex() for tensor in tensors_of(outputs).values()):
        raise ValueError(f"{form} has no complex numbers; use format: npy")


def layout(column: Column) -> Hashable:
    """Return what columns that can be joined have in common: dtype and row shape, or nothing."""
    return "values" if isinstance(column, ValueColumn) else (column.dtype, column.shape[1:])


def close(one: Column, other: Column, tolerance: float) -> bool:
    """Report whether columns are equal, or tensors within a relative and absolute tolerance."""
    import torch

    if isinstance(one, ValueColumn) or isinstance(other, ValueColumn):
        same = isinstance(one, ValueColumn) and isinstance(other, ValueColumn)
        return same and one.checksum(0) == other.checksum(0)  # type: ignore[union-attr]
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def values_of(column: Column) -> Sequence[Any]:
    """Return the value of each sample: those of a column of values, or the rows of a tensor."""
    return column.values if isinstance(column, ValueColumn) else column.unbind()


def layout_error(subject: str, first: Column, column: Column) -> ValueError:
    """Return the error for a batch of an output that cannot follow the first one in a file."""
    return ValueError(
        f"{subject} has {describe(first)}, but the next batch has {describe(column)}; use "
        "format: jsonl for rows of any shape, or output.transform: mean_pool or cls for one "
        "row per sequence"
    )


def describe(column: Column) -> str:
    """Describe the rows of a column in a few words."""
    if isinstance(column, ValueColumn):
        return "values of any shape"
    return f"{column.dtype} rows of shape {list(column.shape[1:])}"


def describe_values(column: ValueColumn) -> str:
    """Describe the type of values in a few words."""
    try:
        return str(column.type)
    except TypeMismatch as error:
        return f"of several types: {error}"


def row_bytes(columns: Mapping[str, Column]) -> int:
    """Return the size of a sample in memory; that of the largest, where samples differ."""
    return sum(
        max(map(value_bytes, column.values), default=0)
        if isinstance(column, ValueColumn)
        else column[:1].nbytes
        for column in columns.values()
    )


def value_bytes(value: Any) -> int:
    """Return the size of one value in memory."""
    if not _is_json(value):
        return int(value.nbytes) + _OBJECT_BYTES
    if isinstance(value, str):
        return len(value) + _OBJECT_BYTES
    if isinstance(value, list | dict):
        items = value.values() if isinstance(value, dict) else value
        return sum(map(value_bytes, items)) + _OBJECT_BYTES
    return 8


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | list | dict)


def _value_type(value: Any) -> ValueType:
    if _is_json(value):
        return type_of(value)
    dtype = str(value.dtype).removeprefix("torch.")
    return ValueType("tensor", dtype=dtype, ndim=value.ndim)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _numbers(leaf: Any) -> list[float]:
    if isinstance(leaf, str):
        return [float(ord(character)) for character in leaf]
    if _is_json(leaf):
        return [math.nan if leaf is None else float(leaf)]
    numbers: list[float] = leaf.reshape(-1).double().tolist()
    return numbers


def _is_finite(leaf: Any) -> bool:
    if isinstance(leaf, float):
        return math.isfinite(leaf)
    if _is_json(leaf) or not leaf.is_floating_point():
        return True
    return bool((leaf if leaf.element_size() > 1 else leaf.float()).isfinite().all())
