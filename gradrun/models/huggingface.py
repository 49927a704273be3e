"""A model of transformers, with the head that `auto_class` names and the weights of its folder.

Knows what of such a folder could run code, and which weights it lacks; knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gradrun.config.model import HuggingFaceModel
from gradrun.core.errors import ConfigError
from gradrun.core.optional import NEEDS_TRUST, hub_errors, import_transformers

_KEY = "model.path"
_LISTED = 4


def open_model(config: HuggingFaceModel, *, trust_code: bool) -> nn.Module:
    """The model, which is data: code and pickles of its folder are for those who trust it."""
    transformers = import_transformers(_KEY)
    auto = getattr(transformers, config.auto_class)
    settings: dict[str, Any] = {
        "revision": config.revision or "main",
        "trust_remote_code": trust_code,
    }
    with hub_errors(config.path, _KEY):
        described = transformers.AutoConfig.from_pretrained(config.path, **settings)
        if not trust_code and config.attention is None:
            _check_kernels(config, settings["revision"], transformers)
        model, report = auto.from_pretrained(
            config.path,
            **settings,
            config=described,
            dtype=getattr(torch, config.dtype) if config.dtype else "auto",
            attn_implementation=config.attention,
            use_safetensors=None if trust_code else True,
            output_loading_info=True,
        )
    if not config.random_weights:
        _check_weights(config, sorted(report["missing_keys"]))
    model.class_names = _class_names(model.config) if "Classification" in config.auto_class else ()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # one forward comes back to no cache
    return model  # type: ignore[no-any-return]


def _class_names(described: Any) -> tuple[str, ...]:
    """What the model calls its classes, in order; nothing where it only counts them."""
    named = described.id2label or {}
    names = tuple(str(named.get(number, number)) for number in range(len(named)))
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names


def _check_kernels(config: HuggingFaceModel, revision: str, transformers: Any) -> None:
    """Refuse attention that transformers would fetch from the hub as code."""
    written, _ = transformers.PretrainedConfig.get_config_dict(config.path, revision=revision)
    for named in _attentions(written):
        if "/" in named:
            raise ConfigError(
                f"{config.path} asks for the kernel {named!r} from the hub, {NEEDS_TRUST}; or "
                "choose model.attention",
                _KEY,
            )


def _attentions(described: Any) -> Iterator[str]:
    """Every kind of attention that a description names, its parts' too."""
    for key, value in described.items() if isinstance(described, dict) else ():
        if "attn_implementation" in str(key):
            yield str(value)
        yield from _attentions(value)


def _check_weights(config: HuggingFaceModel, lacking: list[str]) -> None:
    if lacking:
        more = len(lacking) - _LISTED
        listed = ", ".join(lacking[:_LISTED]) + (f" and {more} more" if more > 0 else "")
        raise ConfigError(
            f"{config.path} has no weights for {listed}; choose the model.auto_class that it was "
            "saved as, or let model.random_weights: true draw them from run.seed",
            "model.auto_class",
        )
