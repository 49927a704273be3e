"""Tests of the source `records`: .csv, .jsonl and .parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradrun.core.errors import ConfigError, SampleError
from gradrun.data.source import BatchSource
from tests.support.sources import data, joined, read_all


def records(path: Path, text: str | bytes, columns: list[str], **keys: Any) -> BatchSource:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    spec = {"columns": columns} | keys.pop("spec", {})
    return data("records", path=path, inputs={"x": spec}, **keys)


@pytest.mark.parametrize(
    "text",
    [
        "name,a,b\nx,1,2\ny,3,4\n",
        "name,a,b\r\nx,1,2\r\ny,3,4",
        "\ufeffa,b\n1,2\n3,4\n",
        "name,a,b\n\nx,1,2\n\n\ny,3,4\n\n",
        'name,a,b\n"x\nand, more",1,2\n"y ""z""",3,4\n',
        'name,a,b\n"x"," 1 ","2.0"\ny,3e0,+4\n',
    ],
)
def test_csv_files_of_spreadsheets_are_read(tmp_path: Path, text: str) -> None:
    source = records(tmp_path / "t.csv", text, ["b", "a"])
    assert source.samples == 2
    assert joined(source.batches()).tolist() == [[2, 1], [4, 3]]
    assert joined(source.batches(1)).tolist() == [[4, 3]]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "b": 2}\n{"a": 3, "b": 4}\n',
        '\ufeff{"b": 2, "a": 1, "c": "x"}\n\n  \n{"a": 3.0, "b": 4}',
        '{"a": [1], "b": [[2]]}\r\n{"a": 3, "b": [4]}\n',
    ],
)
def test_jsonl_fields_are_joined_to_one_row(tmp_path: Path, text: str) -> None:
    source = records(tmp_path / "t.jsonl", text, ["a", "b"])
    assert joined(source.batches()).tolist() == [[1, 2], [3, 4]]


def test_jsonl_lists_are_converted_to_dtype_scale_and_shape(tmp_path: Path) -> None:
    text = '{"image": [[1, 2], [3, 4]]}\n{"image": [5, 6, 7, 8]}\n'
    spec = {"dtype": "float64", "scale": 0.5, "shape": [1, 2, 2]}
    source = records(tmp_path / "t.jsonl", text, ["image"], spec=spec)
    found = joined(source.batches())
    assert found.dtype == torch.float64
    assert found.tolist() == [[[[0.5, 1], [1.5, 2]]], [[[2.5, 3], [3.5, 4]]]]


def test_large_integers_stay_exact(tmp_path: Path) -> None:
    big = 2**53 + 1
    for name, text in (("t.csv", f"a\n{big}\n"), ("t.jsonl", f'{{"a": {big}}}')):
        source = records(tmp_path / name, text, ["a"], spec={"dtype": "int64"})
        assert joined(source.batches()).item() == big


def test_ids_come_from_the_id_column_or_are_row_numbers(tmp_path: Path) -> None:
    text = "name,a\nx,1\ny,2\nz,3\n"
    named = records(tmp_path / "t.csv", text, ["a"], id="name", batch_size=2)
    assert [list(batch.ids) for batch in named.batches()] == [["x", "y"], ["z"]]
    assert [list(batch.ids) for batch in named.batches(1)] == [["y", "z"]]
    counted = records(tmp_path / "t.csv", text, ["a"], batch_size=2)
    assert [list(batch.ids) for batch in counted.batches()] == [[0, 1], [2]]


