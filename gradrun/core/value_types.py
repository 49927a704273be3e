"""Types of values whose size differs from sample to sample: texts, numbers, lists, records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["unknown", "boolean", "integer", "number", "text", "list", "record", "tensor"]


class TypeMismatch(ValueError):
    """Two values have types that no type covers."""


@dataclass(frozen=True)
class ValueType:
    """The type that covers some values; a missing value (None) fits every type."""

    kind: Kind = "unknown"
    items: ValueType | None = None
    """list: the type of its items."""
    fields: Mapping[str, ValueType] = field(default_factory=dict)
    """record: the types of its fields; a value may lack some."""
    dtype: str = ""
    """tensor: its dtype, such as float32."""
    ndim: int = 0
    """tensor: its number of dimensions."""

    @property
    def scalar(self) -> bool:
        """Whether every value is one text, number or boolean."""
        return self.kind in {"unknown", "boolean", "integer", "number", "text"}

    @property
    def known(self) -> bool:
        """Whether no part of the type is unknown."""
        parts = [*self.fields.values(), *([self.items] if self.items else [])]
        return self.kind != "unknown" and all(part.known for part in parts)

    def merge(self, other: ValueType) -> ValueType:
        """Return the type that covers the values of both.

        Raises:
            TypeMismatch: there is none.
        """
        if self == other or other.kind == "unknown":
            return self
        if self.kind == "unknown":
            return other
        if {self.kind, other.kind} == {"integer", "number"}:
            return ValueType("number")
        if self.kind == other.kind == "list":
            assert self.items is not None
            assert other.items is not None
            return ValueType("list", self.items.merge(other.items))
        if self.kind == other.kind == "record":
            merged = dict(self.fields)
            for name, kind in other.fields.items():
                merged[name] = merged[name].merge(kind) if name in merged else kind
            return ValueType("record", fields=merged)
        raise TypeMismatch(f"{self} and {other}")

    def covers(self, other: ValueType) -> bool:
        """Report whether values of the other type are also of this one."""
        try:
            return self.merge(other) == self
        except TypeMismatch:
            return False

    def __str__(self) -> str:
        if self.kind == "tensor":
            return f"{self.dtype} with {self.ndim} dimension{'' if self.ndim == 1 else 's'}"
        if self.kind == "list":
            return f"list of {self.items}"
        if self.kind == "record":
            return f"{{{', '.join(f'{name}: {kind}' for name, kind in self.fields.items())}}}"
        return self.kind


_KINDS: dict[type, Kind] = {bool: "boolean", int: "integer", float: "number", str: "text"}


def type_of(value: Any) -> ValueType:
    """Return the type of a JSON value.

    Raises:
        TypeMismatch: the items of a list have different types.
    """
    if value is None:
        return ValueType()
    if kind := _KINDS.get(type(value)):
        return ValueType(kind)
    if isinstance(value, list):
        return ValueType("list", merged(map(type_of, value)))
    return ValueType("record", fields={name: type_of(item) for name, item in value.items()})


def merged(types: Iterable[ValueType]) -> ValueType:
    """Return the type that covers all types.

    Raises:
        TypeMismatch: there is none.
    """
    found = ValueType()
    for kind in types:
        found = found.merge(kind)
    return found
