"""What is really in a run's files: each committed range read back and held against its checksum.

Knows the layout of each format, and needs neither torch nor the model.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from gradrun.core import files
from gradrun.core.errors import GradrunError
from gradrun.core.optional import import_optional
from gradrun.output.journal import CommittedRange, JournalState
from gradrun.results.result import DamagedRange

_MOST_HEADER = 100_000_000
"""Bytes that the format allows a header of a .safetensors file."""


class _DamagedError(Exception):
    """What is wrong with a file, in a few words."""


def faults(folder: Path, kept: JournalState) -> Iterator[DamagedRange]:
    """Read back every committed range; yields those that are gone or changed."""
    before: CommittedRange | None = None
    for committed in kept.commits:
        for file, expected in committed.files.items():
            path = folder / file
            check = _CHECKS.get(path.suffix, _of_another)
            # Of a part, or, while it is not full, of the plain rows beside it.
            rest = path.with_name(f"{file}.rest")
            if not path.exists() and rest.exists():
                check, path = _of_rest, rest
            try:
                found = check(path, committed, before)
            except OSError as error:
                what = error.strerror or str(error)
            except _DamagedError as error:
                what = str(error)
            except GradrunError:  # the library that reads it is missing: nothing is known of it
                raise
            except Exception:  # a damaged header fails in any of a dozen ways
                what = "its header is damaged"
            else:
                if found == expected:
                    continue
                what = "its checksum differs"
            yield DamagedRange(committed.start, committed.stop, file, what)
        before = committed


def _of_npy(path: Path, committed: CommittedRange, before: CommittedRange | None) -> int:
    with _opened(path) as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        begin, row = file.tell(), dtype.itemsize
        for size in shape[1:]:
            row *= size
        end = begin + committed.stop * row
        _check_size(file.fileno(), end)
        return files.checksum(file.fileno(), begin + committed.start * row, end)


def _of_lines(path: Path, committed: CommittedRange, before: CommittedRange | None) -> int:
    begin = before.end or 0 if before else 0
    end = committed.end or 0
    with _opened(path) as file:
        _check_size(file.fileno(), end)
        return files.checksum(file.fileno(), begin, end)


def _of_safetensors(path: Path, committed: CommittedRange, before: CommittedRange | None) -> int:
    with _opened(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MOST_HEADER:
            raise _DamagedError("its header is damaged")
        header = json.loads(file.read(length))
        first = int(header.pop("__metadata__")["samples"].partition(":")[0])
        found = 0
        for name in sorted(header):
            begin, end = (8 + length + at for at in header[name]["data_offsets"])
            rows = header[name]["shape"][0]
            row = (end - begin) // rows
            start, stop = committed.start - first, committed.stop - first
            _check_size(file.fileno(), begin + stop * row)
            if stop > rows:
                raise _DamagedError(f"it holds {rows} samples of its part")
            found = files.checksum(file.fileno(), begin + start * row, begin + stop * row, found)
        return found


def _of_parquet(path: Path, committed: CommittedRange, before: CommittedRange | None) -> int:
    """Of the rows as the sink held them: each output's bytes by its name, then a line an id."""
    arrow, parquet = import_optional("pyarrow", ""), import_optional("pyarrow", "", "parquet")
    with _opened(path) as file:
        data = file.read()
    try:
        table = parquet.read_table(arrow.BufferReader(data))
    except Exception as error:  # in any of a dozen ways
        raise _DamagedError("the file is damaged") from error
    first = int(table.schema.metadata[b"start"])
    start, count = committed.start - first, committed.stop - committed.start
    if start + count > table.num_rows:
        raise _DamagedError(f"it holds {table.num_rows} samples of its part")
    found = 0
    told = table.schema.metadata
    for name in sorted(name for name in table.column_names if f"shape.{name}".encode() in told):
        values = table.column(name).slice(start, count).combine_chunks()
        while arrow.types.is_list(values.type):
            values = values.flatten()
        if values.null_count:  # no class, for which the sink held the least integer
            values = values.fill_null(np.iinfo(np.int64).min)
        found = zlib.crc32(values.to_numpy(zero_copy_only=False).tobytes(), found)
    for name in table.column("id").slice(start, count).to_pylist():
        found = zlib.crc32(json.dumps(name).encode() + b"\n", found)
    return found


def _of_rest(path: Path, committed: CommittedRange, before: CommittedRange | None) -> int:
    of_same_part = before is not None and before.files.keys() == committed.files.keys()
    begin = before.end or 0 if before and of_same_part else 0
    end = committed.end or 0
    with _opened(path) as file:
        _check_size(file.fileno(), end)
        return files.checksum(file.fileno(), begin, end)


def _of_another(path: Path, committed: CommittedRange, before: CommittedRange | None) -> int:
    raise _DamagedError("no run writes a file of this kind")


def _opened(path: Path) -> IO[bytes]:
    return os.fdopen(files.open_regular(path, os.O_RDONLY), "rb")


def _check_size(descriptor: int, end: int) -> None:
    if files.size(descriptor) < end:
        raise _DamagedError("the file is cut off")


_CHECKS: dict[str, Callable[[Path, CommittedRange, CommittedRange | None], int]] = {
    ".npy": _of_npy,
    ".jsonl": _of_lines,
    ".csv": _of_lines,
    ".safetensors": _of_safetensors,
    ".parquet": _of_parquet,
}
