"""Example predictions and class counts in a result, against the files of the run."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gradrun
from gradrun.config.data import ImagesData
from gradrun.data import open_data
from gradrun.data.thumbnails import thumbnail_of_array
from gradrun.output.formats import FORMATS
from gradrun.results.result import InferResult, RunResult
from tests.support.small_models import save_tokenizer

TABLES = [form for form in FORMATS if form != "files"]

CLASSES, SAMPLES = 3, 40
NAMES = ("cat", "dog", "fox")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores [n, 3] that an Identity model returns, and their true classes."""
    base = tmp_path_factory.mktemp("examples")
    scores = np.random.default_rng(0).normal(size=(SAMPLES, CLASSES)).astype(np.float32)
    labels = np.where(np.arange(SAMPLES) % 4 == 0, (scores.argmax(1) + 1) % 3, scores.argmax(1))
    np.savez(base / "x.npz", scores=scores, labels=labels)
    with (base / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "c", "label", "name"])
        pairs = enumerate(zip(scores, labels, strict=True))
        writer.writerows([*row, NAMES[label], f"no. {i}"] for i, (row, label) in pairs)
    (base / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Identity):\n"
        f"    class_names = {list(NAMES)}\n"
        "def bad(): return Bad()\n"
        "class Bad(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        if (x[:, 0] > 1).any(): raise ValueError('too large')\n"
        "        return x\n"
    )
    return base


def run(folder: Path, out: Path, data: dict[str, Any], **sections: Any) -> InferResult:
    config = {
        "model": {"source": "python", "target": f"{folder / 'net.py'}:Net"},
        "data": {"path": str(folder / "x.npz"), "batch_size": 8} | data,
        "run": {"warmup": 0, "threads": 1, "device": "cpu"},
        "measure": {"memory": False},
        **sections,
    }
    config["output"] = {"path": str(out)} | sections.get("output", {})
    return gradrun.infer(config, trust_code=True)


ARRAYS = {
    "source": "arrays",
    "inputs": {"x": {"key": "scores"}},
    "labels": {"key": "labels"},
}


def arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    loaded = np.load(folder / "x.npz")
    return loaded["scores"], loaded["labels"]


@pytest.mark.parametrize(
    ("form", "transform"),
    [
        *(("npy", name) for name in ("none", "softmax", "argmax", ["softmax", "topk"])),
        *((form, "classify") for form in TABLES),
    ],
)
def test_classes_are_counted_and_examples_have_prediction_and_label(
    folder: Path, tmp_path: Path, form: str, transform: Any
) -> None:
    output = {"format": form, "transform": transform, "k": 2}
    result = run(folder, tmp_path / "out", ARRAYS, output=output)
    scores, labels = arrays(folder)
    best = scores.argmax(1)
    (found,) = result.class_distribution
    assert {c.name: c.count for c in found.most_frequent} == {
        NAMES[number]: count for number, count in Counter(best.tolist()).items()
    }
    assert (found.predictions, found.samples, found.classes) == (SAMPLES, SAMPLES, CLASSES)
    positions = [example.position for example in result.examples]
    assert positions == [round(i * (SAMPLES - 1) / 7) for i in range(8)]
    for example in result.examples:
        at = example.position
        assert example.prediction.startswith(NAMES[best[at]])
        assert example.label == NAMES[labels[at]]
        assert example.correct is bool(best[at] == labels[at])
        if transform in ("classify", "softmax"):
            probability = torch.from_numpy(scores[at]).softmax(0).max()
            assert example.prediction == f"{NAMES[best[at]]} ({probability:.3g})"
    assert {example.correct for example in result.examples} == {True, False}
    assert RunResult.load(tmp_path / "out") == result


