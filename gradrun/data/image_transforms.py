"""Turn decoded images into model inputs: resize, center crop, and normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gradrun.config.data import ImagesData
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_optional
from gradrun.core.units import pluralize
from gradrun.results.result import Statement

Pixels = np.ndarray[Any, np.dtype[np.float32]]
ImageTransform = Callable[[Any], Pixels]
"""A Pillow image of `Preprocessing.mode` or F (values 0 to 255) -> float32 [channels, h, w]."""

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""interpolation -> its number in Pillow."""
FULL_SCALE = 1 / 255

Sizes = int | tuple[int, ...]


class Preprocessing(NamedTuple):
    """The steps from a decoded image to a model input, and their description."""

    transform: ImageTransform
    mode: str
    """The mode of the images that `transform` takes: RGB or L."""
    statements: tuple[Statement, ...]


def own_steps(
    config: ImagesData,
    name: str,
    resize: Sizes = 0,
    crop: Sizes = 0,
    mean: Any = None,
    std: Any = None,
) -> Preprocessing:
    """Return a resize, a center crop and a normalization with Pillow and NumPy."""
    mode = config.mode or "RGB"
    size, crop = preset_sizes(config, resize, crop)
    interpolation = config.interpolation or "bilinear"

    def resize_and_crop(image: Any) -> Any:
        if size:
            image = image.resize(_resized(image.size, size), RESAMPLE[interpolation])
        if crop:
            image = image.crop(_center(image.size, crop))
        pixels = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
        # An image of the mode F has one channel; some filters exceed the range.
        return pixels if image.mode == mode else np.tile(pixels.clip(0, 255), (len(mode), 1, 1))

    geometry = [f"resize {size_text(size)} {interpolation}"] if size else []
    geometry += [f"crop {size_text(crop)}"] if crop else []
    return normalized(
        config, resize_and_crop, mode, f"{name}: " + ", ".join([*geometry, mode]), mean, std
    )


def preset_sizes(config: ImagesData, resize: Sizes, crop: Sizes) -> tuple[Sizes, Sizes]:
    """Return the sizes of the resize and the crop of a preset after the config's changes."""
    new_crop = config.crop or crop
    if config.resize and crop and not config.crop and _shortest(config.resize) < _shortest(crop):
        raise ConfigError(
            f"a resize to {size_text(config.resize)} is smaller than the preset's crop to "
            f"{size_text(crop)}; set data.crop too, or preprocess: none",
            "data.resize",
        )
    return config.resize or resize, new_crop


def _shortest(size: Sizes) -> int:
    return size if isinstance(size, int) else min(size)


def size_text(size: Sizes) -> str:
    """Format 224 as "224", which is the shorter side, and (224, 160) as "224x160"."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def normalized(
    config: ImagesData,
    geometry: Callable[[Any], Any],
    mode: str,
    text: str,
    mean: Any = None,
    std: Any = None,
) -> Preprocessing:
    """Return `geometry`, which gives [channels, height, width] from 0 to 255, and normalization."""
    scale = FULL_SCALE if config.scale is None else config.scale
    mean, std = config.mean or mean, config.std or std
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != len(mode):
            raise ConfigError(
                f"mode {mode} needs {pluralize(len(mode), 'value')}, one per channel, instead of "
                f"{len(values)}",
                f"data.{key}",
            )
    if std is not None and not all(std):
        raise ConfigError("a standard deviation must not be 0", "data.std")
    check_pixel_range(config, scale)

    def transform(image: Any) -> Pixels:
        pixels: Pixels = np.array(geometry(image), np.float32, order="C")
        pixels *= np.float32(scale)
        if mean is not None:
            pixels -= np.array(mean, np.float32).reshape(-1, 1, 1)
        if std is not None:
            pixels /= np.array(std, np.float32).reshape(-1, 1, 1)
        return pixels

    return Preprocessing(transform, mode, describe_steps(text, scale, mean, std))


_MAX_OF_UNIT = {"mean": 1.0, "std": 4.0}
"""Greatest mean and std for pixels from 0 to 1; those for 0 to 255 are about 57 and more.

A std of 1 or 2 is a scale of its own, as some models use it.
"""


def check_pixel_range(config: ImagesData, scale: float) -> None:
    """Reject a mean or std of the config for pixels from 0 to 255 if they are scaled to 0 to 1.

    Raises:
        ConfigError: a value is too large for the range of the pixels.
    """
    if scale * 255 > 1.01:
        return
    for key, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and max(values) > _MAX_OF_UNIT[key]:
            given = ", ".join(f"{value:g}" for value in values)
            divided = ", ".join(f"{value / 255:.3g}" for value in values)
            raise ConfigError(
                f"{key} is [{given}], for pixels from 0 to 255, but pixels are scaled to 0 to "
                f"{scale * 255:.3g} first; set data.scale: 1, or {key}: [{divided}]",
                f"data.{key}",
            )


def describe_steps(text: str, scale: float, mean: Any, std: Any) -> tuple[Statement, ...]:
    """Describe the geometry, and the values that a model sees."""
    scaled = f"x {_number(scale)}"
    for name, values in (("mean", mean), ("std", std)):
        if values is not None:
            scaled += f", {name} " + " ".join(map(_number, values))
    return (
        Statement(topic="preprocess", text=text),
        Statement(topic="pixels", text=scaled),
    )


def _number(value: float) -> str:
    whole = round(1 / value) if 0 < value < 0.1 else 0
    return f"1/{whole}" if whole and abs(1 / whole - value) < 1e-9 else f"{value:.4g}"


def _resized(size: tuple[int, int], target: Sizes) -> tuple[int, int]:
    """Return (width, height) after a resize to (height, width), or of the shorter side."""
    if not isinstance(target, int):
        return target[1], target[0]
    width, height = size
    if width <= height:
        return target, max(1, int(target * height / width))
    return max(1, int(target * width / height)), target


def _center(size: tuple[int, int], target: Sizes) -> tuple[int, int, int, int]:
    """Return Pillow's box of a center crop; a smaller image is padded with black."""
    height, width = (target, target) if isinstance(target, int) else target
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return left, top, left + width, top + height


def eight_bit(image: Any, mode: str) -> Any:
    """Return an image of the mode F in `mode`, for libraries that take 8 bits per channel."""
    if image.mode != "F":
        return image
    pillow = import_optional("PIL", "data.source", "Image")
    return pillow.fromarray(np.rint(np.asarray(image)).astype(np.uint8)).convert(mode)
