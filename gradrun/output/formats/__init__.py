"""Output formats: each module writes, resumes, reads and verifies the files of one format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gradrun.config.output import OutputSection
from gradrun.output.class_labels import ClassLabels
from gradrun.output.formats import csv_table, jsonl, npy, parquet, safetensors, text_writer
from gradrun.output.journal import CommittedRange

if TYPE_CHECKING:
    import torch

    from gradrun.output.transforms import Outputs


class PredictionWriter(Protocol):
    """Writes the outputs of consecutive batches, in the order of the input."""

    @property
    def written(self) -> int:
        """Samples received so far; they survive a crash only after a commit."""

    @property
    def nonfinite(self) -> int:
        """Committed samples with a NaN or an infinity, without the quarantined ones."""

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        """Create the files, or continue those of an earlier run after its last range.

        Args:
            outputs: tensors [size, ...] of some batch, for names, shapes and dtypes.
            committed: ranges of the earlier run; anything after them in the files is discarded.

        Raises:
            OSError: the folder is not writable, the disk is too small, or the files of the earlier
                run are missing or incomplete.
            ValueError: the format cannot represent the outputs.
        """

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            outputs: tensors [n, ...].
            ids: ids of the n samples.
            valid: mask [n], false for samples without a prediction; None if all have one.

        Raises:
            OSError: the disk is full; earlier rows are not affected.
            ValueError: an output has another shape or dtype than before.
        """

    def commit(self) -> list[CommittedRange]:
        """Sync complete rows to the disk; returns their ranges, each once.

        Raises:
            OSError: rows since the last commit may be lost.
        """

    def close(self) -> list[CommittedRange]:
        """Commit all rows and close the files."""

    def files(self) -> list[str]:
        """Names of the files in the folder."""


WRITERS: dict[str, Callable[[Path, int, int, ClassLabels], PredictionWriter]] = {
    "npy": npy.NpyWriter,
    "safetensors": safetensors.SafetensorsWriter,
    "jsonl": jsonl.JsonlWriter,
    "csv": csv_table.CsvWriter,
    "parquet": parquet.ParquetWriter,
}
"""Format to a function (folder, samples, batch size, class labels) -> writer."""

Rows = tuple[npy.Array, dict[str, npy.Array]]
"""Numbers [n] of some samples in order, and their outputs [n, ...]."""

READERS: dict[str, Callable[[Path], Iterator[Rows]]] = {
    "npy": npy.read,
    "safetensors": safetensors.read,
    "jsonl": jsonl.read,
    "csv": csv_table.read,
    "parquet": parquet.read,
}
"""Format to a function that yields the rows of a run folder, in chunks of about a MiB.

Rows of quarantined samples are omitted, or have the missing value of their dtype.
"""

CHECKSUMS: dict[str, Callable[[Path, CommittedRange, int], int]] = {
    "npy": npy.checksum,
    "safetensors": safetensors.checksum,
    "jsonl": text_writer.checksum,
    "csv": text_writer.checksum,
    "parquet": parquet.checksum,
}
"""Format to a function (file, range, offset of its first byte in a text file) -> CRC-32.

It raises OSError if the file is missing or too short, and any exception if it is damaged.
"""


def open_writer(
    config: OutputSection, samples: int, batch_size: int = 1, classes: Sequence[str] = ()
) -> PredictionWriter:
    """The writer for a config; it creates no files before `open`.

    Args:
        config: the output section.
        samples: number of samples of the run.
        batch_size: samples between two points at which a run can be resumed.
        classes: class names of the model, which text and table formats write.
    """
    return WRITERS[config.format](config.path, samples, batch_size, ClassLabels(config, classes))
