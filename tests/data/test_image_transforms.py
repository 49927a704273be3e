"""Tests of the steps between a decoded image and the model input, own and of transformers.

The steps of timm are tested in tests/models/test_timm.py, which can import it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gradrun
from gradrun.config.data import ImagesData
from gradrun.config.load import load_config
from gradrun.config.model import HuggingFaceModel
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_transformers
from gradrun.data import open_data
from gradrun.data.image_presets import preprocessing_of
from tests.support.pictures import lay_out, opened, save_noise, section
from tests.support.small_models import save_tokenizer


def test_pixels_are_scaled_and_normalized_per_channel(tmp_path: Path) -> None:
    save_noise(tmp_path / "a.png", 3, 2)
    with Image.open(tmp_path / "a.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    (batch,) = opened(tmp_path, mean=mean, std=std).batches()
    expected = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert batch.args[0].dtype == torch.float32
    assert torch.allclose(batch.args[0][0].double(), expected, atol=1e-6)


@pytest.mark.parametrize("preset", ["none", "imagenet", "processor"])
@pytest.mark.parametrize(
    ("key", "values", "divided"),
    [
        ("mean", (123.675, 116.28, 103.53), r"\[0.485, 0.456, 0.406\]"),
        ("std", (58.395, 57.12, 57.375), r"\[0.229, 0.224, 0.225\]"),
    ],
)
def test_a_mean_or_std_for_pixels_to_255_is_refused_if_pixels_are_scaled_to_1(
    tmp_path: Path, preset: str, key: str, values: tuple[float, ...], divided: str
) -> None:
    save_noise(tmp_path / "a.png", 300, 300)
    keys: dict[str, Any] = {"preprocess": preset, key: values}
    if preset == "processor":
        import_transformers("")
        file = {"image_processor_type": "CLIPImageProcessor"} | PROCESSORS["CLIPImageProcessor"]
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
        keys["processor"] = tmp_path
    with pytest.raises(ConfigError, match=f"set data.scale: 1, or {key}: {divided}") as raised:
        opened(tmp_path, **keys)
    assert raised.value.key == f"data.{key}"


def test_a_mean_and_std_for_pixels_to_255_apply_with_scale_1(tmp_path: Path) -> None:
    save_noise(tmp_path / "a.png", 3, 2)
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.array(image, np.float64).transpose(2, 0, 1)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    (batch,) = opened(tmp_path, scale=1, mean=mean, std=std).batches()
    expected = (pixels - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert np.allclose(batch.args[0][0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_of_every_mode_are_converted_to_the_mode_of_the_config(
    tmp_path: Path, mode: str
) -> None:
    save_noise(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), 4, 4, mode=mode)
    assert opened(tmp_path).batches().__next__().args[0].shape == (1, 3, 4, 4)
    assert opened(tmp_path, mode="L").batches().__next__().args[0].shape == (1, 1, 4, 4)


def test_images_are_resized_by_the_shorter_side_and_cropped_at_the_center(tmp_path: Path) -> None:
    red = np.zeros((40, 100, 3), np.uint8)
    red[:, 45:55] = 255
    Image.fromarray(red).save(tmp_path / "wide.png")
    Image.fromarray(red.transpose(1, 0, 2)).save(tmp_path / "high.png")
    (batch,) = opened(tmp_path, resize=20, crop=10, interpolation="nearest").batches()
    high, wide = batch.args[0]
    assert batch.args[0].shape == (2, 3, 10, 10)
    assert torch.equal(high, wide.transpose(1, 2)), "one is the transpose of the other"
    assert wide[0, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0] or wide[0, 0].sum() == 5
    (batch,) = opened(tmp_path, resize=(6, 9)).batches()
    assert batch.args[0].shape == (2, 3, 6, 9)
    (batch,) = opened(tmp_path, resize=20, crop=64).batches()
    assert batch.args[0][:, :, 0].abs().sum() == 0, "padding is black"


def test_preprocess_imagenet_resizes_to_256_and_crops_224_unless_overridden(tmp_path: Path) -> None:
    save_noise(tmp_path / "a.png", 300, 400)
    with Image.open(tmp_path / "a.png") as image:
        resized = image.resize((341, 256), Image.Resampling.BILINEAR).crop((74, 32, 266, 224))
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    (batch,) = opened(tmp_path, preprocess="imagenet", crop=192).batches()
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(batch.args[0][0], expected, atol=1e-6)
    (batch,) = opened(tmp_path, preprocess="imagenet").batches()
    assert batch.args[0].shape == (1, 3, 224, 224)


PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": {"height": 32, "width": 32},
    },
    "CLIPImageProcessor": {
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
        "size": {"shortest_edge": 40},
        "image_mean": [0.4, 0.4, 0.4],
        "image_std": [0.2, 0.2, 0.2],
        "rescale_factor": 1 / 255,
    },
    "ConvNextImageProcessor": {
        "size": {"shortest_edge": 64},
        "crop_pct": 0.875,
        "do_normalize": False,
        "resample": 3,
    },
}


def library_processor(folder: Path) -> Any:
    """Return the processor that resizes with PIL; torchvision's, where installed, differs."""
    transformers = import_transformers("")
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocess_processor_gives_the_pixels_of_transformers(tmp_path: Path, name: str) -> None:
    processor_file = tmp_path / "preprocessor_config.json"
    processor_file.write_text(json.dumps(PROCESSORS[name] | {"image_processor_type": name}))
    images = [Image.open(save_noise(tmp_path / f"{i}.png", 50 + i, 70)) for i in range(3)]
    library = library_processor(tmp_path)
    expected = library(images=images, return_tensors="pt")["pixel_values"]
    for processor in (tmp_path, processor_file):
        data = opened(tmp_path, preprocess="processor", processor=processor)
        (batch,) = data.batches()
        assert torch.equal(batch.args[0], expected)


