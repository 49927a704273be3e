"""Values of one table column to numbers: fill, then categories, then mean and std."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradrun.config.columns import ColumnSection
from gradrun.core.errors import ConfigError
from gradrun.core.units import list_names
from gradrun.data.rows import parse_number

_BOOLEANS = {"true": True, "false": False}
_NANS = {"nan", "+nan", "-nan"}
_LISTED = 6
_DIGITS = re.compile(r"[+-]?[0-9]{1,20}")


class ColumnEncoding:
    """Encodes the values of a column as `data.columns` describes it."""

    def __init__(
        self, column: str, spec: ColumnSection, parse: Callable[[Any], float], dtype: str
    ) -> None:
        """Prepare the categories.

        Args:
            parse: converts a value to a number of the input's dtype, or raises ValueError.

        Raises:
            ConfigError: the section does not match the dtype.
        """
        self.column, self.spec = column, spec
        self._parse = parse
        self._scaled = not (spec.mean is None and spec.std is None)
        key = f"data.columns.{column}"
        if self._scaled and "float" not in dtype:
            raise ConfigError(f"mean and std need a floating-point dtype, not {dtype}", key)
        categories = spec.categories or ()
        self._kind = _kind_of(categories)
        self._plain = str if categories and self._kind is str else _plain
        self._gaps = frozenset(map(self._plain, spec.gaps))
        self._indices = {_category(value, self._kind): i for i, value in enumerate(categories)}
        if spec.fill is not None:
            try:
                self(spec.fill)
            except ValueError:
                text = f"fill {spec.fill!r:.40} is not a number of type {dtype}"
                raise ConfigError(text, f"{key}.fill") from None

    def __call__(self, value: Any) -> list[float]:
        """Return the numbers of a value: one, or one per category.

        Raises:
            ValueError: the value is missing, not a number, or not one of the categories.
            TypeError: the value has another type.
        """
        spec = self.spec
        if spec.fill is not None and self.is_gap(value):
            value = spec.fill
        if spec.categories is None:
            return [self._standardized(self._parse(value))]
        index = self._index(value)
        if index is None and spec.unknown == "error":
            raise ValueError(value)
        if spec.encode == "one_hot":
            return [float(i == index) for i in range(len(spec.categories))]
        number = spec.unknown if index is None else index
        return [self._standardized(self._parse(number))]

    def numbers(self, value: Any) -> list[float]:
        """Return the numbers of a value, which may be a nested list of numbers.

        Raises:
            ValueError: as a call.
            TypeError: as a call; a list is not a category.
        """
        if isinstance(value, list) and not self._indices:
            items = np.array(value, object).ravel().tolist()
            return [number for item in items for number in self(item)]
        return self(value)

    def is_gap(self, value: Any) -> bool:
        """Return whether `fill` replaces a value."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return True
        if self._gaps and self._plain(value) in self._gaps:
            return True
        return isinstance(value, str) and (
            value == "" or (not self._indices and value.strip().lower() in _NANS)
        )

    def is_unknown(self, value: Any) -> bool:
        """Return whether `unknown` applies to a value that can be encoded."""
        replaced = self.spec.fill is not None and self.is_gap(value)
        return not replaced and self._index(value) is None

    def noted(self) -> list[Callable[[Any], bool]]:
        """Return the tests of values that `describe` counts, in its order."""
        spec = self.spec
        fills = [self._has_gap] if spec.fill is not None else []
        return fills + ([self.is_unknown] if spec.unknown != "error" else [])

    def _has_gap(self, value: Any) -> bool:
        if isinstance(value, list):
            return any(map(self._has_gap, value))
        return self.is_gap(value)

    def problem(self, value: Any) -> str:
        """Describe a value that is not one of the categories; "" for a column of numbers."""
        if not self._indices:
            return ""
        if isinstance(value, list | dict):
            return "a list or an object; categories need one value per row"
        listed = list_names([*map(str, self.spec.categories or ())], _LISTED)
        return (
            f"{value!r:.60}, not one of the categories {listed}; set unknown in "
            f"data.columns.{self.column} to accept others"
        )

    def describe(self, counts: Sequence[int | None]) -> str:
        """Describe the steps in order, with the number of rows that each of `noted` applied to."""
        spec, steps = self.spec, []
        remaining = iter(counts)
        if spec.fill is not None:
            steps.append(f"gaps filled with {spec.fill}{_so_far(next(remaining))}")
        if spec.categories is not None:
            form = spec.encode.replace("_", "-")
            steps.append(f"{form} of {len(spec.categories)} categories")
        if spec.unknown != "error":
            steps.append(f"others as {spec.unknown}{_so_far(next(remaining))}")
        if self._scaled:
            steps.append(f"standardized (mean {spec.mean or 0:g}, std {spec.std or 1:g})")
        return ", ".join(steps)

    def _standardized(self, number: float) -> float:
        if not self._scaled:
            return number
        spec = self.spec
        shifted = number if spec.mean is None else number - spec.mean
        return shifted if spec.std is None else shifted / spec.std

    def _index(self, value: Any) -> int | None:
        """Return the index of a category, or None for another one.

        Raises:
            ValueError: the value is missing.
            TypeError: the value is a list.
        """
        if isinstance(value, list | dict):
            raise TypeError(value)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(value)
        found = self._indices.get(_category(value, self._kind))
        if found is None and value == "":
            raise ValueError(value)
        return found


def _so_far(count: int | None) -> str:
    return "" if count is None else f" ({count:,} so far)"


def _kind_of(categories: Sequence[Any]) -> type:
    """Return str, float or bool: the kind of all categories."""
    first = type(categories[0]) if categories else str
    return float if first is int else first


def _category(value: Any, kind: type) -> Any:
    """Return a value in the form in which categories of a kind are compared.

    A table may store 1 as the text "1", and as 1.0 if the column has gaps.
    """
    if isinstance(value, bool) or kind is bool:
        text = str(value).lower()
        return _BOOLEANS.get(text) if kind is bool else text
    if kind is not float:
        return str(value)
    try:
        return int(value) if _DIGITS.fullmatch(str(value)) else parse_number(str(value))
    except ValueError:
        return None


def _plain(value: Any) -> str:
    """Return a value as text, so that -999, -999.0 and "-999" are the same gap."""
    try:
        number = parse_number(str(value))
    except ValueError:
        return str(value)
    return str(int(number)) if number.is_integer() else str(number)
