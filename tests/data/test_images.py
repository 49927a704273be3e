"""Tests of the source `images`: listing, decoding in order, labels and damaged files."""

from __future__ import annotations

import csv
import json
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import gradrun
from gradrun.config.load import load_config
from gradrun.core.cpu import available_cpus
from gradrun.core.errors import ConfigError, Interrupted, RunFailed, SampleError
from gradrun.core.progress import Progress
from gradrun.data import decoded_files
from gradrun.data.source import BatchSource
from gradrun.inference.sampling import first_batches
from gradrun.output.formats import FORMATS
from gradrun.results.result import RunResult
from tests.support.pictures import BROKEN, DIGITS, LABELS, lay_out, opened, save_noise

# --- runs over digits ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    lay_out(folder)
    return folder


def infer(digits: Path, out: Path, **changes: Any) -> RunResult:
    given: dict[str, Any] = {
        "model": {"source": "zoo", "name": "digits_cnn"},
        "data": {
            "source": "images",
            "path": str(digits),
            "mode": "L",
            "scale": 1 / 256,
            "labels": "folder",
        },
        "run": {"on_error": "quarantine", "warmup": 0},
        "measure": {"memory": False},
        "output": {"path": str(out), "format": "jsonl", "transform": "argmax"},
    }
    return gradrun.infer(given, **changes)


def test_a_run_over_500_images_quarantines_the_three_damaged_ones(
    digits: Path, tmp_path: Path
) -> None:
    result = infer(digits, tmp_path / "out", metrics=["accuracy"])
    apart = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").open()]
    assert {int(Path(sample["id"]).stem) for sample in apart} == set(BROKEN)
    assert all(sample["error"].startswith(sample["id"]) for sample in apart)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").open()]
    assert len(lines) == 500
    assert [line["id"] for line in lines] == sorted(line["id"] for line in lines)
    found = {int(Path(line["id"]).stem): line["prediction"] for line in lines}
    assert {number for number, digit in found.items() if digit is None} == set(BROKEN)
    right = [digit == LABELS[number] for number, digit in found.items() if digit is not None]
    assert len(right) == 497
    assert np.mean(right) >= 0.97
    (metric,) = result.metrics
    assert (metric.samples, metric.value) == (497, pytest.approx(np.mean(right)))


def test_a_damaged_image_ends_the_run_with_on_error_stop(digits: Path, tmp_path: Path) -> None:
    message = r"3/007\.png is not an image.*; set run\.on_error: quarantine to skip"
    with pytest.raises(RunFailed, match=message):
        infer(digits, tmp_path / "later", run={"on_error": "stop"})
    with pytest.raises(ConfigError, match=message):
        infer(digits, tmp_path / "at once", run={"on_error": "stop"}, data={"batch_size": 256})
    assert not (tmp_path / "at once").exists()


