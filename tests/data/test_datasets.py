"""Hugging Face datasets as texts, images, audio and records, against the library itself."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

import gradrun
from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError, SampleError
from gradrun.core.optional import import_transformers
from tests.conftest import Command
from tests.support.engines import InlineEngines
from tests.support.small_models import save_bert, save_tokenizer, skewed
from tests.support.sources import data, data_error, joined, read_all

NAMES = ["good", "bad", "neither"]
COUNT = 41


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of save_to_disk: reviews with two splits, pictures, numbers and sounds."""
    root = tmp_path_factory.mktemp("datasets")
    texts = skewed(COUNT)
    labels = [i % 3 for i in range(COUNT)]
    numbers = np.random.default_rng(0).normal(size=(COUNT, 2)).astype(np.float32)
    reviews = Dataset.from_dict(
        {
            "key": [f"r{i}" for i in range(COUNT)],
            "review": texts,
            "label": labels,
            "tags": [[0, 2] if i % 2 else [] for i in range(COUNT)],
            "x": numbers.tolist(),
        },
        features=Features(
            key=Value("string"),
            review=Value("string"),
            label=ClassLabel(names=NAMES),
            tags=datasets.List(ClassLabel(names=NAMES)),
            x=datasets.List(Value("float32")),
        ),
    )
    half = reviews.select(range(7)).with_format("torch")
    DatasetDict({"train": half, "test": reviews}).save_to_disk(root / "reviews")
    reviews.save_to_disk(root / "single")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    for number, array in enumerate(pixels):
        keys = {"exif": turned} if number == 2 else {}
        Image.fromarray(array.transpose(1, 0, 2) if number == 2 else array).save(
            root / f"{number}.png", **keys
        )
    features = Features(picture=datasets.Image(), label=ClassLabel(names=["cat", "dog"]))
    files = [str(root / f"{number}.png") for number in range(6)]
    made = Dataset.from_dict({"picture": files, "label": [0, 1, 1, 0, 1, 0]}, features=features)
    made.save_to_disk(root / "pictures")
    clip = np.random.default_rng(0).uniform(-0.5, 0.5, 80).astype(np.float32)
    soundfile.write(root / "clip.wav", clip, 16_000, subtype="FLOAT")
    stored = [{"bytes": (root / "clip.wav").read_bytes(), "path": None}, None]
    sounds = Dataset.from_dict({"sound": stored}).cast_column("sound", datasets.Audio())
    sounds.save_to_disk(root / "sounds")
    save_tokenizer(root / "bert")
    save_bert(root / "bert", "BertForSequenceClassification", num_labels=3)
    return root


