"""A model of torchvision by its name, with weights from a file, from torchvision, or none.

Knows torchvision's names; nothing of pictures.
"""

from __future__ import annotations

import inspect

from torch import nn

from gradrun.config.model import TorchvisionModel
from gradrun.core.errors import ConfigError, first_line
from gradrun.core.optional import import_optional
from gradrun.core.suggest import did_you_mean
from gradrun.models.python import build


def open_model(config: TorchvisionModel, *, trust_code: bool) -> nn.Module:
    """The network; only `pretrained: true` without a file of weights downloads anything."""
    models = import_optional("torchvision", "model.source", "models")
    if config.name not in (names := models.list_models()):
        hint = did_you_mean(config.name, names) or "torchvision.models.list_models() says all"
        raise ConfigError(f"torchvision has no model {config.name!r:.60}; {hint}", "model.name")
    if config.pretrained and not config.weights:
        try:
            module: nn.Module = models.get_model(config.name, weights="DEFAULT", **config.args)
        except Exception as error:  # no network, args that fit none
            raise ConfigError(
                f"torchvision's own weights of {config.name} cannot be had: "
                f"{type(error).__name__}: {first_line(error)}; model.weights reads them from a "
                "file",
                "model.pretrained",
            ) from error
        return module
    builder = models.get_model_builder(config.name)
    # Without weights of its own a model may want to fetch those of its backbone.
    known = inspect.signature(builder).parameters
    none = {key: None for key in ("weights", "weights_backbone") if key in known}
    return build(
        lambda **args: builder(**none, **args), config.args, f"torchvision's {config.name}"
    )
