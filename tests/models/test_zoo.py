"""Tests of the source `zoo`: architectures, trained weights and their data."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gradrun.config.model import ZooModel
from gradrun.core.errors import ConfigError
from gradrun.models import load_model

MODELS = Path(__file__).parents[2] / "models"
CONFIGS = MODELS.parent / "configs"


def zoo(name: str, **keys: Any) -> nn.Module:
    return load_model(ZooModel(source="zoo", name=name, **keys), torch.device("cpu")).module


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "args", "shape", "output", "count"),
    [
        # 3x3 convolutions 1-32-32-64 without bias, two figures a batch norm channel, 256 -> 10
        ("digits_cnn", {}, (1, 8, 8), (10,), 288 + 9216 + 18432 + 2 * (32 + 32 + 64) + 2570),
        ("mlp", {}, (64,), (64,), 8 * (64 * 64 + 64)),
        ("mlp", {"width": 10, "depth": 3}, (10,), (10,), 3 * 110),
        ("resnet18", {}, (3, 224, 224), (1000,), 11_689_512),
        ("resnet18", {"classes": 10}, (3, 64, 64), (10,), 11_689_512 - 990 * 513),
        ("transformer_encoder", {}, (16, 256), (16, 256), 4 * 789_760),
        (
            "transformer_encoder",
            {"d_model": 8, "heads": 2, "layers": 1, "feedforward": 16},
            (5, 8),
            (5, 8),
            288 + 144 + 136 + 32,  # attention, in and out of the feedforward, two norms
        ),
    ],
)
def test_a_network_has_the_standard_shape_and_number_of_parameters(
    name: str, args: dict[str, Any], shape: tuple[int, ...], output: tuple[int, ...], count: int
) -> None:
    module = zoo(name, args=args)
    assert parameters(module) == count
    with torch.inference_mode():
        assert module(torch.zeros(2, *shape)).shape == (2, *output)


def test_resnet18_has_the_parameter_names_of_torchvision() -> None:
    keys = zoo("resnet18").state_dict().keys()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{part}" for part in norm)}
    for layer in range(1, 5):
        for block in (0, 1):
            at = f"layer{layer}.{block}"
            expected |= {f"{at}.conv1.weight", f"{at}.conv2.weight"}
            expected |= {f"{at}.bn{i}.{part}" for i in (1, 2) for part in norm}
        if layer > 1:
            expected |= {f"layer{layer}.0.downsample.0.weight"}
            expected |= {f"layer{layer}.0.downsample.1.{part}" for part in norm}
    assert set(keys) == expected
    assert len(keys) == 122


def test_random_weights_depend_on_the_seed_of_the_caller() -> None:
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(zoo("mlp").parameters())

    with torch.random.fork_rng():
        assert torch.equal(first(1), first(1))
        assert not torch.equal(first(1), first(2))


def test_trained_weights_are_loaded_unless_the_config_names_others(
    tmp_path: Path,
) -> None:
    trained = load_file(MODELS / "digits_cnn.safetensors")
    module = zoo("digits_cnn")
    assert all(torch.equal(module.state_dict()[name], trained[name]) for name in trained)
    assert not module.training
    other = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    save_file(other, tmp_path / "zeros.safetensors")
    module = zoo("digits_cnn", weights=tmp_path / "zeros.safetensors")
    assert parameters(module) > 0
    assert not any(parameter.any() for parameter in module.parameters())


def test_a_wrong_argument_of_a_network_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unexpected keyword argument 'classes'"):
        zoo("mlp", args={"classes": 3})


def test_the_trained_weights_are_small() -> None:
    assert (MODELS / "digits_cnn.safetensors").stat().st_size <= 200_000


def test_the_test_images_are_from_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    known = {
        image.astype(np.uint8).tobytes(): int(label)
        for image, label in zip(digits.data, digits.target, strict=True)
    }
    held = np.load(CONFIGS / "digits.npz")
    images, labels = held["images"], held["labels"]
    assert images.shape == (500, 64)
    assert images.dtype == np.uint8
    assert [known[image.tobytes()] for image in images] == labels.tolist()
    assert len({image.tobytes() for image in images}) == 500, "no image twice"
    assert np.bincount(labels).min() >= 45, "every digit has its share"


def test_the_trained_network_is_correct_on_97_percent_of_the_test_images() -> None:
    held = np.load(CONFIGS / "digits.npz")
    images = torch.from_numpy(held["images"]).float().mul(0.0625).view(-1, 1, 8, 8)
    with torch.inference_mode():
        found = zoo("digits_cnn")(images).argmax(1)
    assert (found.numpy() == held["labels"]).mean() >= 0.97


@pytest.mark.parametrize("script", ["train_digits.py", "export_digits.py", "train_answers.py"])
def test_the_scripts_that_created_the_files_are_included_and_seeded(script: str) -> None:
    source = (MODELS / script).read_text(encoding="utf-8")
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Call)]  # fmt: skip
    assert "torch.manual_seed" in calls
