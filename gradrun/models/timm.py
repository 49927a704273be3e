"""A model of timm, by its name."""

from __future__ import annotations

from gradrun.config.model import TimmModel
from gradrun.core.errors import ConfigError
from gradrun.core.optional import import_optional
from gradrun.core.suggest import did_you_mean
from gradrun.models.loaded import LoadedModel
from gradrun.models.python import build_module
from gradrun.models.weights import downloading


def open_model(config: TimmModel, *, trust_code: bool) -> LoadedModel:
    """Create the network; download weights only with model.pretrained and without model.weights."""
    timm = import_optional("timm", "model.source")
    if not timm.is_model(config.name):
        hint = did_you_mean(config.name, timm.list_models()) or "see timm.list_models()"
        raise ConfigError(f"timm has no model {config.name!r:.60}; {hint}", "model.name")
    if config.pretrained and not config.weights:
        with downloading("timm", config.name):
            module = timm.create_model(config.name, pretrained=True, **config.args)
            tag = (getattr(module, "pretrained_cfg", None) or {}).get("tag")
            name = f"{config.name}.{tag}" if tag and "." not in config.name else config.name
            return LoadedModel(module, weights=f"timm {name}")
    module = build_module(
        lambda **args: timm.create_model(config.name, pretrained=False, **args),
        config.args,
        f"timm's {config.name}",
    )
    return LoadedModel(module)
