"""Batches that can be read once, in order, and whose number is unknown before the last."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gradrun.core.errors import ConfigError
from gradrun.core.units import pluralize
from gradrun.data.batch import Batch

WINDOW = 2
"""Recent batches that can be read again: a run reads two early, and a failed one twice."""


class StreamedBatches:
    """The range protocol of a BatchSource over an iterator of batches.

    The last batches that were read and the one with the most elements stay in memory, so that a run
    can inspect the first batches before it starts, read a failed batch again and measure the
    largest. A resume reads and drops the batches before its start.
    """

    def __init__(self, batches: Iterator[Batch], batch_size: int, key: str) -> None:
        """Read from an iterator.

        Args:
            batches: batches of `batch_size` samples; only the last may be shorter.
        """
        self._iterator, self.batch_size, self._key = batches, batch_size, key
        self.samples: int | None = None
        self._read = 0
        """Samples that were read."""
        self._recent: dict[int, Batch] = {}
        """First sample -> copy of a batch, which the model cannot change."""
        self._largest: tuple[int, Batch] | None = None

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches from sample `start`, as a BatchSource does.

        Raises:
            ConfigError: `start` is behind the end of the data, or before the batches in memory.
        """
        while stop is None or start < stop:
            batch = self._batch(start)
            if batch is None:
                return
            yield batch
            start += batch.size

    def _batch(self, start: int) -> Batch | None:
        """Return the batch with this first sample; None at the end."""
        if kept := self._kept(start):
            return kept.map(torch.clone)
        if start < self._read and start != self.samples:
            raise ConfigError(
                f"the batch of sample {start:,} is no longer in memory, and the data are read once",
                self._key,
            )
        batch = None
        while self.samples is None and self._read <= start:
            batch = self._next(keep=start - self._read < WINDOW * self.batch_size)
        if self.samples is not None and self._read < start:
            raise ConfigError(
                f"the data end after {pluralize(self._read, 'sample')}, and {start:,} are "
                "predicted already: they are not those of the run to resume",
                self._key,
            )
        if self._read == start:
            return None
        if batch and self._read - batch.size != start:
            raise ConfigError(
                f"the data have more than the {pluralize(start, 'sample')} of the run to resume",
                self._key,
            )
        return batch

    def _kept(self, start: int) -> Batch | None:
        if self._largest and self._largest[0] == start:
            return self._largest[1]
        return self._recent.get(start)

    def _next(self, *, keep: bool) -> Batch | None:
        batch = next(self._iterator, None)
        if batch is None:
            self._end()
            return None
        if keep:
            copy = batch.map(torch.clone)
            self._recent[self._read] = copy
            if len(self._recent) > WINDOW:
                del self._recent[next(iter(self._recent))]
            if self._largest is None or copy.elements > self._largest[1].elements:
                self._largest = (self._read, copy)
        self._read += batch.size
        if batch.size < self.batch_size:
            self._end()
        return batch

    def _end(self) -> None:
        self.samples = self._read
        self._iterator = iter(())  # ends the processes that an iterator may have started
