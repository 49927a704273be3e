"""Weights from a file into a module: safetensors, or a checkpoint that weights_only can load.

Knows state dicts; not which model they belong to.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from gradrun.core.errors import ConfigError, first_line
from gradrun.models.archives import HostileError
from gradrun.models.pickles import check_checkpoint

_KEY = "model.weights"
_USUAL_KEYS = ("state_dict", "model", "model_state_dict")
_LISTED = 8


def load_weights(module: nn.Module, path: Path, nested_key: str | None) -> None:
    """Copy the file's tensors into the module.

    Args:
        module: every parameter and buffer of its state dict must be in the file, and no other.
        path: a .safetensors file or a torch checkpoint.
        nested_key: where the state dict lies in the checkpoint; None looks where it usually is.

    Raises:
        ConfigError: the file cannot be read without running code, or does not fit; lists the keys.
    """
    state = _read(path, nested_key)
    own = module.state_dict()
    problems = [
        *_listed("missing in the file", [key for key in own if key not in state]),
        *_listed("not in the model", [key for key in state if key not in own]),
        *_listed(
            "of another shape",
            [
                f"{key} {list(state[key].shape)} (the model has {list(own[key].shape)})"
                for key in own
                if key in state
                and not nn.parameter.is_lazy(own[key])  # it takes the shape of what it is given
                and state[key].shape != own[key].shape
            ],
        ),
    ]
    if problems:
        raise ConfigError(f"{path} does not fit the model: {'; '.join(problems)}", _KEY)
    try:
        module.load_state_dict(dict(state))
    except Exception as error:  # sparse or quantized tensors, say, where plain ones are wanted
        raise ConfigError(f"{path} does not fit the model: {first_line(error)}", _KEY) from error


def _listed(what: str, keys: list[str]) -> list[str]:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return [f"{what}: {', '.join(map(str, keys[:_LISTED]))}{more}"] if keys else []


def _read(path: Path, nested_key: str | None) -> Mapping[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError, MemoryError) as error:
            raise ConfigError(f"{path} is no safetensors file: {error}", _KEY) from error
    return _state_dict(_checkpoint(path), path, nested_key)


def _checkpoint(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            check_checkpoint(file)
        return torch.load(path, map_location="cpu", weights_only=True)
    except HostileError as error:
        raise ConfigError(
            f"{path} {error}; save a .safetensors file and name that", _KEY
        ) from error
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            begins = file.read(2)
        if begins != b"PK" and not begins.startswith(b"\x80"):  # torch.save's zip, or a pickle
            raise ConfigError(f"{path} is no checkpoint of torch.save", _KEY) from error
        raise ConfigError(
            f"{path} holds Python objects besides tensors, and unpickling them could run code; "
            "save torch.save(model.state_dict(), ...) or a .safetensors file and name that",
            _KEY,
        ) from error
    except Exception as error:  # a damaged archive fails in any of a dozen ways
        raise ConfigError(
            f"{path} is no checkpoint of torch.save: {first_line(error):.200}", _KEY
        ) from error


def _state_dict(checkpoint: Any, path: Path, nested_key: str | None) -> Mapping[str, torch.Tensor]:
    if nested_key is not None:
        state = checkpoint
        whole = isinstance(checkpoint, Mapping) and nested_key in checkpoint
        for part in [nested_key] if whole else nested_key.split("."):
            state = state.get(part) if isinstance(state, Mapping) else None
        if not _is_state_dict(state):
            raise ConfigError(
                f"{path} has no state dict under {nested_key!r}; {_contents(checkpoint)}",
                "model.weights_key",
            )
        return state  # type: ignore[no-any-return]
    if _is_state_dict(checkpoint):
        return checkpoint  # type: ignore[no-any-return]
    for usual in _USUAL_KEYS:
        if isinstance(checkpoint, Mapping) and _is_state_dict(checkpoint.get(usual)):
            return checkpoint[usual]  # type: ignore[no-any-return]
    raise ConfigError(
        f"{path} has no state dict at the top or under {', '.join(_USUAL_KEYS)}; "
        f"{_contents(checkpoint)}; name its key with model.weights_key",
        _KEY,
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(tensor, torch.Tensor) for tensor in value.values())
    )


def _contents(checkpoint: Any) -> str:
    if isinstance(checkpoint, Mapping):
        return "it holds " + ", ".join(map(str, list(checkpoint)[:_LISTED]))
    return f"it holds a {type(checkpoint).__name__}"
