"""Samples that threads decode from files, some batches ahead of the model."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from gradrun.config.data import FilesData
from gradrun.core.cpu import available_cpus
from gradrun.core.errors import ConfigError, SampleError
from gradrun.data.batch import Batch
from gradrun.data.sample_files import SampleFiles
from gradrun.data.source import BatchSource

Decoding = TypeVar("Decoding")
Decoded = np.ndarray[Any, np.dtype[np.float32]]

_BATCHES_AHEAD = 2


class DecodedFiles(BatchSource, Generic[Decoding]):
    """A source of files; a subclass decodes one, and collates those of a batch."""

    has_ids = has_previews = True
    samples: int
    noun: str

    def __init__(
        self, config: FilesData, listed: SampleFiles, samples: int, model_classes: Sequence[str]
    ) -> None:
        self.config, self._listed = config, listed
        self.classes = config.classes or listed.class_names(model_classes)
        self.batch_size, self.samples = config.batch_size, samples
        self.flags = np.zeros(samples, np.uint8)

    @property
    def files(self) -> list[Path]:
        return self._listed.paths

    @property
    def repeated_ids(self) -> int:
        return self._listed.repeated

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        firsts = range(start, self.samples if stop is None else stop, self.batch_size)
        left = (range(first, min(first + self.batch_size, self.samples)) for first in firsts)
        ahead: deque[tuple[range, Decoding]] = deque()
        wanted = 1  # often only the first batch is read, for example after an error
        threads = self.config.decode_threads
        pool = ThreadPoolExecutor(
            available_cpus() if threads == "auto" else threads, "gradrun-decode"
        )
        try:
            while True:
                for numbers in itertools.islice(left, wanted - len(ahead)):
                    ahead.append((numbers, self._decode(pool, numbers)))
                if not ahead:
                    return
                yield self._collate(*ahead.popleft())
                wanted = 1 + _BATCHES_AHEAD
        finally:
            pool.shutdown(cancel_futures=True)

    def labels(self) -> Iterator[torch.Tensor]:
        return self._listed.label_numbers(range(self.samples), self.classes)

    def _decode(self, pool: ThreadPoolExecutor, numbers: range) -> Decoding:
        """Submit the files of the samples of a batch to the pool."""
        raise NotImplementedError

    def _collate(self, numbers: range, decoding: Decoding) -> Batch:
        """Return the batch of some samples when their files are decoded."""
        raise NotImplementedError

    def _read(self, number: int) -> Decoded:
        """Return the values of one sample.

        Raises:
            SampleError: its file cannot be decoded.
        """
        raise NotImplementedError

    def _first(self) -> Decoded:
        """Return the first sample that can be decoded."""
        problem: SampleError | None = None
        for number in range(self.samples):
            try:
                return self._read(number)
            except SampleError as error:
                problem = error
        raise self._unreadable(problem) from problem

    def _unreadable(self, problem: SampleError | None) -> ConfigError:
        return ConfigError(f"no {self.noun} can be read; the last error: {problem}", "data.path")
