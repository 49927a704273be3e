"""Columns of a table that are carried through to the predictions (output.keep)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from gradrun.core.errors import ConfigError
from gradrun.core.suggest import suggest
from gradrun.core.value_types import TypeMismatch, ValueType, type_of
from gradrun.data.rows import Record
from gradrun.results.result import Statement

KEY = "output.keep"


class KeptColumns:
    """The values of some columns, with a type that covers those of all rows."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.types: dict[str, ValueType | None] = dict.fromkeys(names, ValueType())
        """The type of each column over the rows; None if its values have no common type."""
        self._known: set[str] = set()

    def observe(self, record: Record) -> None:
        """Take a row into account for the types; call it for every row before `types`.

        Raises:
            ConfigError: a value cannot be written.
        """
        if record.error:
            return
        self._known |= record.fields.keys()
        for name, value in zip(self.names, self.of(record), strict=True):
            kind = self.types[name]
            if kind is not None:
                try:
                    self.types[name] = kind.merge(type_of(value))
                except TypeMismatch:
                    self.types[name] = None

    def check(self) -> None:
        """Check that the rows have all columns.

        Raises:
            ConfigError: a column is in no row.
        """
        for name in self.names if self._known else ():  # empty files have another error
            if name not in self._known:
                hint = suggest(name, sorted(self._known))
                raise ConfigError(f"the data have no column {name!r}; {hint}", KEY)

    def of(self, record: Record) -> tuple[Any, ...]:
        """Return the values of a row; None where the row has none.

        Raises:
            ConfigError: a value cannot be written.
        """
        return tuple(_json(record, name, record.fields.get(name)) for name in self.names)

    def batch(self, rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the values of some rows, which `of` returned, by column."""
        if not self.names:
            return {}
        return dict(zip(self.names, map(list, zip(*rows, strict=True)), strict=True))

    def statements(self) -> Iterable[Statement]:
        """Yield the statement of the columns and their types."""
        kinds = (f"{name} ({kind or 'several types'})" for name, kind in self.types.items())
        if self.names:
            yield Statement(topic="kept columns", text=", ".join(kinds))


def _json(record: Record, name: str, value: Any) -> Any:
    """Return a value of a row as a JSON value; dates and decimals of Parquet as text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_json(record, name, item) for item in value]
    if isinstance(value, dict):
        return {str(key): _json(record, name, item) for key, item in value.items()}
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise ConfigError(
        f"{record.place}  the column {name!r} contains {type(value).__name__}, which predictions "
        "cannot; remove it from output.keep",
        KEY,
    )
