"""Predictions in .parquet parts: a row a sample, with its id and its outputs as numbers or lists.

Knows pyarrow's tables; when a part is written stands in parts.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradrun.core.optional import import_optional
from gradrun.output.formats.sharded_writer import Columns, ShardedWriter
from gradrun.output.journal import CommittedRange
from gradrun.output.transforms import MISSING_CLASS

_WIDENED = {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
"""Parquet has no such types; float32 holds each of their values exactly."""

_ROWS = 16 * 1024
"""How many are read back at once."""


class ParquetWriter(ShardedWriter):
    """One column an output in every part, one of the ids, and what classes are called."""

    suffix = "parquet"
    keeps_ids = True

    def __init__(self, folder: Path, samples: int) -> None:
        _arrow("parquet")  # where it is missing, nothing is to be written
        super().__init__(folder, samples)

    def open(self, outputs: Columns, kept: Sequence[CommittedRange] = ()) -> None:
        if "id" in outputs:
            raise ValueError("an output is called 'id', as the sample is; format: npy keeps both")
        if any(tensor.is_complex() for tensor in outputs.values()):
            raise ValueError("Parquet has no complex numbers; format: npy has")
        super().open(outputs, kept)

    def write(
        self, outputs: Columns, ids: Sequence[int | str], missing: Collection[int] = ()
    ) -> None:
        if not isinstance(ids, range):
            ids = [_text(name) if isinstance(name, str) else name for name in ids]
        super().write(outputs, ids, missing)

    def prepared(self, outputs: Columns) -> Columns:
        if any(tensor.dtype in _WIDENED for tensor in outputs.values()):
            return {n: t.float() if t.dtype in _WIDENED else t for n, t in outputs.items()}
        return outputs

    def encode(self, columns: Columns, ids: Sequence[int | str], start: int) -> bytes:
        arrow, parquet = _arrow(), _arrow("parquet")
        names = list(ids) if all(isinstance(name, int) for name in ids) else [*map(str, ids)]
        held = {"id": names, **{name: _column(arrow, rows) for name, rows in columns.items()}}
        for name, called in self.spelling.columns(columns).items():
            held[called] = self.spelling.names_of(columns[name].tolist())
        table = arrow.table(held)
        shapes = {f"shape.{n}": " ".join(map(str, t.shape[1:])) for n, t in columns.items()}
        told = {"start": str(start), **shapes}
        buffer = arrow.BufferOutputStream()
        parquet.write_table(table.replace_schema_metadata(told), buffer)
        return bytes(buffer.getvalue())

    def decode(self, path: Path) -> tuple[Columns, Sequence[int | str]]:
        table = _arrow("parquet").read_table(_arrow().BufferReader(path.read_bytes()))
        return _columns(table), table.column("id").to_pylist()


def read(folder: Path) -> Iterator[tuple[torch.Tensor, Columns]]:
    """The rows of every output, some at a time, part after part."""
    start = 0
    for path in sorted(folder.glob("predictions-*.parquet")):
        with _arrow("parquet").ParquetFile(path) as part:
            for batch in part.iter_batches(_ROWS):
                columns = _columns(_arrow().Table.from_batches([batch]))
                yield torch.arange(start, start + batch.num_rows), columns
                start += batch.num_rows


def _text(name: str) -> str:
    """A name that UTF-8 can hold: one of a file may be any bytes."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def _arrow(part: str = "") -> Any:
    return import_optional("pyarrow", "output.format", part)


def _column(arrow: Any, rows: torch.Tensor) -> Any:
    """A tensor [n, ...] as numbers, or as lists (of lists) of numbers; null for no class."""
    flat = rows.contiguous().numpy().reshape(-1)
    values = arrow.array(flat, mask=flat == MISSING_CLASS if flat.dtype == np.int64 else None)
    for depth in range(rows.ndim - 1, 0, -1):
        lists, size = math.prod(rows.shape[:depth]), rows.shape[depth]
        ends = arrow.array(np.arange(lists + 1, dtype=np.int32) * np.int32(size))
        values = arrow.ListArray.from_arrays(ends, values)
    return values


def _columns(table: Any) -> Columns:
    """A part's columns as the tensors that they were written from."""
    columns: Columns = {}
    for name in table.column_names:
        said = table.schema.metadata.get(f"shape.{name}".encode())
        if said is None:
            continue  # the id, or what classes are called
        shape = [int(size) for size in said.split()]
        values = table.column(name).combine_chunks()
        for _ in shape:
            values = values.flatten()
        if values.null_count:
            values = values.fill_null(MISSING_CLASS)
        flat = torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())
        columns[name] = flat.reshape(table.num_rows, *shape)
    return columns
