"""Arrow arrays of values whose size differs from sample to sample, and their content."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gradrun.core.value_types import ValueType

Array = np.ndarray[Any, Any]


def values_to_arrow(arrow: Any, values: Sequence[Any], kind: ValueType) -> Any:
    """Return an arrow array of values: texts, numbers, (nested) lists or structs; None as null."""
    if kind.kind == "tensor":
        return _tensors_to_arrow(arrow, values, kind)
    if kind.kind == "text":
        values = [value and as_utf8(value) for value in values]
    return arrow.array(values, _arrow_type(arrow, kind))


def values_from_arrow(array: Any, kind: ValueType) -> list[Any]:
    """Return the values of an arrow array that `values_to_arrow` made."""
    values: list[Any] = array.to_pylist()
    if kind.kind != "tensor":
        return values
    import torch

    dtype = getattr(torch, kind.dtype)
    return [None if value is None else torch.tensor(value, dtype=dtype) for value in values]


def content_of(arrow: Any, array: Any) -> Iterator[bytes]:
    """Yield the content of an arrow array, which does not depend on its place in a larger one."""
    kind = array.type
    yield array.is_valid().to_numpy(zero_copy_only=False).tobytes()
    if arrow.types.is_null(kind):
        return
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
        lengths = array.value_lengths().fill_null(0)
        yield lengths.cast("int64").to_numpy(zero_copy_only=False).tobytes()
        yield from content_of(arrow, array.flatten())
    elif arrow.types.is_struct(kind):
        for field in array.flatten():
            yield from content_of(arrow, field)
    elif arrow.types.is_string(kind):
        for text in array.to_pylist():
            data = (text or "").encode()
            yield len(data).to_bytes(8, "little") + data
    else:
        filled = array.fill_null(False if arrow.types.is_boolean(kind) else 0)
        yield filled.to_numpy(zero_copy_only=False).tobytes()


def _tensors_to_arrow(arrow: Any, values: Sequence[Any], kind: ValueType) -> Any:
    """Return nested lists of the tensors, without a Python object per number."""
    present = [value for value in values if value is not None]
    # A tensor without elements may have been read back with fewer dimensions.
    shapes = [(*value.shape, *[0] * (kind.ndim - value.ndim)) for value in present]
    parts = [value.contiguous().numpy().reshape(-1) for value in present]
    dtype = np.dtype(kind.dtype)
    result = arrow.array(np.concatenate(parts) if parts else np.empty(0, dtype))
    for depth in range(kind.ndim - 1, 0, -1):
        lists = [math.prod(shape[:depth]) for shape in shapes]
        lengths = np.repeat([shape[depth] for shape in shapes], lists)
        result = arrow.ListArray.from_arrays(_offsets(arrow, lengths), result)
    sizes = iter([shape[0] for shape in shapes])
    rows = np.array([0 if value is None else next(sizes) for value in values], np.int64)
    missing = np.array([value is None for value in values] + [False])
    return arrow.ListArray.from_arrays(_offsets(arrow, rows, missing), result)


def _offsets(arrow: Any, lengths: Array, missing: Array | None = None) -> Any:
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return arrow.array(ends, mask=missing if missing is not None and missing.any() else None)


def _arrow_type(arrow: Any, kind: ValueType) -> Any:
    if kind.kind == "list":
        assert kind.items is not None
        return arrow.list_(_arrow_type(arrow, kind.items))
    if kind.kind == "record":
        return arrow.struct([(name, _arrow_type(arrow, k)) for name, k in kind.fields.items()])
    return getattr(arrow, _ARROW_TYPES[kind.kind])()


_ARROW_TYPES = {
    "unknown": "null",
    "boolean": "bool_",
    "integer": "int64",
    "number": "float64",
    "text": "string",
}


def as_utf8(text: str) -> str:
    """Escape halves of surrogate pairs, such as of a file name, which UTF-8 cannot encode."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
