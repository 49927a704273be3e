"""`data.columns`: gaps, categories and scalers of tables, against pandas and scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from torch import nn

import gradrun
from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError, RunFailed, SampleError
from gradrun.data import open_data
from tests.support.engines import InlineEngines
from tests.support.sources import data, data_error, data_problem, joined

CITIES = ["Berlin", "Paris", "Rome"]
ROWS = 37


def people(seed: int) -> pandas.DataFrame:
    """Rows with gaps in `age` and `city`."""
    draw = np.random.default_rng(seed)
    frame = pandas.DataFrame(
        {
            "age": draw.integers(18, 90, ROWS).astype(float),
            "income": draw.normal(3e4, 1e4, ROWS).round(2),
            "city": draw.choice(CITIES, ROWS),
        }
    )
    frame.loc[draw.choice(ROWS, 5, replace=False), "age"] = np.nan
    frame.loc[draw.choice(ROWS, 4, replace=False), "city"] = None
    return frame


def write(frame: pandas.DataFrame, path: Path) -> Path:
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".parquet":
            frame.to_parquet(path)
        case _:
            frame.to_json(path, orient="records", lines=True)
    return path


def scaler_as_json(scaler: StandardScaler, folder: Path) -> Path:
    names = scaler.feature_names_in_.tolist()
    fitted = {"columns": names, "mean": scaler.mean_.tolist(), "std": scaler.scale_.tolist()}
    (folder / "scaler.json").write_text(json.dumps(fitted))
    return folder / "scaler.json"


def scaler_as_npz(scaler: StandardScaler, folder: Path) -> Path:
    np.savez(
        folder / "scaler.npz",
        feature_names_in_=scaler.feature_names_in_.astype(str),
        mean_=scaler.mean_,
        scale_=scaler.scale_,
    )
    return folder / "scaler.npz"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("export", [scaler_as_json, scaler_as_npz])
def test_a_table_with_gaps_a_category_and_a_scaler_gives_the_predictions_of_scikit_learn_and_torch(
    tmp_path: Path, suffix: str, export: Callable[[StandardScaler, Path], Path]
) -> None:
    train, new = people(0), people(1)
    numeric = make_pipeline(SimpleImputer(), StandardScaler()).set_output(transform="pandas")
    category = make_pipeline(
        SimpleImputer(strategy="constant", fill_value="Rome", missing_values=None),
        OneHotEncoder(categories=[CITIES], sparse_output=False),
    )
    prepare = ColumnTransformer([("n", numeric, ["age", "income"]), ("c", category, ["city"])])
    prepare.fit(train.astype(object).where(train.notna(), None))
    imputer, scaler = prepare.named_transformers_["n"]
    path = write(new, tmp_path / f"t{suffix}")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    config = {
        "model": {
            "source": "layers",
            "layers": [{"Linear": [5, 8]}, "Tanh", {"Linear": [8, 2]}],
            "weights": str(tmp_path / "net.pt"),
        },
        "data": {
            "source": "records",
            "path": str(path),
            "inputs": {"x": {"columns": ["age", "income", "city"]}},
            "columns": [
                str(export(scaler, tmp_path)),
                {
                    "age": {"fill": float(imputer.statistics_[0])},
                    "city": {"categories": CITIES, "fill": "Rome"},
                },
            ],
            "batch_size": 5,
        },
        "output": {"path": str(tmp_path / "out")},
    }
    result = gradrun.infer(config)
    prepared = prepare.transform(new.astype(object).where(new.notna(), None)).astype(np.float32)
    inputs = joined(open_data(load_config(config).config.data, seed=0).batches())
    np.testing.assert_array_equal(inputs, prepared)
    expected = net(torch.from_numpy(prepared)).detach()
    found = np.load(tmp_path / "out" / "predictions.npy")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    texts = {statement.topic: statement.text for statement in result.interpretation}
    mean, std = scaler.mean_[0], scaler.scale_[0]
    assert texts["column age"] == (
        f"gaps filled with {imputer.statistics_[0]} (5 so far), standardized (mean {mean:g}, "
        f"std {std:g})"
    )
    assert texts["column city"] == "gaps filled with Rome (4 so far), one-hot of 3 categories"


def one_column(path: Path, text: str, settings: Any, **spec: Any) -> Any:
    path.write_text(text)
    inputs = {"x": {"columns": ["a"], **spec}}
    return data("records", path=path, inputs=inputs, columns={"a": settings})


def test_an_index_feeds_an_embedding_and_equals_an_ordinal_encoder(tmp_path: Path) -> None:
    values = ["b", "c", "a", "z", "c"]
    encoder = OrdinalEncoder(
        categories=[["a", "b", "c"]], handle_unknown="use_encoded_value", unknown_value=3
    )
    expected = encoder.fit_transform([[value] for value in values]).astype(np.int64)
    source = one_column(
        tmp_path / "t.csv",
        "a\n" + "\n".join(values),
        {"categories": ["a", "b", "c"], "encode": "index", "unknown": 3},
        dtype="int64",
    )
    found = joined(source.batches())
    assert found.dtype == torch.int64
    assert found.tolist() == expected.tolist()
    text = next(s.text for s in source.statements() if s.topic == "column a")
    assert text == "index of 3 categories, others as 3 (1 so far)"


def test_fill_comes_before_categories_and_these_before_mean_and_std(tmp_path: Path) -> None:
    settings = {"fill": 30, "categories": [10, 20, 30], "encode": "index", "mean": 1, "std": 0.5}
    source = one_column(tmp_path / "t.csv", "a,b\n10,x\n,x\n20,x\n", settings)
    assert joined(source.batches()).flatten().tolist() == [-2.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "a,b\n1,x\n,x\nNA,x\nnan,x\n"),
        ("t.jsonl", '{"a": 1}\n{"a": null}\n{"a": "NA"}\n{"b": 2}\n'),
    ],
)
def test_every_kind_of_gap_is_filled_and_counted(tmp_path: Path, name: str, text: str) -> None:
    source = one_column(tmp_path / name, text, {"fill": 7, "gaps": ["NA"]})
    assert joined(source.batches()).flatten().tolist() == [1, 7, 7, 7]
    texts = {s.topic: s.text for s in source.statements()}
    assert texts["column a"] == "gaps filled with 7 (3 so far)"
    assert "NaN in" not in texts["missing values"]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_number_that_marks_a_gap_is_filled_in_every_format(tmp_path: Path, name: str) -> None:
    write(pandas.DataFrame({"a": [1.5, -999.0, 2.0]}), tmp_path / name)
    source = data(
        "records",
        path=tmp_path / name,
        inputs={"x": {"columns": ["a"]}},
        columns={"a": {"fill": 0, "gaps": [-999]}},
    )
    assert joined(source.batches()).flatten().tolist() == [1.5, 0, 2]


def test_items_of_lists_are_filled_and_standardized_one_by_one(tmp_path: Path) -> None:
    text = '{"a": [1, null, 3]}\n{"a": [4, 5, 6]}\n'
    source = one_column(tmp_path / "t.jsonl", text, {"fill": 0, "mean": 2, "std": 2})
    assert joined(source.batches()).tolist() == [[-0.5, -1, 0.5], [1, 1.5, 2]]
    stated = [part.text for part in source.statements() if part.topic == "column a"]
    assert stated == ["gaps filled with 0 (1 so far), standardized (mean 2, std 2)"]


@pytest.mark.parametrize(
    ("categories", "text", "expected"),
    [
        ([1, 2], "a\n1\n2.0\n+1\n", [0, 1, 0]),
        (["1", "01"], "a\n01\n1\n1\n", [1, 0, 0]),
        ([True, False], "a\nfalse\nTRUE\nFalse\n", [1, 0, 1]),
        ([0.5, 2**53, 2**53 + 1], f"a\n{2**53 + 1}\n.5\n{2**53}\n", [2, 0, 1]),
    ],
)
def test_categories_are_compared_as_texts_numbers_or_booleans(
    tmp_path: Path, categories: list[Any], text: str, expected: list[int]
) -> None:
    settings = {"categories": categories, "encode": "index"}
    source = one_column(tmp_path / "t.csv", text, settings)
    assert joined(source.batches()).flatten().tolist() == expected


def test_numbers_of_a_parquet_column_with_gaps_are_found_among_whole_categories(
    tmp_path: Path,
) -> None:
    pandas.DataFrame({"a": [1.0, None, 2.0]}).to_parquet(tmp_path / "t.parquet")
    columns = {"a": {"categories": [1, 2], "fill": 2}}
    source = data(
        "records",
        path=tmp_path / "t.parquet",
        inputs={"x": {"columns": ["a"]}},
        columns=columns,
    )
    assert joined(source.batches()).tolist() == [[1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("a\nx\nOslo\n", {"categories": ["x", "y"]}, "t.csv:3  column 'a' is 'Oslo', not one of"),
        ("a,b\nx,1\n,1\n", {"categories": ["x", "y"]}, "t.csv:3  column 'a' is empty"),
        ("a,b\n1,1\n,1\n", {"mean": 1}, "t.csv:3  column 'a' is empty"),
        ("a\n1\nNA\n", {"fill": 1}, "t.csv:3  column 'a' is 'NA', not a number"),
        ("a\n1\n1_0\n", {"categories": [1, 10]}, "t.csv:3  column 'a' is '1_0', not one of"),
    ],
)
def test_a_value_that_no_setting_covers_is_an_error_of_its_row(
    tmp_path: Path, text: str, settings: dict[str, Any], words: str
) -> None:
    (tmp_path / "t.csv").write_text(text)
    keys = {"path": tmp_path / "t.csv", "inputs": {"x": {"columns": ["a"]}}}
    assert words in data_problem("records", columns={"a": settings}, **keys)


def test_a_list_is_not_a_category(tmp_path: Path) -> None:
    text = '{"a": "x"}\n{"a": ["x", "y"]}\n'
    source = one_column(tmp_path / "t.jsonl", text, {"categories": ["x", "y"]})
    with pytest.raises(SampleError, match=r"t.jsonl:2  column 'a' is a list"):
        next(source.batches()).raise_errors()


def test_a_wrong_name_of_a_filled_column_is_an_error_although_json_lines_may_lack_fields(
    tmp_path: Path,
) -> None:
    (tmp_path / "t.jsonl").write_text('{"age": 1}\n{"age": 2}\n')
    keys = {"path": tmp_path / "t.jsonl", "inputs": {"x": {"columns": ["agee"]}}}
    words = data_error("records", columns={"agee": {"fill": 0}}, **keys)
    assert words == "t.jsonl has no column 'agee'; did you mean age? (allowed: age)"


def test_standardizing_whole_numbers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="need a floating-point dtype, not int64"):
        one_column(tmp_path / "t.csv", "a\n1\n", {"mean": 1}, dtype="int64")
    with pytest.raises(ConfigError, match=r"fill 0.5 is not a number of type int64"):
        one_column(tmp_path / "t.csv", "a\n1\n", {"fill": 0.5}, dtype="int64")


CONFIG = """\
model: {source: layers, layers: [Identity]}
data:
  source: records
  path: t.csv
  inputs: {x: {columns: [a, b]}}
  columns: COLUMNS