def test_a_resumed_run_ends_with_the_same_bytes(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done >= 192:
            raise KeyboardInterrupt

    infer(digits, tmp_path / "whole")
    monkeypatch.setattr("gradrun.inference.timed_loop._CALLBACK_NS", 0)
    with pytest.raises(Interrupted):
        infer(digits, tmp_path / "out", progress=stop)
    result = infer(digits, tmp_path / "out", resume=True)
    assert 0 < result.resumed_at < 500
    for name in ("predictions.jsonl", "quarantine.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_resume_is_refused_if_images_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    files = lay_out(tmp_path / "few", 150, {})
    monkeypatch.setattr("gradrun.inference.timed_loop._CALLBACK_NS", 0)
    with pytest.raises(Interrupted):
        infer(tmp_path / "few", tmp_path / "out", progress=stop)
    files[40].write_bytes(files[40].read_bytes() + b"\0")
    with pytest.raises(ConfigError, match=r"the files in data\.path changed \(names and sizes"):
        infer(tmp_path / "few", tmp_path / "out", resume=True)
    names = "\n".join(str(file) for file in files)
    (tmp_path / "list.txt").write_text(names)
    with pytest.raises(Interrupted):
        infer(tmp_path / "list.txt", tmp_path / "listed", progress=stop)
    files[40].write_bytes(files[40].read_bytes() + b"\0")
    with pytest.raises(ConfigError, match=r"the files in data\.path changed"):
        infer(tmp_path / "list.txt", tmp_path / "listed", resume=True)


def test_file_names_that_are_not_utf8_are_written_by_every_format(tmp_path: Path) -> None:
    name = os.fsdecode(b"4/\xff\xe9.png")
    lay_out(tmp_path / "odd", 3, {})
    (tmp_path / "odd" / name).write_bytes(next((tmp_path / "odd").rglob("*.png")).read_bytes())
    (tmp_path / "odd" / "4" / "gone.png").symlink_to(tmp_path / "nowhere")
    for form in FORMATS:
        result = infer(tmp_path / "odd", tmp_path / form, output={"format": form})
        assert result.predictions == 5
    assert "\\udcff" in (tmp_path / "jsonl" / "predictions.jsonl").read_text()
    table = pandas.read_parquet(tmp_path / "parquet" / "predictions")
    assert "4/\\udcff\\udce9.png" in table["id"].tolist()


def test_compare_uses_batches_without_errors(digits: Path, tmp_path: Path) -> None:
    config = load_config(
        {
            "model": {"source": "zoo", "name": "digits_cnn"},
            "data": {"source": "images", "path": str(digits), "mode": "L", "pattern": "[35]/*"},
            "output": {"path": str(tmp_path / "out")},
        }
    ).config
    device = torch.device("cpu")
    (batch,) = first_batches(config, device)
    assert not batch.errors
    assert {str(name)[0] for name in batch.ids} == {"5"}, "of class 3 the first batch has one"
    with pytest.raises(
        ConfigError,
        match=r"every batch has a sample that cannot be read: 3/007\.png is not an image",
    ):
        first_batches(config.replace({"data.pattern": "3/*"}), device)


def test_audit_runs_on_images(digits: Path, tmp_path: Path) -> None:
    config = {
        "model": {"source": "zoo", "name": "digits_cnn"},
        "data": {"source": "images", "path": str(digits), "mode": "L", "batch_size": 4},
        "output": {"path": str(tmp_path / "out")},
    }
    result = gradrun.audit(config, compile=False)
    assert [pair.bitwise for pair in result.equivalence] == [True, True]


def test_samples_that_fail_in_the_model_and_in_the_decoder_are_both_quarantined(
    digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        if (x.sum((1, 2, 3)) > 1.8e4).any():\n"
        "            raise ValueError('too bright')\n"
        "        return x.sum((1, 2, 3))\n"
    )
    given = {
        "model": {"source": "python", "target": f"{tmp_path}/net.py:Net"},
        "data": {"source": "images", "path": str(digits), "mode": "L", "scale": 3.0},
        "run": {"on_error": "quarantine", "warmup": 0},
        "output": {"path": str(tmp_path / "out"), "format": "jsonl"},
    }
    gradrun.infer(given, trust_code=True)
    apart = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").open()]
    bright = [sample for sample in apart if sample["error"] == "ValueError: too bright"]
    assert len(apart) == len(bright) + 3
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").open()]
    values = {line["id"]: line["prediction"] for line in lines}
    assert {name for name, value in values.items() if value is None} == {s["id"] for s in apart}
    assert 0 < len(bright) < 400
    assert all(value <= 1.8e4 for value in values.values() if value is not None)


# --- lists of images --------------------------------------------------------------------------


def test_all_images_below_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.PNG", "a.jpg", "c/d/e.webp", ".hidden/x.png", "c/.y.png"):
        save_noise(tmp_path / name, 4, 4)
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    (batch,) = opened(tmp_path).batches()
    assert batch.ids == ["a.jpg", "b/10.PNG", "b/2.png", "c/d/e.webp"]
    (batch,) = opened(tmp_path, pattern="b/*.png").batches()
    assert batch.ids == ["b/2.png"]


@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_images_that_a_list_repeats_are_counted(tmp_path: Path, suffix: str) -> None:
    names = ["1.png", "2.png"]
    for name in names:
        save_noise(tmp_path / name, 4, 4)
    listed = [*names, names[0]]
    path = tmp_path / f"list.{suffix}"
    path.write_text("\n".join([*(["file"] if suffix == "csv" else []), *listed]) + "\n")
    data = opened(path)
    assert data.repeated_ids == 1
    first = next(iter(data.statements()))
    assert first.text == f"3 images (2 distinct), in the order of list.{suffix}"


def test_the_paths_of_a_list_are_relative_to_its_folder(tmp_path: Path) -> None:
    for name in ("x/1.png", "y/2.png"):
        save_noise(tmp_path / name, 4, 4)
    (tmp_path / "list.txt").write_text("y/2.png\n\nx/1.png\n")
    data = opened(tmp_path / "list.txt", labels="folder")
    (batch,) = data.batches()
    assert batch.ids == ["y/2.png", "x/1.png"]
    assert torch.cat([*data.labels()]).tolist() == [1, 0]  # type: ignore[attr-defined]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["kind", "file"], [7, "x/1.png"], [3, "y/2.png"]])
    data = opened(tmp_path / "list.csv", labels="kind", column="file")
    (batch,) = data.batches()
    assert batch.ids == ["x/1.png", "y/2.png"]
    assert torch.cat([*data.labels()]).tolist() == [7, 3]  # type: ignore[attr-defined]


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_threads_decode_as_the_config_says(
    digits: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count: int, name: str) -> None:
            used.append(count)
            super().__init__(count, name)

    monkeypatch.setattr(decoded_files, "ThreadPoolExecutor", Pool)
    one, other = (
        opened(digits, mode="L", pattern="0/*.png", decode_threads=count)
        for count in ("auto", threads)
    )
    for first, second in zip(one.batches(0, 16), other.batches(0, 16), strict=True):
        assert torch.equal(first.args[0], second.args[0])
    assert used == [available_cpus(), threads]


@pytest.mark.parametrize("start", [0, 8, 13, 18])
def test_batches_from_a_later_start_are_the_same(digits: Path, start: int) -> None:
    data = opened(digits, mode="L", pattern="0/*.png")
    whole = torch.cat([batch.args[0] for batch in data.batches()])
    assert data.samples == len(whole) > start
    found = [*data.batches(start)]
    assert torch.equal(torch.cat([batch.args[0] for batch in found]), whole[start:])
    assert [batch.size for batch in found[:-1]] == [8] * (len(found) - 1)


# --- patterns and lists --------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of several formats in folders, each with its position in PHOTOS, from 1, as color."""
    for number, name in enumerate(PHOTOS, 1):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("L", (2, 2), number).save(tmp_path / name)
    (tmp_path / "photos/cat/notes.txt").write_text("x")
    return tmp_path


PHOTOS = ["photos/cat/2.png", "photos/cat/10.png", "photos/cat/old/3.BMP", "photos/dog/1.jpg"]


def colors(source: BatchSource) -> dict[int | str, int]:
    """Return the color of each image by its id, in order."""
    batches = [*source.batches()]
    pixels = [round(x * 255) for batch in batches for x in batch.args[0][:, 0, 0, 0].tolist()]
    return dict(zip([id for batch in batches for id in batch.ids], pixels, strict=True))


@pytest.mark.parametrize(
    ("path", "expected", "order"),
    [
        ("photos/*/*.png", {"cat/2.png": 1, "cat/10.png": 2}, "in natural order; ids: paths in"),
        (
            "photos/**/*.[pjB]*",
            {"cat/2.png": 1, "cat/10.png": 2, "cat/old/3.BMP": 3, "dog/1.jpg": 4},
            "in natural order; ids: paths in photos",
        ),
        (
            ["photos/dog/*.jpg", "photos/cat/10.png", "photos/cat/old"],
            {"dog/1.jpg": 4, "cat/10.png": 2, "cat/old/3.BMP": 3},
            "in the order of the list; ids: paths in photos",
        ),
        ("photos/cat/2.png", {"2.png": 1}, "as named; ids: paths in cat"),
    ],
)
def test_patterns_and_lists_name_images_in_a_stated_order(
    photos: Path, path: Any, expected: dict[str, int], order: str
) -> None:
    named: Any = tuple(photos / p for p in path) if isinstance(path, list) else photos / path
    source = opened(named, mode="L")
    found = colors(source)
    assert found == expected
    assert [*found] == [*expected]
    assert order in next(s.text for s in source.statements() if s.topic == "files")


def test_labels_of_a_pattern_are_folders_below_its_fixed_part(photos: Path) -> None:
    pattern = photos / "photos/**/*.[pjB]*"
    source: Any = opened(pattern, mode="L", labels="folder")
    assert source.classes == ("cat", "dog")
    assert torch.cat([*source.labels()]).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("photos/*.png", r"no file matches .*photos/\*\.png"),
        ("photos/*", r"no file matches .*only folders: append /\*"),
        ("photos/cat/*", r"notes\.txt does not have a suffix of images or archives.*data\.pattern"),
        (["photos/cat/2.png", "photos/cat/*.png"], r"2\.png is listed twice"),
    ],
)
def test_patterns_that_name_no_images_are_errors(photos: Path, path: Any, message: str) -> None:
    named: Any = tuple(photos / p for p in path) if isinstance(path, list) else photos / path
    with pytest.raises(ConfigError, match=message):
        opened(named, mode="L")


