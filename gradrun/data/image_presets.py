"""Presets of image preprocessing: ImageNet's, and those of timm, torchvision and transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gradrun.config.data import ImagesData
from gradrun.config.model import HuggingFaceModel, ModelConfig, TimmModel, TorchvisionModel
from gradrun.core.errors import ConfigError, first_line
from gradrun.core.optional import hub_errors, import_optional, import_transformers
from gradrun.core.pretrained import processor_folder
from gradrun.data.image_transforms import (
    FULL_SCALE,
    RESAMPLE,
    Pixels,
    Preprocessing,
    check_pixel_range,
    describe_steps,
    eight_bit,
    normalized,
    own_steps,
    preset_sizes,
    size_text,
)
from gradrun.results.result import Statement

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


NOT_APPLIED = "not applied"
"""Topic of the statement about a model's own preprocessing that the config replaces."""

_KEYS = (
    "preprocess", "architecture", "processor", "mode", "resize", "crop", "interpolation", "scale",
    "mean", "std",
)  # fmt: skip
"""The keys of the config that replace a model's own preprocessing."""


def preprocessing_of(config: ImagesData, model: ModelConfig | None) -> Preprocessing:
    """Return the steps of `data.preprocess`, with the keys that the config overrides.

    The statements name the model's own preprocessing if it is another one.

    Raises:
        ConfigError: a preset cannot be loaded, or does not fit the overrides.
    """
    chosen = _resolve(config, model)
    default = config.model_copy(update=dict.fromkeys(_KEYS))
    if default == config or default.preset(model) == "none":
        return chosen
    try:
        own = _resolve(default, model).statements
    except ConfigError:  # a library or a file that the config avoids
        return chosen
    if own == chosen.statements:
        return chosen
    text = f"the model's own preprocessing: {', '.join(part.text for part in own)}"
    differing = Statement(topic=NOT_APPLIED, text=text)
    return chosen._replace(statements=(*chosen.statements, differing))


def _resolve(config: ImagesData, model: ModelConfig | None) -> Preprocessing:
    source = config.preprocess_source(model)
    match config.preset(model):
        case "timm":
            return _timm(config, str(source), model)
        case "torchvision":
            return _torchvision(config, str(source), model)
        case "processor":
            own = config.processor is None and isinstance(model, HuggingFaceModel)
            return _processor(config, source or "", model.revision if own else None)  # type: ignore[union-attr]
        case "imagenet":
            return own_steps(config, "imagenet", 256, 224, _IMAGENET_MEAN, _IMAGENET_STD)
    if config.preprocess is None and isinstance(model, HuggingFaceModel):
        return own_steps(config, "none, the model has no image processor")
    return own_steps(config, "none")


# --- timm and torchvision ----------------------------------------------------------------------


def _timm(config: ImagesData, architecture: str, model: ModelConfig | None) -> Preprocessing:
    """Return timm's evaluation transform; normalization is done in NumPy, without torch threads."""
    timm = import_optional("timm", "data.preprocess")
    pretrained = timm.get_pretrained_cfg(architecture)
    if pretrained is None:
        if config.preprocess is None:
            return own_steps(config, f"none, timm has none for {architecture}")
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
    arguments = model.args if isinstance(model, TimmModel) else {}
    given = {key: arguments[key] for key in ("img_size", "in_chans") if key in arguments}
    settings = data.resolve_data_config(
        given if isinstance(given.get("img_size", 0), int) else {},
        pretrained_cfg=pretrained.to_dict(),
    )
    if config.crop is not None:
        crop = (config.crop, config.crop) if isinstance(config.crop, int) else config.crop
        settings["input_size"] = (settings["input_size"][0], *crop)
    if config.interpolation is not None:
        settings["interpolation"] = config.interpolation
    # use_prefetcher: uint8 arrays instead of normalized tensors.
    geometry = data.create_transform(**settings, use_prefetcher=True)
    mode = config.mode or ("L" if settings["input_size"][0] == 1 else "RGB")
    text = (
        f"timm's {architecture}: {size_text(settings['input_size'][1:])} "
        f"{settings['interpolation']}, {settings['crop_mode']} crop {settings['crop_pct']:.4g}, "
        f"{mode}"
    )
    return normalized(
        config,
        lambda image: geometry(eight_bit(image, mode)),
        mode,
        text,
        tuple(settings["mean"]),
        tuple(settings["std"]),
    )


