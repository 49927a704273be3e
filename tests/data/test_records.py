"""Tests of the source `records`: .csv, .jsonl and .parquet."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from pyarrow import parquet

from gradrun.core.errors import ConfigError, SampleError
from gradrun.data.source import BatchSource
from tests.support.sources import data, data_problem, joined, read_all


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
        ("t.jsonl", '{"a": 1, "b": 2}\n{"a": 1, "b": null}\n', "t.jsonl:2  column 'b' is null"),
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


# --- numbers, suffixes and types, compared with pandas -------------------------------------------

NUMBERS = ["1", " 1", "-2.5", "+4", "1e3", ".5", "7.", "inf", "-Infinity", "nan", "NaN", "1E-400"]
NOT_NUMBERS = [
    "12_34",
    "0x10",
    "1e400",
    "-1e999",
    "1,5",
    "1.2.3",
    "٣",
    "½",
    "one",
    "1 2",
    "$3",
    "--1",
]


def test_numbers_of_a_csv_are_those_that_pandas_reads(tmp_path: Path) -> None:
    text = "a\n" + "".join(f"{number}\n" for number in NUMBERS)
    source = records(tmp_path / "t.csv", text, ["a"], spec={"dtype": "float64"})
    expected = pandas.read_csv(tmp_path / "t.csv")["a"].to_numpy()
    assert expected.dtype == np.float64
    assert np.array_equal(joined(source.batches())[:, 0].numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_texts_that_are_not_numbers_are_errors(
    tmp_path: Path, suffix: str, value: str, dtype: str
) -> None:
    lines = ["a", "1", f'"{value}"', "0"]
    if suffix == "jsonl":
        lines = ['{"a": 1}', f'{{"a": "{value}"}}', '{"a": 0}']
    source = records(tmp_path / f"t.{suffix}", "\n".join(lines), ["a"], spec={"dtype": dtype})
    (batch,) = source.batches()
    assert [*batch.errors] == [1]
    assert f"column 'a' is {value!r}, not a number of type {dtype}" in str(batch.errors[1])
    assert batch.args[0][:, 0].tolist() == [1, 0, 0]


def test_whole_numbers_written_as_decimals_are_integers(tmp_path: Path) -> None:
    text = "a\n1.0\n2e3\n-7.\n1.5\n9007199254740993.0\n"
    (batch,) = records(tmp_path / "t.csv", text, ["a"], spec={"dtype": "int64"}).batches()
    assert batch.args[0][:, 0].tolist() == [1, 2000, -7, 0, 0]
    assert [*batch.errors] == [3, 4]


def test_booleans_of_pandas_are_read_as_bool(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"a": [True, False, True]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    for name in ("t.csv", "t.jsonl"):
        inputs = {"x": {"columns": ["a"], "dtype": "bool"}}
        found = joined(data("records", path=tmp_path / name, inputs=inputs).batches())
        assert found[:, 0].tolist() == frame["a"].tolist()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("T.CSV", "a,b\n1,2\n"),
        ("T.Tsv", "a\tb\n1\t2\n"),
        ("t.tsv", 'a\tb\n1\t"2"\n'),
        ("T.JSONL", '{"a": 1, "b": 2}\n'),
        ("t.ndjson", '{"a": 1, "b": 2}\n'),
        ("T.PARQUET", ""),
    ],
)
def test_suffixes_are_read_without_regard_to_case(tmp_path: Path, name: str, text: str) -> None:
    if name == "T.PARQUET":
        pandas.DataFrame({"a": [1.0], "b": [2.0]}).to_parquet(tmp_path / name)
        text = (tmp_path / name).read_bytes()  # type: ignore[assignment]
    source = records(tmp_path / name, text, ["a", "b"])
    assert joined(source.batches()).tolist() == [[1, 2]]


def test_a_field_longer_than_the_limit_of_the_csv_module_is_read(tmp_path: Path) -> None:
    text = f"a,note\n1,{'x' * 200_000}\n2,y\n"
    assert joined(records(tmp_path / "t.csv", text, ["a"]).batches()).tolist() == [[1], [2]]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_two_columns_of_one_name_are_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    if suffix == "csv":
        path.write_text("a,b,a\n1,2,3\n")
    else:
        arrays = [pyarrow.array([1.0])] * 3
        parquet.write_table(pyarrow.Table.from_arrays(arrays, names=["a", "b", "a"]), path)
    message = data_problem("records", path=path, inputs={"x": {"columns": ["a"]}})
    assert "two columns have the name 'a'" in message


def test_decimals_and_integers_of_parquet_keep_their_values(tmp_path: Path) -> None:
    table = {"a": [Decimal("1.50"), Decimal("2.00")], "b": [2**53 + 1, 7]}
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    inputs = {"x": {"columns": ["a"]}, "y": {"columns": ["b"], "dtype": "int64"}}
    (batch,) = data("records", path=tmp_path / "t.parquet", inputs=inputs).batches()
    assert batch.kwargs["x"][:, 0].tolist() == [1.5, 2]
    assert batch.kwargs["y"][:, 0].tolist() == table["b"]
    inputs = {"x": {"columns": ["a"], "dtype": "int64"}}
    (batch,) = data("records", path=tmp_path / "t.parquet", inputs=inputs).batches()
    assert [*batch.errors] == [0], "1.50 is no whole number"


def test_nan_is_passed_on_and_counted_and_a_null_is_an_error(tmp_path: Path) -> None:
    column = pyarrow.array([1.0, float("nan"), None, 4.0])
    parquet.write_table(pyarrow.table({"a": column}), tmp_path / "t.parquet")
    source = data("records", path=tmp_path / "t.parquet", inputs={"x": {"columns": ["a"]}})
    for _ in range(2):  # reading a batch again does not count it twice
        (batch,) = source.batches()
    assert batch.args[0][[0, 1, 3], 0].isnan().tolist() == [False, True, False]
    assert "t.parquet:3  column 'a' is null" in str(batch.errors[2])
    statements = {one.topic: one.text for one in source.statements()}
    assert statements["missing values"] == (
        "empty or null: the row fails (run.on_error); NaN in 1 row: passed to the model"
    )


def test_half_a_surrogate_pair_in_an_id_is_escaped(tmp_path: Path) -> None:
    lines = [
        r'{"k": "a\ud83d", "a": 1}',
        r'{"k": "\ud83d\ude00", "a": 2}',
        r'{"k": "\ud83d", "a": 3}',
    ]
    source = records(tmp_path / "t.jsonl", "\n".join(lines), ["a"], id="k")
    (batch,) = source.batches()
    assert batch.ids == ["a\\ud83d", "😀", "\\ud83d"]


def test_a_row_without_an_id_is_an_error_with_its_line(tmp_path: Path) -> None:
    source = records(tmp_path / "t.csv", "k,a\nx,1\n,2\nz,3\n", ["a"], id="k")
    (batch,) = source.batches()
    assert batch.ids == ["x", "row 1", "z"]
    assert "t.csv:3  the id 'k' is empty" in str(batch.errors[1])
    # pandas stores whole numbers with a gap as fractions and NaN.
    pandas.DataFrame({"k": [1, None], "a": [1, 2]}).to_parquet(tmp_path / "t.parquet")
    table = data("records", path=tmp_path / "t.parquet", inputs={"x": {"columns": ["a"]}}, id="k")
    (batch,) = table.batches()
    assert batch.ids == ["1.0", "row 1"]
    assert "t.parquet:2  the id 'k' is null" in str(batch.errors[1])


def test_rows_are_those_of_most_even_if_the_first_one_differs(tmp_path: Path) -> None:
    lines = ['{"a": [1]}', *['{"a": [1, 2]}'] * 5, '{"a": [1, 2, 3]}']
    (batch,) = records(tmp_path / "t.jsonl", "\n".join(lines), ["a"]).batches()
    assert [*batch.errors] == [0, 6]
    message = str(batch.errors[6])
    assert "t.jsonl:7  3 values for input 'x', but most rows have 2" in message
    assert "set data.inputs.x.pad to pad lists" in message


def test_a_number_that_would_move_to_another_column_or_axis_is_an_error_of_its_row(
    tmp_path: Path,
) -> None:
    lines = ['{"a": [1, 2], "b": 3}', '{"a": 4, "b": [5, 6]}', '{"a": [7, 8], "b": [[9]]}']
    (batch,) = records(tmp_path / "t.jsonl", "\n".join(lines), ["a", "b"]).batches()
    assert batch.args[0].tolist() == [[1, 2, 3], [0, 0, 0], [7, 8, 9]]
    (problem,) = map(str, batch.errors.values())
    assert "t.jsonl:2  input 'x' has lists of the shapes b [2], but most rows a [2]" in problem
    lines = ['{"a": [[1, 2, 3], [4, 5, 6]]}', '{"a": [[1, 2], [3, 4], [5, 6]]}']
    for spec in ({"shape": [2, 3]}, {}):
        (batch,) = records(tmp_path / "u.jsonl", "\n".join(lines), ["a"], spec=spec).batches()
        assert batch.args[0].flatten().tolist() == [1, 2, 3, 4, 5, 6] + 6 * [0]
        assert "a [3, 2], but most rows a [2, 3]" in str(batch.errors[1])


# --- labels ------------------------------------------------------------------------------------


def labels_of(path: Path, text: str, **keys: Any) -> list[float]:
    source: Any = records(path, text, ["a"], labels="y", **keys)
    return torch.cat(list(source.labels())).tolist()  # type: ignore[no-any-return]


def test_labels_may_be_numbers_booleans_or_names(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"a": [1, 2, 3], "y": [True, False, True]})
    text = frame.to_csv(index=False)
    assert labels_of(tmp_path / "t.csv", text) == frame["y"].astype(float).tolist()
    text = frame.to_json(orient="records", lines=True)
    assert labels_of(tmp_path / "t.jsonl", text) == [1, 0, 1]
    text = "a,y\n1,dog\n2,cat\n3,dog\n"
    assert labels_of(tmp_path / "t.csv", text, classes=["cat", "dog"]) == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,y\n1,1\n2,\n", "t.csv:3  the label 'y' is missing"),
        ("a,y\n1,1\n2,nan\n", "t.csv:3  the label 'y' is missing"),
        ("a,y\n1,1\n2,1_0\n", "t.csv:3  the label '1_0' is not a number"),
        ("a,y\n1,cat\n", "t.csv:2  the label 'cat' is not a number; list class names"),
    ],
)
def test_labels_that_are_missing_or_no_numbers_are_errors(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        labels_of(tmp_path / "t.csv", text)
    assert words in str(caught.value)


def test_columns_order_ids_and_labels_are_stated(tmp_path: Path) -> None:
    text = "k,a,b,y\n7,1,2,dog\n8,3,4,cat\n"
    keys = {"id": "k", "labels": "y", "classes": ["cat", "dog"]}
    source = records(tmp_path / "t.csv", text, ["b", "a"], **keys)
    assert {one.topic: one.text for one in source.statements()} == {
        "input x": "b, a, float32 [2]",
        "order": "rows as in t.csv; ids: column k (whole numbers, 2 distinct)",
        "labels": "column y, by name: cat, dog (2 classes, from data.classes)",
        "missing values": "empty or null: the row fails (run.on_error)",
    }


@pytest.mark.parametrize("values", [["b", "a", "b", "b"], [-1, -2, -1, -2], ["7", "07", "7", "8"]])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_distinct_and_repeated_ids_are_counted(
    tmp_path: Path, suffix: str, values: list[Any]
) -> None:
    path = tmp_path / f"t.{suffix}"
    table = pandas.DataFrame({"k": values, "a": range(4)})
    write = {
        "csv": lambda: table.to_csv(path, index=False),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "parquet": lambda: table.to_parquet(path),
    }
    write[suffix]()
    source = data("records", path=path, inputs={"x": {"columns": ["a"]}}, id="k")
    distinct = table["k"].nunique()
    assert source.repeated_ids == table["k"].duplicated().sum() == 4 - distinct
    (order,) = [one.text for one in source.statements() if one.topic == "order"]
    assert f"{distinct} distinct" in order


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"k": 1}', "column 'a' is missing"),
        ('{"k": 1, "a": null}', "column 'a' is null"),
        ('{"k": 1, "a": ""}', "column 'a' is empty"),
        ('{"a": 1}', "the id 'k' is missing"),
        ('{"k": null, "a": 1}', "the id 'k' is null"),
    ],
)
def test_the_error_distinguishes_missing_null_and_empty_fields(
    tmp_path: Path, line: str, found: str
) -> None:
    source = records(tmp_path / "t.jsonl", f'{{"k": 0, "a": 1}}\n{line}\n', ["a"], id="k")
    (batch,) = source.batches()
    assert str(batch.errors[1]).endswith(found)


@pytest.mark.parametrize(("mark", "name"), [(";", '";"'), ("\t", '"\\t"')])
def test_the_error_names_another_separator_of_a_csv_file(
    tmp_path: Path, mark: str, name: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        records(tmp_path / "t.csv", f"a{mark}b\n1{mark}2\n", ["a"])
    assert f"seem to be separated by {name}; set data.separator: {name}" in str(caught.value)


def test_examples_of_rows_show_four_digits(tmp_path: Path) -> None:
    lines = '{"a": 0.123456789, "b": [20261128, 1.5], "c": "2.00004"}\n'
    source = records(tmp_path / "t.jsonl", lines, ["a", "b", "c"])
    assert [one.text for one in source.previews([0])] == ["a 0.1235, b [20261128, 1.5], c 2"]


def test_the_last_column_of_a_short_csv_row_is_missing(tmp_path: Path) -> None:
    (batch,) = records(tmp_path / "t.csv", "b,a\n1,2\n3\n", ["a"]).batches()
    assert str(batch.errors[1]).endswith("t.csv:3  column 'a' is missing")


@pytest.mark.parametrize("row", ['"3', '"3\n4\n5', '3 and "4'])
def test_a_quote_without_an_end_is_an_error_of_its_row(row: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"a\n1\n2\n{row}")
    source = data("records", path=path, inputs={"x": {"columns": ["a"]}}, batch_size=8)
    (batch,) = source.batches()
    (error,) = batch.errors.values()
    closed = row.startswith("3")  # a quote in the middle of a field is a character
    assert ("a quote is not closed" in str(error)) is not closed
    assert batch.args[0][:2].flatten().tolist() == [1, 2]