_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_SQUARE = {"height": 64, "width": 64}
UNUSUAL: dict[str, dict[str, Any]] = {
    "rescaling twice": {
        "image_processor_type": "EfficientNetImageProcessor",
        "include_top": True,
        "size": _SQUARE,
        **_IMAGENET,
    },
    "a resize by 256/224": {
        "image_processor_type": "LevitImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": _SQUARE,
    },
    "a crop before the resize": {
        "image_processor_type": "PerceiverImageProcessor",
        "size": _SQUARE,
        "crop_size": {"height": 80, "width": 80},
    },
    "multiples of a patch": {
        "image_processor_type": "DPTImageProcessor",
        "keep_aspect_ratio": True,
        "ensure_multiple_of": 14,
        "size": _SQUARE,
    },
    "an old file with whole numbers": {
        "feature_extractor_type": "DeiTFeatureExtractor",
        "do_resize": True,
        "resample": 3,
        "size": 72,
        "do_center_crop": True,
        "crop_size": 64,
        **_IMAGENET,
    },
    "an old file whose number is a square": {
        "feature_extractor_type": "ViTFeatureExtractor",
        "do_resize": True,
        "resample": 2,
        "size": 64,
    },
    "defaults of the class": {"image_processor_type": "ViTImageProcessor"},
    "a mask that hides nothing": {
        "image_processor_type": "YolosImageProcessor",
        "size": {"shortest_edge": 64, "longest_edge": 96},
    },
    "reversed channels": {
        "image_processor_type": "MobileViTImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": _SQUARE,
    },
}


def test_the_processor_of_a_model_on_the_hub_has_the_revision_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor"})
    )
    transformers = import_transformers("data.processor")
    local = transformers.AutoImageProcessor.from_pretrained
    asked: list[tuple[Any, str]] = []

    def from_hub(source: Any, revision: str, **options: Any) -> Any:
        asked.append((source, revision))
        return local(tmp_path, **options)

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", from_hub)
    save_noise(tmp_path / "a.png", 4, 4)
    model = HuggingFaceModel(
        source="huggingface", path="some/model", revision="v2", auto_class="AutoModel"
    )
    assert open_data(section(tmp_path), seed=0, model=model).samples == 1
    opened(tmp_path, preprocess="processor", processor=tmp_path)
    assert asked == [("some/model", "v2"), (tmp_path, "main")]


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_processors_give_the_pixels_of_transformers(tmp_path: Path, name: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(UNUSUAL[name]))
    image = Image.open(save_noise(tmp_path / "a.png", 90, 120))
    library = library_processor(tmp_path)
    expected = library(images=image, return_tensors="pt")["pixel_values"]
    (batch,) = opened(tmp_path, preprocess="processor", processor=tmp_path).batches()
    assert torch.equal(batch.args[0], expected)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Siglip2ImageProcessor", "also returns pixel_attention_mask, spatial_shapes"),
        ("Pix2StructImageProcessor", "also returns attention_mask, flattened_patches"),
        ("VideoMAEImageProcessor", r"pixel_values have the shape \[1, 1, 3, 224, 224\]"),
        ("VitPoseImageProcessor", "does not turn one image into one array"),
    ],
)
def test_processors_whose_models_need_more_than_one_array_are_an_error(
    tmp_path: Path, kind: str, words: str
) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": kind}))
    with pytest.raises(ConfigError, match=f"{kind} .*{words}.* source: arrays") as caught:
        preprocessing_of(section(tmp_path, preprocess="processor", processor=tmp_path), None)
    assert caught.value.key == "data.processor"


