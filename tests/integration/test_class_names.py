"""Class names in every format: from the config, a file, or the model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image
from safetensors.torch import load_file

import gradrun
from gradrun.core.errors import ConfigError, Interrupted
from gradrun.core.progress import Progress
from gradrun.models.class_names import check_order
from gradrun.output.formats import FORMATS

TABLES = [form for form in FORMATS if form != "files"]

NAMES = ["cat", "dog", "emu", "fox"]
SCORES = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
ORDER = np.argsort(-SCORES, axis=1)


def config(folder: Path, form: str = "npy", **data: Any) -> dict[str, Any]:
    np.save(folder / "x.npy", SCORES)
    return {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "arrays", "path": str(folder / "x.npy"), "batch_size": 4, **data},
        "run": {"warmup": 0},
        "measure": {"memory": False},
        "output": {"path": str(folder / "out"), "format": form},
    }


def names_in(folder: Path, form: str, numbers: str, column: str) -> list[Any]:
    """The class names of the predictions, read with other tools."""
    if form in {"npy", "safetensors"}:
        names = (folder / "classes.txt").read_text().splitlines()
        if form == "npy":
            rows = np.load(folder / f"predictions{numbers}.npy")
        else:
            rows = load_file(folder / "predictions-00000.safetensors")[
                numbers.removeprefix(".") or "prediction"
            ].numpy()
        return np.array(names)[rows].tolist()
    if form == "parquet":
        return [
            value if isinstance(value, str) else list(value)
            for value in pandas.read_parquet(folder / "predictions")[column]
        ]
    if form == "csv":
        with (folder / "predictions.csv").open(newline="") as file:
            rows_of_csv = [*csv.DictReader(file)]
        if column in rows_of_csv[0]:
            return [row[column] for row in rows_of_csv]
        return [[row[f"{column}.{i}"] for i in range(3)] for row in rows_of_csv]
    return [json.loads(line)[column] for line in (folder / "predictions.jsonl").open()]


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("source", ["list", "file", "map"])
@pytest.mark.parametrize("transform", ["argmax", "topk", "classify"])
def test_listed_class_names_are_written_in_every_format(
    tmp_path: Path, form: str, source: str, transform: str
) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    numbered = {i: NAMES[i] for i in (2, 0, 3, 1)}
    classes = {"list": NAMES, "file": str(tmp_path / "classes.txt"), "map": numbered}
    keys = config(tmp_path, form, classes=classes[source])
    keys["output"] |= {"transform": transform, "k": 3}
    result = gradrun.infer(keys)
    numbers = {"argmax": "", "topk": ".indices", "classify": ".class"}[transform]
    found = names_in(tmp_path / "out", form, numbers, "labels" if transform == "topk" else "label")
    expected = np.array(NAMES)[ORDER[:, :3] if transform == "topk" else ORDER[:, 0]]
    assert found == expected.tolist()
    statements = {one.topic: one.text for one in result.interpretation}
    assert statements["classes"] == "cat, dog, emu, fox (4, data.classes)"


@pytest.mark.parametrize("form", TABLES)
def test_scores_per_class_have_the_names_of_their_columns_beside_them(
    tmp_path: Path, form: str
) -> None:
    keys = config(tmp_path, form, classes=NAMES)
    keys["output"]["transform"] = "softmax"
    gradrun.infer(keys)
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\nemu\nfox\n"


def test_outputs_that_are_no_classes_have_no_file_of_names(tmp_path: Path) -> None:
    gradrun.infer(config(tmp_path, classes=["a", "b", "c"]))  # four values per row
    assert not (tmp_path / "out" / "classes.txt").exists()


MODEL = """
import torch
class Net(torch.nn.Module):
    class_names = {names}
    def forward(self, x): return x
