"""Tokenized texts: the lines of a .txt file, or one field of a file of records."""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch

from gradrun.config.data import TextData
from gradrun.core.errors import SampleError
from gradrun.data.batch import Batch
from gradrun.data.dataset_rows import open_table
from gradrun.data.rows import BEGINNING, READERS, Position
from gradrun.data.source import InputBatcher, OpeningFacts, Preview, at_positions
from gradrun.data.tables import IndexedRows
from gradrun.data.text_files import Text, checked_rows, read_texts
from gradrun.data.tokenization import Tokenization, Tokens
from gradrun.results.result import Padding, Statement

CHUNK_BATCHES = 16
"""Least number of batches that are tokenized, and ordered by length, together."""

CHUNK_TEXTS, _CHUNK_TOKENS = 2048, 2**17
"""More batches are, up to this many texts and tokens: their outputs are in memory together."""

LEAST_CHUNKS = 4
"""Chunks of a short input, which workers share."""

_MIN_SAVING = 0.1
"""group_by_length: auto groups texts if this saves at least this share of the tokens."""

_CACHED_LAYOUTS = 8


class _Layout(NamedTuple):
    """The order of the texts of a chunk, and their batches."""

    order: Sequence[int]
    """Position in the chunk of each text that is run."""
    starts: Sequence[int]
    """The first row of each batch."""

    def batches(self) -> Iterator[tuple[int, int]]:
        """Yield the first row of each batch, and the row behind its last one."""
        return itertools.pairwise((*self.starts, len(self.order)))


class _Chunk(NamedTuple):
    """The tokens of some texts, in the order in which they are run."""

    tokens: Tokens
    texts: list[Text]
    """The texts without their content."""
    layout: _Layout
    errors: dict[int, SampleError]
    """Row -> why its text cannot be run."""
    full_lengths: list[int]
    """Tokens of each text before it was truncated."""

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.tokens["input_ids"]]