def test_the_image_processor_of_a_saved_processor_is_used(tmp_path: Path) -> None:
    transformers = import_transformers("")
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    pil = getattr(transformers, "BlipImageProcessorPil", transformers.BlipImageProcessor)
    images = pil(size=_SQUARE)
    transformers.BlipProcessor(images, tokenizer).save_pretrained(tmp_path / "blip")
    image = Image.open(save_noise(tmp_path / "pics/a.png", 90, 120))
    expected = images(images=image, return_tensors="pt")["pixel_values"]
    keys = {"preprocess": "processor", "processor": tmp_path / "blip"}
    (batch,) = opened(tmp_path / "pics", **keys).batches()
    assert torch.equal(batch.args[0], expected)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"reads a folder with .*, not other\.json"):
        opened(tmp_path / "pics", **keys | {"processor": tmp_path / "other.json"})


def test_steps_are_stated_as_they_are_applied(tmp_path: Path) -> None:
    save_noise(tmp_path / "pics/a.png", 50, 70)
    file = {"image_processor_type": "CLIPImageProcessor"} | PROCESSORS["CLIPImageProcessor"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
    expected = {
        (): ("none: RGB", "x 1/255"),
        (("mode", "L"), ("scale", 1.0), ("resize", (20, 30))): (
            "none: resize 20x30 bilinear, L", "x 1",
        ),
        (("preprocess", "imagenet"), ("interpolation", "bicubic")): (
            "imagenet: resize 256 bicubic, crop 224, RGB",
            "x 1/255, mean 0.485 0.456 0.406, std 0.229 0.224 0.225",
        ),
        (("preprocess", "processor"), ("processor", tmp_path), ("std", (1.0, 2.0, 0.25))): (
            "CLIPImageProcessor: resize shortest edge 40 bicubic, crop 32x32, RGB",
            "x 1/255, mean 0.4 0.4 0.4, std 1 2 0.25",
        ),
    }  # fmt: skip
    for keys, texts in expected.items():
        steps = preprocessing_of(section(tmp_path / "pics", **dict(keys)), None)
        assert tuple(statement.text for statement in steps.statements) == texts
        assert [statement.topic for statement in steps.statements] == ["preprocess", "pixels"]


def test_a_key_that_the_preset_does_not_use_is_an_error(tmp_path: Path) -> None:
    given = {
        "model": {"source": "zoo", "name": "resnet18"},
        "data": {"source": "images", "path": str(tmp_path), "architecture": "resnet18"},
        "output": {"path": str(tmp_path / "out")},
    }
    message = "architecture is not used by preprocess: none; set preprocess: timm or torchvision"
    with pytest.raises(ConfigError, match=message):
        load_config(given)
    with pytest.raises(ConfigError, match=r"smaller than the preset's crop to 224; set data\.crop"):
        preprocessing_of(section(tmp_path, preprocess="imagenet", resize=64), None)


def test_keys_of_the_config_override_those_of_a_processor(tmp_path: Path) -> None:
    file = {"image_processor_type": "CLIPImageProcessor"} | PROCESSORS["CLIPImageProcessor"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
    image = Image.open(save_noise(tmp_path / "a.png", 50, 70))
    overrides: dict[str, Any] = {
        "resize": 20, "crop": (16, 12), "interpolation": "nearest", "scale": 1 / 128,
        "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 4.0),
    }  # fmt: skip
    data = opened(tmp_path, preprocess="processor", processor=tmp_path, **overrides)
    (batch,) = data.batches()
    own = preprocessing_of(section(tmp_path, **overrides), None)
    assert batch.args[0].shape == (1, 3, 16, 12)
    assert torch.allclose(batch.args[0][0], torch.from_numpy(own.transform(image)), atol=1e-6)


def test_the_processor_of_an_image_classifier_is_the_default_and_gives_its_predictions(
    tmp_path: Path,
) -> None:
    transformers = import_transformers("")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(**small, intermediate_size=32, image_size=32, patch_size=8)
    ).eval()
    vit.save_pretrained(tmp_path / "vit")
    file = {"image_processor_type": "ViTImageProcessor"} | PROCESSORS["ViTImageProcessor"]
    (tmp_path / "vit/preprocessor_config.json").write_text(json.dumps(file))
    lay_out(tmp_path / "images", 8, {})
    turned = Image.Exif()
    turned[0x0112] = 6
    noise = Image.open(save_noise(tmp_path / "noise.png", 50, 70))
    noise.save(tmp_path / "images/turned.jpg", exif=turned)
    noise.convert("P").save(tmp_path / "images/palette.gif")
    given = {
        "model": {
            "source": "huggingface",
            "path": str(tmp_path / "vit"),
            "auto_class": "AutoModelForImageClassification",
        },
        "data": {"source": "images", "path": str(tmp_path / "images"), "batch_size": 10},
        "output": {"path": str(tmp_path / "out")},
    }
    result = gradrun.infer(given)
    pipeline = transformers.pipeline(
        "image-classification", model=vit, image_processor=library_processor(tmp_path / "vit"),
        function_to_apply="none", top_k=None,
    )  # fmt: skip
    names = (tmp_path / "out/ids.txt").read_text().splitlines()
    predictions = np.load(tmp_path / "out/predictions.npy")
    assert len(names) == len(predictions) == 10
    for name, logits in zip(names, predictions, strict=True):
        expected = {
            item["label"]: item["score"] for item in pipeline(str(tmp_path / "images" / name))
        }
        assert [expected[f"LABEL_{i}"] for i in range(2)] == pytest.approx(
            logits.tolist(), abs=1e-6
        )
    stated = {statement.topic: statement.text for statement in result.interpretation}
    assert stated["preprocess"] == "ViTImageProcessor: resize 32x32 bilinear, RGB"
    assert stated["exif"] == "1 of 10 images turned upright"
    assert "not applied" not in stated
    plain = gradrun.infer(given, overwrite=True, data={"preprocess": "none", "resize": (32, 32)})
    assert [s.text for s in plain.interpretation if s.topic == "not applied"] == [
        "the model's own preprocessing: ViTImageProcessor: resize 32x32 bilinear, RGB, x 1/255, "
        "mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    ]
    codes = [w.code for w in result.warnings], [w.code for w in plain.warnings]
    assert ["other_preprocessing" in found for found in codes] == [False, True]
    (tmp_path / "vit/preprocessor_config.json").unlink()
    small = gradrun.infer(given, overwrite=True, data={"resize": (32, 32)})
    stated = {statement.topic: statement.text for statement in small.interpretation}
    assert stated["preprocess"].startswith("none, the model has no image processor: resize 32x32")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "cannot be loaded"),
        ("{", "cannot be loaded"),
        ('{"image_processor_type": "NoSuchProcessor"}', "cannot be loaded"),
        (
            '{"image_processor_type": "M", "auto_map": {"AutoImageProcessor": "evil.M"}}',
            "contains Python code",
        ),
    ],
)
def test_a_processor_that_cannot_be_loaded_is_an_error(
    tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    with pytest.raises(ConfigError, match=words) as caught:
        preprocessing_of(section(tmp_path, preprocess="processor", processor=tmp_path), None)
    assert caught.value.key == "data.processor"
    assert not (tmp_path / "mark").exists()


def test_preprocess_timm_needs_an_architecture(tmp_path: Path) -> None:
    given = {
        "model": {"source": "zoo", "name": "resnet18"},
        "data": {"source": "images", "path": str(tmp_path), "preprocess": "timm"},
        "output": {"path": str(tmp_path / "out")},
    }
    with pytest.raises(
        ConfigError, match=r"preprocess: timm needs data\.architecture, or a model that"
    ):
        load_config(given)
    config = load_config(given, {"data.architecture": "resnet18"}).config
    assert isinstance(config.data, ImagesData)
    assert config.data.preprocess_source(config.model) == "resnet18"
