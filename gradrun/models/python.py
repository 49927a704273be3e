"""The user's own model: a class, function or module in a Python file or package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gradrun.config.model import PythonModel
from gradrun.core.errors import ConfigError
from gradrun.core.imports import (
    describe_user_error,
    import_target,
    require_trust,
)
from gradrun.models.initialization import RandomOrigins, describe_random
from gradrun.models.loaded import LoadedModel

_KEY = "model.target"


def open_model(config: PythonModel, *, trust_code: bool) -> LoadedModel:
    """Import the target and return it, or the module that it returns for model.args."""
    require_trust(trust_code, f"{config.target} is Python code", _KEY)
    location, _, name = config.target.rpartition(":")
    origins = RandomOrigins()
    with origins:
        target = import_target(config.target, config.root, _KEY)
        model = build_module(target, config.args, config.target)
    return LoadedModel(
        model,
        weights=f"made by {Path(location).name}:{name}",
        random=describe_random(origins.random_parameters(model), model),
    )


def build_module(target: Any, args: Mapping[str, Any], name: str) -> nn.Module:
    """Return `target` if it is a module, else its result when called with `args`.

    Args:
        name: the target in error messages.

    Raises:
        ConfigError: the call fails, or the result is not a module.
    """
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise ConfigError(f"{name} is {_describe(target)}, not a torch.nn.Module", _KEY)
    try:
        module = target(**args)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(
            f"building {name} failed: {describe_user_error(error)}", "model"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name} returns {_describe(module)}, not a torch.nn.Module", _KEY)
    return module


def _describe(value: Any) -> str:
    return f"the {type(value).__name__} {value!r:.60}"
