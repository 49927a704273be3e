"""Texts through a tokenizer: the lines of a .txt file, or one field of a file of records.

Reads and tokenizes a window of batches at once, within which it may put texts of like length
together. Knows tokens and where a text stood; not what the model makes of them.
"""

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
from gradrun.data.records import READERS, labels_in
from gradrun.data.source import BatchSource, InputBatcher
from gradrun.results.result import Padding

WINDOW_BATCHES = 16
"""Batches that are tokenized, and ordered, together."""

_WORTH = 0.9
"""Texts are grouped by length where what is left to compute is this share or less."""

_REMEMBERED = 8
_NO_LIMIT = 1_000_000
"""A tokenizer that was made for any length says 1e30."""


class _Text(NamedTuple):
    text: str
    id: int | str


class _Window(NamedTuple):
    """Tokens of some texts, as the tokenizer names them, in the order in which they are run."""

    tokens: dict[str, list[list[int]]]
    ids: Sequence[int | str]
    order: Sequence[int]
    """Which text of the window each is."""


def open_data(config: TextData, seed: int, model: ModelConfig | None) -> BatchSource:
    """The file's texts, counted once; the first window says whether grouping pays."""
    return Texts(config, _tokenizer(config, model))


class Texts:
    """Data whose samples differ in length: `Uneven`, where they are grouped by it."""

    def __init__(self, config: TextData, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.batch_size = config.batch_size
        self.chunk_size = WINDOW_BATCHES * config.batch_size
        self.limit = config.max_length or _limit(tokenizer)
        self.grouped = False
        # A batch that failed is read again while a thread may be reading ahead.
        self._alone = Lock()
        self._orders: dict[int, Sequence[int]] = {}
        self._padding: dict[int, Padding] = {}
        self.samples = 0
        self.classes = config.classes
        with closing(self._texts()) as texts:
            window = self._tokenized(list(itertools.islice(texts, self.chunk_size)))
            self.samples = len(window.ids) + sum(1 for _ in texts)
        lengths = [len(row) for row in window.tokens["input_ids"]]
        inputs = len(self._inputs(window))
        self.sample_bytes = 8 * inputs * max(lengths, default=0)
        self.grouped = (
            self._pays(lengths)
            if config.group_by_length == "auto"
            else (config.group_by_length and config.padding == "longest")
        )
        self.batch = InputBatcher(config.call, inputs)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        begin = start - start % self.chunk_size
        with closing(self._texts()) as texts:
            rest = itertools.islice(texts, begin, None)
            for first in range(begin, self.samples, self.chunk_size):
                taken = list(itertools.islice(rest, self.chunk_size))
                if len(taken) < min(self.chunk_size, self.samples - first):
                    raise ConfigError(f"{self.config.path} lost lines while it was read")
                window = self._tokenized(taken)
                self._remember(first, window)
                for at in range(max(start - first, 0), len(taken), self.batch_size):
                    yield self._batch(window, at, min(at + self.batch_size, len(taken)))

    def input_positions(self, start: int, stop: int) -> Sequence[int]:
        first = start - start % self.chunk_size
        if first not in self._orders:
            next(self.batches(first))
        return [first + place for place in self._orders[first][start - first : stop - first]]

    def labels(self) -> Iterator[torch.Tensor]:
        path = self.config.path
        records = READERS[path.suffix](path) if path.suffix in READERS else iter(())
        return labels_in(records, path, self.config.labels, self.config.classes)

    def padding(self, start: int, stop: int) -> Padding:
        return sum(
            (found for first, found in self._padding.items() if start <= first < stop), Padding()
        )

    # --- a window ------------------------------------------------------------------------------

    def _tokenized(self, texts: list[_Text]) -> _Window:
        tokens: dict[str, list[list[int]]] = {"input_ids": []}
        if texts:
            cut = {"truncation": True, "max_length": self.limit} if self.limit else {}
            with self._alone:
                tokens = dict(self.tokenizer([text.text for text in texts], **cut))
        order: Sequence[int] = range(len(texts))
        if self.grouped:
            order = self._by_length([len(row) for row in tokens["input_ids"]])
            tokens = {name: [rows[i] for i in order] for name, rows in tokens.items()}
        return _Window(tokens, [texts[i].id for i in order], order)

    def _by_length(self, lengths: list[int]) -> list[int]:
        """Batches of like length: the longest first, since it may not fit; then as dice fall.

        So a few batches show what texts there are, as those in the file's order do.
        """
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        size = self.batch_size
        first, *others = [order[at : at + size] for at in range(0, len(order), size)]
        # A batch that is not whole stays the last.
        last = [others.pop()] if others and len(others[-1]) < size else []
        random.Random(0).shuffle(others)  # noqa: S311
        return [i for batch in (first, *others, *last) for i in batch]

    def _inputs(self, window: _Window) -> list[str]:
        given = [name for name in self.tokenizer.model_input_names if name in window.tokens]
        for name in self.config.inputs:
            if name not in given:
                hint = suggest(name, given)
                raise ConfigError(f"the tokenizer makes no {name!r}; {hint}", "data.inputs")
        return list(self.config.inputs) or given

    def _batch(self, window: _Window, begin: int, end: int) -> Batch:
        padded = self.tokenizer.pad(
            {name: rows[begin:end] for name, rows in window.tokens.items()},
            padding=self.config.padding,
            max_length=self.config.max_length,
            return_tensors="pt",
        )
        tensors: dict[str, torch.Tensor] = {name: padded[name] for name in self._inputs(window)}
        return self.batch(tensors, window.ids[begin:end])

    def _remember(self, first: int, window: _Window) -> None:
        self._orders.pop(first, None)  # what is read again is the last to be forgotten
        self._orders[first] = window.order
        while len(self._orders) > _REMEMBERED:
            del self._orders[next(iter(self._orders))]
        if first not in self._padding:
            run = [len(row) for row in window.tokens["input_ids"]]
            read = [length for _, length in sorted(zip(window.order, run, strict=True))]
            self._padding[first] = Padding(
                tokens=sum(run), run=self._padded(run), ungrouped=self._padded(read)
            )

    def _padded(self, lengths: Sequence[int]) -> int:
        """Tokens that the model computes for texts of these lengths, run in this order."""
        if self.config.padding == "max_length":
            return len(lengths) * (self.config.max_length or 0)
        batches = (
            lengths[i : i + self.batch_size] for i in range(0, len(lengths), self.batch_size)
        )
        return sum(len(batch) * max(batch) for batch in batches)

    def _pays(self, lengths: Sequence[int]) -> bool:
        return self._padded(sorted(lengths)) <= _WORTH * self._padded(lengths)

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
                    f"{path.name} is no text file; allowed: .txt, {', '.join(READERS)}", "data.path"
                )
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{path} cannot be read: {error}", "data.path") from error

    def _lines(self, path: Path) -> Iterator[_Text]:
        for key in ("field", "id", "labels"):
            if getattr(self.config, key):
                raise ConfigError("the lines of a .txt file have no columns", f"data.{key}")
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file):
                yield _Text(line.rstrip("\n"), number)

    def _fields(self, path: Path) -> Iterator[_Text]:
        field, named = self.config.field, self.config.id
        for number, (line, fields) in enumerate(READERS[path.suffix](path)):
            if number == 0:
                self._check_columns(fields)
            text, name = fields.get(str(field)), fields.get(named) if named else number
            if not isinstance(text, str):
                raise ConfigError(f"{path}:{line}  {field!r} is {text!r:.60}, which is no text")
            if name is None:
                raise ConfigError(f"{path}:{line}  the id {named!r} is missing")
            yield _Text(text, name if name is number else str(name))

    def _check_columns(self, fields: dict[str, Any]) -> None:
        name = self.config.path.name
        if self.config.field is None:
            hint = suggest("", fields)
            raise ConfigError(
                f"{name} has columns; name the one with the text; {hint}", "data.field"
            )
        for key in ("field", "id", "labels"):
            column = getattr(self.config, key)
            if column is not None and column not in fields:
                hint = suggest(column, fields)
                raise ConfigError(f"{name} has no column {column!r}; {hint}", f"data.{key}")


def _tokenizer(config: TextData, model: ModelConfig | None) -> Any:
    place, revision = config.tokenizer_source(model)
    auto = import_transformers("data.tokenizer").AutoTokenizer
    with hub_errors(place, "data.tokenizer", "which tokenizers never run; use another tokenizer"):
        tokenizer = auto.from_pretrained(
            place, revision=revision or "main", trust_remote_code=False
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # What transformers makes of a folder without one: every text would be unknown words.
        raise ConfigError(
            f"{place} holds no vocabulary; data.tokenizer names a folder or a hub name that does",
            "data.tokenizer",
        )
    if tokenizer.pad_token is None:
        # GPT-2 and its like have none; what is filled up is masked, whatever stands there.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"the tokenizer {place} has no token to fill up short texts with; save it with a "
            "pad_token",
            "data.tokenizer",
        )
    return tokenizer


def _limit(tokenizer: Any) -> int | None:
    return tokenizer.model_max_length if tokenizer.model_max_length < _NO_LIMIT else None
