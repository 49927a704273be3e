"""A model from torch.jit.save, run as it was scripted or traced.

Knows only the file.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from gradrun.config import TorchScriptModel
from gradrun.errors import ConfigError


def open_model(config: TorchScriptModel, *, trust_code: bool) -> nn.Module:
    """The scripted module, on the CPU."""
    try:
        with warnings.catch_warnings():
            # torch.jit announces its own retirement at every load; the user did not ask.
            warnings.simplefilter("ignore", DeprecationWarning)
            module: nn.Module = torch.jit.load(str(config.path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"{config.path} is no TorchScript archive that torch {torch.__version__} reads; "
            "it is written by torch.jit.save (source: exported reads torch.export's .pt2)",
            "model.path",
        ) from error
    return module