def test_rows_of_a_table_are_shown_by_their_columns(folder: Path, tmp_path: Path) -> None:
    data = {
        "source": "records",
        "path": str(folder / "x.csv"),
        "inputs": {"x": {"columns": ["a", "b", "c"]}},
        "labels": "label",
        "id": "name",
        "classes": list(NAMES),
    }
    result = run(folder, tmp_path / "out", data, output={"transform": "argmax", "format": "csv"})
    with (folder / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    for example in result.examples:
        row = rows[example.position]
        values = ", ".join(f"{name} {float(row[name]):.4g}" for name in "abc")
        assert example.input == f"{row['name']}: {values}"
        assert example.label == row["label"]


def test_texts_and_pictures_are_shown_in_the_order_of_the_input(tmp_path: Path) -> None:
    lines = [f"text number {i} " + "and on " * (i % 40) for i in range(60)]
    (tmp_path / "t.txt").write_text("\n".join(lines) + "\n")
    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, input_ids, **_):\n"
        "        return (input_ids > 0).sum(1, keepdim=True).float()\n"
    )
    texts = {
        "model": {"source": "python", "target": f"{tmp_path / 'net.py'}:Net"},
        "data": {
            "source": "text",
            "path": str(tmp_path / "t.txt"),
            "tokenizer": str(tmp_path / "tokenizer"),
            "batch_size": 4,
            "group_by_length": True,
        },
        "output": {"path": str(tmp_path / "texts"), "examples": 5},
    }
    shown = gradrun.infer(texts, trust_code=True).examples
    assert [example.position for example in shown] == [0, 15, 30, 44, 59]
    for example in shown:
        line = lines[example.position].strip()
        assert example.input == (line if len(line) <= 200 else f"{line[:199]}…")
    for i in range(4):
        Image.new("RGB", (30, 20), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    pictures = {
        "model": {"source": "layers", "layers": ["Flatten", {"Linear": [1800, 2]}]},
        "data": {"source": "images", "path": str(tmp_path), "preprocess": "none"},
        "output": {"path": str(tmp_path / "pictures")},
    }
    for i, example in enumerate(gradrun.infer(pictures).examples):
        assert example.input == f"{i}.png"
        assert np.abs(decoded(example.picture) - (60 * i, 0, 0)).max() < 12


def test_a_model_without_names_is_described_with_those_of_the_labels(
    folder: Path, tmp_path: Path
) -> None:
    for i, name in enumerate(("b", "a", "c")):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (90 * i, 0, 0)).save(tmp_path / "in" / name / "x.png")
    result = gradrun.infer(
        {
            "model": {"source": "layers", "layers": ["Flatten", {"Linear": [192, 3]}]},
            "data": {"source": "images", "path": str(tmp_path / "in"), "labels": "folder"},
            "output": {"path": str(tmp_path / "out"), "transform": "argmax"},
        }
    )
    numbers = np.load(tmp_path / "out/predictions.npy")
    assert [e.prediction for e in result.examples] == ["abc"[number] for number in numbers]
    assert [e.label for e in result.examples] == ["a", "b", "c"]
    text = "the model names none; numbered as the labels: 0 is a, 1 is b, 2 is c"
    assert text in [s.text for s in result.interpretation if s.topic == "classes"]


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("transform", ["argmax", "classify"])
def test_a_prediction_of_nan_is_wrong_in_the_metrics_of_every_format(
    folder: Path, tmp_path: Path, form: str, transform: str
) -> None:
    scores, labels = arrays(folder)
    scores[[1, 6]] = np.nan
    np.savez(tmp_path / "x.npz", scores=scores, labels=labels)
    result = run(
        folder,
        tmp_path / "out",
        ARRAYS | {"path": str(tmp_path / "x.npz")},
        metrics=["accuracy"],
        output={"format": form, "transform": transform},
    )
    right = (scores.argmax(1) == labels) & np.isfinite(scores).all(1)
    assert result.metrics[0].value == pytest.approx(right.mean())
    assert [one.code for one in result.warnings if one.code == "nonfinite"] == ["nonfinite"]
    assert gradrun.verify(tmp_path / "out").complete


@pytest.mark.parametrize("form", TABLES)
def test_a_quarantined_last_sample_does_not_shorten_the_count(
    folder: Path, tmp_path: Path, form: str
) -> None:
    scores, labels = arrays(folder)
    scores = np.minimum(scores, 0.5)
    scores[-1] = 2
    np.savez(tmp_path / "x.npz", scores=scores, labels=labels)
    result = run(
        folder,
        tmp_path / "out",
        ARRAYS | {"path": str(tmp_path / "x.npz")},
        model={"source": "python", "target": f"{folder / 'net.py'}:bad"},
        output={"transform": "classify", "format": form},
        run={"on_error": "quarantine", "warmup": 0, "device": "cpu"},
    )
    (found,) = result.class_distribution
    assert (found.predictions, found.samples) == (SAMPLES - 1, SAMPLES)


def test_samples_with_the_same_id_are_a_warning(folder: Path, tmp_path: Path) -> None:
    records = {"source": "records", "inputs": {"x": {"columns": ["a", "b", "c"]}}}
    table = {"path": str(folder / "x.csv"), **records}
    for column, distinct in {"name": SAMPLES, "label": CLASSES}.items():
        result = run(folder, tmp_path / column, table | {"id": column})
        texts = [one.text for one in result.warnings if one.code == "repeated_ids"]
        repeated = SAMPLES - distinct
        assert [text.split(" the id")[0] for text in texts] == (
            [f"{repeated} of {SAMPLES} samples have"] if repeated else []
        )


def test_quarantined_samples_are_neither_examples_nor_counted(folder: Path, tmp_path: Path) -> None:
    bad = {"model": {"source": "python", "target": f"{folder / 'net.py'}:bad"}}
    result = run(
        folder,
        tmp_path / "out",
        ARRAYS,
        **bad,
        output={"transform": "argmax", "examples": SAMPLES},
        run={"on_error": "quarantine", "warmup": 0, "device": "cpu"},
    )
    scores, _ = arrays(folder)
    good = np.flatnonzero(scores[:, 0] <= 1)
    assert 0 < len(good) < SAMPLES
    assert [example.position for example in result.examples] == good.tolist()
    (found,) = result.class_distribution
    counts = Counter(scores[good].argmax(1).tolist())
    assert {c.name: c.count for c in found.most_frequent} == {str(n): c for n, c in counts.items()}


