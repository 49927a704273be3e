"""Output formats: each module writes, resumes, reads and verifies the files of one format."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from gradrun.config.objects import ObjectOutput
from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError, UnsupportedValues
from gradrun.core.value_types import TypeMismatch
from gradrun.output import journal
from gradrun.output.class_labels import ClassLabels
from gradrun.output.columns import ValueColumn, describe_values
from gradrun.output.formats import (
    csv_table,
    ids_file,
    jsonl,
    memory,
    npy,
    parquet,
    safetensors,
    sample_files,
    text_writer,
)
from gradrun.output.formats.target import WriterTarget
from gradrun.output.journal import CommittedRange
from gradrun.output.kept_columns import is_kept, title_of
from gradrun.results.result import Statement

if TYPE_CHECKING:
    import torch

    from gradrun.output.transforms import Outputs


class RowWriter(Protocol):
    """Receives the outputs of consecutive batches."""

    @property
    def written(self) -> int:
        """Samples received so far, and before the run."""

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            outputs: columns of n samples.
            ids: ids of the n samples.
            valid: mask [n], false for samples without a prediction; None if all have one.

        Raises:
            OSError: the disk is full; earlier rows are not affected.
            ValueError: an output has another shape, dtype or type than before.
        """


class PredictionWriter(RowWriter, Protocol):
    """Writes the outputs to files, in the order of the input; a commit makes them durable."""

    @property
    def nonfinite(self) -> int:
        """Committed samples with a NaN or an infinity, without the quarantined ones."""

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        """Create the files, or continue those of an earlier run after its last range.

        Args:
            outputs: those of some batch, for names, shapes, dtypes and types.
            committed: ranges of the earlier run; anything after them in the files is discarded.

        Raises:
            OSError: the folder is not writable, the disk is too small, or the files of the earlier
                run are missing or incomplete.
            ValueError: the format cannot represent the outputs.
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


Rows = tuple[npy.Array, dict[str, npy.Array]]
"""Numbers [n] of some samples in order, and their outputs [n, ...]."""


class Format(NamedTuple):
    """Functions of an output format, and the names of its files."""

    writer: Callable[[WriterTarget], PredictionWriter]
    read: Callable[[Path, Container[str]], Iterator[Rows]]
    """Yield the rows of a run folder, in chunks of about a MiB, without some columns.

    Those are the columns of values that are not one tensor, which no reader needs. Rows of
    quarantined samples are omitted, or have the missing value of their dtype.
    """
    checksum: Callable[[Path, CommittedRange, int], int]
    """Return the CRC-32 of a range, given the file and the offset of the range in a text file.

    Raises OSError if the file is missing or too short, and any exception if it is damaged.
    """
    files: tuple[str, ...]
    """Patterns of the file names."""
    joins_outputs: Callable[[str], bool] = lambda _: False
    """Return whether `read` may yield the output of this name as a part of another."""
    stores_ids: bool = True
    """Whether the files contain the ids of the samples; otherwise ids.txt does."""
    typed_ids: bool = False
    """Whether the files contain whole numbers as numbers, and other ids as text."""
    describe: Callable[[ClassLabels, Outputs], Iterator[tuple[str, str]]] = lambda *_: iter(())
    """Yield the names of outputs, and how they are written where the config leaves a choice."""
    records: Callable[[Path], Iterator[Any]] | None = None
    """Yield the row of each sample with its values, as JSON; None if `read` yields all values."""
    values: Literal["none", "scalars", "any"] = "none"
    """Which values a sample may have besides rows of a tensor: none; a text or a number; or also
    lists, records, and tensors of any shape."""


_SHARD = f"predictions-{'[0-9]' * 5}"

FORMATS = {
    "npy": Format(
        lambda target: npy.NpyWriter(target.folder, target.samples),
        npy.read,
        npy.checksum,
        ("predictions.npy", "predictions.*.npy"),
        stores_ids=False,
    ),
    "safetensors": Format(
        safetensors.SafetensorsWriter,
        safetensors.read,
        safetensors.checksum,
        (f"{_SHARD}.safetensors",),
        stores_ids=False,
    ),
    "jsonl": Format(
        jsonl.JsonlWriter,
        jsonl.read,
        text_writer.checksum,
        ("predictions.jsonl",),
        typed_ids=True,
        records=jsonl.records,
        values="any",
    ),
    "csv": Format(
        csv_table.CsvWriter,
        csv_table.read,
        text_writer.checksum,
        ("predictions.csv",),
        csv_table.joins_outputs,
        records=csv_table.records,
        values="scalars",
    ),
    "parquet": Format(
        parquet.ParquetWriter,
        parquet.read,
        parquet.checksum,
        (f"{parquet.FOLDER}/{_SHARD}.parquet", f"{_SHARD}.parquet"),
        typed_ids=True,
        records=parquet.records,
        values="any",
    ),
    "files": Format(
        sample_files.FilesWriter,
        sample_files.read,
        sample_files.checksum,
        (sample_files.INDEX, *(f"{journal.SUBFOLDER}/*{end}" for end in sample_files.SUFFIXES)),
        joins_outputs=lambda _: True,
        typed_ids=True,
        records=sample_files.records,
        values="any",
        describe=sample_files.describe,
    ),
}


def read_rows(config: OutputSection, skip: Container[str] = ()) -> Iterator[Rows]:
    """Yield the predictions of a run, as `Format.read` does."""
    if isinstance(config, ObjectOutput):
        return config.arrays.read(skip)  # type: ignore[no-any-return]
    return FORMATS[config.format].read(config.path, skip)


def checksum(path: Path, committed: CommittedRange, begin: int) -> int:
    """Return the CRC-32 of a range in a file of any format, as `Format.checksum` does."""
    if path.name == ids_file.FILE_NAME:
        return text_writer.checksum(path, committed, begin)
    form = "files" if path.name == sample_files.INDEX else path.suffix.removeprefix(".")
    return FORMATS[form].checksum(path, committed, begin)


def check_columns(config: OutputSection, outputs: Outputs) -> None:
    """Check that the format of a config can store the outputs of a batch.

    Raises:
        ConfigError: it cannot, or two columns have the same title.
    """
    kept = {title_of(name) for name in outputs if is_kept(name)}
    own = {"id", *(name for name in outputs if not is_kept(name))}
    if repeated := next(iter(sorted(kept & own)), None):
        raise ConfigError(
            f"the predictions have two columns {repeated!r}: a column of output.keep has the name "
            "of an output; set output.name, or remove it from output.keep",
            "output.keep",
        )
    allowed = FORMATS[config.format].values
    able = [name for name, form in FORMATS.items() if form.values == "any"]
    for name, column in outputs.items():
        if not isinstance(column, ValueColumn) or allowed == "any":
            continue
        try:
            scalar = column.type.scalar
        except TypeMismatch:
            scalar = False
        if allowed == "scalars" and scalar:
            continue
        able += [form for form, f in FORMATS.items() if scalar and f.values == "scalars"]
        formats = f"{', '.join(able[:-1])} or {able[-1]}"
        raise UnsupportedValues(
            f"{config.format} cannot store {title_of(name)!r}, whose samples have values of "
            f"any size ({describe_values(column)}); set output.format: {formats}",
            "output.format",
        )


def statements(
    config: OutputSection,
    outputs: Outputs,
    classes: Sequence[str] = (),
    class_counts: Mapping[str, int] | None = None,
) -> Iterator[Statement]:
    """Yield how the format writes the outputs, where it has a choice."""
    labels = ClassLabels(config, classes, class_counts)
    for name, text in FORMATS[config.format].describe(labels, outputs):
        yield Statement(topic=f"file of {name}", text=text)


def open_writer(
    config: OutputSection,
    samples: int | None,
    batch_size: int = 1,
    classes: Sequence[str] = (),
    *,
    has_ids: bool = False,
    class_counts: Mapping[str, int] | None = None,
) -> PredictionWriter:
    """The writer for a config; it creates no files before `open`.

    Args:
        samples: number of samples of the run; None if unknown, which makes the files grow.
        batch_size: samples between two points at which a run can be resumed.
        has_ids: whether samples have ids of their own, not row numbers.
        class_counts: number of classes of outputs, which get names only if they have as many.
    """
    if isinstance(config, ObjectOutput):
        return memory.MemoryWriter(config.arrays, samples)
    form = FORMATS[config.format]
    labels = ClassLabels(config, classes, class_counts)
    writer = form.writer(WriterTarget(config.path, samples, batch_size, labels))
    if has_ids and not form.stores_ids:
        return ids_file.IdsWriter(writer, config.path)
    return writer