"""


def python_config(folder: Path, names: Any, **data: Any) -> dict[str, Any]:
    (folder / "net.py").write_text(MODEL.format(names=names))
    keys = config(folder, "jsonl", **data)
    keys["model"] = {"source": "python", "target": str(folder / "net.py") + ":Net"}
    keys["output"]["transform"] = "argmax"
    return keys


def test_names_of_the_model_are_the_default_and_a_list_replaces_them(tmp_path: Path) -> None:
    own = ["w", "x", "y", "z"]
    result = gradrun.infer(python_config(tmp_path, own), trust_code=True)
    found = names_in(tmp_path / "out", "jsonl", "", "label")
    assert found == np.array(own)[ORDER[:, 0]].tolist()
    statements = {one.topic: one.text for one in result.interpretation}
    assert statements["classes"] == "w, x, y, z (4, the model's)"
    gradrun.infer(python_config(tmp_path, own, classes=NAMES), trust_code=True, overwrite=True)
    found = names_in(tmp_path / "out", "jsonl", "", "label")
    assert found == np.array(NAMES)[ORDER[:, 0]].tolist()


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["dog", "cat", "emu", "fox"], r"another order; set data.classes: \[dog, cat, emu, fox\]"),
        (["a", "b", "c"], r"4 classes are listed, but the model has 3 \(a, b, c\)"),
    ],
)
def test_a_list_that_contradicts_the_model_is_an_error(
    tmp_path: Path, own: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        gradrun.infer(python_config(tmp_path, own, classes=NAMES), trust_code=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat\n\ndog\n", "line 2 of .* is empty"),
        ("cat\ndog\ncat\n", "'cat' is listed twice"),
        (None, "does not exist"),
        ("cat\n", "at least 2|too_short|2 items"),
    ],
)
def test_a_wrong_file_of_classes_is_an_error(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ConfigError, match=words):
        gradrun.infer(config(tmp_path, classes=str(tmp_path / "names.txt")))


def test_other_class_names_are_another_run_only_where_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradrun.inference.timed_loop._CALLBACK_NS", 0)

    def stop(progress: Progress) -> None:
        if progress.stage == "predicting" and progress.done >= 8:
            raise KeyboardInterrupt

    for form in ("jsonl", "npy"):
        (tmp_path / form).mkdir()
        keys = config(tmp_path / form, form, classes=NAMES)
        keys["output"]["transform"] = "argmax"
        with pytest.raises(Interrupted):
            gradrun.infer(keys, progress=stop)
        keys["data"]["classes"] = ["a", "b", "c", "d"]
        if form == "jsonl":
            with pytest.raises(ConfigError, match=r"the class names changed \(data\.classes"):
                gradrun.infer(keys, resume=True)
        else:
            gradrun.infer(keys, resume=True)
            text = (tmp_path / form / "out" / "classes.txt").read_text()
            assert text == "a\nb\nc\nd\n"


def test_a_map_of_classes_may_give_the_number_of_each_name(tmp_path: Path) -> None:
    keys = config(tmp_path, "jsonl", classes={NAMES[i]: i for i in (2, 0, 3, 1)})
    keys["output"]["transform"] = "argmax"
    gradrun.infer(keys)
    assert names_in(tmp_path / "out", "jsonl", "", "label") == np.array(NAMES)[ORDER[:, 0]].tolist()


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"cat": 0, "dog": 2}, "without gaps, each once"),
        ({"cat": 0, "dog": 0}, "without gaps, each once"),
        ({"cat": 0, "dog": "1"}, "without gaps, each once"),
        ({0: 1, 1: 0}, "the map has numbers on both sides; write a list of names"),
    ],
)
def test_a_map_of_classes_without_one_name_per_number_is_an_error(
    tmp_path: Path, classes: dict[Any, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        gradrun.infer(config(tmp_path, classes=classes))


@pytest.mark.parametrize("transform", ["topk", "classify", "softmax", "argmax"])
def test_names_of_another_number_of_classes_are_in_no_file(tmp_path: Path, transform: str) -> None:
    keys = config(tmp_path, classes=["a", "b"])  # and four scores per row
    keys["output"] |= {"transform": transform, "k": 2}
    result = gradrun.infer(keys)
    assert not (tmp_path / "out" / "classes.txt").exists()
    assert [w.code for w in result.warnings if w.code == "class_names"]


def test_a_map_of_classes_with_a_gap_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be 0, 1, 2, \.\.\. without gaps"):
        gradrun.infer(config(tmp_path, classes={0: "cat", 2: "dog"}))


@pytest.mark.parametrize("classes", [None, NAMES])
def test_a_config_that_was_dumped_is_valid_again(tmp_path: Path, classes: Any) -> None:
    loaded = gradrun.load_config(config(tmp_path, classes=classes)).config
    again = type(loaded).model_validate_json(loaded.model_dump_json())
    assert again == loaded


NAMED_MODEL = """
import torch

class Brightness(torch.nn.Module):
    def __init__(self, names):
        super().__init__()
        self.class_names = names

    def forward(self, image):
        white = image.mean((1, 2, 3))
        return torch.stack([4 - 8 * white, 8 * white - 4], 1)
