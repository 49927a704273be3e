"""Rows of Hugging Face datasets as tables, images and audio files are read."""

from __future__ import annotations

import io
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gradrun.config.data import DatasetSection, FilesData, TableData
from gradrun.config.model import ModelConfig
from gradrun.core.errors import ConfigError, SampleError
from gradrun.data.hf_dataset import HFDataset
from gradrun.data.row_transform import TransformedTable
from gradrun.data.rows import BEGINNING, Position, Reader, Record
from gradrun.data.sample_files import SampleFiles, list_samples
from gradrun.data.tables import FileTable, Table
from gradrun.results.result import Statement


def open_table(
    config: TableData, readers: Mapping[str, Reader], model: ModelConfig | None
) -> Table:
    """Open the table of a config, with its transform: a dataset, or files of some formats.

    Args:
        config: the data section; its transform is trusted.
        readers: format -> reader of files.

    Raises:
        ConfigError: it cannot be opened, or the transform cannot be imported.
    """
    table: Table
    if config.dataset:
        table = _DatasetTable(config.dataset, config.labels)
    else:
        table = FileTable(config, readers)
    return TransformedTable(table, config.transform, model) if config.transform else table


class _DatasetTable(Table):
    """The rows of a dataset, with names in place of the numbers of classes."""

    suffix, has_columns = "", True

    def __init__(self, section: DatasetSection, labels: str | None) -> None:
        self._dataset, self._labels = HFDataset(section), labels
        columns = self._dataset.columns
        self._columns = [name for name in columns if not self._dataset.has_media(name)]
        self.files = self._dataset.files

    def class_names(self, column: str) -> tuple[str, ...]:
        return self._dataset.class_names(column)

    def read(self, start: Position = BEGINNING) -> Generator[Record]:
        path, labels = Path(self._dataset.name), self._labels
        rows = self._dataset.rows(self._columns, start.lines)
        for number, fields in enumerate(rows, start.lines + 1):
            if labels in fields:
                fields[labels] = self._dataset.names_of_classes(labels, fields[labels])
            yield Record(path, number, fields, Position(lines=number, checksum=None))

    def describe_order(self, ids: str) -> Statement:
        text = f"rows as in the dataset {self._dataset.name}; ids: {ids}"
        return Statement(topic="order", text=text)

    def check_columns(self, record: Record, columns: Iterable[tuple[str, str]]) -> None:
        named = [*columns]
        self._dataset.check_columns(named)
        for key, column in named:
            if self._dataset.has_media(column):
                raise ConfigError(
                    f"the column {column!r} contains images or audio; read it with source: images "
                    "or audio",
                    key,
                )


@dataclass(frozen=True, kw_only=True)
class _DatasetFiles(SampleFiles):
    """Images or audio files in a column of a dataset."""

    dataset: HFDataset
    column: str
    own_classes: tuple[str, ...]

    @property
    def paths(self) -> list[Path]:
        return [*self.dataset.files]

    def open(self, number: int) -> IO[bytes]:
        value = self.dataset.value(self.column, number)
        if value and value["bytes"] is not None:
            return io.BytesIO(value["bytes"])
        if value and value["path"]:
            return Path(value["path"]).open("rb")
        raise SampleError(f"is null in the column {self.column!r}")

    def class_names(self, model_classes: Sequence[str]) -> tuple[str, ...]:
        own = self.own_classes
        if not own:
            return super().class_names(model_classes)
        return tuple(model_classes) if {*own} <= {*model_classes} else own


def open_samples(config: FilesData, suffixes: Collection[str], kind: str) -> SampleFiles:
    """Find the images or audio files of a config: in a dataset, a folder or a list.

    Args:
        suffixes: the lower-case suffixes of such files.
        kind: the plural noun of the files.

    Raises:
        ConfigError: there are none, or a column is missing or has other values.
    """
    if not config.dataset:
        return list_samples(config, suffixes, kind)
    if not isinstance(config.labels, str | None):
        raise ConfigError("the labels of a dataset are a column; set its name", "data.labels")
    dataset = HFDataset(config.dataset)
    column = config.column or _only_media(dataset, kind)
    named = {"column": column, "labels": config.labels, "id": config.id}
    dataset.check_columns((f"data.{key}", name) for key, name in named.items() if name)
    if not dataset.has_media(column):
        raise ConfigError(f"the column {column!r} does not contain {kind}", "data.column")
    if not len(dataset):
        raise ConfigError(f"{dataset.name} contains no rows", "data.dataset")
    described = f"column {config.id}" if config.id else "row numbers, from 0"
    return _DatasetFiles(
        root=Path(),
        names=_texts(dataset, config.id, "id") if config.id else [*map(str, range(len(dataset)))],
        order=f"as in the dataset {dataset.name}; ids: {described}",
        labels=_texts(dataset, config.labels, "label") if config.labels else [],
        dataset=dataset,
        column=column,
        own_classes=dataset.class_names(config.labels),
    )


def _only_media(dataset: HFDataset, kind: str) -> str:
    found = [name for name in dataset.columns if dataset.has_media(name)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(found or dataset.columns)
    text = f"several columns with {kind}: {listed}" if found else f"no {kind}, only {listed}"
    raise ConfigError(f"{dataset.name} has {text}; set data.column", "data.column")


def _texts(dataset: HFDataset, column: str, noun: str) -> list[str]:
    """Return the ids or labels of all rows as texts."""
    values = [dataset.names_of_classes(column, row[column]) for row in dataset.rows([column])]
    if None in values:
        key = "data.id" if noun == "id" else "data.labels"
        raise ConfigError(f"row {values.index(None)} of {dataset.name} has no {noun}", key)
    return [*map(str, values)]
