"""Arrays in memory, passed by Python code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gradrun.config.objects import ObjectArrays
from gradrun.core.errors import ConfigError
from gradrun.core.units import pluralize
from gradrun.data.source import BatchSource, ChunkedSource, OpeningFacts

_KEY = "data"


def open_data(config: ObjectArrays, facts: OpeningFacts) -> BatchSource:
    """Open arrays as inputs of the model: one, several by position, or several by name."""
    inputs, positional = read_inputs(config)
    readers = {name: _TensorReader(rows, config.name) for name, rows in inputs.items()}
    labels = None if config.labels is None else _TensorReader(read_labels(config), "labels")
    call = "positional" if positional else config.call
    return ChunkedSource(readers, config.batch_size, call, labels, config.classes or ())


def read_inputs(config: ObjectArrays) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the inputs by name, each [samples, ...], and whether they have only positions.

    Raises:
        ConfigError: one of them is not an array of numbers.
    """
    value = config.value
    positional = isinstance(value, tuple)
    if positional:
        value = {f"input{number}": part for number, part in enumerate(value, 1)}
    inputs = value if isinstance(value, Mapping) else {"input": value}
    if not inputs:
        raise ConfigError("data has no arrays", _KEY)
    return {
        str(name): _rows(array, str(name), config.floats) for name, array in inputs.items()
    }, positional


def read_labels(config: ObjectArrays) -> torch.Tensor:
    """Return the labels [samples, ...].

    Raises:
        ConfigError: they are not numbers.
    """
    return _rows(config.labels, "labels", "float64")


def is_frame(value: Any) -> bool:
    """Return whether a value is a DataFrame of pandas, without importing pandas."""
    return type(value).__name__ == "DataFrame" and hasattr(value, "iloc")


class _TensorReader:
    """Reads rows of a tensor."""

    def __init__(self, rows: torch.Tensor, origin: str) -> None:
        self._rows, self._origin = rows, origin
        self.samples = len(rows)
        self.sample_bytes = rows[:1].nbytes or rows.element_size()

    def chunk(self, start: int, stop: int) -> tuple[torch.Tensor, Mapping[int, str]]:
        # A copy, because a model may write to its input.
        return self._rows[start:stop].clone(), {}

    def describe(self) -> str:
        dtype = str(self._rows.dtype).removeprefix("torch.")
        return f"{dtype} {list(self._rows.shape[1:])}, in memory ({self._origin})"


def _rows(value: Any, name: str, floats: str) -> torch.Tensor:
    """Return an array, tensor, list of numbers or table of numbers as a tensor."""
    if isinstance(value, torch.Tensor):
        rows = value.detach()
    else:
        rows = _array_rows(_frame_rows(value) if is_frame(value) else value, name, floats)
    if rows.ndim == 0:
        raise ConfigError(f"{name} is a single number, not one row per sample", _KEY)
    return rows


def _array_rows(value: Any, name: str, floats: str) -> torch.Tensor:
    try:
        array = np.asarray(value)
    except Exception as error:  # ragged lists; other libraries raise types of their own
        raise ConfigError(
            f"{name} is a {type(value).__name__} that is not an array of numbers: {error}", _KEY
        ) from error
    if array.dtype.kind not in "biuf":
        raise ConfigError(
            f"{name} is an array of {array.dtype}, not of numbers; pass numbers, a list of texts, "
            "or a Dataset",
            _KEY,
        )
    if np.ma.is_masked(value):
        text = f"{name} is an array with masked values; fill them first, for example with filled(0)"
        raise ConfigError(text, _KEY)
    # torch computes in float32 unless asked otherwise, NumPy and Python in float64.
    dtype = np.dtype(floats) if array.dtype == np.float64 else array.dtype.newbyteorder("=")
    try:
        with np.errstate(over="raise"):
            # torch warns of memory that is read-only.
            return torch.from_numpy(array.astype(dtype, copy=not array.flags.writeable))
    except FloatingPointError as error:
        text = f"{name} has values that do not fit in {floats}"
        raise ConfigError(text, _KEY) from error
    except TypeError as error:
        text = f"{name} is an array of {array.dtype}, which torch lacks"
        raise ConfigError(text, _KEY) from error


def _frame_rows(frame: Any) -> np.ndarray[Any, Any]:
    """Return the columns of a table as rows [n, columns]."""
    other = [str(name) for name, dtype in frame.dtypes.items() if dtype.kind not in "biuf"]
    if other:
        raise ConfigError(
            f"column {other[0]!r} is not numeric; pass numeric columns, such as "
            "frame[['a', 'b']], or one column of texts",
            _KEY,
        )
    missing = frame.isna().sum()
    if missing.any():
        raise ConfigError(
            f"column {str(missing.idxmax())!r} has {pluralize(int(missing.max()), 'missing value')}"
            "; fill or drop them first",
            _KEY,
        )
    rows: np.ndarray[Any, Any] = frame.to_numpy(dtype=np.float64)
    return rows
