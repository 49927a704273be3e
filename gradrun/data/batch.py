"""One batch of model inputs: selecting, slicing, and moving to a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from gradrun.core.errors import SampleError


class Batch(NamedTuple):
    """Arguments for one call of the model; every tensor has the shape [size, ...]."""

    args: tuple[torch.Tensor, ...]
    kwargs: dict[str, torch.Tensor]
    size: int
    ids: Sequence[int | str]
    errors: Mapping[int, SampleError] = MappingProxyType({})
    """Row -> the error for a sample that could not be read; its rows in the tensors are zero."""
    labels: torch.Tensor | None = None
    """The true classes or values [size, ...], if the data source reads them with the inputs."""
    kept: Mapping[str, Sequence[Any]] = MappingProxyType({})
    """Column of the input to its values, which are written beside the predictions."""
    lengths: Mapping[int, torch.Tensor] = MappingProxyType({})
    """Position in `tensors()` of an input that is padded at its end -> the length of each row."""

    def raise_errors(self) -> None:
        """Raise the first SampleError, if any."""
        for error in self.errors.values():
            raise error

    def select(self, rows: Sequence[int]) -> Batch:
        """Return a batch of the given rows, which must be free of errors."""
        index = torch.tensor(rows, dtype=torch.int64)
        selected = self.map(lambda tensor: tensor[index.to(tensor.device)])
        labels = None if self.labels is None else self.labels[index]
        kept = {name: [values[row] for row in rows] for name, values in self.kept.items()}
        ids = [self.ids[row] for row in rows]
        lengths = {position: values[index] for position, values in self.lengths.items()}
        return selected._replace(
            size=len(rows), ids=ids, errors={}, labels=labels, kept=kept, lengths=lengths
        )

    def slice(self, start: int, stop: int) -> Batch:
        """Return a batch of the rows from `start` up to but excluding `stop`."""
        errors = {row - start: error for row, error in self.errors.items() if start <= row < stop}
        sliced = self.map(lambda tensor: tensor[start:stop])
        labels = None if self.labels is None else self.labels[start:stop]
        kept = {name: values[start:stop] for name, values in self.kept.items()}
        ids = self.ids[start:stop]
        lengths = {position: values[start:stop] for position, values in self.lengths.items()}
        size = stop - start
        return sliced._replace(
            size=size, ids=ids, errors=errors, labels=labels, kept=kept, lengths=lengths
        )

    @property
    def elements(self) -> int:
        """The number of elements of all inputs."""
        return sum(tensor.numel() for tensor in self.tensors())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the largest input; () without inputs."""
        largest = max(self.tensors(), key=torch.Tensor.numel, default=None)
        return () if largest is None else tuple(largest.shape)

    def tensors(self) -> list[torch.Tensor]:
        """Return every input, in order."""
        return [*self.args, *self.kwargs.values()]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return a batch with `function` applied to every input."""
        return self._replace(
            args=tuple(map(function, self.args)),
            kwargs={name: function(value) for name, value in self.kwargs.items()},
        )


def transfer_to(device: torch.device, dtype: str | None) -> Callable[[Batch], Batch] | None:
    """Return a function that moves a batch to `device` and casts floating-point inputs to `dtype`.

    Return None if the batches of a data source need neither.
    """
    if device.type == "cpu" and dtype is None:
        return None
    target: Any = getattr(torch, dtype) if dtype else None

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, target if tensor.is_floating_point() else None)

    return lambda batch: batch.map(move)
