"""Tests of the sources `timm` and `torchvision`, and of `preprocess: timm`.

Both libraries run in subprocesses: torchvision's public build is for CUDA, and beside a CPU-only
torch it breaks whatever imports it. `make install` therefore installs the two in a separate
folder, and the subprocesses define the operators that torchvision expects.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
import pytest

from tests.conftest import ROOT
from tests.support.pictures import lay_out

_OPERATORS = """\
import torch
operators = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(name + "(Tensor boxes, Tensor scores, float threshold) -> Tensor")


def nms(boxes, scores, threshold):
    order, kept = scores.argsort(descending=True, stable=True), []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[order, :2])
        high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        order = order[shared <= threshold * (areas[best] + areas[order] - shared)]
    return torch.stack(kept) if kept else order


operators.impl("nms", nms, "CPU")
"""

Environment = dict[str, str]


class Compared(NamedTuple):
    """A folder of runs, and what a process reported about them."""

    folder: Path
    report: dict[str, Any]
    """Case -> greatest difference between gradrun and a library, or a message."""
    detections: dict[str, Any]
    """What the detector returns in a loop, the names of its classes, and a message."""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Environment variables of a process that can import both; skip if there are none."""
    operators = tmp_path_factory.mktemp("operators")
    (operators / "sitecustomize.py").write_text(_OPERATORS)
    error = ""
    for extra in ([], [Path(sys.prefix, "timm"), operators]):
        paths = os.pathsep.join(map(str, [ROOT, *extra]))
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        done = run(["-c", "import timm, torchvision"], environment)
        if done.returncode == 0:
            return environment
        error = done.stderr.strip().splitlines()[-1]
    pytest.skip(f"timm and torchvision cannot be imported: {error}")


