"""Predictions in .parquet shards: one row per sample, with its id, outputs and class names.

An output of several numbers is a column of (nested) lists. A missing class is null.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradrun.core import files
from gradrun.core.optional import import_optional
from gradrun.output.class_labels import ClassLabels
from gradrun.output.formats.npy import has_numpy_dtype
from gradrun.output.formats.sharded_writer import Columns, ShardedWriter, row_checksum
from gradrun.output.journal import CommittedRange
from gradrun.output.missing import MISSING_CLASS

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

_ROWS = 16 * 1024
"""Number of rows read at once."""


class ParquetWriter(ShardedWriter):
    """One column per output in each shard, besides the ids and the class names."""

    suffix = "parquet"
    stores_ids = True

    def __init__(
        self, folder: Path, samples: int, batch_size: int = 1, labels: ClassLabels | None = None
    ) -> None:
        _pyarrow("parquet")  # fails before anything is written if pyarrow is missing
        super().__init__(folder, samples, batch_size, labels)

    def open(self, outputs: Columns, committed: Sequence[CommittedRange] = ()) -> None:
        if "id" in outputs:
            raise ValueError("the output name 'id' is reserved for sample ids; use format: npy")
        if any(tensor.is_complex() for tensor in outputs.values()):
            raise ValueError("Parquet has no complex numbers; use format: npy")
        super().open(outputs, committed)

    def write(
        self, outputs: Columns, ids: Sequence[int | str], valid: torch.Tensor | None = None
    ) -> None:
        if not isinstance(ids, range):
            ids = [_as_utf8(name) if isinstance(name, str) else name for name in ids]
        super().write(outputs, ids, valid)

    def convert(self, outputs: Columns) -> Columns:
        if all(has_numpy_dtype(tensor) for tensor in outputs.values()):
            return outputs
        return {n: t if has_numpy_dtype(t) else t.float() for n, t in outputs.items()}

    def encode(self, columns: Columns, ids: Sequence[int | str], start: int) -> bytes:
        arrow, parquet = _pyarrow(), _pyarrow("parquet")
        numbered = all(isinstance(sample_id, int) for sample_id in ids)
        fields = {"id": list(ids) if numbered else [*map(str, ids)]}
        fields |= {name: _to_arrow(arrow, rows) for name, rows in columns.items()}
        for name, label in self.labels.columns(columns).items():
            fields[label] = self.labels.names_of(columns[name].tolist())
        shapes = {f"shape.{n}": " ".join(map(str, t.shape[1:])) for n, t in columns.items()}
        table = arrow.table(fields).replace_schema_metadata({"start": str(start), **shapes})
        buffer = arrow.BufferOutputStream()
        parquet.write_table(table, buffer)
        return bytes(buffer.getvalue())

    def decode(self, path: Path) -> tuple[Columns, Sequence[int | str]]:
        from torch import from_numpy

        table = _read_table(path)
        columns = {name: from_numpy(rows) for name, rows in _to_numpy(table).items()}
        return columns, table.column("id").to_pylist()


def read(folder: Path) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Yield all rows, some at a time; a missing class is MISSING_CLASS."""
    first = 0
    for path in sorted(folder.glob("predictions-*.parquet")):
        with _pyarrow("parquet").ParquetFile(path) as shard:
            for batch in shard.iter_batches(_ROWS):
                columns = _to_numpy(_pyarrow().Table.from_batches([batch]))
                yield np.arange(first, first + batch.num_rows), columns
                first += batch.num_rows


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
    columns = _to_numpy(rows)
    values = (columns[name].tobytes() for name in sorted(columns))
    return row_checksum(values, rows.column("id").to_pylist())


def _as_utf8(name: str) -> str:
    """Escape bytes of a file name that UTF-8 cannot encode."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def _pyarrow(module: str = "") -> Any:
    return import_optional("pyarrow", "output.format", module)


def _read_table(path: Path) -> Any:
    arrow, parquet = _pyarrow(), _pyarrow("parquet")
    with files.open_binary(path) as file:
        return parquet.read_table(arrow.BufferReader(file.read()))


def _to_arrow(arrow: Any, rows: torch.Tensor) -> Any:
    """An arrow array of a tensor [n, ...]: numbers, or (nested) lists; MISSING_CLASS as null."""
    flat = rows.contiguous().numpy().reshape(-1)
    values = arrow.array(flat, mask=flat == MISSING_CLASS if flat.dtype == np.int64 else None)
    for depth in range(rows.ndim - 1, 0, -1):
        lists, size = math.prod(rows.shape[:depth]), rows.shape[depth]
        ends = arrow.array(np.arange(lists + 1, dtype=np.int32) * np.int32(size))
        values = arrow.ListArray.from_arrays(ends, values)
    return values


def _to_numpy(table: Any) -> dict[str, Array]:
    """The output columns of a table as arrays [n, ...]; null as MISSING_CLASS."""
    columns: dict[str, Array] = {}
    for name in table.column_names:
        shape_text = table.schema.metadata.get(f"shape.{name}".encode())
        if shape_text is None:
            continue  # ids or class names
        shape = [int(size) for size in shape_text.split()]
        values = table.column(name).combine_chunks()
        for _ in shape:
            values = values.flatten()
        if values.null_count:
            values = values.fill_null(MISSING_CLASS)
        columns[name] = values.to_numpy(zero_copy_only=False).copy()
        columns[name] = columns[name].reshape(table.num_rows, *shape)
    return columns