def test_texts_run_as_in_a_plain_loop_with_their_labels_and_class_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = import_transformers("")
    config: dict[str, Any] = {
        "model": {
            "source": "huggingface",
            "path": str(folder / "bert"),
            "auto_class": "AutoModelForSequenceClassification",
        },
        "data": {
            "source": "text",
            "dataset": {"path": str(folder / "reviews"), "split": "test"},
            "field": "review",
            "labels": "label",
            "id": "key",
            "batch_size": 4,
        },
        "run": {"threads": 1, "warmup": 0},
        "metrics": ["accuracy"],
        "output": {"path": str(tmp_path / "one"), "format": "jsonl"},
        "measure": {"memory": False},
    }
    result = gradrun.infer(config)
    rows = [json.loads(line) for line in (tmp_path / "one" / "predictions.jsonl").open()]

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "bert")
    stored = datasets.load_from_disk(folder / "reviews")["test"]
    with torch.no_grad():
        expected = torch.cat(
            [model(**tokenizer(text, return_tensors="pt")).logits for text in stored["review"]]
        )
    found = torch.tensor([row["prediction"] for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [row["id"] for row in rows] == stored["key"][:]
    (accuracy,) = result.metrics
    right = expected.argmax(1) == torch.tensor(stored["label"][:])
    assert accuracy.value == pytest.approx(right.float().mean().item())
    texts = {statement.topic: statement.text for statement in result.interpretation}
    assert texts["order"].startswith("rows as in the dataset reviews/test; ids: column key")
    assert texts["labels"] == (
        "column label, by name: good, bad, neither (3 classes, from the dataset)"
    )

    InlineEngines(monkeypatch)
    two = config | {"output": config["output"] | {"path": str(tmp_path / "two")}}
    gradrun.infer(two, engine={"source": "processes", "workers": 2})
    read = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("one", "two")]
    assert read[0] == read[1]


def test_a_resume_refuses_another_dataset_and_otherwise_gives_the_same_bytes(
    tmp_path: Path,
) -> None:
    def save(last: float | None) -> None:
        rows = {"x": [*map(float, range(20)), last]}
        Dataset.from_dict(rows, features=Features(x=Value("float32"))).save_to_disk(
            tmp_path / "numbers"
        )

    config: dict[str, Any] = {
        "model": {"source": "layers", "layers": [{"Linear": [1, 2]}]},
        "data": {
            "source": "records",
            "dataset": {"path": str(tmp_path / "numbers")},
            "inputs": {"x": {"columns": ["x"]}},
            "batch_size": 4,
        },
        "run": {"warmup": 0},
    }
    save(None)
    output = {"path": str(tmp_path / "stopped")}
    with pytest.raises(gradrun.RunFailed, match="numbers:21  column 'x' is null"):
        gradrun.infer(config, output=output)
    quarantine = {"run.on_error": "quarantine"}
    gradrun.infer(config, output=output, resume=True, **quarantine)
    gradrun.infer(config, output={"path": str(tmp_path / "whole")}, **quarantine)
    stopped, whole = (
        (tmp_path / name / "predictions.npy").read_bytes() for name in ("stopped", "whole")
    )
    assert stopped == whole
    with pytest.raises(gradrun.RunFailed):
        gradrun.infer(config, output=output, overwrite=True)
    (tmp_path / "numbers" / "state.json").unlink()
    save(20.0)
    with pytest.raises(ConfigError, match="cannot resume"):
        gradrun.infer(config, output=output, resume=True)


def test_pictures_are_decoded_upright_with_the_classes_of_the_features(folder: Path) -> None:
    source = data(
        "images", dataset={"path": folder / "pictures"}, labels="label", batch_size=4, scale=1
    )
    stored = datasets.load_from_disk(folder / "pictures")
    expected = [
        np.asarray(picture.convert("RGB")).transpose(2, 0, 1) for picture in stored["picture"]
    ]
    expected[2] = np.rot90(expected[2], -1, (1, 2)) if expected[2].shape[1] == 5 else expected[2]
    np.testing.assert_array_equal(joined(source.batches()), np.stack(expected).astype(np.float32))
    assert source.classes == ("cat", "dog")
    assert torch.cat(list(source.labels())).tolist() == [0, 1, 1, 0, 1, 0]
    texts = {statement.topic: statement.text for statement in source.statements()}
    assert texts["files"] == "6 images, as in the dataset pictures; ids: row numbers, from 0"
    assert texts["exif"] == "1 of 6 images turned upright"


def test_sounds_are_decoded_and_a_null_is_an_error_of_its_row(folder: Path) -> None:
    source = data("audio", dataset={"path": folder / "sounds"})
    (batch,) = source.batches()
    samples, _ = soundfile.read(folder / "clip.wav", dtype="float32")
    np.testing.assert_array_equal(batch.args[0][0], samples)
    assert {row: str(error) for row, error in batch.errors.items()} == {
        1: "1 is null in the column 'sound'"
    }


def test_numbers_of_any_range_of_rows_are_those_of_the_dataset(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradrun.data.hf_dataset._ROWS", 3)
    source = data(
        "records", dataset={"path": folder / "single"}, inputs={"x": {"columns": ["x"]}},
        labels="tags", batch_size=4,
    )  # fmt: skip
    stored = datasets.load_from_disk(folder / "single")
    expected = torch.tensor(stored["x"][:])
    assert torch.equal(joined(source.batches()), expected)
    assert torch.equal(joined(source.batches(8, 20)), expected[8:20])
    assert torch.cat(list(source.labels()))[:2].tolist() == [[0, 0, 0], [1, 0, 1]]


def test_a_stored_format_does_not_change_the_rows(folder: Path) -> None:
    keys = {"dataset": {"path": folder / "reviews", "split": "train"}}
    source = data("records", inputs={"x": {"columns": ["x"]}}, **keys)
    expected = datasets.load_from_disk(folder / "single").select(range(7))
    assert torch.equal(joined(source.batches()), torch.tensor(expected["x"][:]))


def test_a_class_column_is_an_input_as_its_numbers(folder: Path) -> None:
    keys = {"dataset": {"path": folder / "single"}}
    source = data("records", inputs={"x": {"columns": ["label"], "dtype": "int64"}}, **keys)
    assert joined(source.batches())[:4].flatten().tolist() == [0, 1, 2, 0]


def test_a_missing_class_is_an_error_of_the_metrics(tmp_path: Path) -> None:
    features = Features(x=Value("float32"), y=ClassLabel(names=["a", "b"]))
    Dataset.from_dict({"x": [1, 2], "y": [0, -1]}, features=features).save_to_disk(tmp_path / "d")
    source = data(
        "records", dataset={"path": tmp_path / "d"}, inputs={"x": {"columns": ["x"]}}, labels="y"
    )
    with pytest.raises(ConfigError, match="d:2  the label 'y' is missing"):
        list(source.labels())


# --- errors ------------------------------------------------------------------------------------

RECORDS = {"source": "records", "inputs": {"x": {"columns": ["x"]}}}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (RECORDS | {"dataset": {"path": "reviews"}},
         "reviews has several splits; choose one; allowed: train, test"),
        (RECORDS | {"dataset": {"path": "reviews", "split": "tset"}},
         "reviews has no split 'tset'; did you mean test?"),
        (RECORDS | {"dataset": {"path": "single", "split": "test"}},
         "is one dataset without splits"),
        (RECORDS | {"dataset": {"path": "bert"}}, "bert is not a folder of save_to_disk: "),
        (RECORDS | {"dataset": {"path": "single"}, "inputs": {"x": {"columns": ["xx"]}}},
         "single has no column 'xx'; did you mean x?"),
        (RECORDS | {"dataset": {"path": "pictures"}, "inputs": {"x": {"columns": ["picture"]}}},
         "the column 'picture' contains images or audio; read it with source: images"),
        ({"source": "images", "dataset": {"path": "single"}}, "single has no images, only key, "),
        ({"source": "images", "dataset": {"path": "pictures"}, "column": "label"},
         "the column 'label' does not contain images"),
        ({"source": "images", "dataset": {"path": "pictures"}, "labels": "lable"},
         "pictures has no column 'lable'; did you mean label?"),
        ({"source": "images", "dataset": {"path": "pictures"}, "labels": {"folder": 1}},
         "the labels of a dataset are a column"),
    ],
)  # fmt: skip
def test_a_wrong_dataset_split_or_column_is_one_sentence(
    folder: Path, section: dict[str, Any], words: str
) -> None:
    path = folder / section["dataset"]["path"]
    keys = {key: value for key, value in section.items() if key != "source"}
    keys["dataset"] = section["dataset"] | {"path": path}
    assert words in data_error(section["source"], **keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("", "path is missing; set it to files, or set dataset"),
        ("path: x.csv, dataset: {path: single}", "path and dataset cannot be combined"),
        ("dataset: {path: single}, separator: x", "separator and dataset cannot be combined"),
        ("dataset: {path: org/name}", "a dataset on the hub needs one, such as test"),
        ("dataset: {path: single, revision: main}", "revision has no effect for a folder"),
        ("dataset: {path: single, streaming: true}", "streaming: unknown key"),
        ("dataset: single", "write a map, such as {path: reviews, split: test}"),
    ],
)
def test_keys_that_do_not_fit_are_errors_of_the_config(
    folder: Path, tmp_path: Path, keys: str, words: str
) -> None:
    (tmp_path / "single").symlink_to(folder / "single")
    (tmp_path / "x.csv").write_text("x\n1\n")
    (tmp_path / "c.yaml").write_text(
        "model: {source: layers, layers: [Identity]}\n"
        f"data: {{source: records, inputs: {{x: {{columns: [x]}}}}, {keys}}}\n"
        "output: {path: out}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert words in str(caught.value)


def test_a_name_is_one_sentence_without_a_network(
    tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unreachable(*args: object, **keys: object) -> None:
        raise RuntimeError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    section = {"path": "org/reviews", "split": "test"}
    (tmp_path / "c.yaml").write_text(
        json.dumps(
            {
                "model": {"source": "layers", "layers": ["Identity"]},
                "data": RECORDS | {"dataset": section},
                "output": {"path": "out"},
            }
        )
    )
    started = time.monotonic()
    answer = cli("infer", tmp_path / "c.yaml")
    assert time.monotonic() - started < 20
    assert answer.code == 2
    assert "the hub cannot be reached ([Errno -2] Name or service not known)" in " ".join(
        answer.err.split()
    )
    assert "HF_HUB_OFFLINE=1 uses the cache" in " ".join(answer.err.split())


def test_a_broken_picture_is_an_error_of_its_row(tmp_path: Path) -> None:
    bad, good = ({"bytes": content, "path": None} for content in (b"no image", _png()))
    made = Dataset.from_dict(
        {"image": [bad, None, good], "key": ["a", "b", "c"]},
        features=Features(image=datasets.Image(), key=Value("string")),
    )
    made.save_to_disk(tmp_path / "broken")
    source = data("images", dataset={"path": tmp_path / "broken"}, id="key")
    (batch,) = source.batches()
    assert list(batch.ids) == ["a", "b", "c"]
    assert {row: str(error) for row, error in batch.errors.items()} == {
        0: "a is not an image of a supported format",
        1: "b is null in the column 'image'",
    }
    with pytest.raises(SampleError):
        read_all(source)


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, "PNG")
    return file.getvalue()