def run(words: list[Any], environment: Environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


_COMPARE_WITH_LIBRARIES = """\
import json, sys
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image

import gradrun
from gradrun.config.data import ImagesData
from gradrun.data.image_presets import preprocessing_of

folder = Path(sys.argv[1])
files = sorted(path for path in folder.rglob("*.*") if path.parent.name.isdigit())
torch.manual_seed(5)
model = timm.create_model("test_resnet", num_classes=7).eval()
safetensors.torch.save_file(model.state_dict(), folder / "w.safetensors")
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
images = torch.stack([transform(Image.open(path).convert("RGB")) for path in files])
with torch.inference_mode():
    expected = torch.cat([model(batch) for batch in images.split(8)]).numpy()
gradrun.infer(
    {
        "model": {
            "source": "timm",
            "name": "test_resnet",
            "args": {"num_classes": 7},
            "weights": str(folder / "w.safetensors"),
        },
        "data": {"source": "images", "path": str(folder), "batch_size": 8},
        "output": {"path": str(folder / "out")},
    }
)
predictions = np.load(folder / "out" / "predictions.npy")
report = {"outputs": float(np.abs(predictions - expected).max()), "shape": predictions.shape}

image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 421, 3), np.uint8))


def own(**keys):
    config = ImagesData(source="images", path=folder, **keys)
    return torch.from_numpy(preprocessing_of(config, None).transform(image))


for name in ("resnet18", "vit_base_patch16_224", "convnext_tiny", "efficientnet_b0"):
    settings = timm.get_pretrained_cfg(name).to_dict()
    settings = timm.data.resolve_data_config({}, pretrained_cfg=settings)
    expected = timm.data.create_transform(**settings)(image)
    report[name] = float((own(preprocess="timm", architecture=name) - expected).abs().max())
settings |= {"input_size": (3, 96, 64), "interpolation": "nearest", "mean": (0.5,) * 3}
expected = timm.data.create_transform(**settings)(image)
keys = {"crop": (96, 64), "interpolation": "nearest", "mean": (0.5,) * 3}
changed = own(preprocess="timm", architecture=name, **keys)
report["overrides"] = float((changed - expected).abs().max())
weights = torchvision.models.ResNet18_Weights.DEFAULT
expected = weights.transforms(antialias=True)(image)
report["imagenet"] = float((own(preprocess="imagenet") - expected).abs().max())

names = {
    "resnet50": "resnet50", "inception_v3": "inception_v3", "efficientnet_b3": "efficientnet_b3",
    "deeplabv3_resnet50": "deeplabv3_resnet50", "ssd300_vgg16": "ssd300_vgg16",
    "ResNet50_Weights.IMAGENET1K_V1": None, "ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1": None,
}
for name, builder in names.items():
    entry = torchvision.models.get_model_weights(builder).DEFAULT if builder else None
    expected = (entry or torchvision.models.get_weight(name)).transforms()(image)
    found = own(preprocess="torchvision", architecture=name)
    assert found.shape == expected.shape, name
    report[name] = float((found - expected).abs().max())
steps = torchvision.models.ResNet50_Weights.DEFAULT.transforms
expected = steps(resize_size=120, crop_size=96, mean=(0.5,) * 3)(image)
keys = {"resize": 120, "crop": 96, "mean": (0.5,) * 3}
changed = own(preprocess="torchvision", architecture="resnet50", **keys)
report["overrides of torchvision"] = float((changed - expected).abs().max())

config = {
    "model": {"source": "torchvision", "name": "resnet18", "args": {"num_classes": 3}},
    "data": {"source": "images", "path": str(folder), "batch_size": 20},
    "output": {"path": str(folder / "torchvision")},
}
torch.manual_seed(6)
model = torchvision.models.resnet18(num_classes=3).eval()
torch.save(model.state_dict(), folder / "resnet18-f37072fd.pth")
config["model"]["weights"] = str(folder / "resnet18-f37072fd.pth")
result = gradrun.infer(config)
report["statements"] = {s.topic: s.text for s in result.interpretation}
transform = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
images = torch.stack([transform(Image.open(path).convert("RGB")) for path in files])
with torch.inference_mode():
    expected = model(images).numpy()
predictions = np.load(folder / "torchvision" / "predictions.npy")
report["torchvision by default"] = float(np.abs(predictions - expected).max())
result = gradrun.infer(config, overwrite=True, data={"preprocess": "none", "resize": 64})
report["none"] = next(s.text for s in result.interpretation if s.topic == "preprocess")

errors = {
    "name": ({"name": "resnet19"}, {}),
    "argument": ({"name": "resnet18", "args": {"depth": "x"}}, {}),
    "network": ({"name": "resnet18", "pretrained": True}, {}),
    "resize": ({"name": "resnet18"}, {"preprocess": "timm", "resize": 64}),
    "small": ({"name": "resnet18"}, {"preprocess": "torchvision", "resize": 64}),
    "weights": ({}, {"preprocess": "torchvision", "architecture": "ResNet_Weights.V9"}),
    "video": ({}, {"preprocess": "torchvision", "architecture": "r3d_18"}),
}
for case, (model, data) in errors.items():
    model = {"source": "timm", "name": "test_resnet"} | model
    if case in {"small", "video"}:
        model["source"] = "torchvision"
        model["name"] = "resnet18"
    changes = {"model": model, "data": config["data"] | data}
    try:
        gradrun.infer(config | changes, overwrite=True)
    except gradrun.ConfigError as error:
        report[case] = str(error)

# A detector: a list of photos of several sizes. Its weights are where a download would be.
torchvision.extension._has_ops = lambda: True
name, thresholds = "ssdlite320_mobilenet_v3_large", {"score_thresh": 0.001, "topk_candidates": 2}
weights = torchvision.models.get_model_weights(name).DEFAULT
detector = torchvision.models.get_model(
    name, weights=None, weights_backbone=None, num_classes=91, **thresholds
).eval()
downloads = folder / "hub/checkpoints"
downloads.mkdir(parents=True)
torch.save(detector.state_dict(), downloads / weights.url.rpartition("/")[2])
photos = folder / "photos"
photos.mkdir()
pixels, chance = [], np.random.default_rng(1)
for number, size in enumerate([(40, 64), (64, 48), (50, 50), (24, 80), (64, 48)]):
    noise = Image.fromarray(chance.integers(0, 256, (*size, 3), np.uint8))
    noise.save(photos / f"{number}.jpg")
    array = np.asarray(Image.open(photos / f"{number}.jpg")) * np.float32(1 / 255)
    pixels.append(torch.from_numpy(array).permute(2, 0, 1).contiguous())
with torch.inference_mode():
    boxes = [found for start in (0, 2, 4) for found in detector(pixels[start : start + 2])]
report["boxes"] = [{key: value.tolist() for key, value in found.items()} for found in boxes]
report["categories"] = weights.meta["categories"]
config = {
    "model": {"source": "torchvision", "name": name, "pretrained": True, "args": thresholds},
    "data": {"source": "images", "path": str(photos), "batch_size": 2},
    "run": {"warmup": 0},
    "measure": {"memory": False, "batch_independence": False},
}
for form in ("jsonl", "parquet"):
    output = {"path": str(folder / form), "format": form}
    gradrun.infer(config | {"output": output}, data={"call": "list"})
try:
    gradrun.infer(config | {"output": output}, overwrite=True)
except gradrun.ConfigError as error:
    report["a tensor"] = str(error)
print(json.dumps(report))
"""


ERRORS = {
    "name": "timm has no model 'resnet19'; did you mean resnet1",
    "argument": "building timm's resnet18 failed",
    "network": "cannot get timm's weights of resnet18",
    "resize": "preprocess: timm computes the resize from the crop; set data.crop instead",
    "small": "a resize to 64 is smaller than the preset's crop to 224; set data.crop too",
    "weights": "torchvision has no model or weights 'ResNet_Weights.V9'",
    "video": "torchvision has no image preprocessing for 'r3d_18'; set resize, crop, mean and std",
}


@pytest.fixture(scope="module")
def compared(libraries: Environment, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Run gradrun and the libraries on the same pictures."""
    folder = tmp_path_factory.mktemp("compared")
    lay_out(folder, 20, {})
    empty_caches = {"HF_HOME": str(folder), "TORCH_HOME": str(folder)}
    done = run(["-c", _COMPARE_WITH_LIBRARIES, folder], libraries | empty_caches)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    detections = {key: report.pop(key) for key in ("boxes", "categories", "a tensor")}
    return Compared(folder, report, detections)


def test_predictions_and_transforms_equal_those_of_the_libraries(compared: Compared) -> None:
    report = dict(compared.report)
    assert report.pop("shape") == [20, 7]
    statements = report.pop("statements")
    assert statements["preprocess"] == (
        "torchvision's ResNet18_Weights.IMAGENET1K_V1: resize 256 bilinear, crop 224, RGB"
    )
    assert statements["pixels"] == "x 1/255, mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    assert report.pop("none") == "none: resize 64 bilinear, RGB"
    for case, message in ERRORS.items():
        assert message in report.pop(case)
    assert len(report) == 16
    assert max(report.values()) < 1e-5, report


def test_a_detector_of_torchvision_finds_the_boxes_of_a_plain_loop_with_their_names(
    compared: Compared,
) -> None:
    boxes, categories, error = compared.detections.values()
    assert len(categories) == 91
    lines = [json.loads(line) for line in (compared.folder / "jsonl/predictions.jsonl").open()]
    rows = pandas.read_parquet(compared.folder / "parquet/predictions").to_dict("records")
    assert [line["id"] for line in lines] == [f"{number}.jpg" for number in range(5)]
    for line, row, expected in zip(lines, rows, boxes, strict=True):
        assert len(expected["labels"]) > 3
        for found in (line, row):
            assert [*found["labels"]] == expected["labels"]
            assert [*found["label_names"]] == [categories[n] for n in expected["labels"]]
            for name in ("boxes", "scores"):
                values = np.array([*map(np.asarray, found[name])], np.float32)
                np.testing.assert_array_equal(values, np.array(expected[name], np.float32))
    assert "64 x 48 pixels, but the first image is 40 x 64" in error
    assert "data.call: list for a model that takes a list of images" in error


_COMMANDS = """\
import sys
from gradrun.cli.app import app
from tests.support.workers import in_process_workers

with in_process_workers():
    for words in sys.argv[1:]:
        try:
            app(words.split("|"))
        except SystemExit as end:
            if end.code:
                raise
"""


def test_the_example_runs_and_is_compared_and_audited(
    libraries: Environment, tmp_path: Path
) -> None:
    config = str(ROOT / "configs" / "timm.yaml")
    out = ["--set", f"output.path={tmp_path / 'out'}"]
    small = [*out, "--set", "data.batch_size=1", "--set", "measure.budget=1"]
    commands = [
        ["infer", config, *out],
        ["compare", config, "--modes", "grad,no_grad", "--set", "measure.processes=2", *small],
        ["audit", config, "--no-compile", *small],
    ]
    done = run(["-c", _COMMANDS, *map("|".join, commands)], libraries)
    assert done.returncode == 0, done.stderr
    assert "20 predictions" in done.stdout
    assert "bitwise equal" in done.stdout
    assert "Use inference_mode" in done.stdout
