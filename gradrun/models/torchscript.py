"""A model saved with torch.jit.save."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from gradrun.config.model import TorchScriptModel
from gradrun.core.errors import ConfigError
from gradrun.core.imports import require_trust
from gradrun.models.loaded import LoadedModel


def open_model(config: TorchScriptModel, *, trust_code: bool) -> LoadedModel:
    """Load the scripted or traced module onto the CPU."""
    require_trust(trust_code, f"{config.path} contains a TorchScript program", "model.path")
    try:
        with warnings.catch_warnings():
            # torch.jit warns at every load that it is deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            module: nn.Module = torch.jit.load(str(config.path), map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:  # torch raises many types of error for a damaged archive
        raise ConfigError(
            f"{config.path} is not a TorchScript archive that torch {torch.__version__} can read; "
            "save it with torch.jit.save (source: exported reads .pt2 files of torch.export)",
            "model.path",
        ) from error
    return LoadedModel(module, files=(config.path,))
