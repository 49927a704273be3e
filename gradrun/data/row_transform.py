"""Rows of a table after a function of the user, which has consented to run it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from gradrun.config.model import ModelConfig, PythonModel
from gradrun.core.errors import ConfigError
from gradrun.core.imports import describe_user_error, import_target, target_root
from gradrun.core.suggest import suggest
from gradrun.data.rows import BEGINNING, Position, Record
from gradrun.data.tables import RowIndex, Table
from gradrun.results.result import Statement

_KEY = "data.transform"


class TransformedTable(Table):
    """A table whose rows are the results of a function of rows.

    The function gets a row as a dict, and returns a dict. It runs at least twice for each row: when
    the rows are counted and when they are read.
    """

    def __init__(self, table: Table, target: str, model: ModelConfig | None) -> None:
        """Import the function.

        Raises:
            ConfigError: it cannot be imported, or the rows have no columns.
        """
        if not table.has_columns:
            raise ConfigError("a .txt file has no columns to transform", _KEY)
        beside = {target_root(model.target, model.root)} if isinstance(model, PythonModel) else ()
        function = import_target(target, None, _KEY, beside=beside)
        if not callable(function):
            raise ConfigError(f"{target} is not a function of a row", _KEY)
        self._table, self._function = table, function
        self._name = f"{Path(target.rpartition(':')[0]).name}:{target.rpartition(':')[2]}"
        self.suffix, self.has_columns, self.files = table.suffix, True, table.files

    def class_names(self, column: str) -> tuple[str, ...]:
        return self._table.class_names(column)

    def read(self, start: Position = BEGINNING) -> Generator[Record]:
        for record in self._table.read(start):
            yield record if record.error else self._transformed(record)

    def describe(self, index: RowIndex) -> Iterator[Statement]:
        yield from self._table.describe(index)
        yield Statement(
            topic="transform", text=f"every row by {self._name}, before all other steps"
        )

    def describe_order(self, ids: str) -> Statement:
        return self._table.describe_order(ids)

    def check_columns(self, record: Record, columns: Iterable[tuple[str, str]]) -> None:
        for key, column in columns:
            if column not in record.fields:
                hint = suggest(column, map(str, record.fields))
                raise ConfigError(
                    f"the rows of {self._name} have no column {column!r}; {hint}", key
                )

    def _transformed(self, record: Record) -> Record:
        function: Callable[[dict[str, Any]], Any] = self._function
        try:
            fields = function(dict(record.fields))
        except Exception as error:  # the user's code may raise anything
            problem = f"{self._name} failed: {describe_user_error(error)}"
            return record._replace(fields={}, error=problem)
        if not isinstance(fields, dict):
            problem = f"{self._name} returned {type(fields).__name__}, not a dict"
            return record._replace(fields={}, error=problem)
        return record._replace(fields=fields)
