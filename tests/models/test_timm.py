"""Tests of the sources `timm` and `torchvision`, and of `preprocess: timm`.

Both libraries run in subprocesses: torchvision's public build is for CUDA, and beside a CPU-only
torch it breaks whatever imports it. `make install` therefore installs the two in a separate
folder, and the subprocesses define two operators that torchvision expects and no test uses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.pictures import lay_out

_OPERATORS = """\
import torch
operators = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(name + "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
"""

Environment = dict[str, str]


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
from gradrun.data.image_transforms import image_transform

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
        "data": {"source": "images", "path": str(folder), "preprocess": "timm", "batch_size": 8},
        "output": {"path": str(folder / "out")},
    }
)
predictions = np.load(folder / "out" / "predictions.npy")
report = {"outputs": float(np.abs(predictions - expected).max()), "shape": predictions.shape}

image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 421, 3), np.uint8))


def own(**keys):
    config = ImagesData(source="images", path=folder, **keys)
    return torch.from_numpy(image_transform(config, None)(image))


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

config = {
    "model": {"source": "torchvision", "name": "resnet18", "args": {"num_classes": 3}},
    "data": {"source": "images", "path": str(folder), "resize": 64},
    "output": {"path": str(folder / "torchvision")},
}
gradrun.infer(config)
report["rows of torchvision"] = np.load(folder / "torchvision" / "predictions.npy").shape

errors = {
    "name": ({"name": "resnet19"}, {}),
    "argument": ({"name": "resnet18", "args": {"depth": "x"}}, {}),
    "network": ({"name": "resnet18", "pretrained": True}, {}),
    "resize": ({"name": "resnet18"}, {"preprocess": "timm"}),
}
for case, (model, data) in errors.items():
    changes = {"model": {"source": "timm"} | model, "data": config["data"] | data}
    try:
        gradrun.infer(config | changes, overwrite=True)
    except gradrun.ConfigError as error:
        report[case] = str(error)
print(json.dumps(report))
"""


ERRORS = {
    "name": "timm has no model 'resnet19'; did you mean resnet1",
    "argument": "building timm's resnet18 failed",
    "network": "cannot get timm's weights of resnet18",
    "resize": "preprocess: timm computes the resize from the crop; set data.crop instead",
}


def test_predictions_and_transforms_equal_those_of_the_libraries(
    libraries: Environment, tmp_path: Path
) -> None:
    lay_out(tmp_path, 20, {})
    empty_caches = {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = run(["-c", _COMPARE_WITH_LIBRARIES, tmp_path], libraries | empty_caches)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.pop("shape") == [20, 7]
    assert report.pop("rows of torchvision") == [20, 3]
    for case, message in ERRORS.items():
        assert message in report.pop(case)
    assert len(report) == 7
    assert max(report.values()) < 1e-5, report


_COMMANDS = """\
import sys
from gradrun.cli.app import app

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
