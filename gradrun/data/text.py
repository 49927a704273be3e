"""Tokenized texts: the lines of a .txt file, or one field of a file of records."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch

from gradrun.config.data import TextData
from gradrun.config.model import ModelConfig
from gradrun.core.errors import ConfigError
from gradrun.core.optional import hub_errors, import_transformers
from gradrun.core.suggest import suggest
from gradrun.data.batch import Batch
from gradrun.data.records import READERS, read_labels
from gradrun.data.source import BatchSource, InputBatcher
from gradrun.results.result import Padding, Statement

CHUNK_BATCHES = 16
"""Batches that are tokenized, and ordered by length, together."""

_MIN_SAVING = 0.1
"""group_by_length: auto groups texts if this saves at least this share of the tokens."""

_CACHED_ORDERS = 8
_NO_LIMIT = 1_000_000
"""Tokenizers without a maximum length report 1e30."""


class _Text(NamedTuple):
    text: str
    id: int | str


class _Chunk(NamedTuple):
    """The tokens of some texts, in the order in which they are run."""

    tokens: dict[str, list[list[int]]]
    ids: Sequence[int | str]
    order: Sequence[int]
    """Position in the chunk of each text that is run."""

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.tokens["input_ids"]]


def open_data(config: TextData, seed: int, model: ModelConfig | None) -> BatchSource:
    """Count the texts of a file and tokenize the first chunk, which decides on grouping."""
    return Texts(config, _load_tokenizer(config, model))


class Texts:
    """A LengthGrouped source of texts."""

    def __init__(self, config: TextData, tokenizer: Any) -> None:
        self.config, self.tokenizer, self.classes = config, tokenizer, config.classes
        self.batch_size = config.batch_size
        self.chunk_size = CHUNK_BATCHES * config.batch_size
        limit = tokenizer.model_max_length
        self._max_length = config.max_length or (limit if limit < _NO_LIMIT else None)
        self.grouped = False
        # A failed batch is read again while a thread may be prefetching.
        self._tokenizer_lock = Lock()
        self._orders: dict[int, Sequence[int]] = {}
        self._padding: dict[int, Padding] = {}
        with closing(self._texts()) as texts:
            chunk = self._tokenize(list(itertools.islice(texts, self.chunk_size)))
            self.samples = len(chunk.ids) + sum(1 for _ in texts)
        lengths, inputs = chunk.lengths, len(self._inputs(chunk))
        self._new_batch = InputBatcher(config.call, inputs)
        self.sample_bytes = 8 * inputs * max(lengths, default=0)
        if config.group_by_length == "auto":
            grouped, ungrouped = self._padded(sorted(lengths)), self._padded(lengths)
            self.grouped = grouped <= (1 - _MIN_SAVING) * ungrouped
        else:
            self.grouped = config.group_by_length and config.padding == "longest"

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        end = self.samples if stop is None else stop
        first_chunk = start - start % self.chunk_size
        with closing(self._texts()) as texts:
            remaining = itertools.islice(texts, first_chunk, None)
            for first in range(first_chunk, end, self.chunk_size):
                rows = list(itertools.islice(remaining, self.chunk_size))
                if len(rows) < min(self.chunk_size, self.samples - first):
                    raise ConfigError(
                        f"{self.config.path} became shorter while it was read", "data.path"
                    )
                chunk = self._tokenize(rows)
                self._remember(first, chunk)
                last = min(len(rows), end - first)
                for begin in range(max(start - first, 0), last, self.batch_size):
                    yield self._batch(chunk, begin, min(begin + self.batch_size, len(rows)))

    def input_positions(self, start: int, stop: int) -> Sequence[int]:
        first = start - start % self.chunk_size
        if first not in self._orders:
            next(self.batches(first))
        return [first + position for position in self._orders[first][start - first : stop - first]]

    def statements(self) -> Iterator[Statement]:
        yield from ()

    def labels(self) -> Iterator[torch.Tensor]:
        path = self.config.path
        records = READERS[path.suffix](path) if path.suffix in READERS else iter(())
        return read_labels(records, path, self.config.labels, self.config.classes)

    def padding(self, start: int, stop: int) -> Padding:
        chunks = (padding for first, padding in self._padding.items() if start <= first < stop)
        return sum(chunks, Padding())

    # --- chunks --------------------------------------------------------------------------------

    def _tokenize(self, texts: list[_Text]) -> _Chunk:
        tokens: dict[str, list[list[int]]] = {"input_ids": []}
        if texts:
            limit = self._max_length
            truncation = {"truncation": True, "max_length": limit} if limit else {}
            with self._tokenizer_lock:
                tokens = dict(self.tokenizer([text.text for text in texts], **truncation))
        order: Sequence[int] = range(len(texts))
        if self.grouped:
            order = self._order_by_length([len(row) for row in tokens["input_ids"]])
            tokens = {name: [rows[i] for i in order] for name, rows in tokens.items()}
        return _Chunk(tokens, [texts[i].id for i in order], order)

    def _order_by_length(self, lengths: list[int]) -> list[int]:
        """Put texts of similar length into batches, and the batches into random order.

        The longest batch comes first, because it may not fit into memory. With the others
        shuffled, the first batches are a sample of all lengths, as in the order of the input.
        """
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        size = self.batch_size
        longest, *others = [order[i : i + size] for i in range(0, len(order), size)]
        # An incomplete batch stays the last.
        last = [others.pop()] if others and len(others[-1]) < size else []
        random.Random(0).shuffle(others)  # noqa: S311
        return [i for batch in (longest, *others, *last) for i in batch]

    def _inputs(self, chunk: _Chunk) -> list[str]:
        available = [name for name in self.tokenizer.model_input_names if name in chunk.tokens]
        for name in self.config.inputs:
            if name not in available:
                hint = suggest(name, available)
                raise ConfigError(f"the tokenizer has no output {name!r}; {hint}", "data.inputs")
        return list(self.config.inputs) or available

    def _batch(self, chunk: _Chunk, start: int, stop: int) -> Batch:
        padded = self.tokenizer.pad(
            {name: rows[start:stop] for name, rows in chunk.tokens.items()},
            padding=self.config.padding,
            max_length=self.config.max_length,
            return_tensors="pt",
        )
        return self._new_batch(
            {name: padded[name] for name in self._inputs(chunk)}, chunk.ids[start:stop]
        )

    def _remember(self, first: int, chunk: _Chunk) -> None:
        self._orders.pop(first, None)  # a chunk that is read again becomes the newest
        self._orders[first] = chunk.order
        while len(self._orders) > _CACHED_ORDERS:
            del self._orders[next(iter(self._orders))]
        if first not in self._padding:
            lengths = chunk.lengths
            in_file = [length for _, length in sorted(zip(chunk.order, lengths, strict=True))]
            self._padding[first] = Padding(
                tokens=sum(lengths), run=self._padded(lengths), ungrouped=self._padded(in_file)
            )

    def _padded(self, lengths: Sequence[int]) -> int:
        """Count the tokens, with padding, of texts of these lengths that are run in this order."""
        if self.config.padding == "max_length":
            return len(lengths) * (self.config.max_length or 0)
        batches = (
            lengths[i : i + self.batch_size] for i in range(0, len(lengths), self.batch_size)
        )
        return sum(len(batch) * max(batch) for batch in batches)

    # --- the file ------------------------------------------------------------------------------

    def _texts(self) -> Generator[_Text]:
        path = self.config.path
        try:
            if path.suffix == ".txt":
                yield from self._lines(path)
            elif path.suffix in READERS:
                yield from self._fields(path)
            else:
                raise ConfigError(
                    f"{path.name} is not a text file; allowed: .txt, {', '.join(READERS)}",
                    "data.path",
                )
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{path} cannot be read: {error}", "data.path") from error

    def _lines(self, path: Path) -> Iterator[_Text]:
        for key in ("field", "id", "labels"):
            if getattr(self.config, key):
                raise ConfigError("a .txt file has no columns", f"data.{key}")
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file):
                yield _Text(line.rstrip("\n"), number)

    def _fields(self, path: Path) -> Iterator[_Text]:
        field, id_column = str(self.config.field), self.config.id
        for number, (line, fields) in enumerate(READERS[path.suffix](path)):
            if number == 0:
                self._check_columns(fields)
            text = fields.get(field)
            if not isinstance(text, str):
                raise ConfigError(f"{path}:{line}  {field!r} is {text!r:.60}, not a text")
            if id_column is None:
                yield _Text(text, number)
            elif fields.get(id_column) is None:
                raise ConfigError(f"{path}:{line}  the id {id_column!r} is missing")
            else:
                yield _Text(text, str(fields[id_column]))

    def _check_columns(self, fields: dict[str, Any]) -> None:
        name = self.config.path.name
        if self.config.field is None:
            hint = suggest("", fields)
            raise ConfigError(
                f"{name} has columns; set the column of the text; {hint}", "data.field"
            )
        for key in ("field", "id", "labels"):
            column = getattr(self.config, key)
            if column is not None and column not in fields:
                hint = suggest(column, fields)
                raise ConfigError(f"{name} has no column {column!r}; {hint}", f"data.{key}")


def _load_tokenizer(config: TextData, model: ModelConfig | None) -> Any:
    source, revision = config.tokenizer_source(model)
    auto = import_transformers("data.tokenizer").AutoTokenizer
    with hub_errors(source, "data.tokenizer", "which tokenizers never run; choose another one"):
        tokenizer = auto.from_pretrained(
            source, revision=revision or "main", trust_remote_code=False
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # For a folder without a tokenizer, transformers builds one to which every word is unknown.
        raise ConfigError(
            f"{source} contains no vocabulary; set data.tokenizer to a folder or hub name with one",
            "data.tokenizer",
        )
    if tokenizer.pad_token is None:
        # GPT-2 and similar models have none. Padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"the tokenizer {source} has no token for padding; save it with a pad_token",
            "data.tokenizer",
        )
    return tokenizer