def test_examples_can_be_turned_off_and_the_run_resumed(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out", ARRAYS, output={"examples": 0})
    assert (result.examples, result.class_distribution) == ((), ())
    config = result.config | {"output": result.config["output"] | {"examples": 3}}
    assert gradrun.infer(config, trust_code=True, resume=True).predictions == SAMPLES


def test_synthetic_inputs_are_not_shown(tmp_path: Path) -> None:
    result = gradrun.infer(
        {
            "model": {"source": "layers", "layers": [{"Linear": [4, 3]}]},
            "data": {"source": "synthetic", "inputs": {"x": {"shape": [4]}}, "samples": 8},
            "output": {"path": str(tmp_path / "out"), "transform": "argmax"},
        }
    )
    assert (result.examples, result.class_distribution) == ((), ())


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (torch.tensor([[0.123456], [2.0]]), "0.123"),
        (torch.tensor([[1.0, 2.5, float("nan")]] * 2), "1 2.5 nan"),
        (torch.arange(20.0).reshape(2, 10), "10 values, 0 to 9"),
        (torch.arange(24.0).reshape(2, 3, 4), "3 × 4 values, 0 to 11"),
        (torch.tensor([[True], [False]]), "True"),
    ],
)
def test_other_outputs_are_described_in_short_numbers(
    tmp_path: Path, values: torch.Tensor, text: str
) -> None:
    np.save(tmp_path / "x.npy", values.numpy())
    result = gradrun.infer(
        {
            "model": {"source": "layers", "layers": ["Identity"]},
            "data": {"source": "arrays", "path": str(tmp_path / "x.npy")},
            "output": {"path": str(tmp_path / "out")},
        }
    )
    assert result.examples[0].prediction == text
    assert result.class_distribution == ()


def test_the_classes_of_masks_are_counted_per_pixel(tmp_path: Path) -> None:
    scores = np.random.default_rng(1).normal(size=(5, 3, 6, 7)).astype(np.float32)
    np.save(tmp_path / "x.npy", scores)
    result = gradrun.infer(
        {
            "model": {"source": "layers", "layers": ["Identity"]},
            "data": {"source": "arrays", "path": str(tmp_path / "x.npy")},
            "output": {"path": str(tmp_path / "out"), "transform": "argmax"},
        }
    )
    counts = Counter(scores.argmax(1).ravel().tolist())
    (found,) = result.class_distribution
    assert {c.name: c.count for c in found.most_frequent} == {str(n): c for n, c in counts.items()}
    assert (found.predictions, found.samples) == (5 * 6 * 7, 5)
    (number, count), *_ = Counter(scores[0].argmax(0).ravel().tolist()).most_common(1)
    assert result.examples[0].prediction.startswith(f"{number} {count / 42:.0%}")


def test_a_failure_is_a_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr("gradrun.inference.examples.quarantined_positions", fail)
    result = run(folder, tmp_path / "out", ARRAYS)
    assert result.examples == ()
    assert [w.text for w in result.warnings if w.code == "no_examples"] == [
        "the report has no examples: OSError: the disk is gone"
    ]


# --- thumbnails --------------------------------------------------------------------------------


def decoded(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(float)


def thumbnails(folder: Path) -> list[bytes]:
    """The thumbnails of all images of a folder."""
    data: Any = open_data(ImagesData(source="images", path=folder), seed=0)
    return [preview.picture for preview in data.previews(range(data.samples))]


def test_a_thumbnail_is_small_and_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (400, 200), "white")
    picture.paste("red", (0, 0, 200, 200))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise, so that the left half is the upper half
    picture.save(tmp_path / "a.jpg", exif=exif)
    (jpeg,) = thumbnails(tmp_path)
    pixels = decoded(jpeg)
    assert pixels.shape == (96, 48, 3)
    assert len(jpeg) < 4096
    assert np.abs(pixels[:40] - (255, 0, 0)).max() < 40
    assert np.abs(pixels[56:] - 255).max() < 40


def test_an_array_that_looks_like_a_picture_has_a_thumbnail() -> None:
    ramp = torch.linspace(-3, 5, 64).reshape(1, 8, 8)
    pixels = decoded(thumbnail_of_array(ramp))
    expected = ((ramp[0] + 3) / 8 * 255).repeat_interleave(6, 0).repeat_interleave(6, 1).numpy()
    assert np.abs(pixels.mean(2) - expected).mean() < 4
    assert thumbnail_of_array(ramp.reshape(8, 8, 1)) == thumbnail_of_array(ramp)


@pytest.mark.parametrize("shape", [(8,), (8, 8), (5, 8, 8), (1, 2, 2), (0, 8, 8), (1, 1, 8, 8)])
def test_other_arrays_have_none(shape: tuple[int, ...]) -> None:
    assert thumbnail_of_array(torch.zeros(shape)) == b""


def test_a_damaged_picture_has_none(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    good, damaged = thumbnails(tmp_path)
    assert good
    assert damaged == b""
