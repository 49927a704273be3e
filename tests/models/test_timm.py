"""Models of timm and torchvision, and the steps that their libraries take with pictures.

Both run in processes of their own: torchvision's public build is for CUDA, and beside a torch for
the CPU alone it breaks whatever imports it. So `make install` lays the two libraries apart, and the
processes here get them with the names of two operators that torchvision asks for and no test uses.
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
    """The environment of a process that can import both; skips where there is none."""
    operators = tmp_path_factory.mktemp("operators")
    (operators / "sitecustomize.py").write_text(_OPERATORS)
    said = ""
    for more in ([], [Path(sys.prefix, "timm"), operators]):
        paths = os.pathsep.join(map(str, [ROOT, *more]))
        found = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        tried = run(["-c", "import timm, torchvision"], found)
        if tried.returncode == 0:
            return found
        said = tried.stderr.strip().splitlines()[-1]
    pytest.skip(f"timm and torchvision cannot be imported here: {said}")


def run(words: list[Any], environment: Environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


_SAME = """\
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
from gradrun.data.image_transforms import steps

folder = Path(sys.argv[1])
files = sorted(path for path in folder.rglob("*.*") if path.parent.name.isdigit())
torch.manual_seed(5)
model = timm.create_model("test_resnet", num_classes=7).eval()
safetensors.torch.save_file(model.state_dict(), folder / "w.safetensors")
theirs = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
pictures = torch.stack([theirs(Image.open(path).convert("RGB")) for path in files])
with torch.inference_mode():
    wanted = torch.cat([model(batch) for batch in pictures.split(8)]).numpy()
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
found = np.load(folder / "out" / "predictions.npy")

drawn = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 421, 3), np.uint8))
apart = {}
for name in ("resnet18", "vit_base_patch16_224", "convnext_tiny", "efficientnet_b0"):
    described = timm.get_pretrained_cfg(name).to_dict()
    described = timm.data.resolve_data_config({}, pretrained_cfg=described)
    config = ImagesData(source="images", path=folder, preprocess="timm", architecture=name)
    ours = torch.from_numpy(steps(config, None)(drawn))
    apart[name] = float((ours - timm.data.create_transform(**described)(drawn)).abs().max())
weights = torchvision.models.ResNet18_Weights.DEFAULT
config = ImagesData(source="images", path=folder, preprocess="imagenet")
ours = torch.from_numpy(steps(config, None)(drawn))
apart["imagenet"] = float((ours - weights.transforms(antialias=True)(drawn)).abs().max())

config = {
    "model": {"source": "torchvision", "name": "resnet18", "args": {"num_classes": 3}},
    "data": {"source": "images", "path": str(folder), "resize": 64},
    "output": {"path": str(folder / "torchvision")},
}
gradrun.infer(config)
apart["rows of torchvision"] = np.load(folder / "torchvision" / "predictions.npy").shape

wrong = {
    "name": {"name": "resnet19"},
    "argument": {"name": "resnet18", "args": {"depth": "x"}},
    "network": {"name": "resnet18", "pretrained": True},
}
for case, changes in wrong.items():
    try:
        gradrun.infer(config | {"model": {"source": "timm"} | changes}, overwrite=True)
    except gradrun.ConfigError as error:
        apart[case] = str(error)
print(json.dumps({"outputs": float(np.abs(found - wanted).max()), "shape": found.shape, **apart}))
"""


WRONG = {
    "name": "timm has no model 'resnet19'; did you mean resnet1",
    "argument": "building timm's resnet18 failed",
    "network": "timm's own weights of resnet18 cannot be had",
}


def test_predictions_are_those_of_a_plain_loop_with_timms_own_steps(
    libraries: Environment, tmp_path: Path
) -> None:
    lay_out(tmp_path, 20, {})
    none = {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = run(["-c", _SAME, tmp_path], libraries | none)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("shape") == [20, 7]
    assert said.pop("rows of torchvision") == [20, 3]
    for case, sentence in WRONG.items():
        assert sentence in said.pop(case)
    assert said.pop("outputs") < 1e-5
    assert len(said) == 5
    assert max(said.values()) < 1e-5, said


def test_the_example_runs_and_compares_and_is_audited(
    libraries: Environment, tmp_path: Path
) -> None:
    config = ROOT / "configs" / "timm.yaml"
    out = ["--set", f"output.path={tmp_path / 'out'}"]
    done = run(["-m", "gradrun", "infer", config, *out], libraries)
    assert (done.returncode, "20 predictions" in done.stdout) == (0, True), done.stderr
    out += ["--set", "data.batch_size=1"]
    quick = ["--set", "measure.processes=2", "--set", "measure.budget=1"]
    done = run(
        ["-m", "gradrun", "compare", config, "--modes", "grad,no_grad", *quick, *out], libraries
    )
    assert "bitwise equal" in done.stdout, done.stderr
    done = run(["-m", "gradrun", "audit", config, "--no-compile", *out], libraries)
    assert "Use inference_mode" in done.stdout, done.stderr