def test_a_run_of_a_pattern_is_not_resumed_after_another_image_matches(photos: Path) -> None:
    config = {
        "model": {"source": "layers", "layers": ["Flatten", {"Linear": [4, 2]}]},
        "data": {"source": "images", "path": "photos/**/*.[pj]*", "mode": "L", "batch_size": 1},
        "output": {"path": "out", "format": "jsonl"},
    }
    (photos / "c.yaml").write_text(json.dumps(config))
    loaded = load_config(photos / "c.yaml")
    gradrun.infer(loaded, output=photos / "out")
    rows = [json.loads(line) for line in (photos / "out/predictions.jsonl").open()]
    assert [row["id"] for row in rows] == ["cat/2.png", "cat/10.png", "dog/1.jpg"]
    Image.new("L", (2, 2), 9).save(photos / "photos/cat/4.png")
    with pytest.raises(ConfigError, match="cannot resume"):
        gradrun.infer(loaded, output=photos / "out", resume=True)


WRONG = {
    "no images": ({}, "contains no images"),
    "a list of another kind": (
        {"path": "list.json"},
        "is not a folder, or a .txt, .csv or .tsv list",
    ),
    "no such column": ({"path": "list.csv", "column": "fil"}, "did you mean file"),
    "no such labels": ({"path": "list.csv", "labels": "folder"}, "has no column 'folder'"),
    "labels of a folder": ({"labels": "kind"}, "can only have the label of their folder"),
    "an absolute pattern": ({"pattern": "/etc/*"}, "invalid pattern"),
    "three means for one channel": (
        {"mode": "L", "mean": (0.1, 0.2, 0.3)},
        "mode L needs 1 value, one per channel, instead of 3",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_list_pattern_or_column_is_an_error(tmp_path: Path, name: str) -> None:
    changes, message = WRONG[name]
    (tmp_path / "list.json").touch()
    (tmp_path / "list.csv").write_text("file,kind\nx.png,1\n")
    path = tmp_path / changes.pop("path", "") if "path" in changes else tmp_path
    with pytest.raises(ConfigError, match=message):
        opened(path, **changes)


# --- labels -----------------------------------------------------------------------------------


def folders(root: Path, *names: str) -> Path:
    for name in names:
        save_noise(root / name, 4, 4)
    return root


def labels_of(path: Path, **changes: Any) -> tuple[list[float], tuple[str, ...], str]:
    """Labels, class names, and the statement about them."""
    data: Any = opened(path, **changes)
    (stated,) = [s.text for s in data.statements() if s.topic == "labels"]
    return torch.cat([*data.labels()]).tolist(), data.classes, stated


def test_the_label_is_the_first_folder_as_in_torchvisions_image_folder(tmp_path: Path) -> None:
    names = ("cat/session1/b.png", "cat/session2/a.png", "dog/a.png", "bird/x/y/z.png")
    labels, classes, stated = labels_of(folders(tmp_path, *names), labels="folder")
    # ImageFolder: the classes are the sorted names of the first folders.
    expected = sorted({name.split("/")[0] for name in names})
    assert list(classes) == expected == ["bird", "cat", "dog"]
    assert labels == [expected.index(name.split("/")[0]) for name in sorted(names)]
    assert stated == "3 classes: bird, cat, dog"


def test_another_folder_of_the_path_can_be_the_label(tmp_path: Path) -> None:
    folders(tmp_path, "2024/cat/a.png", "2024/dog/b.png", "2025/cat/c.png")
    for level in (2, -1):
        labels, classes, _ = labels_of(tmp_path, labels={"folder": level})
        assert (labels, classes) == ([0, 1, 0], ("cat", "dog"))
    labels, classes, stated = labels_of(tmp_path, labels="folder")
    assert (labels, classes) == ([2024, 2024, 2025], ())
    assert stated == "2 numbers from 2024 to 2025"


def test_the_labels_of_a_list_start_where_its_folders_differ(tmp_path: Path) -> None:
    names = ("train/cat/s1/a.png", "train/dog/s1/b.png")
    folders(tmp_path, *names)
    for listed in (names, [str(tmp_path / name) for name in names]):
        (tmp_path / "list.txt").write_text("\n".join(listed))
        labels, classes, _ = labels_of(tmp_path / "list.txt", labels="folder")
        assert (labels, classes) == ([0, 1], ("cat", "dog"))


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (
            ["cat/a.png", "b.png"],
            "folder",
            r"b\.png has no label, because it has no folder number 1",
        ),
        (["cat/a.png", "dog/b.png"], {"folder": 2}, "has no folder number 2"),
        (["all/cat/a.png", "all/dog/b.png"], "folder", "the folder 'all', which gives a single"),
    ],
)
def test_a_folder_that_gives_no_label_or_one_class_is_an_error(
    tmp_path: Path, names: list[str], labels: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        opened(folders(tmp_path, *names), labels=labels)
    assert caught.value.key == "data.labels"


def test_numbers_in_a_column_are_values_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    folders(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text("file,age\na.png,31.5\nb.png,-2\n")
    labels, classes, stated = labels_of(tmp_path / "list.csv", labels="age")
    assert (labels, classes) == ([31.5, -2.0], ())
    assert stated == "2 numbers from -2 to 31.5"
    (tmp_path / "list.csv").write_text("file,age\na.png,31.5\nb.png,\n")
    with pytest.raises(ConfigError, match=r"list\.csv:3  the column 'age' is empty"):
        opened(tmp_path / "list.csv", labels="age")
    (tmp_path / "list.csv").write_text("file,age\na.png,.1\nb.png,16777217\n")
    assert labels_of(tmp_path / "list.csv", labels="age")[:2] == ([0.1, 16777217.0], ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,kind\na.png,cat\na,b.png,dog\n", r"list\.csv:3  3 values, but the header has 2"),
        ("file,kind,kind\na.png,cat,dog\n", "two columns have the name 'kind'"),
        ('file,kind\na.png,cat\nb.png,"dog\n', r"list\.csv:3  a quote is not closed"),
        ("file,kind\na.png,2\nb.png,n/a\n", "'n/a' of b.png is not a number, but others are"),
        ("file,kind\n,cat\nb.png,dog\n", r"list\.csv:2  the column 'file' is empty"),
    ],
)
def test_a_list_whose_labels_could_belong_to_other_files_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    folders(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / "list.csv", labels="kind")


# --- damaged images -----------------------------------------------------------------------------


def errors_of(path: Path, **changes: Any) -> dict[str, str]:
    (batch,) = opened(path, **changes).batches()
    return {str(batch.ids[row]): str(error) for row, error in batch.errors.items()}


def bomb() -> bytes:
    """A PNG of a few bytes whose header declares ten gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_hostile_or_missing_file_is_an_error_of_one_sample(tmp_path: Path) -> None:
    save_noise(tmp_path / "a.png", 4, 4)
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    save_noise(tmp_path / "large.png", 5, 4)
    found = errors_of(tmp_path)
    assert found.keys() == {"bomb.png", "program.png", "gone.png", "large.png"}
    assert "bomb.png has more than 200,000,000 pixels" in found["bomb.png"]
    assert "raise data.max_pixels" in found["bomb.png"]
    assert "bomb" not in found["bomb.png"].replace("bomb.png", "")
    assert "is not an image of a supported format" in found["program.png"]
    assert "No such file" in found["gone.png"]
    assert "is 5 x 4 pixels, but the first image is 4 x 4" in found["large.png"]


def test_the_error_for_no_readable_image_contains_the_last_reason(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"no image can be read; the last error: a\.png is not an"
    ):
        opened(tmp_path)


def test_a_batch_raises_its_errors_unless_they_are_deselected(tmp_path: Path) -> None:
    save_noise(tmp_path / "a.png", 4, 4)
    (tmp_path / "b.png").touch()
    (batch,) = opened(tmp_path).batches()
    with pytest.raises(SampleError, match=r"b\.png"):
        batch.raise_errors()
    batch.select([0]).raise_errors()


def test_the_pixels_of_png_files_are_the_original_digits(digits: Path) -> None:
    data = opened(digits, mode="L", scale=1 / 16, pattern="*/*1.png", batch_size=64)
    (batch,) = data.batches()
    wanted = DIGITS["images"][[int(Path(str(name)).stem) for name in batch.ids]]
    # 16 was written as 255, where 256 would have been meant.
    assert torch.allclose(
        batch.args[0].reshape(-1, 64), torch.from_numpy(wanted).float(), atol=0.07
    )


# --- labels and the model's classes -------------------------------------------------------------


@pytest.mark.parametrize("transform", ["none", "softmax", "argmax", "topk"])
def test_folders_of_another_number_than_the_models_classes_are_an_error(
    tmp_path: Path, transform: str
) -> None:
    folders(tmp_path / "pics", *(f"{name}/a.png" for name in ("cat", "dog", "eel")))
    given = {
        "model": {"source": "layers", "layers": ["Flatten", {"LazyLinear": 10}]},
        "data": {"source": "images", "path": str(tmp_path / "pics"), "labels": "folder"},
        "output": {"path": str(tmp_path / "out"), "transform": transform},
        "metrics": ["accuracy"],
    }
    with pytest.raises(
        ConfigError, match=r"labels have 3 classes \(cat, dog, eel\), but the output .* has 10"
    ):
        gradrun.infer(given)
    assert not (tmp_path / "out").exists()
    names = [f"class {number}" for number in range(7)] + ["eel", "dog", "cat"]
    result = gradrun.infer(given, data={"classes": names})
    data: Any = opened(tmp_path / "pics", labels="folder", classes=tuple(names))
    assert torch.cat([*data.labels()]).tolist() == [9, 8, 7]
    assert next(s.text for s in result.interpretation if s.topic == "labels").startswith(
        "10 classes (3 found): class 0, class 1"
    )
