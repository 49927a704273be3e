"""Runs whose outputs are not one row of fixed shape: detectors, texts, the user's own function."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import gradrun
from gradrun.comparison.predictions import compare_predictions
from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError, Interrupted
from gradrun.inference.interpretation import explain
from gradrun.output.formats import sample_files
from tests.support.engines import InlineEngines
from tests.support.workers import in_process_workers

NET = """
import torch
from torch import nn

class Detector(nn.Module):
    class_names = ("background", "cat", "dog")

    def forward(self, rows):
        found = []
        for row in rows:
            if row[0] > 7.5:
                raise ValueError("no features")
            count = int(row[0]) % 4
            boxes = row[None, :] * torch.arange(1.0, count + 1)[:, None]
            scores = boxes[:, 1] / (row[0] - 5)
            found.append({"boxes": boxes, "labels": torch.arange(count) % 3, "scores": scores})
        return found

class Texts(nn.Module):
    def forward(self, rows):
        return [f"sum {row.sum():.0f}" for row in rows]

class Scores(nn.Module):
    def forward(self, rows):
        return rows * 2
"""
POST = """
from helper import NAMES

def decode(scores):
    if (scores[:, 0] == 6).any():
        raise KeyError("six")
    return {
        "text": [NAMES[int(row[0]) // 2 % 3] for row in scores],
        "over": [row[row > 3] for row in scores],
        "total": scores.sum(1),
    }

def short(scores):
    return ["x"]

number = 3
"""
SAMPLES, BATCH = 11, 4


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "post.py").write_text(POST)
    (tmp_path / "helper.py").write_text('NAMES = ["a", "b", "c"]\n')
    rows = np.stack([np.arange(SAMPLES), np.linspace(0, 1, SAMPLES)], 1).astype(np.float32)
    rows[rows[:, 0] > 7, 0] -= 8
    rows[5, 0] = 4
    np.save(tmp_path / "rows.npy", rows)
    return {
        "model": {"source": "python", "target": f"{tmp_path}/net.py:Detector"},
        "data": {"source": "arrays", "path": f"{tmp_path}/rows.npy", "batch_size": BATCH},
        "run": {"warmup": 0},
        "measure": {"memory": False, "batch_independence": False},
        "output": {"path": f"{tmp_path}/out", "format": "jsonl"},
    }


def rows_in(folder: Path) -> np.ndarray[Any, Any]:
    return np.load(folder / "rows.npy")  # type: ignore[no-any-return]


def detections(row: np.ndarray[Any, Any]) -> dict[str, Any]:
    """What the detector returns for a sample, by NumPy."""
    count = int(row[0]) % 4
    boxes = row[None, :] * np.arange(1, count + 1, dtype=np.float32)[:, None]
    numbers = [n % 3 for n in range(count)]
    return {
        "boxes": boxes.tolist(),
        "labels": numbers,
        "scores": (boxes[:, 1] / (row[0] - np.float32(5))).tolist(),
        "label_names": [("background", "cat", "dog")[n] for n in numbers],
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").open()]


def plain(value: Any) -> Any:
    """Return nested arrays of pandas as lists."""
    return [plain(item) for item in value] if isinstance(value, list | np.ndarray) else value


def test_the_boxes_of_a_detector_are_written_to_jsonl_and_parquet(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["measure"] = {"memory": False}
    result = gradrun.infer(config, trust_code=True)
    expected = [{"id": i, **detections(row)} for i, row in enumerate(rows_in(tmp_path))]
    assert lines(tmp_path / "out") == expected
    stated = {one.topic: one.text for one in result.interpretation}
    assert stated["output boxes"] == "float32 with 2 dimensions, one per sample"
    assert not [w for w in result.warnings if w.code == "batch_dependent"]
    assert not result.examples, "boxes of any number have no short description"
    config["output"] |= {"path": f"{tmp_path}/table", "format": "parquet"}
    gradrun.infer(config, trust_code=True)
    table = pandas.read_parquet(tmp_path / "table" / "predictions")
    assert [{k: plain(v) for k, v in row.items()} for row in table.to_dict("records")] == expected
    assert gradrun.verify(tmp_path / "table").damaged == ()


@pytest.mark.parametrize("form", ["jsonl", "parquet", "files"])
def test_numbers_of_workers_are_compared_with_values_of_any_size(
    config: dict[str, Any], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    InlineEngines(monkeypatch)
    config["output"]["format"] = form
    config["engine"] = {"source": "processes", "workers": 1}
    config["measure"] |= {"processes": 2, "budget": 1, "precision": 1.0}
    compared = gradrun.compare(config, over=("engine.workers", [1, 2]), trust_code=True).result
    (outputs,) = compared.equivalence
    assert (outputs.bitwise, outputs.equal, outputs.max_abs_diff) == (True, True, 0.0)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv", "files", "npy"])
def test_predictions_of_two_runs_are_compared_by_every_value(
    config: dict[str, Any], tmp_path: Path, form: str
) -> None:
    target = "Detector" if form in {"jsonl", "parquet", "files"} else "Scores"
    config["model"]["target"] = f"{tmp_path}/net.py:{target}"
    rows = rows_in(tmp_path)
    folders = []
    for name, value in (("a", 0.0), ("b", 0.0), ("c", 0.25)):
        changed = rows.copy()
        changed[3, 1] += value
        np.save(tmp_path / "rows.npy", changed)
        config["output"] = {"path": f"{tmp_path}/{name}", "format": form}
        gradrun.infer(config, trust_code=True)
        folders.append(tmp_path / name)

    def compared(one: int, other: int) -> tuple[bool, float, bool]:
        return compare_predictions((folders[one], folders[other]), form, rtol=0, atol=1e-6)

    assert compared(0, 1) == (True, 0.0, True)
    bitwise, difference, equal = compared(0, 2)
    assert not bitwise
    assert not equal
    # The third box is three times the row; the scores double it.
    expected = {"Detector": 0.75, "Scores": 0.5}[target] if form != "files" else np.inf
    assert difference == pytest.approx(expected)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "files"])
def test_predictions_with_other_numbers_of_values_differ(
    config: dict[str, Any], tmp_path: Path, form: str
) -> None:
    config["output"] = {"path": f"{tmp_path}/a", "format": form}
    gradrun.infer(config, trust_code=True)
    rows = rows_in(tmp_path)
    rows[3, 0] = 0  # no boxes
    np.save(tmp_path / "rows.npy", rows)
    config["output"]["path"] = f"{tmp_path}/b"
    gradrun.infer(config, trust_code=True)
    folders = (tmp_path / "a", tmp_path / "b")
    assert compare_predictions(folders, form, rtol=1, atol=1) == (False, np.inf, False)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_check_finds_another_box_of_a_detector(
    config: dict[str, Any], tmp_path: Path, form: str
) -> None:
    config["output"]["format"] = form
    config["check"] = {"smoke": False, "regression": {"time": None, "forward_peak": None}}
    first, other = tmp_path / "first.yaml", tmp_path / "other.yaml"
    first.write_text(json.dumps(config))
    changed = rows_in(tmp_path)
    changed[3, 1] += 0.5
    np.save(tmp_path / "changed.npy", changed)
    config["data"]["path"] = f"{tmp_path}/changed.npy"
    other.write_text(json.dumps(config))
    with in_process_workers():
        (same,) = gradrun.check(first, against=first, trust_code=True).outcomes
        (outcome,) = gradrun.check(first, against=other, trust_code=True).outcomes
    assert (same.check, same.status) == ("outputs vs first.yaml", "pass")
    assert outcome.status == "fail"
    assert "differs in 1 sample of 11, first at 3" in outcome.reason


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_values_are_the_same_with_workers(
    config: dict[str, Any], tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["output"]["format"] = form
    gradrun.infer(config, trust_code=True)
    InlineEngines(monkeypatch)
    config |= {"output": {"path": f"{tmp_path}/spread", "format": form}}
    config["engine"] = {"source": "processes", "workers": 2}
    gradrun.infer(config, trust_code=True)
    for one in (tmp_path / "out").rglob("predictions*"):
        if one.is_file():
            other = tmp_path / "spread" / one.relative_to(tmp_path / "out")
            assert one.read_bytes() == other.read_bytes()


def test_nan_in_values_and_failing_samples_are_quarantined(
    config: dict[str, Any], tmp_path: Path
) -> None:
    rows = rows_in(tmp_path)
    rows[5] = (5, 0.5)  # a division by 0
    rows[9, 0] = 8
    np.save(tmp_path / "rows.npy", rows)
    config["run"] |= {"on_error": "quarantine", "on_nonfinite": "quarantine"}
    result = gradrun.infer(config, trust_code=True)
    assert result.quarantined == 2
    written = lines(tmp_path / "out")
    for i, row in enumerate(rows):
        missing = dict.fromkeys(("boxes", "labels", "scores", "label_names"))
        assert written[i] == {"id": i, **(missing if i in (5, 9) else detections(row))}


def test_a_model_may_return_texts(config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["target"] = f"{tmp_path}/net.py:Texts"
    config["output"]["format"] = "csv"
    gradrun.infer(config, trust_code=True)
    table = pandas.read_csv(tmp_path / "out" / "predictions.csv")
    sums = rows_in(tmp_path).sum(1)
    assert table["prediction"].tolist() == [f"sum {total:.0f}" for total in sums]
    config["output"] |= {"path": f"{tmp_path}/npy", "format": "npy"}
    with pytest.raises(ConfigError, match=r"npy cannot store .* jsonl, parquet, files or csv"):
        gradrun.infer(config, trust_code=True)
    assert not (tmp_path / "npy").exists()


# --- output.transform: FILE.py:FUNCTION ----------------------------------------------------------


@pytest.fixture
def decoding(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    config["model"]["target"] = f"{tmp_path}/net.py:Scores"
    config["output"]["transform"] = f"{tmp_path}/post.py:decode"
    return config


def test_a_function_of_the_user_decodes_outputs_and_failing_samples_are_isolated(
    decoding: dict[str, Any], tmp_path: Path
) -> None:
    rows = rows_in(tmp_path)
    with pytest.raises(ConfigError, match=r"post\.py:decode failed: KeyError: 'six' .*on_error"):
        gradrun.infer(decoding, trust_code=True)
    decoding["run"]["on_error"] = "quarantine"
    result = gradrun.infer(decoding, trust_code=True)
    assert result.quarantined == 1
    for i, (line, row) in enumerate(zip(lines(tmp_path / "out"), rows * 2, strict=True)):
        if row[0] == 6:
            assert line == {"id": i, "text": None, "over": None, "total": None}
            continue
        assert line["text"] == "abc"[int(row[0]) // 2 % 3]
        assert line["over"] == row[row > 3].tolist()
        assert line["total"] == pytest.approx(float(row.sum()))


def test_a_changed_function_does_not_continue_a_run(
    decoding: dict[str, Any], tmp_path: Path
) -> None:
    decoding["run"]["on_error"] = "quarantine"
    gradrun.infer(decoding, trust_code=True)
    (tmp_path / "helper.py").write_text('NAMES = ["x", "b", "c"]\n')
    with pytest.raises(ConfigError, match=r"helper\.py changed"):
        gradrun.infer(decoding, trust_code=True, resume=True)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ("post.py:decod", "has no 'decod'; did you mean decode"),
        ("post.py:number", "is not a function of the model's output"),
        ("post.py:short", "the output of post.py:short is a list of 1 items for a batch of 4"),
        (["softmax", "post.py:decode"], "must be the first transform"),
        ({"x": "post.py:decode"}, "must be the first transform"),
        ("softmx", "did you mean softmax"),
        ("none.py:decode", "does not exist"),
    ],
)
def test_a_wrong_function_is_refused(
    decoding: dict[str, Any], tmp_path: Path, transform: Any, words: str
) -> None:
    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: absolute(one) for name, one in value.items()}
        if isinstance(value, list):
            return [absolute(one) for one in value]
        return f"{tmp_path}/{value}" if ":" in value else value

    decoding["output"]["transform"] = absolute(transform)
    with pytest.raises(ConfigError, match=words):
        gradrun.infer(decoding, trust_code=True)
    assert not (tmp_path / "out").exists()


def test_a_function_needs_trust(decoding: dict[str, Any], tmp_path: Path) -> None:
    decoding["model"] = {"source": "layers", "layers": ["Identity"]}
    (tmp_path / "post.py").write_text("open('ran', 'w')")
    with pytest.raises(ConfigError, match="pass trust_code=True"):
        gradrun.infer(decoding)
    assert not Path("ran").exists()


def test_transforms_of_tensors_and_metrics_refuse_values(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["output"]["transform"] = "softmax"
    with pytest.raises(ConfigError, match="output 'boxes' has one value per sample"):
        gradrun.infer(config, trust_code=True)
    config["output"]["transform"] = {"scores": "softmax"}
    with pytest.raises(ConfigError, match="output 'scores' has one value per sample"):
        gradrun.infer(config, trust_code=True)


# --- output.keep ---------------------------------------------------------------------------------

ROWS = [
    {"id": f"r{i}", "x": i / 4, "title": f"T{i}, ä", "year": 2000 + i, "tags": ["a"] * (i % 3)}
    for i in range(9)
]


def keeping(folder: Path, suffix: str, form: str, keep: list[str], **data: Any) -> dict[str, Any]:
    """Write a table, and return a config whose predictions are twice the column x."""
    table = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == "parquet":
        pandas.DataFrame(ROWS).to_parquet(table)
    else:
        pandas.DataFrame(ROWS).drop(columns="tags").to_csv(table, index=False)
    (folder / "double.pt").unlink(missing_ok=True)
    torch.save({"0.weight": torch.tensor([[2.0]])}, folder / "double.pt")
    return {
        "model": {
            "source": "layers",
            "layers": [{"Linear": {"in_features": 1, "out_features": 1, "bias": False}}],
            "weights": f"{folder}/double.pt",
        },
        "data": {
            "source": "records",
            "path": str(table),
            "inputs": {"x": {"columns": ["x"]}},
            "batch_size": 4,
            **data,
        },
        "run": {"warmup": 0},
        "measure": {"memory": False, "batch_independence": False},
        "output": {"path": f"{folder}/out", "format": form, "keep": keep},
    }


def test_a_file_without_rows_is_the_error_and_not_its_missing_columns(tmp_path: Path) -> None:
    config = keeping(tmp_path, "csv", "csv", ["title"])
    (tmp_path / "rows.csv").write_text("id,x,title\n")
    with pytest.raises(gradrun.ConfigError, match="the data contains no samples"):
        gradrun.infer(config)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_columns_are_carried_through_with_their_types(
    tmp_path: Path, suffix: str, form: str
) -> None:
    keep = ["id", "title", "year", *(["tags"] if "csv" not in (suffix, form) else [])]
    config = keeping(tmp_path, suffix, form, keep, id="id")
    result = gradrun.infer(config)
    out = tmp_path / "out"
    if form == "jsonl":
        written = lines(out)
    elif form == "parquet":
        table = pandas.read_parquet(out / "predictions")
        written = [{k: plain(v) for k, v in row.items()} for row in table.to_dict("records")]
    else:
        text = {"title": str, "year": str}
        written = pandas.read_csv(out / "predictions.csv", dtype=text).to_dict("records")
        for row in written:
            row["prediction"] = [row.pop("prediction.0")]
    texts = suffix == "csv" or form == "csv"  # a csv file has texts only
    expected = [
        {
            "id": row["id"],
            "title": row["title"],
            "year": str(row["year"]) if texts else row["year"],
            **({"tags": row["tags"]} if "tags" in keep else {}),
            "prediction": [row["x"] * 2],
        }
        for row in ROWS
    ]
    assert written == expected
    assert [*written[0]] == [*expected[0]], "kept columns come before the outputs"
    kind = "text" if suffix == "csv" else "integer"
    for statements in (result.interpretation, explain(load_config(config)).statements):
        stated = {one.topic: one.text for one in statements}
        assert f"title (text), year ({kind})" in stated["kept columns"]
    assert gradrun.verify(out).damaged == ()


def test_dates_decimals_and_records_of_parquet_are_kept_as_json_values(tmp_path: Path) -> None:
    times = [datetime.datetime(2026, 3, n, 4, 5, tzinfo=datetime.UTC) for n in (1, 2)]
    rows = [
        {
            "x": 0.5,
            "day": time.date(),
            "time": time,
            "clock": time.time(),
            "price": decimal.Decimal("1.50"),
            "size": {"width": 3, "days": [time.date(), None]},
        }
        for time in times
    ]
    config = keeping(tmp_path, "parquet", "jsonl", [*list(rows[0])[1:]])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    result = gradrun.infer(config)
    assert lines(tmp_path / "out") == [
        {
            "id": n,
            "day": f"2026-03-0{n + 1}",
            "time": f"2026-03-0{n + 1}T04:05:00+00:00",
            "clock": "04:05:00",
            "price": "1.50",
            "size": {"width": 3, "days": [f"2026-03-0{n + 1}", None]},
            "prediction": [1.0],
        }
        for n in range(2)
    ]
    stated = {one.topic: one.text for one in result.interpretation}
    assert "price (text), size ({width: integer, days: list of text})" in stated["kept columns"]

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"x": 0.5, "day": b"raw"}]), tmp_path / "rows.parquet"
    )
    config["output"] |= {"keep": ["day"], "path": f"{tmp_path}/bytes"}
    message = r"rows.parquet:1  the column 'day' contains bytes, which predictions cannot; remove"
    with pytest.raises(ConfigError, match=message):
        gradrun.infer(config)


def test_a_kept_column_of_several_types_is_stated_and_refused_by_typed_formats(
    tmp_path: Path,
) -> None:
    config = keeping(tmp_path, "jsonl", "jsonl", ["year"])
    table = tmp_path / "rows.jsonl"
    table.write_text(table.read_text().replace('"year": 2003', '"year": "unknown"'))
    result = gradrun.infer(config)
    assert [row["year"] for row in lines(tmp_path / "out")][2:5] == [2002, "unknown", 2004]
    stated = {one.topic: one.text for one in result.interpretation}
    assert stated["kept columns"] == "year (several types)"
    config["output"] |= {"format": "parquet", "path": f"{tmp_path}/typed"}
    with pytest.raises(ConfigError, match="'year'"):
        gradrun.infer(config)


def test_kept_columns_of_failing_rows_and_with_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = keeping(tmp_path, "jsonl", "jsonl", ["title"])
    table = tmp_path / "rows.jsonl"
    table.write_text(table.read_text().replace('"x": 1.25', '"x": null'))
    config["run"]["on_error"] = "quarantine"
    gradrun.infer(config)
    assert lines(tmp_path / "out")[5] == {"id": 5, "title": "T5, ä", "prediction": None}
    InlineEngines(monkeypatch)
    spread = config | {"engine": {"source": "processes", "workers": 2}}
    spread["output"] = config["output"] | {"path": f"{tmp_path}/spread"}
    gradrun.infer(spread)
    assert lines(tmp_path / "spread") == lines(tmp_path / "out")


@pytest.mark.parametrize(
    ("form", "keep", "words"),
    [
        ("npy", ["title"], "npy cannot store columns of the input; set output.format: csv, jsonl"),
        ("jsonl", ["titel"], "no column 'titel'; did you mean title"),
        ("jsonl", ["id"], "set data.id: id"),
        ("jsonl", ["year", "year"], "listed twice"),
        ("csv", ["tags"], "csv cannot store 'tags'"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused(
    tmp_path: Path, form: str, keep: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        gradrun.infer(keeping(tmp_path, "jsonl", form, keep))
    assert not (tmp_path / "out").exists()


def test_an_output_cannot_have_the_name_of_a_kept_column(tmp_path: Path) -> None:
    config = keeping(tmp_path, "jsonl", "jsonl", ["year"])
    config["output"]["name"] = "year"
    with pytest.raises(ConfigError, match="two columns 'year'"):
        gradrun.infer(config)


# --- images of several sizes ---------------------------------------------------------------------

SIZES = """
from torch import nn

class Sizes(nn.Module):
    def forward(self, images):
        assert isinstance(images, list) and all(image.is_contiguous() for image in images)
        return [{"size": [*image.shape], "mean": image.mean((1, 2))} for image in images]
"""


def test_images_of_several_sizes_are_a_list(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SIZES)
    rng = np.random.default_rng(0)
    shapes = [(6, 9), (12, 3), (5, 5), (8, 8), (1, 20)]
    pixels = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "2b.png").write_text("no picture")
    config = {
        "model": {"source": "python", "target": f"{tmp_path}/net.py:Sizes"},
        "data": {
            "source": "images",
            "path": f"{tmp_path}/pictures",
            "batch_size": 4,
            "call": "list",
        },
        "run": {"warmup": 0, "on_error": "quarantine"},
        "output": {"path": f"{tmp_path}/out", "format": "jsonl"},
    }
    config["measure"] = {"memory": False}
    result = gradrun.infer(config, trust_code=True)
    written = {line["id"]: line for line in lines(tmp_path / "out")}
    for i, (shape, picture) in enumerate(zip(shapes, pixels, strict=True)):
        line = written[f"{i}.png"]
        assert line["size"] == [3, *shape]
        means = (picture / np.float32(255)).mean((0, 1))
        assert line["mean"] == pytest.approx(means.tolist(), abs=1e-6)
    assert written["2b.png"]["size"] is None
    assert not [w for w in result.warnings if w.code == "batch_dependent"]


# --- one file per sample -------------------------------------------------------------------------

MASKS = """
import torch
from torch import nn

class Net(nn.Module):
    class_names = ("ground", "road", "tree")

    def forward(self, images):
        return torch.cat([images[:, :1] - 0.5, images[:, 1:2] - 0.4, images[:, 2:] - 0.3], 1)

class Texts(nn.Module):
    def forward(self, images):
        return [f"{image.mean():.3f} ä" for image in images]
"""


@pytest.fixture
def masks(tmp_path: Path) -> dict[str, Any]:
    """A config of a net whose class of a pixel follows from its colors, and eleven pictures."""
    (tmp_path / "masks.py").write_text(MASKS)
    rng = np.random.default_rng(0)
    for i in range(SAMPLES):
        folder = tmp_path / "pictures" / ("a" if i % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8))
        picture.save(folder / f"{i // 2}.png")
    return {
        "model": {"source": "python", "target": f"{tmp_path}/masks.py:Net"},
        "data": {"source": "images", "path": f"{tmp_path}/pictures", "batch_size": BATCH},
        "run": {"warmup": 0},
        "measure": {"memory": False, "batch_independence": False},
        "output": {"path": f"{tmp_path}/out", "format": "files", "transform": "argmax"},
    }


def index(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "files.jsonl").open()]


def classes_of(picture: Path) -> np.ndarray[Any, Any]:
    pixels = np.asarray(Image.open(picture)).astype(np.float32) * np.float32(1 / 255)
    return (pixels - np.array([0.5, 0.4, 0.3], np.float32)).argmax(2)


def test_masks_are_png_files_with_a_palette_named_by_the_ids(
    masks: dict[str, Any], tmp_path: Path
) -> None:
    result = gradrun.infer(masks, trust_code=True)
    for line in index(tmp_path / "out"):
        mask = Image.open(tmp_path / "out" / line["prediction"]["file"])
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask), classes_of(tmp_path / "pictures" / line["id"]))
        assert line["prediction"]["file"] == f"predictions/{line['id'].replace('/', '_')}"
    assert len({*(tmp_path / "out" / "predictions").iterdir()}) == SAMPLES
    stated = {one.topic: one.text for one in result.interpretation}
    assert stated["file of prediction"] == "class numbers with a palette, 255: no class"
    assert gradrun.verify(tmp_path / "out").damaged == ()
    (tmp_path / "out" / "predictions" / "a_1.png").write_bytes(b"x")
    (damaged,) = gradrun.verify(tmp_path / "out").damaged
    assert damaged.problem == "predictions/a_1.png: the checksum differs"


@pytest.mark.parametrize(
    ("changes", "mode", "pixel"),
    [
        ({"palette": False}, "L", lambda classes: classes),
        ({"palette": [[0, 0, 0], [255, 0, 0]]}, "P", lambda classes: classes),
        ({"file_type": "npy"}, "", lambda classes: classes),
    ],
)
def test_masks_may_be_gray_or_have_own_colors_or_be_arrays(
    masks: dict[str, Any], tmp_path: Path, changes: dict[str, Any], mode: str, pixel: Any
) -> None:
    masks["output"] |= changes
    gradrun.infer(masks, trust_code=True)
    line = index(tmp_path / "out")[1]
    path = tmp_path / "out" / line["prediction"]["file"]
    expected = classes_of(tmp_path / "pictures" / line["id"])
    if not mode:
        assert np.array_equal(np.load(path), expected)
        return
    mask = Image.open(path)
    assert mask.mode == mode
    assert np.array_equal(np.asarray(mask), pixel(expected))
    if mode == "P":
        colors = np.array([(0, 0, 0), (255, 0, 0)])
        shown = np.asarray(mask.convert("RGB"))
        known = expected < 2
        assert np.array_equal(shown[known], colors[expected[known]])


def test_files_of_texts_and_repeated_ids(masks: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\n" + "pictures/a/0.png\n" * 3 + "pictures/b/1.png\n")
    masks["data"] |= {"path": f"{tmp_path}/list.csv"}
    masks["model"]["target"] = f"{tmp_path}/masks.py:Texts"
    masks["output"]["transform"] = "none"
    gradrun.infer(masks, trust_code=True)
    lines_of_index = index(tmp_path / "out")
    names = [line["prediction"]["file"] for line in lines_of_index]
    stem = "predictions/pictures_a_0"
    assert names == [
        f"{stem}.txt", f"{stem}-1.txt", f"{stem}-2.txt", "predictions/pictures_b_1.txt",
    ]  # fmt: skip
    for line, name in zip(lines_of_index, names, strict=True):
        pixels = np.asarray(Image.open(tmp_path / line["id"])) / 255
        assert (tmp_path / "out" / name).read_text() == f"{pixels.mean():.3f} ä"


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_run_of_files_continues_with_the_same_bytes(
    masks: dict[str, Any], tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradrun.infer(masks, trust_code=True)
    masks["output"]["path"] = f"{tmp_path}/stopped"
    write, calls = sample_files.FilesWriter.append, []

    def append(*args: Any) -> None:
        calls.append(args)
        if len(calls) > stop:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(sample_files.FilesWriter, "append", append)
    with pytest.raises(Interrupted):
        gradrun.infer(masks, trust_code=True)
    assert len(index(tmp_path / "stopped")) == stop * BATCH
    monkeypatch.undo()
    InlineEngines(monkeypatch)
    masks["engine"] = {"source": "processes", "workers": 2}
    gradrun.infer(masks, trust_code=True, resume=True)
    for path in [*(tmp_path / "out" / "predictions").iterdir(), tmp_path / "out" / "files.jsonl"]:
        other = tmp_path / "stopped" / path.relative_to(tmp_path / "out")
        assert path.read_bytes() == other.read_bytes()
    gradrun.infer(masks, trust_code=True, overwrite=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file_type": "txt"}, r"a \.txt file cannot contain output 'prediction'"),
        ({"transform": "none", "file_type": "png"}, "has the shape .* set output.file_type: npy"),
        ({"transform": "none", "file_type": "png", "palette": [[0, 0, 0]]}, "needs class numbers"),
        ({"palette": [[0, 0, 300]]}, "must be at most 255"),
    ],
)
def test_outputs_that_do_not_fit_the_kind_of_file_are_refused(
    masks: dict[str, Any], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    masks["output"] |= changes
    with pytest.raises(ConfigError, match=words):
        gradrun.infer(masks, trust_code=True)
    assert not (tmp_path / "out" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("sample_id", "name"),
    [
        ("../../etc/passwd", "_.._etc_passwd"),
        (".hidden", "hidden"),
        ("a/b.JPG", "a_b"),
        ("scan.tif#3", "scan#3".replace("#", "_")),
        ("x" * 300, "x" * 60),
        ("...", "sample"),
        ("cat 1.v2", "cat 1.v2"),
        ("a\x00b:c*", "a_b_c_"),
    ],
)
def test_the_name_of_a_file_is_safe(sample_id: str, name: str) -> None:
    assert sample_files.safe_name(sample_id) == name