output: {path: out}
"""

WRONG = {
    "{a: {std: 0}}": "std 0 is not more than 0",
    "{a: {fill: mean}}": "statistics are not computed from the data to predict",
    "{a: {gaps: [NA]}}": "gaps has no effect without fill",
    "{a: {encode: index}}": "encode has no effect without categories",
    "{a: {categories: [x, 1]}}": "texts, numbers or booleans, not several",
    "{a: {categories: [x, x]}}": "'x' is listed twice",
    "{a: {categories: [x], unknown: 1}}": "a number needs encode: index",
    "{a: {categories: [x], encode: index, unknown: zeros}}": "is error or a number",
    "{a: {categories: [x], mean: 1}}": "cannot be combined with encode: one_hot",
    "{a: {categories: [x], fill: y}}": "fill 'y' is not one of the categories",
    "{a: {mena: 1}}": "unknown key; did you mean mean?",
    "{aa: {mean: 1}}": "'aa' of data.columns is not a column of any input; did you mean a?",
    "{a: 3}": "3 is not a section",
    "[{a: {mean: 1}}, {a: {mean: 2}}]": "mean of column 'a' is set twice",
    "nope.json": "nope.json does not exist",
    "t.csv": "it is neither a .json nor an .npz file",
    "broken.json": "broken.json cannot be read: Expecting",
    "array.json": "array.json is not a map of columns",
    "names.json": "mean_ is a list, but feature_names_in_ is missing",
    "short.json": "mean_ has 1 values for the 2 columns of feature_names_in_",
    "minmax.json": "a MinMaxScaler multiplies by scale_",
    "scale.json": "scale_ without mean_ is ambiguous",
    "other.json": "unknown key 'var_'",
    "twice.json": "mean sets mean, which another list sets too",
    "objects.npz": "contains Python objects, which could run code; save names.astype(str)",
    "empty.npz": "it is not an .npz archive",
    "one.npz": "it is not an .npz archive",
    "damaged.npz": "damaged.npz cannot be read: ",
    "[{a: 3}, {a: {mean: 1}}]": "3 is not a section",
}
NAMES = '"feature_names_in_": ["a", "b"]'
FILES = {
    "broken.json": "{",
    "array.json": "[1]",
    "names.json": '{"mean_": [1, 2]}',
    "short.json": f'{{{NAMES}, "mean_": [1]}}',
    "minmax.json": f'{{{NAMES}, "min_": [1, 2], "scale_": [1, 2]}}',
    "scale.json": f'{{{NAMES}, "scale_": [1, 2]}}',
    "other.json": f'{{{NAMES}, "var_": [1, 2]}}',
    "twice.json": f'{{{NAMES}, "mean_": [1, 2], "mean": [1, 2]}}',
}


@pytest.mark.parametrize("columns", WRONG)
def test_settings_without_one_meaning_are_errors_of_the_config(
    tmp_path: Path, columns: str
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    np.savez(tmp_path / "objects.npz", names=np.array([{}], object))
    (tmp_path / "empty.npz").touch()
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.ones(2))
    np.savez_compressed(tmp_path / "damaged.npz", mean=np.arange(100.0))
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[80:90] = b"\0" * 10
    (tmp_path / "damaged.npz").write_bytes(content)
    (tmp_path / "c.yaml").write_text(CONFIG.replace("COLUMNS", columns))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert WRONG[columns] in str(caught.value)
    assert "c.yaml:" in str(caught.value)


def test_the_files_of_an_imputer_and_an_encoder_set_fill_and_categories(tmp_path: Path) -> None:
    names = {"feature_names_in_": ["a", "b"]}
    fitted = {**names, "statistics_": [1.5, None], "categories_": [None, ["x", "y"]]}
    (tmp_path / "f.json").write_text(json.dumps(fitted))
    (tmp_path / "t.csv").write_text("a,b\n,y\n2,x\n")
    (tmp_path / "c.yaml").write_text(CONFIG.replace("COLUMNS", "f.json"))
    config = load_config(tmp_path / "c.yaml").config
    source = open_data(config.data, seed=0)
    assert joined(source.batches()).tolist() == [[1.5, 0, 1], [2, 1, 0]]


def test_two_workers_and_a_resume_write_the_same_bytes_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(people(3), tmp_path / "t.csv")
    columns = {
        "age": {"fill": 0, "mean": 40, "std": 20},
        "city": {"categories": CITIES[:2], "fill": "Paris", "unknown": "zeros"},
    }
    config: dict[str, Any] = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {
            "source": "records",
            "path": str(tmp_path / "t.csv"),
            "inputs": {"x": {"columns": ["age", "city"]}},
            "columns": columns,
            "batch_size": 4,
        },
        "run": {"warmup": 0},
    }
    InlineEngines(monkeypatch)
    alone = gradrun.infer(config, output={"path": str(tmp_path / "one")})
    engine = {"source": "processes", "workers": 2}
    shared = gradrun.infer(config, output={"path": str(tmp_path / "two")}, engine=engine)
    right = (tmp_path / "t.csv").read_text()
    lines = right.splitlines()
    lines[30] = "old,0,Rome"
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(RunFailed, match=r"t.csv:31  column 'age' is 'old'"):
        gradrun.infer(config, output={"path": str(tmp_path / "three")})
    (tmp_path / "t.csv").write_text(right)
    output = {"path": str(tmp_path / "three")}
    with pytest.raises(ConfigError, match=r"data\.columns\.age\.mean changed from 40"):
        gradrun.infer(config, output=output, resume=True, **{"data.columns.age.mean": 41})
    gradrun.infer(config, output=output, resume=True)
    one, *others = [
        (tmp_path / name / "predictions.npy").read_bytes() for name in ("one", "two", "three")
    ]
    assert others == [one, one]
    stated = [
        [s for s in result.interpretation if s.topic.startswith("column")]
        for result in (alone, shared)
    ]
    assert stated[0] == stated[1]
    assert "others as zeros" in stated[0][1].text
