"""Several files as one table or array: order, ids, ranges, compressions, and shards that differ."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from gradrun.core.errors import ConfigError
from gradrun.data import rows
from gradrun.data.batch import Batch
from gradrun.data.source import BatchSource
from tests.core.test_input_files import COMPRESS
from tests.support.sources import data, data_error, joined

SIZE = 4
COUNTS = [5, 0, 7, 1, 10]
"""Rows of each shard; one is empty."""
VALUES = np.arange(2 * sum(COUNTS), dtype=np.float32).reshape(-1, 2) / 8
FORMATS = [*(f"jsonl{suffix}" for suffix in ("", *COMPRESS)), "csv", "csv.gz", "parquet", "npy"]
RANGES = [(0, 23), (0, 4), (4, 12), (12, 23), (20, 23), (4, 8), (8, 8), (16, 20)]


def write(path: Path, values: np.ndarray[Any, Any]) -> Path:
    table = pandas.DataFrame(values, columns=["a", "b"]).assign(key=[f"k{v[0]}" for v in values])
    suffix = "".join(path.suffixes[-2:] if path.suffix in COMPRESS else path.suffixes[-1:])
    match suffix.split(".")[1]:
        case "npy":
            np.save(path.with_name("x.npy"), values)
            content = path.with_name("x.npy").read_bytes()
            path.with_name("x.npy").unlink()
        case "parquet":
            content = table.to_parquet(row_group_size=3)
        case "csv":
            content = table.to_csv(index=False).encode()
        case _:
            lines = (json.dumps(row) for row in table.to_dict("records"))
            content = "\n".join(lines).encode()  # without a line end after the last row
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    return path


def shards(folder: Path, form: str, counts: Sequence[int] = COUNTS) -> list[Path]:
    """Write the values as shards part-7, part-8, ..., which text order would mix up."""
    bounds = np.cumsum([0, *counts])
    return [
        write(folder / f"part-{number}.{form}", VALUES[bounds[number - 7] : bounds[number - 6]])
        for number in range(7, 7 + len(counts))
    ]


def opened(path: Any, form: str, **keys: Any) -> BatchSource:
    if "npy" in form:
        return data("arrays", path=path, batch_size=SIZE)
    inputs = {"x": {"columns": ["a", "b"]}}
    return data("records", path=path, inputs=inputs, batch_size=SIZE, **keys)


def same(left: Batch, right: Batch) -> bool:
    return list(left.ids) == list(right.ids) and torch.equal(left.args[0], right.args[0])


@pytest.mark.parametrize("form", [*FORMATS, "npy.gz"])
def test_shards_are_read_as_one_file_and_from_any_batch(tmp_path: Path, form: str) -> None:
    shards(tmp_path, form)
    source = opened(tmp_path, form)
    whole = list(source.batches())
    assert joined(whole).tolist() == VALUES.tolist()
    assert [id for batch in whole for id in batch.ids] == [*range(23)]
    for start, stop in RANGES:  # also backward
        found = list(source.batches(start, stop))
        expected = whole[start // SIZE : -(-stop // SIZE)]
        assert len(found) == len(expected)
        assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_a_compressed_file_is_read_once_by_ranges_that_increase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.csv.gz", VALUES)
    source = opened(tmp_path / "x.csv.gz", "csv")
    opens: list[Path] = []
    open_input = rows.open_input
    monkeypatch.setattr(rows, "open_input", lambda path: (opens.append(path), open_input(path))[1])
    ranges = [(0, 4), (8, 12), (12, 16), (20, 23)]
    found = [joined(source.batches(*span)) for span in ranges]
    assert all(
        torch.equal(part, torch.from_numpy(VALUES[start:stop]))
        for part, (start, stop) in zip(found, ranges, strict=True)
    )
    assert len(opens) == 1


def test_ids_of_a_column_and_labels_come_from_all_files(tmp_path: Path) -> None:
    shards(tmp_path, "jsonl.gz")
    source: Any = opened(tmp_path, "jsonl", id="key", labels="b")
    ids = [id for batch in source.batches() for id in batch.ids]
    assert ids == [f"k{value[0]}" for value in VALUES]
    assert torch.cat([*source.labels()]).tolist() == VALUES[:, 1].tolist()


def test_arrays_have_labels_in_several_files(tmp_path: Path) -> None:
    shards(tmp_path, "npy")
    (tmp_path / "labels").mkdir()
    for number, part in enumerate(np.split(np.arange(23), [11, 12])):
        np.save(tmp_path / "labels" / f"{number}.npy", part)
    source: Any = data(
        "arrays",
        path=tmp_path / "part-*.npy",
        labels={"path": str(tmp_path / "labels")},
        batch_size=SIZE,
    )
    assert torch.cat([*source.labels()]).tolist() == [*range(23)]


def test_the_statement_names_the_first_and_the_last_file(tmp_path: Path) -> None:
    shards(tmp_path, "jsonl.gz")
    (tmp_path / "notes.md").touch()
    found = [(s.topic, s.text) for s in opened(tmp_path, "jsonl").statements()]
    assert ("files", "1 other file (1 .md) not read") in found
    assert (
        "files",
        "5 files (1 empty), jsonl.gz, 23 rows, first part-7.jsonl.gz, last part-11.jsonl.gz",
    ) in found
    assert (
        "order",
        "rows as in the files, in natural order; ids: row numbers, from 0",
    ) in found


# --- files that differ ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_file_without_a_column_of_the_others_is_an_error(tmp_path: Path, form: str) -> None:
    shards(tmp_path, form, [3, 2])
    table = pandas.DataFrame({"a": [1.0], "c": [2.0], "key": "x"})
    path = tmp_path / f"part-9.{form}"
    table.to_csv(path, index=False) if form == "csv" else table.to_parquet(path)
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, form)
    assert f"part-9.{form} has no column 'b', unlike part-7.{form}" in str(caught.value)


@pytest.mark.parametrize(
    ("other", "keys", "message"),
    [
        ({"a": ["1"]}, {}, "column 'a' has whole numbers in 1.parquet, text in 2.parquet"),
        ({"a": [[1]]}, {}, "'a' has whole numbers in 1.parquet, lists of whole numbers in 2.par"),
        ({"a": [True]}, {}, "whole numbers in 1.parquet, booleans in 2.parquet"),
        ({"k": [1.0]}, {"id": "k"}, "column 'k' has whole numbers in 1.parquet, numbers with frac"),
        ({"k": ["x"]}, {"labels": "k"}, "column 'k' has whole numbers in 1.parquet, text in 2"),
    ],
)
def test_parquet_columns_of_several_kinds_are_an_error(
    tmp_path: Path, other: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    row: dict[str, Any] = {"a": [1], "b": [2.5], "k": [3]}
    pandas.DataFrame(row).to_parquet(tmp_path / "1.parquet")
    pandas.DataFrame(row | other).to_parquet(tmp_path / "2.parquet")
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, "parquet", **keys)
    assert message in str(caught.value)


def test_whole_numbers_and_fractions_of_parquet_files_are_numbers(tmp_path: Path) -> None:
    pandas.DataFrame({"a": [1, 2], "b": [None, None]}).to_parquet(tmp_path / "1.parquet")
    pandas.DataFrame({"a": [0.5], "b": [3]}).to_parquet(tmp_path / "2.parquet")
    source = data(
        "records", path=tmp_path, inputs={"x": {"columns": ["a"]}}, labels="b", batch_size=SIZE
    )
    assert joined(source.batches()).tolist() == [[1], [2], [0.5]]
    text = "column a has whole numbers in 1.parquet, numbers with fractions in 2.parquet"
    assert f"{text}: all are read as numbers" in [s.text for s in source.statements()]


def test_a_file_without_a_header_is_an_error(tmp_path: Path) -> None:
    shards(tmp_path, "csv", [3])
    (tmp_path / "part-8.csv").write_text("0.5,1.5,k\n2.5,3.5,m\n")
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, "csv")
    assert "unlike part-7.csv; every file needs the header" in str(caught.value)


def test_columns_may_have_another_order_in_each_file(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("a,b\n1,2\n")
    (tmp_path / "2.csv").write_bytes(b"\xef\xbb\xbfb,more,a\r\n4,0,3")  # with a BOM, no line end
    assert joined(opened(tmp_path, "csv").batches()).tolist() == [[1, 2], [3, 4]]


def test_arrays_of_another_shape_or_dtype_are_an_error(tmp_path: Path) -> None:
    first, second = tmp_path / "1.npy", tmp_path / "2.npy"
    np.save(first, np.zeros((2, 3), np.float32))
    np.save(second, np.zeros((2, 3), np.int64))
    expected = "2.npy has rows of int64 [3], but those of 1.npy are float32 [3]"
    assert expected in data_error("arrays", path=[first, second])
    np.save(second, np.zeros((2, 4), np.float32))
    assert "float32 [4]" in data_error("arrays", path=tmp_path)


@pytest.mark.parametrize("form", ["jsonl", "csv.gz", "parquet"])
def test_a_file_that_changes_after_the_count_is_an_error(tmp_path: Path, form: str) -> None:
    first, *_ = shards(tmp_path, form)
    source = opened(tmp_path, form)
    (changed := VALUES[:5].copy())[1, 0] = 99
    write(first, changed)
    os.utime(first, (1, 1))
    with pytest.raises(ConfigError, match=f"{first.name} changed while it was read"):
        list(source.batches())


@pytest.mark.parametrize("form", ["jsonl", "csv.xz", "parquet", "npy", "npy.gz"])
def test_a_file_that_disappears_is_an_error(tmp_path: Path, form: str) -> None:
    *_, last = shards(tmp_path, form)
    source = opened(tmp_path, form)
    last.unlink()
    with pytest.raises((ConfigError, OSError), match=last.name):
        list(source.batches())


def test_a_file_that_grows_does_not_shift_the_rows_of_the_next(tmp_path: Path) -> None:
    first, *_ = shards(tmp_path, "jsonl")
    source = opened(tmp_path, "jsonl")
    with first.open("a") as file:
        file.write('\n{"a": 1, "b": 2}\n')
    with pytest.raises(ConfigError, match="changed while it was read"):
        list(source.batches())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "b.jsonl.gz",
            gzip.compress(b'{"a": 1, "b": 2}\n' * 9000, mtime=0)[:-20],
            "the file is truncated",
        ),
        ("b.jsonl.gz", b'{"a": 1, "b": 2}\n', "for gzip data, but it is not"),
        (
            "b.jsonl",
            gzip.compress(b"{}", mtime=0),
            "it is compressed with gzip; add .gz to its name",
        ),
        ("b.csv", b"a,b\n", "several formats, such as a.jsonl and b.csv"),
    ],
)
def test_a_broken_shard_is_an_error_that_names_it(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    write(tmp_path / "a.jsonl", VALUES[:3])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, "jsonl")
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_bad_rows_name_their_file_and_line(tmp_path: Path) -> None:
    shards(tmp_path, "jsonl.gz", [5, 4])
    (tmp_path / "part-9.jsonl").write_text('{"a": 1, "b": 2}\n\n{"a": 1, "b": null}')
    batches = list(opened(tmp_path, "jsonl").batches())
    (error,) = batches[-1].errors.values()
    assert str(error) == f"{tmp_path / 'part-9.jsonl'}:3  column 'b' is null"


def test_parquet_in_another_compression_is_an_error(tmp_path: Path) -> None:
    (path,) = shards(tmp_path, "parquet", [5])
    with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    with pytest.raises(ConfigError, match="Parquet files are compressed inside"):
        opened(Path(f"{path}.gz"), "parquet")


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_the_separator_of_csv_files_can_be_set(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f'a{mark}b\n1{mark}"2"\n')
    assert joined(opened(path, "csv", separator=mark).batches()).tolist() == [[1, 2]]


def test_a_separator_for_other_formats_is_an_error(tmp_path: Path) -> None:
    (path,) = shards(tmp_path, "jsonl", [3])
    with pytest.raises(ConfigError, match="has no separators between columns"):
        opened(path, "jsonl", separator=";")
