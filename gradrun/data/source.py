"""The nouns of the data shelf: a Batch, Data that yields them, and how rows become batches.

Knows tensors and sizes; not where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from gradrun.config.data import ArrayInput, RecordInput
from gradrun.core.errors import ConfigError, SampleError
from gradrun.results.result import Padding

CHUNK_BYTES = 1024 * 1024
"""How much of a file is held (and converted) at once; the resident set grows by no more."""


class Batch(NamedTuple):
    """What the model is called with: `args` and `kwargs` hold tensors of shape [size, ...]."""

    args: tuple[torch.Tensor, ...]
    kwargs: dict[str, torch.Tensor]
    size: int
    ids: Sequence[int | str]
    faults: Mapping[int, SampleError] = MappingProxyType({})
    """Positions that could not be read, where the tensors hold nothing of worth."""

    def check(self) -> None:
        """Raise the first SampleFault, if there is any."""
        for fault in self.faults.values():
            raise fault

    def select(self, rows: Sequence[int]) -> Batch:
        """A batch of some of the samples, none of them at fault."""
        index = torch.tensor(rows, dtype=torch.int64)
        picked = self.map(lambda tensor: tensor[index.to(tensor.device)])
        return picked._replace(size=len(rows), ids=[self.ids[row] for row in rows], faults={})

    def tensors(self) -> list[torch.Tensor]:
        """Every input, in order."""
        return [*self.args, *self.kwargs.values()]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same batch with every input changed."""
        return self._replace(
            args=tuple(map(change, self.args)),
            kwargs={name: change(value) for name, value in self.kwargs.items()},
        )


def cut_batch(batch: Batch, begin: int, end: int) -> Batch:
    """Samples begin to end of a batch."""
    return Batch(
        tuple(tensor[begin:end] for tensor in batch.args),
        {name: tensor[begin:end] for name, tensor in batch.kwargs.items()},
        end - begin,
        batch.ids[begin:end],
        {row - begin: fault for row, fault in batch.faults.items() if begin <= row < end},
    )


class BatchSource(Protocol):
    """A lazy sequence of batches that can be walked again, from any sample on."""

    samples: int
    batch_size: int
    sample_bytes: int
    """Of one sample as the model gets it, all inputs together."""

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches from sample `start` on, in order; the last may be shorter."""


@runtime_checkable
class HasLabels(Protocol):
    """Data whose config may name labels."""

    @property
    def classes(self) -> Sequence[str] | None:
        """What labels are called that are no numbers, in the order in which they are counted."""

    def labels(self) -> Iterator[torch.Tensor]:
        """The true class or value of every sample, in order, some at a time: [n] or [n, ...].

        Raises:
            ConfigError: they cannot be read, or the config names none.
        """


@runtime_checkable
class HasFileList(Protocol):
    """Data that read files which no key of the config names."""

    listed: Sequence[Path]


@runtime_checkable
class LengthGrouped(Protocol):
    """Data whose samples differ in length, so that batches of them are padded.

    Where they are `grouped`, they are run in another order than that of the input. It is changed
    only inside a window of so many samples, which are whole batches.
    """

    grouped: bool
    window: int

    def input_positions(self, start: int, stop: int) -> Sequence[int]:
        """Where in the input the samples stand that are run as start to stop, of one window."""

    def padding(self, start: int, stop: int) -> Padding:
        """How many tokens are computed for samples start to stop, whole windows that were read."""


def input_position(data: BatchSource, at: int) -> int:
    """Where in the input the sample stands that is run as the at-th."""
    if isinstance(data, LengthGrouped) and data.grouped:
        return data.input_positions(at, at + 1)[0]
    return at


class RowReader(Protocol):
    """One input: `samples` rows, each a tensor of the same shape and type."""

    samples: int
    sample_bytes: int

    def window(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop as one tensor [stop - start, ...]."""


