"""A model of torchvision, by its name."""

from __future__ import annotations

import inspect

from gradrun.config.model import TorchvisionModel
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_optional
from gradrun.core.suggest import did_you_mean
from gradrun.models.loaded import LoadedModel
from gradrun.models.python import build_module
from gradrun.models.weights import downloading


def open_model(config: TorchvisionModel, *, trust_code: bool) -> LoadedModel:
    """Create the network; download weights only with model.pretrained and without model.weights."""
    models = import_optional("torchvision", "model.source", "models")
    if config.name not in (names := models.list_models()):
        hint = did_you_mean(config.name, names) or "see torchvision.models.list_models()"
        raise ConfigError(f"torchvision has no model {config.name!r:.60}; {hint}", "model.name")
    if config.pretrained and not config.weights:
        with downloading("torchvision", config.name):
            module = models.get_model(config.name, weights="DEFAULT", **config.args)
            default = models.get_model_weights(config.name).DEFAULT
            classes = tuple(default.meta.get("categories") or ())
            return LoadedModel(module, weights=f"torchvision {default}", classes=classes)
    builder = models.get_model_builder(config.name)
    # Without weights=None a model may download weights of its backbone.
    known = inspect.signature(builder).parameters
    none = {key: None for key in ("weights", "weights_backbone") if key in known}
    module = build_module(
        lambda **args: builder(**none, **args), config.args, f"torchvision's {config.name}"
    )
    return LoadedModel(module)
