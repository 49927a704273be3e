"""Tokenized texts: the lines of a .txt file, or one field of a file of records."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch

from gradrun.config.data import TextData
from gradrun.config.model import ModelConfig
from gradrun.core.errors import SampleError
from gradrun.data.batch import Batch
from gradrun.data.rows import BEGINNING, READERS, Position
from gradrun.data.source import (
    BatchSource,
    InputBatcher,
    Preview,
    at_positions,
    describe_labels,
)
from gradrun.data.tables import (
    IndexedRows,
    RowIndex,
    Table,
    classes_of_labels,
    id_column,
    read_labels,
)
from gradrun.data.text_files import Text, column_keys, read_texts
from gradrun.data.tokenization import Tokenization, Tokens
from gradrun.results.result import Padding, Statement

CHUNK_BATCHES = 16
"""Batches that are tokenized, and ordered by length, together."""

_MIN_SAVING = 0.1
"""group_by_length: auto groups texts if this saves at least this share of the tokens."""

_CACHED_ORDERS = 8


class _Chunk(NamedTuple):
    """The tokens of some texts, in the order in which they are run."""

    tokens: Tokens
    ids: Sequence[int | str]
    order: Sequence[int]
    """Position in the chunk of each text that is run."""
    errors: dict[int, SampleError]
    """Row -> why its text cannot be run."""
    full_lengths: list[int]
    """Tokens of each text before it was truncated."""
    repaired: list[str]
    """File and line of each text with replaced halves of surrogate pairs, "" for others."""

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.tokens["input_ids"]]


def open_data(
    config: TextData, seed: int, model: ModelConfig | None, model_classes: Sequence[str] = ()
) -> BatchSource:
    """Count the texts of a file and tokenize the first chunk, which decides on grouping."""
    return Texts(config, Tokenization(config, model), model_classes)


class Texts(IndexedRows):
    """A LengthGrouped source of texts."""

    def __init__(
        self, config: TextData, tokenization: Tokenization, model_classes: Sequence[str]
    ) -> None:
        self.config, self._table = config, Table(config, READERS)
        self.classes = config.classes or classes_of_labels(
            self._table, config.labels, model_classes
        )
        self.batch_size = config.batch_size
        self.chunk_size = CHUNK_BATCHES * config.batch_size
        self.grouped, self.varying = False, config.padding == "longest"
        self._tokenization = tokenization
        self._orders: dict[int, Sequence[int]] = {}
        self._padding: dict[int, Padding] = {}
        self._table.check_kinds(column_keys(config))
        self._ids = id_column(self._table, config.id)
        self.has_ids = self._ids is not None
        self._index = RowIndex(config.batch_size)
        first = []
        with closing(self._texts()) as texts:
            for number, text in enumerate(texts):
                self._index.add(text.end)
                if number < self.chunk_size:
                    first.append(text)
        self.samples = self._index.rows
        chunk = self._tokenize(first)
        lengths, inputs = chunk.lengths, len(tokenization.inputs(chunk.tokens))
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
        for first, rows in self._groups(self._texts, first_chunk, end, self.chunk_size):
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
        yield from self._tokenization.statements()
        yield from self._table.describe(self._index)
        yield self._table.describe_order(self._ids)
        if self.config.labels:
            yield describe_labels(self.config, self.classes)

    def previews(self, positions: Sequence[int]) -> Iterator[Preview]:
        with closing(self._texts()) as texts:
            yield from (Preview(" | ".join(text.parts)) for text in at_positions(texts, positions))

    def labels(self) -> Iterator[torch.Tensor]:
        records = self._table.read() if self._table.has_columns else iter(())
        return read_labels(records, self.config.labels, self.classes)

    def padding(self, start: int, stop: int) -> Padding:
        batches = (padding for first, padding in self._padding.items() if start <= first < stop)
        return sum(batches, Padding())

    def _texts(self, start: Position = BEGINNING) -> Generator[Text]:
        return read_texts(self.config, self._table, self._ids, start)

    # --- chunks --------------------------------------------------------------------------------

    def _tokenize(self, texts: list[Text]) -> _Chunk:
        tokens, full_lengths, errors = self._tokenization.tokenize(texts)
        order: Sequence[int] = range(len(texts))
        if self.grouped:
            order = self._order_by_length([len(row) for row in tokens["input_ids"]])
            tokens = {name: [rows[i] for i in order] for name, rows in tokens.items()}
        errors = {row: errors[i] for row, i in enumerate(order) if i in errors}
        return _Chunk(
            tokens=tokens,
            ids=[texts[i].id for i in order],
            order=order,
            errors=errors,
            full_lengths=[full_lengths[i] for i in order],
            repaired=[Path(texts[i].place).name if texts[i].repaired else "" for i in order],
        )

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

    def _batch(self, chunk: _Chunk, start: int, stop: int) -> Batch:
        rows = {name: rows[start:stop] for name, rows in chunk.tokens.items()}
        errors = {row - start: e for row, e in chunk.errors.items() if start <= row < stop}
        return self._new_batch(self._tokenization.pad(rows), chunk.ids[start:stop], errors)

    def _remember(self, first: int, chunk: _Chunk) -> None:
        self._orders.pop(first, None)  # a chunk that is read again becomes the newest
        self._orders[first] = chunk.order
        while len(self._orders) > _CACHED_ORDERS:
            del self._orders[next(iter(self._orders))]
        if first in self._padding:
            return
        lengths, limit = chunk.lengths, self._tokenization.limit or 0
        in_file = [length for _, length in sorted(zip(chunk.order, lengths, strict=True))]
        for start in range(0, len(lengths), self.batch_size):
            rows = slice(start, start + self.batch_size)
            full = chunk.full_lengths[rows]
            repaired = [place for place in chunk.repaired[rows] if place]
            self._padding[first + start] = Padding(
                texts=len(full),
                truncated=sum(length > limit > 0 for length in full),
                limit=limit,
                longest=max(full),
                repaired=len(repaired),
                first_repaired=repaired[0] if repaired else "",
                tokens=sum(lengths[rows]),
                run=self._padded(lengths[rows]),
                ungrouped=self._padded(in_file[rows]),
            )

    def _padded(self, lengths: Sequence[int]) -> int:
        """Count the tokens, with padding, of texts of these lengths that are run in this order."""
        if self.config.padding == "max_length":
            return len(lengths) * (self.config.max_length or 0)
        batches = (
            lengths[i : i + self.batch_size] for i in range(0, len(lengths), self.batch_size)
        )
        return sum(len(batch) * max(batch) for batch in batches)