class ChunkedSource:
    """Data over Rows: a window of a MiB is read at once and split into batches.

    One call of split costs a hundredth of slicing each batch out of a memory map, and dropping a
    window gives its pages back, so the resident set stays flat however long the file is.
    """

    classes = None

    def __init__(
        self,
        rows: Mapping[str, RowReader],
        batch_size: int,
        call: str,
        truth: RowReader | None = None,
    ) -> None:
        counts = {name: row.samples for name, row in rows.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ConfigError(f"the inputs differ in their number of samples: {listed}", "data")
        self.rows, self.batch_size = rows, batch_size
        self.samples = next(iter(counts.values()))
        self.sample_bytes = sum(row.sample_bytes for row in rows.values())
        self.by_position = by_position(call, len(rows))
        self.truth = truth
        if truth and truth.samples != self.samples:
            raise ConfigError(
                f"there are {truth.samples:,} labels for {self.samples:,} samples", "data.labels"
            )

    def labels(self) -> Iterator[torch.Tensor]:
        if self.truth is None:
            raise no_labels()
        step = max(1, CHUNK_BYTES // max(1, self.truth.sample_bytes))
        for begin in range(0, self.samples, step):
            yield self.truth.window(begin, min(begin + step, self.samples))

    def batches(self, start: int = 0) -> Iterator[Batch]:
        batch_bytes = max(1, self.batch_size * self.sample_bytes)
        step = max(1, CHUNK_BYTES // batch_bytes) * self.batch_size
        names = list(self.rows)
        for begin in range(start, self.samples, step):
            stop = min(begin + step, self.samples)
            windows = [
                torch.split(row.window(begin, stop), self.batch_size) for row in self.rows.values()
            ]
            firsts = range(begin, stop, self.batch_size)
            for first, tensors in zip(firsts, zip(*windows, strict=True), strict=True):
                ids = range(first, min(first + self.batch_size, stop))
                size = len(ids)
                if self.by_position:
                    yield Batch(tensors, {}, size, ids)
                else:
                    yield Batch((), dict(zip(names, tensors, strict=True)), size, ids)


def no_labels() -> ConfigError:
    """The error where metrics are asked for and the data name no labels."""
    return ConfigError(
        "metrics hold predictions against labels, and data.labels is not set", "data"
    )


def class_number(name: str, classes: Sequence[str]) -> int:
    """The place of a label in the list of classes.

    Raises:
        ValueError: it is not among them.
    """
    if name not in classes:
        listed = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
        raise ValueError(f"the label {name!r:.60} is not one of data.classes: {listed}")
    return classes.index(name)


def by_position(call: str, inputs: int) -> bool:
    """Whether inputs are passed by position: one is, several are passed by name."""
    return call == "positional" or (call == "auto" and inputs == 1)


def cast_rows(
    spec: ArrayInput | RecordInput, stored: tuple[int, ...], key: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What turns stored rows [n, *stored] into the input a config describes [n, *shape].

    Raises:
        ConfigError: the shape asked for has another number of values.
    """
    dtype = getattr(torch, spec.dtype) if spec.dtype else None
    shape = spec.shape
    if shape is not None and _count(shape) != _count(stored):
        raise ConfigError(
            f"{_count(stored)} values a sample (shape {list(stored)}) do not make the shape "
            f"{list(shape)}, which takes {_count(shape)}",
            f"{key}.shape",
        )

    def convert(rows: torch.Tensor) -> torch.Tensor:
        if dtype is not None:
            rows = rows.to(dtype)
        if spec.scale is not None:
            rows = rows * spec.scale
        return rows if shape is None else rows.reshape(len(rows), *shape)

    return convert


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def transfer_to(device: torch.device, dtype: str | None) -> Callable[[Batch], Batch] | None:
    """What brings a batch to the model's device and float type; None where it is there already."""
    if device.type == "cpu" and dtype is None:
        return None
    target: Any = getattr(torch, dtype) if dtype else None

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, target if tensor.is_floating_point() else None)

    return lambda batch: batch.map(move)
