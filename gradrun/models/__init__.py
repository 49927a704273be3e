"""Load the model of a config: the table of model sources, and the steps that all sources share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradrun.config.data import DataConfig, TextData
from gradrun.config.model import EagerModel, HuggingFaceModel, ModelConfig, WeightedModel
from gradrun.core.errors import ConfigError, first_line
from gradrun.models import (
    exported,
    generation,
    huggingface,
    layers,
    objects,
    python,
    texts,
    timm,
    torchscript,
    torchvision,
    zoo,
)
from gradrun.models.class_names import names_of, with_class_names
from gradrun.models.initialization import describe_random
from gradrun.models.loaded import LoadedModel
from gradrun.models.weights import load_weights

SOURCES: dict[str, Callable[..., LoadedModel]] = {
    "zoo": zoo.open_model,
    "layers": layers.open_model,
    "object": objects.open_model,
    "python": python.open_model,
    "torchscript": torchscript.open_model,
    "exported": exported.open_model,
    "huggingface": huggingface.open_model,
    "timm": timm.open_model,
    "torchvision": torchvision.open_model,
}
"""source -> loader: (config section, *, trust_code: bool) -> the model, on the CPU."""


def load_model(
    config: ModelConfig,
    device: torch.device,
    *,
    data: DataConfig | None = None,
    trust_code: bool = False,
) -> LoadedModel:
    """Load the model of a config onto `device`, ready to be called.

    Weights that no file provides are drawn from torch's default generator; the caller seeds it.

    Args:
        data: the data section: a model of texts gets the pad token of their tokenizer, and
            `classes` names the model's classes.
        trust_code: allow code of the config to run.

    Raises:
        ConfigError: the module cannot be built, needs trust, or its weights do not fit.
    """
    model = SOURCES[config.source](config, trust_code=trust_code)
    if isinstance(data, TextData):
        model = texts.fit_to_tokenizer(model, config, data)
    if isinstance(config, HuggingFaceModel) and config.generate is not None:
        model = generation.generating(model, config, data)
    module = model.module
    if isinstance(config, WeightedModel) and config.weights:
        renamed = load_weights(module, config.weights, config.weights_key, trust_code=trust_code)
        model = model.replace(
            weights="", files=(config.weights,), random="", notes=(*model.notes, *renamed)
        )
    elif not module.state_dict():
        model = model.replace(weights="none (the model has no parameters)")
    elif not (model.weights or model.files):
        names = [name for name, _ in module.named_parameters()]
        model = model.replace(random=describe_random(names, module))
    try:
        if isinstance(config, EagerModel):
            module.train(config.training)
            if config.dtype:
                module.to(getattr(torch, config.dtype))
            if config.channels_last:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module.to(device)
        if model.embedding is not None:
            model.embedding.to(device)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the model cannot be moved to {device} with the dtype and memory format of the "
            f"config: {first_line(error)}",
            "model",
        ) from error
    model = with_class_names(model.replace(classes=model.classes or names_of(module)), data)
    if data is not None and data.call == "dict":
        module = DictInput(module)
    if data is not None and data.call == "list":
        module = ListInput(module)
    return model.replace(module=module)


class DictInput(nn.Module):
    """Passes its keyword inputs to a module as one dict."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: torch.Tensor) -> Any:
        """Call the module with the inputs, each [n, ...], by name."""
        return self.module(inputs)


class ListInput(nn.Module):
    """Passes its input to a module as a list with one tensor per sample."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: torch.Tensor, sizes: torch.Tensor | None = None) -> Any:
        """Call the module with the samples of an input.

        Args:
            rows: the input [n, ...].
            sizes: the height and width [n, 2] of images that are padded with 0 at the bottom and
                on the right; default: no padding.
        """
        if sizes is None:
            return self.module(list(rows.unbind()))
        parts = zip(rows, sizes.tolist(), strict=True)
        return self.module([row[..., :high, :wide].contiguous() for row, (high, wide) in parts])
