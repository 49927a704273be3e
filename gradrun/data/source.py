"""The BatchSource protocol, and sources that read rows in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from gradrun.config.data import ArrayInput, RecordInput
from gradrun.core.errors import ConfigError, SampleError
from gradrun.data.batch import Batch
from gradrun.results.result import Padding, Statement, Warning

CHUNK_BYTES = 1024 * 1024
"""Bytes of a file that are read and converted at once; bounds the growth of the resident set."""


class BatchSource(Protocol):
    """A lazy sequence of batches of which any range can be read again."""

    samples: int
    batch_size: int
    sample_bytes: int
    """Size of one sample in memory, over all inputs."""

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches of samples `start` to `stop`, in order; the last may be shorter.

        Args:
            start: the first sample.
            stop: the end of the last batch: a whole number of batches after `start`, or the number
                of samples; default: the number of samples.
        """

    def statements(self) -> Iterator[Statement]:
        """Yield the interpretations of the data, with the counts of the batches read so far."""


@runtime_checkable
class HasLabels(Protocol):
    """A data source whose config may name labels."""

    @property
    def classes(self) -> Sequence[str] | None:
        """The names of the classes, in order, if labels are names."""

    def labels(self) -> Iterator[torch.Tensor]:
        """Yield the true class or value of every sample, in order, in chunks [n] or [n, ...].

        Raises:
            ConfigError: the labels cannot be read, or the config names none.
        """


@runtime_checkable
class HasWarnings(Protocol):
    """A data source that may change samples in a way that a user should know of."""

    def warnings(self) -> Iterator[Warning]:
        """Yield the warnings for the batches read so far."""


@runtime_checkable
class HasFileList(Protocol):
    """A data source that reads files which the config does not name."""

    files: Sequence[Path]


@runtime_checkable
class LengthGrouped(Protocol):
    """A data source that may batch samples of similar length, so that batches need less padding.

    If `grouped`, samples are run in another order than that of the input. The order changes only
    within chunks of `chunk_size` samples, a multiple of the batch size.
    """

    grouped: bool
    chunk_size: int

    def input_positions(self, start: int, stop: int) -> Sequence[int]:
        """Return the input positions of samples that are run as start to stop, within a chunk."""

    def padding(self, start: int, stop: int) -> Padding:
        """Count the tokens of samples start to stop, which must be whole chunks read before."""


def input_position(data: BatchSource, index: int) -> int:
    """Return the input position of the sample that is run as number `index`."""
    if isinstance(data, LengthGrouped) and data.grouped:
        return data.input_positions(index, index + 1)[0]
    return index


class InputBatcher:
    """Builds batches from named inputs, passed by position or by keyword."""

    def __init__(self, call: str, inputs: int) -> None:
        """Decide how to pass the inputs; "auto": one by position, several by keyword."""
        self.positional = call == "positional" or (call == "auto" and inputs == 1)

    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        ids: Sequence[int | str],
        errors: Mapping[int, SampleError] | None = None,
    ) -> Batch:
        """Return a batch of the inputs, each [n, ...], with n ids."""
        if self.positional:
            return Batch(tuple(inputs.values()), {}, len(ids), ids, errors or {})
        return Batch((), dict(inputs), len(ids), ids, errors or {})


class RowReader(Protocol):
    """Reads one input: `samples` rows, each a tensor of the same shape and type."""

    samples: int
    sample_bytes: int

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start to stop as one tensor [stop - start, ...]."""


class ChunkedSource:
    """A data source over RowReaders that reads about CHUNK_BYTES at once.

    Splitting a chunk costs a hundredth of reading each batch on its own, and freeing it keeps the
    resident set flat for files of any size.
    """

    classes = None

    def __init__(
        self,
        readers: Mapping[str, RowReader],
        batch_size: int,
        call: str,
        labels: RowReader | None = None,
    ) -> None:
        counts = {name: reader.samples for name, reader in readers.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ConfigError(f"the inputs have different numbers of samples: {listed}", "data")
        self.readers, self.batch_size = readers, batch_size
        self.samples = next(iter(counts.values()))
        self.sample_bytes = sum(reader.sample_bytes for reader in readers.values())
        self._batcher = InputBatcher(call, len(readers))
        self._labels = labels
        if labels and labels.samples != self.samples:
            raise ConfigError(
                f"there are {labels.samples:,} labels for {self.samples:,} samples", "data.labels"
            )

    def statements(self) -> Iterator[Statement]:
        yield from ()

    def labels(self) -> Iterator[torch.Tensor]:
        if self._labels is None:
            raise missing_labels()
        step = max(1, CHUNK_BYTES // max(1, self._labels.sample_bytes))
        for start in range(0, self.samples, step):
            yield self._labels.chunk(start, min(start + step, self.samples))

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        end = self.samples if stop is None else stop
        batch_bytes = max(1, self.batch_size * self.sample_bytes)
        step = max(1, CHUNK_BYTES // batch_bytes) * self.batch_size
        names, positional = list(self.readers), self._batcher.positional
        for first in range(start, end, step):
            last = min(first + step, end)
            chunks = [
                torch.split(reader.chunk(first, last), self.batch_size)
                for reader in self.readers.values()
            ]
            # Without InputBatcher, which would cost as much as the rest of this loop.
            for begin, tensors in zip(
                range(first, last, self.batch_size), zip(*chunks, strict=True), strict=True
            ):
                ids = range(begin, min(begin + self.batch_size, last))
                if positional:
                    yield Batch(tensors, {}, len(ids), ids)
                else:
                    yield Batch((), dict(zip(names, tensors, strict=True)), len(ids), ids)


def missing_labels() -> ConfigError:
    """Return the error for metrics over data without labels."""
    return ConfigError("metrics need labels, and data.labels is not set", "data")


def class_number(name: str, classes: Sequence[str]) -> int:
    """Return the index of a label in the list of classes.

    Raises:
        ValueError: the label is not in the list.
    """
    if name not in classes:
        listed = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
        raise ValueError(f"the label {name!r:.60} is not one of data.classes: {listed}")
    return classes.index(name)


def cast_rows(
    spec: ArrayInput | RecordInput, stored: tuple[int, ...], key: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that converts rows [n, *stored] to the dtype, scale and shape of `spec`.

    Raises:
        ConfigError: the shape of `spec` has another number of values.
    """
    dtype = getattr(torch, spec.dtype) if spec.dtype else None
    shape = spec.shape
    if shape is not None and math.prod(shape) != math.prod(stored):
        raise ConfigError(
            f"cannot reshape {math.prod(stored)} values per sample (shape {list(stored)}) to "
            f"{list(shape)}, which has {math.prod(shape)}",
            f"{key}.shape",
        )

    def convert(rows: torch.Tensor) -> torch.Tensor:
        if dtype is not None:
            rows = rows.to(dtype)
        if spec.scale is not None:
            rows = rows * spec.scale
        return rows if shape is None else rows.reshape(len(rows), *shape)

    return convert