"""


def run_on_folders(folder: Path, names: list[str], **data: Any) -> gradrun.InferResult:
    """Run a model of dark (0) and bright (1) on images in the folders `black` and `white`."""
    for label, value in {"black": 0, "white": 255}.items():
        (folder / "in" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (4, 4), (value,) * 3).save(folder / "in" / label / f"{number}.png")
    (folder / "brightness.py").write_text(NAMED_MODEL)
    return gradrun.infer(
        {
            "model": {
                "source": "python",
                "target": f"{folder}/brightness.py:Brightness",
                "args": {"names": names},
            },
            "data": {
                "source": "images",
                "path": str(folder / "in"),
                "labels": "folder",
                "batch_size": 4,
                **data,
            },
            "run": {"warmup": 0},
            "measure": {"memory": False},
            "output": {"path": str(folder / "out"), "transform": "classify", "format": "csv"},
        },
        trust_code=True,
    )


def label_warnings(result: gradrun.InferResult) -> list[str]:
    return [warning.text for warning in result.warnings if warning.code == "label_names"]


def test_labels_with_other_spelling_of_the_model_classes_are_the_same(tmp_path: Path) -> None:
    result = run_on_folders(tmp_path, [" Black", "WHITE"])

    assert label_warnings(result) == []
    assert all(example.correct for example in result.examples)
    assert {example.label for example in result.examples} == {"black", "white"}


def test_labels_with_other_spelling_in_another_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"another order; set data.classes: \[white, black\]"):
        run_on_folders(tmp_path, ["White", "Black"])


def test_folders_are_matched_by_name_with_the_classes_of_the_model(tmp_path: Path) -> None:
    result = run_on_folders(tmp_path, ["white", "black"])  # its class 0 is the dark one

    assert label_warnings(result) == []
    assert {(e.label, e.prediction.split()[0]) for e in result.examples} == {
        ("black", "white"),
        ("white", "black"),
    }
    assert {example.correct for example in result.examples} == {False}


def run_on_records(folder: Path, names: list[str], path: Path) -> gradrun.InferResult:
    keys = python_config(folder, names)
    inputs = {"x": {"columns": [*"abcd"]}}
    keys["data"] = {"source": "records", "path": str(path), "inputs": inputs, "labels": "kind"}
    return gradrun.infer(keys, trust_code=True, metrics=["accuracy"])


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_column_of_labels_is_matched_by_name_with_the_classes_of_the_model(
    tmp_path: Path, form: str
) -> None:
    labels = np.random.default_rng(1).choice(["emu", "cat", "fox"], 20)  # no dog
    table = pandas.DataFrame(SCORES.astype(float), columns=[*"abcd"]).assign(kind=labels)
    path = tmp_path / f"t.{form}"
    if form == "csv":
        table.to_csv(path, index=False)
    elif form == "jsonl":
        table.to_json(path, orient="records", lines=True, double_precision=15)
    else:
        table.to_parquet(path)
    result = run_on_records(tmp_path, NAMES, path)
    expected = np.mean(np.array(NAMES)[ORDER[:, 0]] == labels)
    assert result.metrics[0].value == pytest.approx(expected)
    stated = {statement.topic: statement.text for statement in result.interpretation}
    named = "column kind, by name: cat, dog, emu, fox (4 classes, from the model)"
    assert stated["labels"] == named


def test_labels_that_are_numbers_remain_numbers_with_names_in_the_model(tmp_path: Path) -> None:
    numbers = np.arange(20) % 4
    table = pandas.DataFrame(SCORES.astype(float), columns=[*"abcd"]).assign(kind=numbers)
    table.to_csv(tmp_path / "t.csv", index=False)
    result = run_on_records(tmp_path, ["3", "2", "1", "0"], tmp_path / "t.csv")
    assert result.metrics[0].value == pytest.approx(np.mean(ORDER[:, 0] == numbers))


def test_labels_with_one_name_of_another_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'white' is class 0 of the model"):
        run_on_folders(tmp_path, ["White", "Other"])


def test_labels_with_other_names_are_matched_by_position_with_a_warning(tmp_path: Path) -> None:
    result = run_on_folders(tmp_path, ["dark", "bright"])

    (text,) = label_warnings(result)
    assert "labels are black, white, and the model's classes are dark, bright" in text
    assert "set data.classes" in text
    assert {(e.label, e.prediction.split()[0]) for e in result.examples} == {
        ("black", "dark"),
        ("white", "bright"),
    }


def test_listed_classes_settle_the_names_of_the_labels(tmp_path: Path) -> None:
    result = run_on_folders(tmp_path, ["dark", "bright"], classes=["black", "white"])

    assert label_warnings(result) == []
    texts = [s.text for s in result.interpretation if s.topic == "classes"]
    assert texts == ["black, white (2, data.classes, instead of dark, bright in the model)"]


def test_listed_classes_with_other_spelling_in_another_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"another order; set data.classes: \[white, black\]"):
        run_on_folders(tmp_path, ["White", "Black"], classes=["black", "white"])


def test_lists_with_a_repeated_name_are_in_the_same_order() -> None:
    birds_and_machines = ["crane", "heron", "crane"]  # as in the classes of ImageNet
    check_order(birds_and_machines, birds_and_machines)
    with pytest.raises(ConfigError, match="another order"):
        check_order(["heron", "crane", "crane"], birds_and_machines)
