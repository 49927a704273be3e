"""What is done to a picture before a model sees it: size, crop, colours, by name or in numbers.

Knows Pillow's pictures and the files of two libraries that say what their models expect; not where
pictures come from.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradrun.config.data import ImagesData
from gradrun.config.model import ModelConfig
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_optional

Size = int | tuple[int, int] | None
"""The shorter side, or (height, width)."""

_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""interpolation -> Pillow's number for it."""


@dataclass(frozen=True)
class Steps:
    """Resize, crop, scale, normalize, in this order; what is None is not done."""

    mode: str = "RGB"
    resize: Size = None
    crop: Size = None
    interpolation: str = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, picture: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A Pillow picture as float32 [channels, height, width]."""
        picture = picture.convert(self.mode)
        if self.resize is not None:
            width, height = _resized(picture.size, self.resize)
            picture = picture.resize((width, height), _FILTERS[self.interpolation])
        if self.crop is not None:
            picture = picture.crop(_middle(picture.size, self.crop))
        pixels = np.asarray(picture, np.float32)
        rows = np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1))
        rows *= np.float32(self.scale)
        if self.mean is not None:
            rows -= np.array(self.mean, np.float32).reshape(-1, 1, 1)
        if self.std is not None:
            rows /= np.array(self.std, np.float32).reshape(-1, 1, 1)
        return rows


def steps(config: ImagesData, model: ModelConfig | None) -> Steps:
    """The steps that a config names, with the keys that it changes.

    Raises:
        ConfigError: their description cannot be read, or does not fit the channels.
    """
    named = _PRESETS[config.preprocess](config.preprocess_source(model))
    own = {field.name: getattr(config, field.name) for field in fields(Steps)}
    found = replace(named, **{key: value for key, value in own.items() if value is not None})
    channels = len(found.mode)
    for key in ("mean", "std"):
        values = getattr(found, key)
        if values is not None and len(values) != channels:
            raise ConfigError(
                f"{len(values)} values, where mode {found.mode} has {channels} channels",
                f"data.{key}",
            )
    if found.std and not all(found.std):
        raise ConfigError("0 cannot be divided by", "data.std")
    return found


def _resized(size: tuple[int, int], wanted: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height) after a resize; of a single number it is the shorter side."""
    if not isinstance(wanted, int):
        return wanted[1], wanted[0]
    width, height = size
    if width <= height:
        return wanted, max(1, int(wanted * height / width))
    return max(1, int(wanted * width / height)), wanted


def _middle(size: tuple[int, int], wanted: int | tuple[int, int]) -> tuple[int, int, int, int]:
    """Pillow's box of the middle; beyond a picture that is smaller lies black."""
    height, width = (wanted, wanted) if isinstance(wanted, int) else wanted
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return left, top, left + width, top + height


# --- by name -----------------------------------------------------------------------------------


def _imagenet(_: object) -> Steps:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Steps(resize=256, crop=224, mean=mean, std=std)


def _of_timm(architecture: str | Path | None) -> Steps:
    """What timm says of an architecture, as its own evaluation does it."""
    timm = import_optional("timm", "data.preprocess")
    described = timm.get_pretrained_cfg(str(architecture))
    if described is None:
        raise ConfigError(
            f"timm says nothing of what {str(architecture)!r:.60} expects; give resize, crop, mean "
            "and std",
            "data.preprocess",
        )
    found = import_optional("timm", "data.preprocess", "data").resolve_data_config(
        {}, pretrained_cfg=described.to_dict()
    )
    _, height, width = found["input_size"]
    if found["crop_mode"] not in {"center", "squash"} or found["interpolation"] not in _FILTERS:
        raise ConfigError(
            f"timm's steps of {architecture} (crop {found['crop_mode']}, {found['interpolation']}) "
            "are not known here; give resize, crop and interpolation",
            "data.preprocess",
        )
    scaled = tuple(math.floor(side / found["crop_pct"]) for side in (height, width))
    shorter = height == width and found["crop_mode"] == "center"
    return Steps(
        resize=scaled[0] if shorter else scaled,
        crop=(height, width),
        interpolation=found["interpolation"],
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
    )


def _of_processor(place: str | Path | None) -> Steps:
    """What a preprocessor_config.json says, where it asks for nothing but these steps."""
    path = Path(str(place))
    path = path / "preprocessor_config.json" if path.is_dir() else path
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return _processor_steps(said)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read: {reason}", "data.processor") from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"{path} asks for steps that are not known here ({type(error).__name__}: {error}); "
            "give resize, crop, mean and std",
            "data.processor",
        ) from error


def _processor_steps(said: dict[str, Any]) -> Steps:
    if others := [key for key in ("do_pad", "do_flip_channel_order") if said.get(key)]:
        raise KeyError(others[0])
    resize = _size(said["size"]) if said.get("do_resize", True) and "size" in said else None
    crop = _size(said["crop_size"]) if said.get("do_center_crop") else None
    if "crop_pct" in said and isinstance(resize, int):  # ConvNext's: larger ones are not cropped
        if resize < 384:
            resize, crop = int(resize / said["crop_pct"]), resize
        else:
            resize = (resize, resize)
    normalized = said.get("do_normalize", True) and "image_mean" in said
    return Steps(
        resize=resize,
        crop=crop,
        interpolation=next(n for n, code in _FILTERS.items() if code == said.get("resample", 2)),
        scale=float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0,
        mean=tuple(map(float, said["image_mean"])) if normalized else None,
        std=tuple(map(float, said["image_std"])) if normalized else None,
    )


def _size(said: Any) -> Size:
    if isinstance(said, int):
        return said
    if "shortest_edge" in said and "longest_edge" not in said:
        return int(said["shortest_edge"])
    return int(said["height"]), int(said["width"])


_PRESETS = {
    "none": lambda _: Steps(),
    "imagenet": _imagenet,
    "timm": _of_timm,
    "processor": _of_processor,
}
