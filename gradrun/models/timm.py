"""A model of timm by its name, with weights from a file, from timm, or none.

Knows timm's names; what its models expect of pictures stands in data_sources/preprocess.py.
"""

from __future__ import annotations

from torch import nn

from gradrun.config.model import TimmModel
from gradrun.core.errors import ConfigError, first_line
from gradrun.core.optional import import_optional
from gradrun.core.suggest import did_you_mean
from gradrun.models.python import build


def open_model(config: TimmModel, *, trust_code: bool) -> nn.Module:
    """The network; only `pretrained: true` without a file of weights downloads anything."""
    timm = import_optional("timm", "model.source")
    if not timm.is_model(config.name):
        hint = did_you_mean(config.name, timm.list_models()) or "timm.list_models() says all"
        raise ConfigError(f"timm has no model {config.name!r:.60}; {hint}", "model.name")
    if config.pretrained and not config.weights:
        try:
            module: nn.Module = timm.create_model(config.name, pretrained=True, **config.args)
        except Exception as error:  # no network, no such weights, args that fit none
            raise ConfigError(
                f"timm's own weights of {config.name} cannot be had: {type(error).__name__}: "
                f"{first_line(error)}; model.weights reads them from a file",
                "model.pretrained",
            ) from error
        return module
    return build(
        lambda **args: timm.create_model(config.name, pretrained=False, **args),
        config.args,
        f"timm's {config.name}",
    )
