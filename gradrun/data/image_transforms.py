"""Turn images into model inputs: own steps, or those of timm and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gradrun.config.data import ImagesData
from gradrun.config.model import ModelConfig
from gradrun.core.errors import ConfigError
from gradrun.core.optional import hub_errors, import_optional, import_transformers

Pixels = np.ndarray[Any, np.dtype[np.float32]]
ImageTransform = Callable[[Any], Pixels]
"""A Pillow image -> float32 [channels, height, width]."""

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""interpolation -> its number in Pillow."""


def image_transform(config: ImagesData, model: ModelConfig | None) -> ImageTransform:
    """Return the steps of `data.preprocess`, with the keys that the config overrides.

    Raises:
        ConfigError: a preset cannot be loaded, or does not fit the overrides.
    """
    source = config.preprocess_source(model)
    if config.preprocess == "timm":
        return _timm_transform(config, str(source))
    if config.preprocess == "processor":
        return _processor_transform(config, source or "")
    imagenet = config.preprocess == "imagenet"
    size = config.resize or (256 if imagenet else None)
    crop = config.crop or (224 if imagenet else None)
    resample = _RESAMPLE[config.interpolation or "bilinear"]

    def resize_and_crop(image: Any) -> Any:
        if size is not None:
            image = image.resize(_resized(image.size, size), resample)
        if crop is not None:
            image = image.crop(_center(image.size, crop))
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)

    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if imagenet else (None, None)
    return _normalized(config, resize_and_crop, mean, std)


def _normalized(
    config: ImagesData, geometry: Callable[[Any], Any], mean: Any, std: Any
) -> ImageTransform:
    """Return `geometry`, which gives uint8 [channels, height, width], followed by normalization."""
    mode = config.mode or "RGB"
    scale = 1 / 255 if config.scale is None else config.scale
    mean, std = config.mean or mean, config.std or std
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != len(mode):
            raise ConfigError(
                f"{len(values)} values, but mode {mode} has {len(mode)} channels", f"data.{key}"
            )
    if std is not None and not all(std):
        raise ConfigError("a standard deviation must not be 0", "data.std")

    def transform(image: Any) -> Pixels:
        pixels: Pixels = np.array(geometry(image.convert(mode)), np.float32, order="C")
        pixels *= np.float32(scale)
        if mean is not None:
            pixels -= np.array(mean, np.float32).reshape(-1, 1, 1)
        if std is not None:
            pixels /= np.array(std, np.float32).reshape(-1, 1, 1)
        return pixels

    return transform


def _resized(size: tuple[int, int], target: int | tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) after a resize to (height, width), or of the shorter side."""
    if not isinstance(target, int):
        return target[1], target[0]
    width, height = size
    if width <= height:
        return target, max(1, int(target * height / width))
    return max(1, int(target * width / height)), target


def _center(size: tuple[int, int], target: int | tuple[int, int]) -> tuple[int, int, int, int]:
    """Return Pillow's box of a center crop; a smaller image is padded with black."""
    height, width = (target, target) if isinstance(target, int) else target
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return left, top, left + width, top + height


def _timm_transform(config: ImagesData, architecture: str) -> ImageTransform:
    """Return timm's evaluation transform; normalization is done in NumPy, without torch threads."""
    timm = import_optional("timm", "data.preprocess")
    pretrained = timm.get_pretrained_cfg(architecture)
    if pretrained is None:
        raise ConfigError(
            f"timm has no preprocessing for {architecture!r:.60}; set resize, crop, mean and std",
            "data.preprocess",
        )
    if config.resize is not None:
        raise ConfigError(
            "preprocess: timm computes the resize from the crop; set data.crop instead, or choose "
            "preprocess: none",
            "data.resize",
        )
    data = import_optional("timm", "data.preprocess", "data")
    settings = data.resolve_data_config({}, pretrained_cfg=pretrained.to_dict())
    if config.crop is not None:
        crop = (config.crop, config.crop) if isinstance(config.crop, int) else config.crop
        settings["input_size"] = (settings["input_size"][0], *crop)
    if config.interpolation is not None:
        settings["interpolation"] = config.interpolation
    # use_prefetcher: uint8 arrays instead of normalized tensors.
    geometry = data.create_transform(**settings, use_prefetcher=True)
    return _normalized(config, geometry, tuple(settings["mean"]), tuple(settings["std"]))


def _processor_transform(config: ImagesData, source: str | Path) -> ImageTransform:
    """Return the image processor of transformers, with its Pillow backend."""
    transformers = import_transformers("data.processor")
    # The torchvision backend gives slightly different pixels, and may not be installed.
    backend = {"backend": "pil"} if int(transformers.__version__[0]) >= 5 else {"use_fast": False}
    if isinstance(source, Path) and source.is_file():
        source = source.parent
    with hub_errors(
        source, "data.processor", "which image processors never run; choose another one"
    ):
        processor = transformers.AutoImageProcessor.from_pretrained(
            source, trust_remote_code=False, **backend
        )
    overrides: dict[str, Any] = {}
    if config.resize is not None:
        overrides |= {"do_resize": True, "size": _processor_size(config.resize)}
    if config.crop is not None:
        crop = (config.crop, config.crop) if isinstance(config.crop, int) else config.crop
        overrides |= {"do_center_crop": True, "crop_size": _processor_size(crop)}
    if config.interpolation is not None:
        overrides["resample"] = _RESAMPLE[config.interpolation]
    if config.scale is not None:
        overrides |= {"do_rescale": True, "rescale_factor": config.scale}
    for key in ("mean", "std"):
        if (values := getattr(config, key)) is not None:
            overrides |= {"do_normalize": True, f"image_{key}": list(values)}

    def transform(image: Any) -> Pixels:
        outputs = processor(
            images=image.convert(config.mode or "RGB"), return_tensors="np", **overrides
        )
        pixels: Pixels = outputs["pixel_values"][0].astype(np.float32, copy=False)
        return pixels

    return transform


def _processor_size(size: int | tuple[int, int]) -> dict[str, int]:
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {"height": size[0], "width": size[1]}
