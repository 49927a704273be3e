"""A chain of torch.nn layers that the config lists by name."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

from gradrun.config.model import LayersModel
from gradrun.core.errors import ConfigError, first_line
from gradrun.core.suggest import did_you_mean
from gradrun.core.units import format_bytes
from gradrun.models.loaded import LoadedModel

_LAYERS = {
    name: kind
    for name, kind in vars(nn).items()
    if isinstance(kind, type) and issubclass(kind, nn.Module)
}


def open_model(config: LayersModel, *, trust_code: bool) -> LoadedModel:
    """Build an nn.Sequential of the layers.

    Raises:
        ConfigError: a layer is unknown or has wrong arguments, or the weights exceed free memory.
    """
    with torch.device("meta"):
        planned = _build(config)
    sized = (p for p in planned.parameters() if not nn.parameter.is_lazy(p))
    size = sum(p.numel() * p.element_size() for p in sized)
    free = psutil.virtual_memory().available
    if size > free:
        raise ConfigError(
            f"the layers have {format_bytes(size)} of weights, but only {format_bytes(free)} of "
            "memory is free; make them smaller",
            "model.layers",
        )
    return LoadedModel(_build(config))


def _build(config: LayersModel) -> nn.Sequential:
    return nn.Sequential(*(_build_layer(spec, i) for i, spec in enumerate(config.layers)))


def _build_layer(spec: Any, index: int) -> nn.Module:
    name, arguments = next(iter(spec.items())) if isinstance(spec, dict) else (spec, [])
    key = f"model.layers.{index}"
    if name not in _LAYERS:
        hint = did_you_mean(name, _LAYERS)
        raise ConfigError(f"torch.nn has no layer {name!r}{hint and f'; {hint}'}", key)
    try:
        if isinstance(arguments, dict):
            return _LAYERS[name](**arguments)
        return _LAYERS[name](*(arguments if isinstance(arguments, list) else [arguments]))
    except Exception as error:  # torch raises many types of error for wrong arguments
        raise ConfigError(
            f"nn.{name} does not accept {arguments}: {first_line(error)}", key
        ) from error