def _torchvision(config: ImagesData, architecture: str, model: ModelConfig | None) -> Preprocessing:
    """Return the transforms of torchvision's weights; normalization is done in NumPy."""
    functional = import_optional("torchvision", "data.preprocess", "transforms.functional")
    modes = import_optional("torchvision", "data.preprocess", "transforms").InterpolationMode
    weights = _torchvision_weights(architecture, model)
    steps = weights and weights.transforms()
    if type(steps).__name__ not in {
        "ImageClassification",
        "SemanticSegmentation",
        "ObjectDetection",
    }:
        if config.preprocess is None:
            return own_steps(config, f"none, torchvision has none for {architecture}")
        raise ConfigError(
            f"torchvision has no image preprocessing for {architecture!r:.60}; set resize, crop, "
            "mean and std",
            "data.preprocess",
        )
    size, crop = preset_sizes(
        config, tuple(getattr(steps, "resize_size", ())), tuple(getattr(steps, "crop_size", ()))
    )
    interpolation = modes(
        config.interpolation or getattr(steps, "interpolation", modes.BILINEAR).value
    )
    mode = config.mode or "RGB"
    sides = [size] if isinstance(size, int) else [*size]  # one number is the shorter side

    def geometry(image: Any) -> Any:
        image = eight_bit(image, mode)
        if size:
            image = functional.resize(image, sides, interpolation)
        if crop:
            image = functional.center_crop(image, crop if isinstance(crop, int) else [*crop])
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)

    parts = [f"resize {size_text(size)} {interpolation.value}"] if size else []
    parts += [f"crop {size_text(crop)}"] if crop else []
    text = f"torchvision's {weights}: " + ", ".join([*parts, mode])
    mean, std = getattr(steps, "mean", None), getattr(steps, "std", None)
    return normalized(config, geometry, mode, text, mean, std)


def _torchvision_weights(architecture: str, model: ModelConfig | None) -> Any:
    """Return the named weights, those that the file of the model's weights is named after, or
    the default ones; None if torchvision has none.
    """
    models = import_optional("torchvision", "data.preprocess", "models")
    try:
        if "." in architecture:
            return models.get_weight(architecture)
        known = models.get_model_weights(architecture)
    except ValueError as error:
        raise ConfigError(
            f"torchvision has no model or weights {architecture!r:.60}; see "
            "torchvision.models.list_models()",
            "data.architecture",
        ) from error
    file = model.weights if isinstance(model, TorchvisionModel) else None
    for weights in known:
        if file and file.name == weights.url.rpartition("/")[2]:
            return weights
    return getattr(known, "DEFAULT", None)


_PROBE = (256, 224)
"""Width and height of an image that is used to try a processor."""


# --- transformers ------------------------------------------------------------------------------


def _processor(config: ImagesData, source: str | Path, revision: str | None) -> Preprocessing:
    """Return the image processor of transformers, with its Pillow backend."""
    processor = _load_processor(source, revision)
    mode = config.mode or "RGB"
    overrides = _processor_overrides(config)

    def transform(image: Any) -> Pixels:
        return _pixel_values(
            processor(images=eight_bit(image, mode), return_tensors="np", **overrides)
        )

    try:
        transform(import_optional("PIL", "data.source", "Image").new(mode, _PROBE))
    except Exception as error:
        raise ConfigError(
            f"{_name(processor)} does not turn one image into one array [channels, height, width]: "
            f"{first_line(error).rstrip('.')}. Process the images in Python, save the arrays as "
            ".safetensors, and read them with source: arrays",
            "data.processor",
        ) from error
    scale = _scale_of(vars(processor) | overrides)
    check_pixel_range(config, scale)
    return Preprocessing(transform, mode, _processor_statements(processor, mode, overrides))