def test_several_inputs_use_different_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,c\n1,2,3\n4,5,6\n")
    inputs = {"one": {"columns": ["c"]}, "two": {"columns": ["a", "b"], "dtype": "int32"}}
    source = data("records", path=tmp_path / "t.csv", inputs=inputs)
    assert joined(source.batches(), "one").tolist() == [[3], [6]]
    two = joined(source.batches(), "two")
    assert two.dtype == torch.int32
    assert two.tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "a,b\n1,2\nx,4\n", "t.csv:3  column 'a' is 'x'"),
        ("t.csv", "a,b\n1,2\n\n3,\n", "t.csv:4  column 'b' is empty"),
        ("t.csv", "a,b\n1,2\n3\n", "t.csv:3  column 'b' is missing"),
        ("t.csv", "a,b\n1,2\n3,4,5\n", "t.csv:3  3 values"),
        ("t.csv", "a,b,c\n1,2,3\n1,000,2,3\n", "t.csv:3  4 values"),
        ("t.csv", 'a,b\n"1\n",2\n3,"y\n\n"\n', "t.csv:6  column 'b'"),
        ("t.csv", "a,c\n1,2\n", "no column 'b'"),
        ("t.csv", "a,b\n", "no samples"),
        ("t.csv", "", "no samples"),
        ("t.csv", b"a,b\n1,\xff\n", "t.csv:2  the row is not UTF-8 text"),
        ("t.csv", b"a,\xff\n1,2\n", "t.csv:1  the row is not UTF-8 text"),
        ("t.jsonl", '{"a": 1, "b": 2}\n{"a": 1, "b": "x"}\n', "t.jsonl:2  column 'b' is 'x'"),
        ("t.jsonl", '{"a": 1, "b": 2}\n\n{"a": 1}\n', "t.jsonl:3  column 'b' is missing"),
        ("t.jsonl", '{"a": 1, "b": 2}\n{"a": 1, "b": null}\n', "t.jsonl:2  column 'b' is missing"),
        ("t.jsonl", '{"a": 1, "b": 2}\n{"a": 1, "b": [2, 3]}\n', "t.jsonl:2  3 values"),
        ("t.jsonl", '{"a": 1, "b": [[1, 2], [3]]}\n', "t.jsonl:1  column 'b'"),
        ("t.jsonl", '{"a": 1, "b": {"c": 1}}\n', "t.jsonl:1  column 'b'"),
        ("t.jsonl", '{"a": 1, "b": 2}\n{"a": 1,\n', "t.jsonl:2  invalid JSON"),
        ("t.jsonl", "[1, 2]\n", "t.jsonl:1  a line must be one object"),
        ("t.jsonl", '{"a": 1, "c": 2}\n', "no column 'b'"),
        ("t.jsonl", "\n\n", "no samples"),
        ("t.txt", "a,b\n1,2\n", "source: arrays"),
    ],
)
def test_the_error_for_an_invalid_record_names_file_and_line(
    tmp_path: Path, name: str, text: str | bytes, words: str
) -> None:
    with pytest.raises((ConfigError, SampleError)) as caught:
        read_all(records(tmp_path / name, text, ["a", "b"]))
    assert words in str(caught.value)


@pytest.mark.parametrize(("name", "form"), [("t.csv", "a\n{}\n"), ("t.jsonl", '{{"a": {}}}\n')])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [("1.5", "int64"), (str(2**70), "int64"), ("300", "uint8"), ("1e999", "int8")],
)
def test_a_number_outside_the_range_of_its_dtype_is_an_error(
    tmp_path: Path, name: str, form: str, value: str, dtype: str
) -> None:
    words = "invalid JSON: 1e999 is out of range" if name == "t.jsonl" and "e" in value else ""
    words = words or rf"column 'a' is .*, not a number of type {dtype}"
    with pytest.raises(ConfigError, match=words):
        records(tmp_path / name, form.format(value), ["a"], spec={"dtype": dtype})


def test_an_unknown_id_column_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no column 'nme'; did you mean"):
        records(tmp_path / "t.csv", "name,a\nx,1\n", ["a"], id="nme")


def test_records_are_read_one_batch_at_a_time(tmp_path: Path) -> None:
    """An invalid row is an error of its own batch; the batches before it have none."""
    source = records(tmp_path / "t.csv", "a\n" + "1\n" * 10 + "x\n2\n", ["a"], batch_size=5)
    *before, last = source.batches()
    assert [(batch.size, dict(batch.errors)) for batch in before] == [(5, {}), (5, {})]
    assert [*last.errors] == [0]
    assert str(last.errors[0]).endswith("t.csv:12  column 'a' is 'x', not a number of type float32")
    assert last.args[0].tolist() == [[0], [2]]
