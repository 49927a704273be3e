"""A module in memory, passed by Python code."""

from __future__ import annotations

import copy

from gradrun.config.objects import ObjectModel
from gradrun.models.loaded import LoadedModel


def open_model(config: ObjectModel, *, trust_code: bool) -> LoadedModel:
    """Return the module, or a copy of it if the config changes its dtype or memory format."""
    changes = config.dtype is not None or config.channels_last
    module = copy.deepcopy(config.value) if changes else config.value
    return LoadedModel(module, weights=f"in memory ({config.name})")