def _scale_of(settings: dict[str, Any]) -> float:
    """Return the factor of pixels from 0 to 255 in the settings of a processor."""
    factor = settings.get("rescale_factor")
    return (FULL_SCALE if factor is None else factor) if settings.get("do_rescale") else 1


def _pixel_values(outputs: Any) -> Pixels:
    """Return the only image of a processor's outputs, float32 [channels, height, width]."""
    others = set(outputs) - {"pixel_values"}
    if "pixel_mask" in others and np.all(outputs["pixel_mask"]):  # the default of every model
        others.remove("pixel_mask")
    if others:
        raise ValueError(f"it also returns {', '.join(sorted(others))}")
    pixels: Any = outputs["pixel_values"]
    if np.ndim(pixels) != 4 or len(pixels) != 1:
        raise ValueError(f"its pixel_values have the shape {list(np.shape(pixels))}")
    return pixels[0].astype(np.float32, copy=False)  # type: ignore[no-any-return]


def _processor_statements(
    processor: Any, mode: str, overrides: dict[str, Any]
) -> tuple[Statement, ...]:
    """Describe the steps of an image processor by its attributes."""
    settings = {key: value for key, value in vars(processor).items() if value is not None}
    settings |= overrides
    steps = []
    if settings.get("do_resize"):
        names = {number: name for name, number in RESAMPLE.items()}
        filter_name = names.get(settings.get("resample", -1), "")
        steps.append(f"resize {_processor_size_text(settings.get('size'))} {filter_name}".rstrip())
    if settings.get("do_center_crop"):
        steps.append(f"crop {_processor_size_text(settings.get('crop_size'))}")
    known = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
    others = {key for key, value in settings.items() if key.startswith("do_") and value is True}
    steps += [key.removeprefix("do_").replace("_", " ") for key in sorted(others - known)]
    mean, std = (
        settings.get(key) if settings.get("do_normalize") else None
        for key in ("image_mean", "image_std")
    )
    text = f"{_name(processor)}: {', '.join([*steps, mode])}"
    return describe_steps(text, _scale_of(settings), mean, std)


def _name(processor: Any) -> str:
    return type(processor).__name__.removesuffix("Pil")


def _processor_size_text(size: Any) -> str:
    values = {key: value for key, value in dict(size or {}).items() if value is not None}
    if values.keys() == {"height", "width"}:
        return size_text((values["height"], values["width"]))
    return " ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())


def _load_processor(source: str | Path, revision: str | None) -> Any:
    transformers = import_transformers("data.processor")
    source = processor_folder(source, "data.processor")
    load = partial(
        transformers.AutoImageProcessor.from_pretrained,
        source,
        revision=revision or "main",
        trust_remote_code=False,
    )
    with hub_errors(
        source, "data.processor", "which image processors never run; choose another one"
    ):
        try:
            # The torchvision backend gives slightly different pixels, and may not be installed.
            return load(backend="pil")
        except Exception:  # some classes have only a torchvision backend
            return load()


def _processor_overrides(config: ImagesData) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    if config.resize is not None:
        overrides |= {"do_resize": True, "size": _processor_size(config.resize)}
    if config.crop is not None:
        crop = (config.crop, config.crop) if isinstance(config.crop, int) else config.crop
        overrides |= {"do_center_crop": True, "crop_size": _processor_size(crop)}
    if config.interpolation is not None:
        overrides["resample"] = RESAMPLE[config.interpolation]
    if config.scale is not None:
        overrides |= {"do_rescale": True, "rescale_factor": config.scale}
    for key in ("mean", "std"):
        if (values := getattr(config, key)) is not None:
            overrides |= {"do_normalize": True, f"image_{key}": list(values)}
    return overrides


def _processor_size(size: int | tuple[int, int]) -> dict[str, int]:
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {"height": size[0], "width": size[1]}
