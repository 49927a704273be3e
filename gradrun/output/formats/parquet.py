"""Predictions in .parquet shards: one row per sample, with its id, outputs and class names.

The shards have a folder of their own, which other tools read as one dataset.

An output of several numbers is a column of (nested) lists. The values of a missing prediction and
missing classes are null.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradrun.core import files
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_optional
from gradrun.core.value_types import TypeMismatch, ValueType
from gradrun.output.columns import ValueColumn, check_storable, tensors_of
from gradrun.output.formats.arrow_values import (
    as_utf8,
    content_of,
    values_from_arrow,
    values_to_arrow,
)
from gradrun.output.formats.npy import with_numpy_dtype
from gradrun.output.formats.sharded_writer import Shard, ShardedWriter, row_checksum
from gradrun.output.formats.target import WriterTarget
from gradrun.output.journal import SUBFOLDER, CommittedRange
from gradrun.output.kept_columns import is_kept, title_of
from gradrun.output.missing import MISSING_CLASS

if TYPE_CHECKING:
    import torch

    from gradrun.output.columns import Column
    from gradrun.output.transforms import Outputs

Array = np.ndarray[Any, Any]

FOLDER = SUBFOLDER
"""Folder of the shards in the run folder; runs of journal format 1 have them beside the journal."""

_VALUES = "values."
"""Starts the metadata with the title of a column of values."""

_ROWS = 16 * 1024
"""Number of rows read at once."""


class ParquetWriter(ShardedWriter):
    """One column per output in each shard, besides the ids and the class names."""

    suffix = "parquet"
    subfolder = FOLDER
    stores_ids = True

    def __init__(self, target: WriterTarget) -> None:
        _pyarrow("parquet")  # fails before anything is written if pyarrow is missing
        super().__init__(target)
        self._labelled: dict[str, str] = {}
        """Output of class numbers to the column with their names."""
        self._kept: list[str] = []
        """The columns of the input, in the order of output.keep."""
        self._types: dict[str, ValueType] = {}
        """The types of the columns of values."""

    def open(self, outputs: Outputs, committed: Sequence[CommittedRange] = ()) -> None:
        check_storable(outputs, "Parquet")
        outputs = self.convert(outputs)
        self._types = {
            name: _known_type(name, column)
            for name, column in outputs.items()
            if isinstance(column, ValueColumn)
        }
        self._labelled = self.labels.columns(outputs)
        self._kept = [name for name in outputs if is_kept(name)]
        super().open(outputs, committed)

    def write(
        self, outputs: Outputs, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        if not isinstance(ids, range):
            ids = [as_utf8(name) if isinstance(name, str) else name for name in ids]
        for name, declared in self._types.items():
            _check_type(title_of(name), declared, outputs.get(name))
        super().write(outputs, ids, valid)

    def convert(self, outputs: Outputs) -> Outputs:
        return {name: _converted(column) for name, column in outputs.items()}

    def content(self, name: str, column: Column) -> bytes | memoryview:
        if not isinstance(column, ValueColumn):
            return super().content(name, column)
        arrow = _pyarrow()
        return b"".join(content_of(arrow, values_to_arrow(arrow, column.values, self._types[name])))

    def encode(self, columns: Outputs, ids: Sequence[int | str], start: int) -> bytes:
        arrow, parquet = _pyarrow(), _pyarrow("parquet")
        fields = {"id": _id_values(ids)}
        valid = self._valid[: len(ids)].numpy()
        kept = self._kept
        tensors, metadata = tensors_of(columns), {"start": str(start)}
        for name in (*kept, *(name for name in columns if name not in kept)):
            if name in tensors:
                fields[name] = _to_arrow(arrow, tensors[name], valid)
                metadata[f"shape.{name}"] = " ".join(map(str, tensors[name].shape[1:]))
            else:
                column: Any = columns[name]
                values = values_to_arrow(arrow, column.values, self._types[name])
                fields[title_of(name)] = values
                metadata[f"{_VALUES}{name}"] = title_of(name)
        for name, label in self._labelled.items():
            fields[label] = self.labels.names_of(columns[name].tolist())
        table = arrow.table(fields).replace_schema_metadata(metadata)
        buffer = arrow.BufferOutputStream()
        parquet.write_table(table, buffer, use_dictionary=_repeating(table.schema))
        return bytes(buffer.getvalue())

    def decode(self, path: Path) -> Shard:
        from torch import from_numpy

        table = _read_table(path)
        columns: Outputs = {name: from_numpy(rows) for name, rows in _to_numpy(table).items()}
        for name, values in _value_columns(table):
            columns[name] = ValueColumn(values_from_arrow(values, self._types[name]))
        return Shard(columns, table.column("id").to_pylist(), from_numpy(_valid_rows(table)))


def read(folder: Path, skip: Container[str] = ()) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Yield the tensors of all rows, some at a time."""
    first = 0
    for batch in _batches(folder):
        columns = _to_numpy(_pyarrow().Table.from_batches([batch]))
        yield np.arange(first, first + batch.num_rows), columns
        first += batch.num_rows


