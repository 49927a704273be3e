"""A chain of torch.nn layers that a config names, so that a model needs no code.

Knows torch.nn's class names; the sizes are the user's.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

from gradrun.config.model import LayersModel
from gradrun.core.errors import ConfigError, first_line
from gradrun.core.suggest import did_you_mean
from gradrun.core.units import format_bytes

_LAYERS = {
    name: kind
    for name, kind in vars(nn).items()
    if isinstance(kind, type) and issubclass(kind, nn.Module)
}


def open_model(config: LayersModel, *, trust_code: bool) -> nn.Module:
    """An nn.Sequential of the layers, in order."""
    with torch.device("meta"):
        planned = _chain(config)
    sized = (p for p in planned.parameters() if not nn.parameter.is_lazy(p))
    size = sum(p.numel() * p.element_size() for p in sized)
    free = psutil.virtual_memory().available
    if size > free:
        raise ConfigError(
            f"the layers hold {format_bytes(size)} of weights, and {format_bytes(free)} of memory "
            "are free; make them smaller",
            "model.layers",
        )
    return _chain(config)


def _chain(config: LayersModel) -> nn.Sequential:
    return nn.Sequential(*(_layer(spec, i) for i, spec in enumerate(config.layers)))


def _layer(spec: Any, index: int) -> nn.Module:
    name, arguments = next(iter(spec.items())) if isinstance(spec, dict) else (spec, [])
    key = f"model.layers.{index}"
    if name not in _LAYERS:
        hint = did_you_mean(name, _LAYERS)
        raise ConfigError(f"torch.nn has no layer {name!r}{hint and f'; {hint}'}", key)
    try:
        if isinstance(arguments, dict):
            return _LAYERS[name](**arguments)
        return _LAYERS[name](*(arguments if isinstance(arguments, list) else [arguments]))
    except Exception as error:  # whatever torch raises on arguments that make no sense
        raise ConfigError(
            f"nn.{name} cannot be made with {arguments}: {first_line(error)}", key
        ) from error
