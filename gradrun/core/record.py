"""Plain frozen records that go to JSON and come back: the base of results and of messages.

Knows no field of theirs, and no file.
"""

from __future__ import annotations

import json
import math
import numbers
from typing import Any, Self

import msgspec


class Record(msgspec.Struct, frozen=True):
    """A record of figures and words, whose types are held when it is read, not when it is made."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Its fields by name, and so on inwards, in the types that JSON has."""
        told: dict[str, Any] = msgspec.to_builtins(self, enc_hook=_plain)
        return told

    def to_json(self) -> str:
        """Indented JSON, in which every float comes back bit for bit."""
        told = _spelled(self.as_dict())
        try:
            return msgspec.json.format(msgspec.json.encode(told), indent=1).decode()
        except UnicodeEncodeError:  # a file name that is no UTF-8, say: JSON can escape it
            return json.dumps(told, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What `to_json` made.

        Raises:
            ValueError: it is no JSON.
            msgspec.ValidationError: it is no such record; the text says where and why.
        """
        return cls.of(json.loads(text))

    @classmethod
    def of(cls, told: Any) -> Self:
        """From what JSON holds; keys that it does not know are passed over.

        Raises:
            msgspec.ValidationError: as for `from_json`.
        """
        return msgspec.convert(told, cls, strict=False)


def _plain(value: Any) -> int | float | str:
    """What is no type of JSON's: a figure of numpy's, or else its words."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else str(value)


_WORDS = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}


def _spelled(told: Any) -> Any:
    """JSON has no infinity and no NaN: they are words, which `of` reads as the numbers again."""
    if isinstance(told, float):
        return told if math.isfinite(told) else _WORDS[str(told)]
    if isinstance(told, dict):
        return {key: _spelled(value) for key, value in told.items()}
    if isinstance(told, list | tuple):
        return [_spelled(value) for value in told]
    return told