def records(folder: Path) -> Iterator[Any]:
    """Yield the rows."""
    for batch in _batches(folder):
        yield from batch.to_pylist()


def _batches(folder: Path) -> Iterator[Any]:
    for path in sorted((folder / FOLDER).glob("predictions-*.parquet")):
        with _pyarrow("parquet").ParquetFile(path) as shard:
            yield from shard.iter_batches(_ROWS)


def checksum(path: Path, committed: CommittedRange, begin: int) -> int:
    """CRC-32 of the rows of a range: those of each output in turn, by name, then the ids."""
    table = _read_table(path)
    start, count = (
        committed.start - int(table.schema.metadata[b"start"]),
        committed.stop - committed.start,
    )
    if start + count > table.num_rows:
        raise ValueError("the shard has fewer rows")
    rows = table.slice(start, count)
    content = {name: [column.tobytes()] for name, column in _to_numpy(rows).items()}
    content |= {name: [*content_of(_pyarrow(), values)] for name, values in _value_columns(rows)}
    columns = (b"".join(content[name]) for name in sorted(content))
    return row_checksum(columns, rows.column("id").to_pylist())


def _known_type(name: str, column: ValueColumn) -> ValueType:
    """Return the type of a column.

    Raises:
        ConfigError: its values have several types, or the first batch does not determine it.
    """
    try:
        kind = column.type
    except TypeMismatch as error:
        raise ConfigError(
            f"Parquet needs one type for column {title_of(name)!r}, which has {error}; set "
            "output.format: jsonl",
            "output.format",
        ) from error
    if not (kind.known or is_kept(name)):
        raise ConfigError(
            f"Parquet needs the type of output {name!r}, and the first batch does not determine "
            f"it ({kind}); return tensors, which have a dtype, or set output.format: jsonl",
            "output.format",
        )
    return kind


def _check_type(title: str, declared: ValueType, column: Column | None) -> None:
    """Raise ValueError unless the values of a batch have the type of the column."""
    if not isinstance(column, ValueColumn):
        return  # another error follows
    try:
        kind = _converted(column).type
    except TypeMismatch as error:
        raise ValueError(f"output {title!r} has {error}; use format: jsonl") from error
    if not declared.covers(kind):
        raise ValueError(
            f"output {title!r} had the type {declared} in the first batch, and now has {kind}; "
            "use format: jsonl for values of several types"
        )


def _converted(column: Any) -> Any:
    """Return a column in dtypes that NumPy has."""
    if not isinstance(column, ValueColumn):
        return with_numpy_dtype(column)
    return column.replaced(
        with_numpy_dtype(value) if hasattr(value, "dtype") else value for value in column.values
    )


def _id_values(ids: Sequence[int | str]) -> Any:
    """Return ids as whole numbers, or as texts if one is a text."""
    if isinstance(ids, range):
        return np.arange(ids.start, ids.stop)
    return list(ids) if all(isinstance(name, int) for name in ids) else [*map(str, ids)]