class Texts(IndexedRows):
    """Tokenized texts; those of similar length may be batched together."""

    config: TextData
    has_previews = of_texts = True

    def __init__(self, config: TextData, facts: OpeningFacts) -> None:
        """Count the texts and tokenize the first chunk, which decides on grouping."""
        table = open_table(config, READERS, facts.model)
        self._tokenization = tokenization = Tokenization(config, facts.model)
        super().__init__(config, table, facts)
        self.grouped = self.variable = config.batch_tokens is not None
        self.varying = config.padding == "longest"
        self._layouts: dict[int, _Layout] = {}
        self._recent: tuple[int, _Chunk] | None = None
        """The first text of the chunk that was read last, and the chunk."""
        self._padding: dict[int, Padding] = {}
        for record in checked_rows(config, self._table):
            self._observe(record)
        self._kept.check()
        self.samples = self._index.rows
        with closing(self._texts()) as texts:
            first = list(itertools.islice(texts, CHUNK_BATCHES * self.batch_size))
        chunk = self._tokenize(first)
        in_memory = _CHUNK_TOKENS * len(first) // max(1, sum(chunk.lengths))
        fits = min(CHUNK_TEXTS, in_memory) // self.batch_size
        # Rounded up, so that no short chunk is left: its texts would be padded more.
        share = math.ceil(self.samples / LEAST_CHUNKS / self.batch_size)
        self.chunk_size = max(CHUNK_BATCHES, min(fits, share)) * self.batch_size
        self._numbered = tokenization.generates
        lengths = chunk.lengths
        inputs = len(tokenization.inputs(chunk.tokens)) + self._numbered
        self._new_batch = InputBatcher(config.call, inputs)
        self.sample_bytes = 8 * inputs * max(lengths, default=0)
        if self.variable:
            pass
        elif config.group_by_length == "auto":
            grouped, ungrouped = self._padded(sorted(lengths)), self._padded(lengths)
            self.grouped = grouped <= (1 - _MIN_SAVING) * ungrouped
        else:
            self.grouped = config.group_by_length and config.padding == "longest"

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        end = self.samples if stop is None else stop
        for first, chunk in self._chunks(start, end):
            for begin, behind in chunk.layout.batches():
                if start - first <= begin < end - first:
                    yield self._batch(first, chunk, begin, behind)

    def input_positions(self, start: int, stop: int) -> Sequence[int]:
        first = start - start % self.chunk_size
        order = self._layout(first).order
        return [first + position for position in order[start - first : stop - first]]

    def batch_start(self, index: int) -> int:
        if not self.variable:
            return super().batch_start(index)
        first = index - index % self.chunk_size
        starts = self._layout(first).starts
        return first + starts[bisect_right(starts, index - first) - 1]

    def statements(self) -> Iterator[Statement]:
        yield from self._tokenization.statements()
        yield from super().statements()
        if self.config.batch_tokens:
            text = (
                f"at most {self.config.batch_tokens:,} tokens with padding and {self.batch_size:,} "
                f"texts, a longer text alone; by length within {self.chunk_size:,} texts"
            )
            yield Statement(topic="batches", text=text)

    def previews(self, positions: Sequence[int]) -> Iterator[Preview]:
        with closing(self._texts()) as texts:
            yield from (Preview(" | ".join(text.parts)) for text in at_positions(texts, positions))

    def padding(self, start: int, stop: int) -> Padding:
        batches = (padding for first, padding in self._padding.items() if start <= first < stop)
        return sum(batches, Padding())

    def _texts(self, start: Position = BEGINNING) -> Generator[Text]:
        return read_texts(self.config, self._table, self._ids, start, self._kept.of)

    # --- chunks --------------------------------------------------------------------------------

    def _chunks(self, start: int, end: int) -> Iterator[tuple[int, _Chunk]]:
        """Yield the chunks with samples `start` to `end`, each after the number of its first."""
        first = start - start % self.chunk_size
        recent = self._recent
        if recent and recent[0] == first and end <= first + self.chunk_size:
            yield recent
            return
        for begin, rows in self._groups(self._texts, first, end, self.chunk_size):
            chunk = self._tokenize(rows)
            self._remember(begin, chunk)
            yield begin, chunk

    def _layout(self, first: int) -> _Layout:
        """Return the layout of the chunk that begins at a text."""
        if first not in self._layouts:
            next(self._chunks(first, min(first + self.chunk_size, self.samples)))
        return self._layouts[first]

    def _tokenize(self, texts: list[Text]) -> _Chunk:
        tokens, full_lengths, errors = self._tokenization.tokenize(texts)
        order: Sequence[int] = range(len(texts))
        starts: Sequence[int] = range(0, len(texts), self.batch_size)
        if self.grouped:
            batches = self._by_length([len(row) for row in tokens["input_ids"]])
            order = [i for batch in batches for i in batch]
            starts = [0, *itertools.accumulate(map(len, batches))][:-1]
            tokens = {name: [rows[i] for i in order] for name, rows in tokens.items()}
        errors = {row: errors[i] for row, i in enumerate(order) if i in errors}
        return _Chunk(
            tokens=tokens,
            texts=[texts[i]._replace(parts=(), messages=()) for i in order],
            layout=_Layout(order, starts),
            errors=errors,
            full_lengths=[full_lengths[i] for i in order],
        )

    def _by_length(self, lengths: list[int]) -> list[list[int]]:
        """Divide texts into batches of similar length, in random order.

        The longest batch comes first, because it may not fit into memory. With the others
        shuffled, the first batches are a sample of all lengths, as in the order of the input.

        Returns:
            The numbers of the texts of each batch.
        """
        batches: list[list[int]] = []
        tokens, fits = self.config.batch_tokens, self.batch_size
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if not batches or len(batches[-1]) >= fits:
                batches.append([])
                if tokens:
                    fits = min(self.batch_size, max(1, tokens // max(1, lengths[i])))
            batches[-1].append(i)
        if not batches:
            return []
        longest, *others = batches
        # With batches of one size, an incomplete one stays the last.
        last = [] if self.variable or not others or len(others[-1]) == fits else [others.pop()]
        random.Random(0).shuffle(others)  # noqa: S311
        return [longest, *others, *last]

    def _batch(self, first: int, chunk: _Chunk, start: int, stop: int) -> Batch:
        rows = {name: rows[start:stop] for name, rows in chunk.tokens.items()}
        errors = {row - start: e for row, e in chunk.errors.items() if start <= row < stop}
        inputs = self._tokenization.pad(rows)
        if self._numbered:
            order = chunk.layout.order[start:stop]
            inputs["sample_numbers"] = torch.tensor([first + i for i in order])
        texts = chunk.texts[start:stop]
        kept = self._kept.batch(text.kept for text in texts)
        return self._new_batch(inputs, [text.id for text in texts], errors, kept)

    def _remember(self, first: int, chunk: _Chunk) -> None:
        self._recent = first, chunk
        self._layouts.pop(first, None)  # a chunk that is read again becomes the newest
        self._layouts[first] = chunk.layout
        while len(self._layouts) > _CACHED_LAYOUTS:
            del self._layouts[next(iter(self._layouts))]
        if first in self._padding:
            return
        lengths, limit = chunk.lengths, self._tokenization.limit or 0
        in_file = [length for _, length in sorted(zip(chunk.layout.order, lengths, strict=True))]
        # In the order of the input, batches of one size may have other texts than these, so the
        # first batch counts for all of the chunk.
        ungrouped = itertools.chain((self._padded(in_file),), itertools.repeat(0))
        for start, stop in chunk.layout.batches():
            rows = slice(start, stop)
            full = chunk.full_lengths[rows]
            repaired = [Path(text.place).name for text in chunk.texts[rows] if text.repaired]
            self._padding[first + start] = Padding(
                texts=len(full),
                truncated=sum(length > limit > 0 for length in full),
                limit=limit,
                longest=max(full),
                repaired=len(repaired),
                first_repaired=repaired[0] if repaired else "",
                tokens=sum(lengths[rows]),
                run=self._padded(lengths[rows]),
                ungrouped=next(ungrouped),
            )

    def _padded(self, lengths: Sequence[int]) -> int:
        """Count the tokens, with padding, of texts of these lengths that are run in this order."""
        if self.config.padding == "max_length":
            return len(lengths) * (self.config.max_length or 0)
        batches = (
            lengths[i : i + self.batch_size] for i in range(0, len(lengths), self.batch_size)
        )
        return sum(len(batch) * max(batch) for batch in batches)
