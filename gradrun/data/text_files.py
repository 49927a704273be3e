"""Read texts and pairs of texts: the lines of a .txt file, or fields of records."""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

from gradrun.config.data import TextData
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.suggest import suggest
from gradrun.data.records import READERS

REPLACEMENT = "\ufffd"


class Text(NamedTuple):
    """One sample: a text or a pair of texts."""

    parts: tuple[str, ...]
    id: int | str
    place: str
    """"t.jsonl:12", for messages."""
    repaired: bool = False
    """Whether halves of surrogate pairs were replaced by U+FFFD."""
    error: SampleError | None = None
    """Why the text cannot be read."""


def read_texts(config: TextData) -> Generator[Text]:
    """Yield the texts of a file in order.

    Raises:
        ConfigError: the file cannot be read, or lacks a column.
    """
    path = config.path
    try:
        if path.suffix == ".txt":
            yield from _lines(config)
        elif path.suffix in READERS:
            yield from _fields(config)
        else:
            raise ConfigError(
                f"{path.name} is not a text file; allowed: .txt, {', '.join(READERS)}",
                "data.path",
            )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "data.path") from error


def _lines(config: TextData) -> Iterator[Text]:
    path = config.path
    for key in ("field", "id", "labels"):
        if getattr(config, key):
            raise ConfigError("a .txt file has no columns", f"data.{key}")
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file):
            yield Text((line.rstrip("\n"),), number, f"{path}:{number + 1}")


def _fields(config: TextData) -> Iterator[Text]:
    path, id_column = config.path, config.id
    columns = (config.field,) if isinstance(config.field, str) else config.field or ()
    for number, (line, fields) in enumerate(READERS[path.suffix](path)):
        if number == 0:
            _check_columns(config, columns, fields)
        place = f"{path}:{line}"
        if id_column is None:
            sample: int | str = number
        elif fields.get(id_column) is None:
            raise ConfigError(f"{place}  the id {id_column!r} is missing")
        else:
            sample = str(fields[id_column])
        yield _text([fields.get(column) for column in columns], columns, sample, place)


def _text(values: list[Any], columns: tuple[str, ...], sample: int | str, place: str) -> Text:
    for column, value in zip(columns, values, strict=True):
        if not isinstance(value, str):
            error = SampleError(f"{place}  {column!r} is {value!r:.60}, not a text")
            return Text(("",) * len(columns), sample, place, error=error)
    parts = tuple(map(_without_surrogates, values))
    return Text(parts, sample, place, repaired=parts != tuple(values))


def _without_surrogates(text: str) -> str:
    """Join halves of surrogate pairs, and replace single ones, as in "\\ud83d"."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _check_columns(config: TextData, columns: tuple[str, ...], fields: dict[str, Any]) -> None:
    name = config.path.name
    if not columns:
        hint = suggest("", fields)
        raise ConfigError(f"{name} has columns; set the column of the text; {hint}", "data.field")
    named = [("field", column) for column in columns]
    named += [(key, column) for key in ("id", "labels") if (column := getattr(config, key))]
    for key, column in named:
        if column not in fields:
            hint = suggest(column, fields)
            raise ConfigError(f"{name} has no column {column!r}; {hint}", f"data.{key}")
