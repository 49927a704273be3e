"""Pictures in files: found, decoded in order, prepared by name or in numbers, and broken ones."""

from __future__ import annotations

import csv
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import gradrun
from gradrun.config.data import ImagesData
from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError, Interrupted, RunFailed, SampleError
from gradrun.core.progress import Progress
from gradrun.data import open_data
from gradrun.data.image_transforms import Steps, steps
from gradrun.data.source import BatchSource
from gradrun.inference.sampling import first_batches
from gradrun.output.formats import WRITERS
from gradrun.results.result import RunResult
from tests.support.pictures import BROKEN, DIGITS, LABELS, lay_out


def section(path: Path, **changes: Any) -> ImagesData:
    return ImagesData.model_validate({"source": "images", "path": path, "batch_size": 8} | changes)


def opened(path: Path, **changes: Any) -> BatchSource:
    return open_data(section(path, **changes), seed=0)


def picture(path: Path, *size: int, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(len(str(path))).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(drawn).convert(mode).save(path)
    return path


# --- the digits --------------------------------------------------------------------------------


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


def test_of_500_digits_three_are_broken_and_the_others_are_read(
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


def test_a_broken_picture_ends_the_run_where_it_is_to_stop(digits: Path, tmp_path: Path) -> None:
    said = r"3/007\.png is no picture.*; run\.on_error: quarantine sets such samples apart"
    with pytest.raises(RunFailed, match=said):
        infer(digits, tmp_path / "later", run={"on_error": "stop"})
    with pytest.raises(ConfigError, match=said):
        infer(digits, tmp_path / "at once", run={"on_error": "stop"}, data={"batch_size": 256})
    assert not (tmp_path / "at once").exists()


def test_a_resumed_run_ends_with_the_same_bytes(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done >= 192:
            raise KeyboardInterrupt

    infer(digits, tmp_path / "whole")
    monkeypatch.setattr("gradrun.inference.runner._CALLBACK_NS", 0)
    with pytest.raises(Interrupted):
        infer(digits, tmp_path / "out", progress=stop)
    result = infer(digits, tmp_path / "out", resume=True)
    assert 0 < result.resumed_at < 500
    for name in ("predictions.jsonl", "quarantine.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_resume_refuses_other_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    files = lay_out(tmp_path / "few", 150, {})
    monkeypatch.setattr("gradrun.inference.runner._CALLBACK_NS", 0)
    with pytest.raises(Interrupted):
        infer(tmp_path / "few", tmp_path / "out", progress=stop)
    os.utime(files[40], (1, 1))
    with pytest.raises(ConfigError, match=r"what data\.path names has changed \(names, sizes"):
        infer(tmp_path / "few", tmp_path / "out", resume=True)
    names = "\n".join(str(file) for file in files)
    (tmp_path / "list.txt").write_text(names)
    with pytest.raises(Interrupted):
        infer(tmp_path / "list.txt", tmp_path / "listed", progress=stop)
    os.utime(files[40], (2, 2))
    with pytest.raises(ConfigError, match=r"what data\.path names has changed"):
        infer(tmp_path / "list.txt", tmp_path / "listed", resume=True)


def test_names_that_are_no_utf8_come_out_of_every_sink(tmp_path: Path) -> None:
    name = os.fsdecode(b"4/\xff\xe9.png")
    lay_out(tmp_path / "odd", 3, {})
    (tmp_path / "odd" / name).write_bytes(next((tmp_path / "odd").rglob("*.png")).read_bytes())
    (tmp_path / "odd" / "4" / "gone.png").symlink_to(tmp_path / "nowhere")
    for form in WRITERS:
        result = infer(tmp_path / "odd", tmp_path / form, output={"format": form})
        assert result.predictions == 5
    assert "\\udcff" in (tmp_path / "jsonl" / "predictions.jsonl").read_text()
    table = pandas.read_parquet(tmp_path / "parquet" / "predictions-00000.parquet")
    assert "4/\\udcff\\udce9.png" in table["id"].tolist()


def test_compare_takes_batches_without_a_fault(digits: Path, tmp_path: Path) -> None:
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
        ConfigError, match=r"every batch has a sample that cannot be read: 3/007\.png is no picture"
    ):
        first_batches(config.replace({"data.pattern": "3/*"}), device)


def test_audit_runs_on_pictures(digits: Path, tmp_path: Path) -> None:
    config = {
        "model": {"source": "zoo", "name": "digits_cnn"},
        "data": {"source": "images", "path": str(digits), "mode": "L", "batch_size": 4},
        "output": {"path": str(tmp_path / "out")},
    }
    result = gradrun.audit(config, compile=False)
    assert [pair.bitwise for pair in result.equivalence] == [True, True]


def test_a_model_that_fails_beside_broken_pictures(digits: Path, tmp_path: Path) -> None:
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


# --- where pictures lie ------------------------------------------------------------------------


def test_every_picture_below_a_folder_is_found_in_the_order_of_its_name(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.PNG", "a.jpg", "c/d/e.webp", ".hidden/x.png", "c/.y.png"):
        picture(tmp_path / name, 4, 4)
    (tmp_path / "b" / "notes.txt").write_text("no picture")
    (batch,) = opened(tmp_path).batches()
    assert batch.ids == ["a.jpg", "b/10.PNG", "b/2.png", "c/d/e.webp"]
    (batch,) = opened(tmp_path, pattern="b/*.png").batches()
    assert batch.ids == ["b/2.png"]


def test_a_list_names_pictures_from_its_own_folder_on(tmp_path: Path) -> None:
    for name in ("x/1.png", "y/2.png"):
        picture(tmp_path / name, 4, 4)
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


@pytest.mark.parametrize("start", [0, 8, 13, 18])
def test_batches_are_the_same_from_wherever_they_start(digits: Path, start: int) -> None:
    data = opened(digits, mode="L", pattern="0/*.png")
    whole = torch.cat([batch.args[0] for batch in data.batches()])
    assert data.samples == len(whole) > start
    found = [*data.batches(start)]
    assert torch.equal(torch.cat([batch.args[0] for batch in found]), whole[start:])
    assert [batch.size for batch in found[:-1]] == [8] * (len(found) - 1)


WRONG = {
    "no pictures": ({}, "there are no pictures in"),
    "a list of another kind": ({"path": "list.json"}, "no .txt or .csv list"),
    "no such column": ({"path": "list.csv", "column": "fil"}, "did you mean file"),
    "no such labels": ({"path": "list.csv", "labels": "folder"}, "has no column 'folder'"),
    "labels of a folder": ({"labels": "kind"}, "labels by folder alone"),
    "a pattern of another place": ({"pattern": "/etc/*"}, "is no pattern"),
    "means of three for one": ({"mode": "L", "mean": (0.1, 0.2, 0.3)}, "mode L has 1 channel"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_found_is_an_error(tmp_path: Path, name: str) -> None:
    changes, said = WRONG[name]
    (tmp_path / "list.json").touch()
    (tmp_path / "list.csv").write_text("file,kind\nx.png,1\n")
    path = tmp_path / changes.pop("path", "") if "path" in changes else tmp_path
    with pytest.raises(ConfigError, match=said):
        opened(path, **changes)


# --- broken pictures ---------------------------------------------------------------------------


def faults(path: Path, **changes: Any) -> dict[str, str]:
    (batch,) = opened(path, **changes).batches()
    return {str(batch.ids[row]): str(fault) for row, fault in batch.errors.items()}


def bomb() -> bytes:
    """A PNG of a few bytes that says it has ten thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_what_would_harm_is_the_fault_of_one_sample(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 4, 4)
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    picture(tmp_path / "large.png", 5, 4)
    found = faults(tmp_path)
    assert found.keys() == {"bomb.png", "program.png", "gone.png", "large.png"}
    assert "bomb" in found["bomb.png"]
    assert "is no picture of the formats" in found["program.png"]
    assert "No such file" in found["gone.png"]
    assert "is 5 pixels high and 4 wide, and the first is 4 and 4" in found["large.png"]


def test_where_no_picture_can_be_read_the_error_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no picture can be read; the last: a\.png is no pic"):
        opened(tmp_path)


def test_a_fault_is_an_exception_that_no_batch_hides(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 4, 4)
    (tmp_path / "b.png").touch()
    (batch,) = opened(tmp_path).batches()
    with pytest.raises(SampleError, match=r"b\.png"):
        batch.raise_errors()
    batch.select([0]).raise_errors()


# --- what is done to a picture -----------------------------------------------------------------


def test_pixels_are_scaled_and_normalized_channel_by_channel(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 3, 2)
    with Image.open(tmp_path / "a.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    (batch,) = opened(tmp_path, mean=mean, std=std).batches()
    wanted = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert batch.args[0].dtype == torch.float32
    assert torch.allclose(batch.args[0][0].double(), wanted, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_pictures_of_every_mode_become_the_one_asked_for(tmp_path: Path, mode: str) -> None:
    picture(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), 4, 4, mode=mode)
    assert opened(tmp_path).batches().__next__().args[0].shape == (1, 3, 4, 4)
    assert opened(tmp_path, mode="L").batches().__next__().args[0].shape == (1, 1, 4, 4)


def test_sizes_are_brought_together_by_the_shorter_side_and_the_middle(tmp_path: Path) -> None:
    red = np.zeros((40, 100, 3), np.uint8)
    red[:, 45:55] = 255
    Image.fromarray(red).save(tmp_path / "wide.png")
    Image.fromarray(red.transpose(1, 0, 2)).save(tmp_path / "high.png")
    (batch,) = opened(tmp_path, resize=20, crop=10, interpolation="nearest").batches()
    high, wide = batch.args[0]
    assert batch.args[0].shape == (2, 3, 10, 10)
    assert torch.equal(high, wide.transpose(1, 2)), "one is the other, lying down"
    assert wide[0, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0] or wide[0, 0].sum() == 5
    (batch,) = opened(tmp_path, resize=(6, 9)).batches()
    assert batch.args[0].shape == (2, 3, 6, 9)
    (batch,) = opened(tmp_path, resize=20, crop=64).batches()
    assert batch.args[0][:, :, 0].abs().sum() == 0, "beyond the picture lies black"


def test_imagenets_steps_and_a_key_that_changes_one(tmp_path: Path) -> None:
    found = steps(section(tmp_path, preprocess="imagenet", crop=192), None)
    assert (found.resize, found.crop, found.mode) == (256, 192, "RGB")
    assert found.mean == (0.485, 0.456, 0.406)


PROCESSORS: dict[str, tuple[dict[str, Any], Steps | str]] = {
    "vit": (
        {
            "do_normalize": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
            "size": {"height": 224, "width": 224},
        },
        Steps(resize=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3),
    ),
    "clip": (
        {
            "crop_size": 224,
            "do_center_crop": True,
            "resample": 3,
            "size": {"shortest_edge": 224},
            "image_mean": [0.4, 0.4, 0.4],
            "image_std": [0.2, 0.2, 0.2],
            "rescale_factor": 1 / 255,
        },
        Steps(resize=224, crop=224, interpolation="bicubic", mean=(0.4,) * 3, std=(0.2,) * 3),
    ),
    "convnext": (
        {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "do_normalize": False, "resample": 3},
        Steps(resize=256, crop=224, interpolation="bicubic"),
    ),
    "nothing": ({"do_resize": False, "do_rescale": False, "do_normalize": False}, Steps(scale=1.0)),
    "padding": ({"do_pad": True, "size": 4}, "asks for steps that are not known here"),
    "a longest edge": ({"size": {"longest_edge": 800, "shortest_edge": 600}}, "not known here"),
    "no section": ([], "not known here"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processors_file_says_the_steps(tmp_path: Path, name: str) -> None:
    said, wanted = PROCESSORS[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    given = section(tmp_path, preprocess="processor", processor=tmp_path)
    if isinstance(wanted, Steps):
        assert steps(given, None) == wanted
    else:
        with pytest.raises(ConfigError, match=wanted):
            steps(given, None)


def test_steps_of_a_model_need_one_that_has_some(tmp_path: Path) -> None:
    given = {
        "model": {"source": "zoo", "name": "resnet18"},
        "data": {"source": "images", "path": str(tmp_path), "preprocess": "timm"},
        "output": {"path": str(tmp_path / "out")},
    }
    with pytest.raises(ConfigError, match=r"needs data\.architecture; only timm models imply"):
        load_config(given)
    config = load_config(given, {"data.architecture": "resnet18"}).config
    assert isinstance(config.data, ImagesData)
    assert config.data.preprocess_source(config.model) == "resnet18"


def test_the_digits_themselves_come_out_of_png(digits: Path) -> None:
    data = opened(digits, mode="L", scale=1 / 16, pattern="*/*1.png", batch_size=64)
    (batch,) = data.batches()
    wanted = DIGITS["images"][[int(Path(str(name)).stem) for name in batch.ids]]
    # 16 was written as 255, where 256 would have been meant.
    assert torch.allclose(
        batch.args[0].reshape(-1, 64), torch.from_numpy(wanted).float(), atol=0.07
    )