def _repeating(schema: Any) -> list[str]:
    """Return the paths of the columns whose values may repeat, for which Parquet has dictionaries.

    Dictionaries of ids and floats would take memory and enlarge the file.
    """
    parquet, buffer = _pyarrow("parquet"), _pyarrow().BufferOutputStream()
    parquet.write_metadata(schema, buffer)
    leaves = parquet.read_metadata(_pyarrow().BufferReader(buffer.getvalue())).schema
    return [
        leaf.path
        for leaf in (leaves.column(number) for number in range(len(leaves)))
        if leaf.path != "id" and leaf.physical_type not in {"FLOAT", "DOUBLE"}
    ]


def _pyarrow(module: str = "") -> Any:
    return import_optional("pyarrow", "output.format", module)


def _read_table(path: Path) -> Any:
    arrow, parquet = _pyarrow(), _pyarrow("parquet")
    with files.open_binary(path) as file:
        return parquet.read_table(arrow.BufferReader(file.read()))


def _to_arrow(arrow: Any, rows: torch.Tensor, valid: Array) -> Any:
    """An arrow array of a tensor [n, ...]: numbers, or (nested) lists.

    Values of invalid rows and MISSING_CLASS become null.
    """
    flat = rows.contiguous().numpy().reshape(-1)
    missing = np.repeat(~valid, flat.size // max(1, len(rows)))
    if flat.dtype == np.int64:
        missing |= flat == MISSING_CLASS
    values = arrow.array(flat, mask=missing if missing.any() else None)
    for depth in range(rows.ndim - 1, 0, -1):
        lists, size = math.prod(rows.shape[:depth]), rows.shape[depth]
        ends = arrow.array(np.arange(lists + 1, dtype=np.int32) * np.int32(size))
        values = arrow.ListArray.from_arrays(ends, values)
    return values


def _to_numpy(table: Any) -> dict[str, Array]:
    """The output columns of a table as arrays [n, ...]; null as the missing value of the dtype."""
    columns: dict[str, Array] = {}
    for name, values, shape in _flat_columns(table):
        missing = values.is_null().to_numpy(zero_copy_only=False)
        dtype = np.dtype(values.type.to_pandas_dtype())
        if dtype.kind in "iub" and values.null_count:
            values = values.fill_null(False if dtype.kind == "b" else 0)
        array = values.to_numpy(zero_copy_only=False).copy()
        if dtype.kind in "iu":
            array[missing] = np.iinfo(dtype).min or np.iinfo(dtype).max
        elif dtype.kind == "f":
            array[missing] = np.nan
        columns[name] = array.reshape(table.num_rows, *shape)
    return columns


def _valid_rows(table: Any) -> Array:
    """Mask of the rows with a value that is not null in any output."""
    valid = np.zeros(table.num_rows, bool)
    for _, values, shape in _flat_columns(table):
        present = values.is_valid().to_numpy(zero_copy_only=False)
        valid |= present.reshape(table.num_rows, math.prod(shape)).any(axis=1)
    for name, values in _value_columns(table):
        if not is_kept(name):
            valid |= values.is_valid().to_numpy(zero_copy_only=False)
    return valid


def _flat_columns(table: Any) -> Iterator[tuple[str, Any, list[int]]]:
    """Yield name, values without lists, and row shape of each output column."""
    for name in table.column_names:
        shape_text = table.schema.metadata.get(f"shape.{name}".encode())
        if shape_text is None:
            continue  # ids, values or class names
        shape = [int(size) for size in shape_text.split()]
        values = table.column(name).combine_chunks()
        for _ in shape:
            values = values.flatten()
        yield name, values, shape


def _value_columns(table: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the arrow array of each column of values."""
    for key, title in table.schema.metadata.items():
        if key.startswith(_VALUES.encode()):
            name = key.decode().removeprefix(_VALUES)
            yield name, table.column(title.decode()).combine_chunks()
