"""config.model to a callable torch.nn.Module: the contract of the shelf and its table.

A source builds a module; what all of them share (weights, dtype, eval, device, compile) is done
here. Knows no data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradrun.config.model import EagerModel, ModelConfig, WeightedModel
from gradrun.core.errors import ConfigError, first_line
from gradrun.models import (
    exported,
    huggingface,
    layers,
    python,
    timm,
    torchscript,
    torchvision,
    zoo,
)
from gradrun.models.weights import load_weights

SOURCES: dict[str, Callable[..., nn.Module]] = {
    "zoo": zoo.open_model,
    "layers": layers.open_model,
    "python": python.open_model,
    "torchscript": torchscript.open_model,
    "exported": exported.open_model,
    "huggingface": huggingface.open_model,
    "timm": timm.open_model,
    "torchvision": torchvision.open_model,
}
"""source -> opener: (config section, *, trust_code: bool) to the module, on the CPU."""


def load_model(config: ModelConfig, device: torch.device, *, trust_code: bool = False) -> nn.Module:
    """The module that a config names, with its weights, on `device`, ready to be called.

    Weights that no file gives are drawn from torch's default generator, which the caller seeds.

    Raises:
        ConfigError: it cannot be built, is not trusted, or its weights do not fit it.
    """
    module = SOURCES[config.source](config, trust_code=trust_code)
    if isinstance(config, WeightedModel) and config.weights:
        load_weights(module, config.weights, config.weights_key)
    try:
        if isinstance(config, EagerModel):
            module.train(config.training)
            if config.dtype:
                module.to(getattr(torch, config.dtype))
            if config.channels_last:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module.to(device)
    except (RuntimeError, ValueError, TypeError) as error:
        text = f"cannot be brought to {device} as the config asks: {first_line(error)}"
        raise ConfigError(text, "model") from error
    return _compiled(module) if config.compile else module


def class_names(model: nn.Module) -> tuple[str, ...]:
    """What a model calls its classes, in order, where its source has said so."""
    return tuple(getattr(model, "class_names", ()))


def _compiled(module: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(module)
    return compiled  # type: ignore[no-any-return]
