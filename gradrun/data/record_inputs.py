"""The columns of one input of records as tensors: rows of one shape, or padded lists."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from gradrun.config.columns import ColumnSection
from gradrun.config.data import RecordInput
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.units import first_names
from gradrun.data.column_encoding import ColumnEncoding
from gradrun.data.conversion import Conversion, Problems
from gradrun.data.rows import Record, describe_absence, parse_boolean, parse_number

_DIGITS = re.compile(r"\s*[+-]?[0-9]+\s*")
_LISTED = 6
_EXACT = 2**53
"""Greatest whole number below which float64 has every whole number."""


class Form(NamedTuple):
    """The form of a row, by which its numbers belong to columns and axes."""

    width: int
    """Count of the numbers."""
    lists: tuple[tuple[int, tuple[int, ...]], ...]
    """Position of each column with a list of several items, and the shape of the list."""

    def fits(self, other: Form) -> bool:
        """Return whether the numbers of another row mean the same; a flat list fits nested ones."""
        if self.width != other.width or len(self.lists) != len(other.lists):
            return False
        return all(
            at == at_other
            and math.prod(shape) == math.prod(own)
            and (shape == own or 1 in {len(shape), len(own)})
            for (at, shape), (at_other, own) in zip(self.lists, other.lists, strict=True)
        )


class Converted(NamedTuple):
    """The rows of one input in a batch."""

    tensors: dict[str, torch.Tensor]
    """The input, and the lengths of its lists if they are an input."""
    problems: Problems
    nans: np.ndarray[Any, np.dtype[np.bool_]]
    """Whether each row has NaN."""
    lengths: torch.Tensor | None = None
    """The length of each row, if rows are padded to the longest."""


def open_columns(name: str, spec: RecordInput, encoded: Mapping[str, ColumnSection]) -> Columns:
    """Return the columns of an input, as rows of one shape or as lists.

    Raises:
        ConfigError: keys of the input exclude each other.
    """
    key = f"data.inputs.{name}"
    if spec.pad is None:
        if spec.lengths is not None:
            raise ConfigError("lengths needs pad, the value that fills shorter lists", key)
        return Columns(name, spec, encoded)
    if spec.shape and spec.permute:
        raise ConfigError("with pad, set either shape (of one item) or permute", f"{key}.shape")
    return ListColumns(name, spec, encoded)


class Columns:
    """The columns of one input, as rows of one shape, which `expect` decides."""

    def __init__(self, name: str, spec: RecordInput, encoded: Mapping[str, ColumnSection]) -> None:
        self.name, self.spec, self._key = name, spec, f"data.inputs.{name}"
        self.kind = np.int64 if "int" in spec.dtype else np.float64
        self._parse = _number_parser(spec.dtype)
        self.encodings = {
            name: ColumnEncoding(name, encoded[name], self._parse, spec.dtype)
            for name in spec.columns
            if name in encoded
        }
        self.sample_bytes = 0

    def observe(self, record: Record) -> None:
        """Take a row into account; call it for every row before `expect`."""

    def expect(self, form: Any) -> None:
        """Expect rows of a form that `values` returned."""
        self._form: Form = form
        axes_matter = len(self.spec.columns) == 1 and (self.spec.shape or self.spec.permute)
        stored = form.lists[0][1] if axes_matter and form.lists else (form.width,)
        self._conversion = Conversion(self.spec, stored, torch.float64, self._key)
        self.sample_bytes = self._conversion.sample_bytes

    def values(self, record: Record) -> tuple[list[float], Any]:
        """Return the columns of a record as one row of numbers, with lists flattened, and its form.

        Raises:
            SampleError: a value is missing or not a number.
        """
        row: list[float] = []
        lists: list[tuple[int, tuple[int, ...]]] = []
        for position, column in enumerate(self.spec.columns):
            value = record.fields.get(column)
            encoding = self.encodings.get(column)
            try:
                if encoding:
                    row += encoding.numbers(value)
                else:
                    row += self._flatten(value) if isinstance(value, list) else [self._parse(value)]
            except (ValueError, TypeError, OverflowError):
                problem = self._problem(record, column)
                raise SampleError(f"{record.place}  column {column!r} is {problem}") from None
            if isinstance(value, list) and math.prod(shape := _nested_shape(value)) != 1:
                lists.append((position, shape))
        return row, Form(len(row), tuple(lists))

    def _flatten(self, value: list[Any]) -> list[float]:
        nested = np.array(value, object).ravel().tolist()
        if self.kind is np.float64 and set(map(type, nested)) <= {float, int}:
            return np.array(nested, np.float64).tolist()  # type: ignore[no-any-return]
        return [self._parse(item) for item in nested]

    def _problem(self, record: Record, column: str) -> str:
        value = record.fields.get(column)
        if value is None or value == "":
            return describe_absence(record, column)
        if column in self.encodings and (problem := self.encodings[column].problem(value)):
            return problem
        if isinstance(value, list) and any(isinstance(item, list) for item in value):
            return "a list of lists of different lengths, or contains more than numbers"
        return f"{value!r:.60}, not a number of type {self.spec.dtype}"

    @property
    def names(self) -> list[str]:
        """The names of the tensors."""
        return [self.name]

    def buffer(self, rows: int) -> Any:
        """Return a sequence whose items are set to `row(...)`, for `convert`."""
        return np.zeros((rows, self._form.width), self.kind)

    def convert(self, rows: Any) -> Converted:
        """Return the tensors of a buffer; rows that were not set are zero."""
        nans = _rows_with_nan(rows)
        tensor, problems = self._conversion(torch.from_numpy(rows))
        return Converted({self.name: tensor}, problems, nans)

    def describe(self) -> str:
        return (
            f"{first_names(self.spec.columns, _LISTED)}, {self._conversion.describe(origin=False)}"
        )

    def row(self, record: Record) -> Any:
        """Return the columns of a record as one row of numbers.

        Raises:
            SampleError: a value is missing or not a number, or the row has another shape.
        """
        row, form = self.values(record)
        usual = self._form
        if form.width != usual.width:
            raise SampleError(
                f"{record.place}  {form.width} values for input {self.name!r}, but most rows have "
                f"{usual.width}; set data.inputs.{self.name}.pad to pad lists of different "
                "length"
            )
        if form != usual and (self.spec.permute or not form.fits(usual)):
            found, most = (
                ", ".join(f"{self.spec.columns[at]} {list(shape)}" for at, shape in lists) or "none"
                for lists in (form.lists, usual.lists)
            )
            raise SampleError(
                f"{record.place}  input {self.name!r} has lists of the shapes {found}, but most "
                f"rows {most}"
            )
        return row


class ListColumns(Columns):
    """Columns of lists, padded at their end to the longest list of each batch."""

    def __init__(self, name: str, spec: RecordInput, encoded: Mapping[str, ColumnSection]) -> None:
        super().__init__(name, spec, encoded)
        self._shortest, self._longest = 0, 0
        """Numbers of items of all lists that were observed, except empty ones."""
        try:
            self._parse(spec.pad)
        except ValueError:
            raise ConfigError(
                f"{spec.pad:g} is not a number of type {spec.dtype}", f"{self._key}.pad"
            ) from None

    def observe(self, record: Record) -> None:
        value = record.fields.get(self.spec.columns[0])
        if isinstance(value, list) and value:
            self._shortest = min(self._shortest or len(value), len(value))
            self._longest = max(self._longest, len(value))

    def expect(self, form: Any) -> None:
        self._item: tuple[int, ...] = form
        self.sample_bytes = self._converter(self._longest).sample_bytes

    def values(self, record: Record) -> tuple[list[float], Any]:
        """Return the numbers of a record, and the shape of one item as their form."""
        lengths = [self._length(record, column) for column in self.spec.columns]
        if len(set(lengths)) > 1:
            found = ", ".join(map(str, lengths))
            raise SampleError(
                f"{record.place}  the lists in {', '.join(self.spec.columns)} have different "
                f"lengths: {found}"
            )
        row, _ = super().values(record)
        if len(lengths) > 1:
            return row, (len(lengths),)
        return row, _nested_shape(record.fields[self.spec.columns[0]])[1:]

    def _length(self, record: Record, column: str) -> int:
        value = record.fields.get(column)
        if isinstance(value, list) and value:
            return len(value)
        absent = value is None or value == ""
        problem = describe_absence(record, column) if absent else f"{value!r:.60}, not a list"
        problem = "an empty list" if value == [] else problem
        raise SampleError(f"{record.place}  column {column!r} is {problem}")

    @property
    def names(self) -> list[str]:
        return [self.name] if self.spec.lengths is None else [self.name, self.spec.lengths]

    def buffer(self, rows: int) -> Any:
        return [None] * rows

    def row(self, record: Record) -> Any:
        """Return the lists of a record as an array [length, *item].

        Raises:
            SampleError: a column has no list of numbers, or its items have another shape.
        """
        values, item = self.values(record)
        if item != self._item:
            raise SampleError(
                f"{record.place}  an item of input {self.name!r} has the shape {list(item)}, but "
                f"those of most rows {list(self._item)}"
            )
        array = np.array(values, self.kind)
        if len(self.spec.columns) > 1:  # one column after the other
            return array.reshape(len(self.spec.columns), -1).T
        return array.reshape(-1, *item)

    def convert(self, rows: Any) -> Converted:
        lengths = [0 if row is None else len(row) for row in rows]
        shape = (len(rows), max(lengths), *self._item)
        padded = np.full(shape, self.spec.pad, self.kind)
        for target, row in zip(padded, rows, strict=True):
            if row is not None:
                target[: len(row)] = row
        tensor, problems = self._converter(max(lengths))(torch.from_numpy(padded))
        tensors, counts = {self.name: tensor}, torch.tensor(lengths)
        if self.spec.lengths is not None:
            tensors[self.spec.lengths] = counts
        return Converted(tensors, problems, _rows_with_nan(padded), counts)

    def describe(self) -> str:
        spec = self.spec
        dtype, item = spec.dtype, ", ".join(map(str, ("length", *(spec.shape or self._item))))
        scale = f", x {spec.scale:g}" if spec.scale is not None else ""
        axes = f", axes {list(spec.permute)}" if spec.permute else ""
        lengths = f"input {spec.lengths}" if spec.lengths is not None else "not passed to the model"
        return (
            f"{first_names(spec.columns, _LISTED)}, {dtype} [{item}]{scale}{axes}, lists of "
            f"{self._shortest:,} to {self._longest:,} items, padded at the end with {spec.pad:g} "
            f"to the longest of each batch; lengths: {lengths}"
        )

    def _converter(self, length: int) -> Conversion:
        """Return the conversion of lists of a length."""
        shape = None if self.spec.shape is None else (length, *self.spec.shape)
        spec = self.spec.model_copy(update={"shape": shape})
        return Conversion(spec, (length, *self._item), torch.float64, self._key)


def _rows_with_nan(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if rows.dtype.kind != "f":
        return np.zeros(len(rows), bool)
    found: np.ndarray[Any, np.dtype[np.bool_]] = np.isnan(rows).reshape(len(rows), -1).any(axis=1)
    return found


def short_number(value: Any) -> str:
    """Return a number for people, with 4 significant digits of a fraction.

    Raises:
        ValueError: it is not a number.
        TypeError: it is not a number.
    """
    return str(value) if _is_digits(value) else f"{_parse_float(value):.4g}"


def _nested_shape(value: list[Any]) -> tuple[int, ...]:
    """Return the shape of a list whose items can be parsed."""
    if not value or type(value[0]) in {int, float}:
        return (len(value),)
    return np.shape(np.array(value, object))


def _parse_float(item: Any) -> float:
    return parse_number(item) if isinstance(item, str) else float(item)


@functools.cache
def _number_parser(dtype: str) -> Callable[[Any], float]:
    """Return a parser of numbers that raises ValueError if the dtype cannot store one."""
    if "int" not in dtype:
        return parse_boolean if dtype == "bool" else _parse_float
    limits = torch.iinfo(getattr(torch, dtype))

    def integer(item: Any) -> int:
        value = int(item) if _is_digits(item) else _parse_float(item)
        exact = isinstance(value, int) or (value == int(value) and abs(value) < _EXACT)
        if not (exact and limits.min <= value <= limits.max):
            raise ValueError(item)
        return int(value)

    return integer


def _is_digits(item: Any) -> bool:
    return isinstance(item, int) or (isinstance(item, str) and bool(_DIGITS.fullmatch(item)))
