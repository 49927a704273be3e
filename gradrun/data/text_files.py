"""Read texts and pairs of texts: the lines of a .txt file, or fields of records."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from gradrun.config.data import TextData
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.suggest import suggest
from gradrun.data.rows import Position, Record, describe_absence, has_fixed_columns
from gradrun.data.tables import IdColumn, Table


class Text(NamedTuple):
    """One sample: a text or a pair of texts."""

    parts: tuple[str, ...]
    id: int | str
    place: str
    """"t.jsonl:12", for messages."""
    end: Position
    """The place after the text, as in Record."""
    repaired: bool = False
    """Whether halves of surrogate pairs were replaced by U+FFFD."""
    error: SampleError | None = None
    """Why the text cannot be read."""
    kept: tuple[Any, ...] = ()
    """The values of the columns that are written beside the predictions."""
    messages: tuple[tuple[str, str], ...] = ()
    """Role and content of each message of a conversation; () if the text is one of the user."""


def checked_rows(config: TextData, table: Table) -> Iterator[Record]:
    """Yield all rows of a table; check that each file has the columns of the config.

    Raises:
        ConfigError: a file cannot be read, or lacks a column.
    """
    if not table.has_columns:
        for key in ("field", "id", "labels"):
            if getattr(config, key):
                raise ConfigError("a .txt file has no columns", f"data.{key}")
    checked = -1
    for record in table.read():
        if (
            table.has_columns
            and not record.error
            and (checked < 0 or (record.end.file != checked and has_fixed_columns(record.path)))
        ):
            if not config.field:
                raise ConfigError(
                    f"{record.path.name} has columns; set the column of the text; "
                    f"{suggest('', record.fields)}",
                    "data.field",
                )
            table.check_columns(record, config.column_keys())
            checked = record.end.file
        yield record


def read_texts(
    config: TextData,
    table: Table,
    ids: IdColumn | None,
    start: Position,
    kept: Callable[[Record], tuple[Any, ...]],
) -> Generator[Text]:
    """Yield the texts of a table from `start` on, with ids from a column if there is one.

    Args:
        kept: returns the values of a row that are written beside the predictions.

    Raises:
        ConfigError: a file cannot be read.
    """
    columns = config.fields if table.has_columns else ("text",)
    for number, record in enumerate(table.read(start), start.rows):
        sample, missing = ids.of(record, number) if ids else (number, None)
        text = _text(record, columns, sample, chat=config.chat)
        yield text._replace(error=text.error or missing, kept=kept(record))


def _text(record: Record, columns: tuple[str, ...], sample: int | str, *, chat: bool) -> Text:
    place = record.place
    values = [record.fields.get(column) for column in columns]
    messages = _messages(values[0]) if chat else ()
    if messages:
        values = [messages[-1][1]]
    wrong = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
    problem = record.error
    if wrong is not None:
        value = values[wrong]
        absent = value is None and describe_absence(record, columns[wrong])
        kind = "a text or a list of {role, content}" if chat else "a text"
        found = absent or f"{json.dumps(value, default=str):.60}, not {kind}"
        problem = problem or f"{columns[wrong]!r} is {found}"
    if problem:
        error = SampleError(f"{place}  {problem}")
        return Text(("",) * len(columns), sample, place, record.end, error=error)
    texts = tuple(map(str, values))
    parts = tuple(map(_without_surrogates, texts))
    return Text(parts, sample, place, record.end, repaired=parts != texts, messages=messages)


def _messages(value: Any) -> tuple[tuple[str, str], ...]:
    """Return role and content of each message of a conversation; () for other values."""
    if not isinstance(value, list):
        return ()
    pairs = [(m.get("role"), m.get("content")) for m in value if isinstance(m, dict)]
    texts = all(isinstance(part, str) for pair in pairs for part in pair)
    if len(pairs) < len(value) or not texts:
        return ()
    return tuple((str(role), _without_surrogates(str(content))) for role, content in pairs)


def _without_surrogates(text: str) -> str:
    """Join halves of surrogate pairs, and replace single ones, as in "\\ud83d"."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
