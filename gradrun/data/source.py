"""The base class of data sources, and sources that read rows in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from gradrun.config.model import ModelConfig
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.units import list_names
from gradrun.core.value_types import ValueType
from gradrun.data.batch import Batch
from gradrun.results.result import Padding, Statement

T = TypeVar("T")

CHUNK_BYTES = 1024 * 1024
"""Bytes of a file that are read and converted at once; bounds the growth of the resident set."""


class Preview(NamedTuple):
    """What a person sees of an input."""

    text: str
    picture: bytes = b""
    """A small JPEG; empty if the input is not a picture."""


class OpeningFacts(NamedTuple):
    """The facts outside of the data section that decide how data are opened."""

    seed: int = 0
    """Of synthetic data, and of the workers of a DataLoader."""
    model: ModelConfig | None = None
    """The model section, which may provide the tokenizer or the preprocessing."""
    classes: Sequence[str] = ()
    """The class names of the model, which labels may use without data.classes."""
    keep: Sequence[str] = ()
    """Columns that are written beside the predictions; for records and texts only."""


class BatchSource:
    """A lazy sequence of batches of which any range can be read again.

    A source implements `batches` and `statements`, and overrides what else applies to its data. If
    the number of samples is unknown, only recent batches can be read again: see StreamedBatches.
    """

    samples: int | None
    """The number of samples; None if unknown, until the last batch was read."""
    batch_size: int
    sample_bytes: int
    """Size of one sample in memory, over all inputs."""
    has_ids = False
    """Whether samples have ids of their own; otherwise their ids are row numbers."""
    has_previews = False
    """Whether people can recognize inputs by their `previews`."""
    classes: Sequence[str] = ()
    """The names of the classes, in order, if labels are names."""
    labels_in_batches = False
    """Whether labels are read with the inputs, once, and saved by the run.

    `labels()` then yields those of the first batch only.
    """
    main_thread_only = False
    """Whether only the main thread may read the data, because that runs the user's code."""
    flags: np.ndarray[Any, np.dtype[Any]] = np.zeros(0, np.uint8)
    """Unsigned numbers, [samples], that note what reading met in each sample, for the statements.

    Empty if nothing is noted. Only the source interprets their bits; 0 for unread samples. A worker
    that read some samples sends their flags to the process that states them.
    """
    kept_types: Mapping[str, ValueType | None] = MappingProxyType({})
    """The type of each column that is written beside the predictions; None for a mix of types."""
    of_texts = False
    """Whether samples are texts, of which `padding` counts the tokens."""
    grouped = False
    """Whether samples are run in another order than that of the input, by length.

    The order changes only within chunks of `chunk_size` samples, a multiple of the batch size.
    """
    chunk_size: int
    varying = False
    """Whether batches differ in the length of their samples."""
    variable = False
    """Whether batches differ in their number of samples, of which batch_size is the greatest."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that are read and that the config need not name, in the order of samples."""
        return ()

    @property
    def repeated_ids(self) -> int:
        """Number of samples with the id of an earlier sample."""
        return 0

    @property
    def id_type(self) -> str:
        """The type of ids in a column: "whole numbers" or "text"; empty without such a column."""
        return ""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Further properties, by name, that a resume compares; they go to JSON."""
        return {}

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches of samples `start` to `stop`, in order; the last may be shorter.

        Args:
            start: the first sample.
            stop: the end of the last batch: a whole number of batches after `start`, or the number
                of samples; default: the number of samples.
        """
        raise NotImplementedError

    def statements(self) -> Iterator[Statement]:
        """Yield the interpretations of the data, with the counts of the batches read so far."""
        raise NotImplementedError

    def labels(self) -> Iterator[torch.Tensor]:
        """Yield the true class or value of every sample, in order, in chunks [n] or [n, ...].

        Raises:
            ConfigError: the labels cannot be read, or the config names none.
        """
        raise missing_labels()

    def previews(self, positions: Sequence[int]) -> Iterator[Preview]:
        """Yield a preview of the inputs at these positions, which increase."""
        raise NotImplementedError

    def checksum(self, stop: int) -> int | None:
        """Return a checksum of the rows before `stop` as they are stored; None without checksums.

        A run can be resumed after rows behind the committed ones changed if its data have
        checksums. `stop` is a multiple of the batch size or the number of samples.
        """
        return None

    def input_positions(self, start: int, stop: int) -> Sequence[int]:
        """Return the input positions of samples that are run as start to stop, within a chunk."""
        return range(start, stop)

    def input_position(self, index: int) -> int:
        """Return the input position of the sample that is run as number `index`."""
        return self.input_positions(index, index + 1)[0] if self.grouped else index

    def batch_start(self, index: int) -> int:
        """Return the first sample of the batch that has the sample run as number `index`."""
        return index - index % self.batch_size

    def padding(self, start: int, stop: int) -> Padding | None:
        """Count the texts of samples start to stop, which must be whole batches read before."""
        return None


def whole_batches(data: BatchSource) -> int:
    """Return the number of samples of which every multiple is the start of a batch."""
    return data.chunk_size if data.variable else data.batch_size


def read_one(data: BatchSource, start: int) -> Batch | None:
    """Return the batch that starts at this sample; None at the end.

    It reads no further, unlike the first of all batches.
    """
    stop = start + data.batch_size
    if data.samples is not None:
        stop = min(stop, data.samples)
    return next(data.batches(start, stop), None) if start < stop else None


def require_length(data: BatchSource) -> int:
    """Return the number of samples of data that several processes read.

    Raises:
        ConfigError: it is unknown.
    """
    if data.samples is None:
        raise ConfigError(
            "the number of samples is unknown, so the data cannot be divided among workers; remove "
            "the engine, or use data with a length, such as a map-style Dataset",
            "engine",
        )
    return data.samples


