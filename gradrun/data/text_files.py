"""Read texts and pairs of texts: the lines of a .txt file, or fields of records."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from gradrun.config.data import TextData
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.suggest import suggest
from gradrun.data.tables import (
    BEGINNING,
    TABLE_SUFFIXES,
    IdColumn,
    Position,
    Record,
    check_columns,
    describe_absence,
    read_lines,
    read_table,
    table_suffix,
)

REPLACEMENT = "\ufffd"


class Text(NamedTuple):
    """One sample: a text or a pair of texts."""

    parts: tuple[str, ...]
    id: int | str
    place: str
    """"t.jsonl:12", for messages."""
    end: Position | None = None
    """The place after the text, as in Record."""
    repaired: bool = False
    """Whether halves of surrogate pairs were replaced by U+FFFD."""
    error: SampleError | None = None
    """Why the text cannot be read."""


def read_texts(
    config: TextData, ids: IdColumn | None, start: Position = BEGINNING
) -> Generator[Text]:
    """Yield the texts of a file from `start` on, with ids from a column if there is one.

    Raises:
        ConfigError: the file cannot be read, or lacks a column.
    """
    path = config.path
    if path.suffix.lower() == ".txt":
        yield from _lines(config, start)
    elif table_suffix(path):
        yield from _fields(config, ids, start)
    else:
        raise ConfigError(
            f"{path.name} is not a text file; allowed: .txt, {', '.join(TABLE_SUFFIXES)}",
            "data.path",
        )


def _lines(config: TextData, start: Position) -> Iterator[Text]:
    for key in ("field", "id", "labels"):
        if getattr(config, key):
            raise ConfigError("a .txt file has no columns", f"data.{key}")
    for number, record in enumerate(read_lines(config.path, start), start.rows):
        yield _text(config.path, record, ("text",), number)


def _fields(config: TextData, ids: IdColumn | None, start: Position) -> Iterator[Text]:
    path = config.path
    columns = (config.field,) if isinstance(config.field, str) else config.field or ()
    checked = False
    for number, record in enumerate(read_table(path, start), start.rows):
        if not checked and not record.error:
            _check_columns(config, columns, record)
            checked = True
        try:
            sample = ids.of(record) if ids else number
        except SampleError as error:
            text = _text(path, record, columns, f"row {number}")
            yield text._replace(error=text.error or error)
        else:
            yield _text(path, record, columns, sample)


def _text(path: Path, record: Record, columns: tuple[str, ...], sample: int | str) -> Text:
    place = f"{path}:{record.line}"
    values = [record.fields.get(column) for column in columns]
    wrong = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
    problem = record.error
    if wrong is not None:
        value = values[wrong]
        absent = value is None and describe_absence(path, record, columns[wrong])
        found = absent or f"{json.dumps(value, default=str):.60}, not a text"
        problem = problem or f"{columns[wrong]!r} is {found}"
    if problem:
        error = SampleError(f"{place}  {problem}")
        return Text(("",) * len(columns), sample, place, record.end, error=error)
    texts = tuple(map(str, values))
    parts = tuple(map(_without_surrogates, texts))
    return Text(parts, sample, place, record.end, repaired=parts != texts)


def _without_surrogates(text: str) -> str:
    """Join halves of surrogate pairs, and replace single ones, as in "\\ud83d"."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _check_columns(config: TextData, columns: tuple[str, ...], record: Record) -> None:
    if not columns:
        raise ConfigError(
            f"{config.path.name} has columns; set the column of the text; "
            f"{suggest('', record.fields)}",
            "data.field",
        )
    named = [("field", column) for column in columns]
    named += [(key, column) for key in ("id", "labels") if (column := getattr(config, key))]
    check_columns(config.path, record, ((f"data.{key}", column) for key, column in named))
