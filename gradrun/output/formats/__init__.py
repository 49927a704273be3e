"""Predictions to files: the contract of the shelf and its table.

Knows named tensors and a folder; not which model they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from gradrun.config.output import OutputSection
from gradrun.output.formats import csv_table, jsonl, npy, parquet, safetensors
from gradrun.output.journal import CommittedRange
from gradrun.output.transforms import ClassLabels


class PredictionWriter(Protocol):
    """Takes the outputs of one batch after the other, in the order of the input."""

    written: int
    """Samples that are in the files, whole, or will be with the next commit."""

    nonfinite: int
    """Of the samples committed, those that hold a NaN or an infinity."""

    spelling: ClassLabels
    """What the numbers of classes are called, for a format that holds text."""

    def open(self, outputs: dict[str, torch.Tensor], kept: Sequence[CommittedRange] = ()) -> None:
        """Make room for the run, given the first batch's outputs [size, ...] (written later).

        With commits of an earlier run, go on behind the last: what follows it in the files is
        forgotten.

        Raises:
            OSError: the folder cannot be written, the disk has too little room, or the files of
                the earlier run are not there.
        """

    def write(
        self,
        outputs: dict[str, torch.Tensor],
        ids: Sequence[int | str],
        missing: Collection[int] = (),
    ) -> None:
        """Add one batch; of the positions in `missing` the outputs hold nothing that was predicted.

        Raises:
            OSError: the disk is full; what was written before stays valid.
            ValueError: an output changed its shape.
        """

    def commit(self) -> list[CommittedRange]:
        """Bring what was written to the disk; tells what was not told before.

        Raises:
            OSError: it may not be there.
        """

    def close(self) -> list[CommittedRange]:
        """End the files so that they hold the samples written, and no more; the last commit."""

    def files(self) -> list[str]:
        """The names of the files in the folder."""


WRITERS: dict[str, Callable[[Path, int], Any]] = {
    "npy": npy.NpyWriter,
    "safetensors": safetensors.SafetensorsWriter,
    "jsonl": jsonl.JsonlWriter,
    "csv": csv_table.CsvWriter,
    "parquet": parquet.ParquetWriter,
}
"""format -> (folder, samples) to Sink."""


Read = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Some samples in order: their numbers [n], and their outputs [n, ...]."""

READERS: dict[str, Callable[[Path], Iterator[Read]]] = {
    "npy": npy.read,
    "safetensors": safetensors.read,
    "jsonl": jsonl.read,
    "csv": csv_table.read,
    "parquet": parquet.read,
}
"""format -> what reads a finished run's folder back, about a MiB at a time.

Of samples that were set apart a reader gives what lies in their place, or leaves them out.
"""


def open_writer(
    config: OutputSection, samples: int, classes: Sequence[str] = ()
) -> PredictionWriter:
    """The sink that a config names; nothing is written before its `open`.

    `classes` are what the model calls them; a format that holds text writes their names.
    """
    sink: PredictionWriter = WRITERS[config.format](config.path, samples)
    sink.spelling = ClassLabels(config, classes)
    return sink