def has_row_checksums(data: BatchSource) -> bool:
    """Return whether the data have checksums of their rows, so that later rows may change."""
    return data.samples is not None and data.checksum(data.samples) is not None


class InputBatcher:
    """Builds batches from named inputs, passed by position or by keyword."""

    def __init__(self, call: str, inputs: int) -> None:
        """Decide how to pass the inputs; "auto": one by position, several by keyword.

        Raises:
            ConfigError: several inputs cannot be passed as a list of samples.
        """
        if call == "list" and inputs > 1:
            raise ConfigError(
                f"call: list passes one input, and there are {inputs}; use dict or keyword",
                "data.call",
            )
        self.positional = call in {"positional", "list"} or (call == "auto" and inputs == 1)

    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        ids: Sequence[int | str],
        errors: Mapping[int, SampleError] | None = None,
        kept: Mapping[str, Sequence[Any]] = MappingProxyType({}),
        lengths: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> Batch:
        """Return a batch of the inputs, each [n, ...], with n ids and n values of kept columns.

        `lengths` has the lengths of the rows of padded inputs, by the name of the input.
        """
        args = tuple(inputs.values()) if self.positional else ()
        kwargs = {} if self.positional else dict(inputs)
        by_position = {list(inputs).index(name): values for name, values in lengths.items()}
        return Batch(args, kwargs, len(ids), ids, errors or {}, kept=kept, lengths=by_position)


class RowReader(Protocol):
    """Reads one input: `samples` rows, each a tensor of the same shape and type."""

    samples: int
    sample_bytes: int

    def chunk(self, start: int, stop: int) -> tuple[torch.Tensor, Mapping[int, str]]:
        """Return rows start to stop as one tensor [stop - start, ...], and the errors by row."""

    def describe(self) -> str:
        """Describe dtype, shape and conversion of the rows in a few words."""


class ChunkedSource(BatchSource):
    """A data source over RowReaders that reads about CHUNK_BYTES at once.

    Splitting a chunk costs a hundredth of reading each batch on its own, and freeing it keeps the
    resident set flat for files of any size.
    """

    samples: int

    def __init__(
        self,
        readers: Mapping[str, RowReader],
        batch_size: int,
        call: str,
        labels: RowReader | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        counts = {name: reader.samples for name, reader in readers.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ConfigError(f"the inputs have different numbers of samples: {listed}", "data")
        self.readers, self.batch_size, self.classes = readers, batch_size, classes
        self.samples = next(iter(counts.values()))
        self.sample_bytes = sum(reader.sample_bytes for reader in readers.values())
        self._batcher = InputBatcher(call, len(readers))
        self._labels = labels
        if labels and labels.samples != self.samples:
            raise ConfigError(
                f"there are {labels.samples:,} labels for {self.samples:,} samples", "data.labels"
            )

    def statements(self) -> Iterator[Statement]:
        for name, reader in self.readers.items():
            yield Statement(topic=f"input {name}", text=reader.describe())
        yield Statement(topic="order", text="samples as stored; ids: row numbers, from 0")
        if self._labels:
            yield Statement(topic="labels", text=self._labels.describe())

    def labels(self) -> Iterator[torch.Tensor]:
        if self._labels is None:
            raise missing_labels()
        step = max(1, CHUNK_BYTES // max(1, self._labels.sample_bytes))
        for start in range(0, self.samples, step):
            yield self._labels.chunk(start, min(start + step, self.samples))[0]

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        end = self.samples if stop is None else stop
        batch_bytes = max(1, self.batch_size * self.sample_bytes)
        step = max(1, CHUNK_BYTES // batch_bytes) * self.batch_size
        names, positional = list(self.readers), self._batcher.positional
        for first in range(start, end, step):
            last = min(first + step, end)
            chunks, errors = self._read(first, last)
            # Without InputBatcher, which would cost as much as the rest of this loop.
            for begin, tensors in zip(
                range(first, last, self.batch_size), zip(*chunks, strict=True), strict=True
            ):
                ids = range(begin, min(begin + self.batch_size, last))
                if positional:
                    batch = Batch(tensors, {}, len(ids), ids)
                else:
                    batch = Batch((), dict(zip(names, tensors, strict=True)), len(ids), ids)
                if errors:
                    own = {row - begin: error for row, error in errors.items() if row in ids}
                    batch = batch._replace(errors=own)
                yield batch

    def _read(
        self, start: int, stop: int
    ) -> tuple[list[Sequence[torch.Tensor]], dict[int, SampleError]]:
        """Return the batches of each input, and the errors by sample."""
        chunks: list[Sequence[torch.Tensor]] = []
        errors: dict[int, SampleError] = {}
        for name, reader in self.readers.items():
            rows, problems = reader.chunk(start, stop)
            chunks.append(torch.split(rows, self.batch_size))
            for row, problem in problems.items():
                errors[start + row] = SampleError(f"sample {start + row}, input {name}: {problem}")
        return chunks, errors


def at_positions(items: Iterable[T], positions: Sequence[int]) -> Iterator[T]:
    """Yield the items at increasing positions, and read no further."""
    items, first = iter(items), 0
    for position in positions:
        yield next(itertools.islice(items, position - first, None))
        first = position + 1


def missing_labels() -> ConfigError:
    """Return the error for metrics over data without labels."""
    return ConfigError("metrics need labels, and data.labels is not set", "data")


def class_number(name: str, classes: Sequence[str]) -> int:
    """Return the index of a label in the list of classes.

    Raises:
        ValueError: the label is not in the list.
    """
    if name not in classes:
        raise ValueError(f"the label {name!r:.60} is not one of the classes: {list_names(classes)}")
    return classes.index(name)
