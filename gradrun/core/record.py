"""Immutable records with JSON serialization."""

from __future__ import annotations

import json
import math
import numbers
from typing import Any, Self

import msgspec


class Record(msgspec.Struct, frozen=True):
    """Base class of records. Field types are checked when a record is read, not at construction."""

    def replace(self, **changes: Any) -> Self:
        """Return a copy with changed fields."""
        return msgspec.structs.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, recursively, as JSON types."""
        data: dict[str, Any] = msgspec.to_builtins(self, enc_hook=_to_builtin)
        return data

    def to_json(self) -> str:
        """Return indented JSON; floats round-trip bit for bit."""
        data = _encode_nonfinite(self.as_dict())
        try:
            return msgspec.json.format(msgspec.json.encode(data), indent=1).decode()
        except UnicodeEncodeError:  # for example a file name that is not UTF-8; json escapes it
            return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse the output of `to_json`.

        Raises:
            ValueError: the text is not JSON.
            msgspec.ValidationError: the data does not match the fields; names the location.
        """
        return cls.of(json.loads(text))

    @classmethod
    def of(cls, data: Any) -> Self:
        """Convert JSON data; unknown keys are ignored.

        Raises:
            msgspec.ValidationError: the data does not match the fields; names the location.
        """
        return msgspec.convert(data, cls, strict=False)


def _to_builtin(value: Any) -> int | float | str:
    """Convert a type that JSON lacks: a NumPy number, or any other value to text."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else str(value)


_NONFINITE = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}


def _encode_nonfinite(data: Any) -> Any:
    """Replace infinities and NaN, which JSON lacks, by strings that `of` converts back."""
    if isinstance(data, float):
        return data if math.isfinite(data) else _NONFINITE[str(data)]
    if isinstance(data, dict):
        return {key: _encode_nonfinite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_encode_nonfinite(value) for value in data]
    return data
