"""Model outputs to named tensors: output.select and output.transform."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError
from gradrun.core.suggest import suggest
from gradrun.output.class_labels import DEFAULT_OUTPUT
from gradrun.output.missing import MISSING_CLASS, is_finite
from gradrun.results.result import Statement

Outputs = dict[str, torch.Tensor]
"""Output name to a tensor [n, ...] on the CPU without a gradient."""

_NO_INPUTS: Mapping[str, torch.Tensor] = MappingProxyType({})
_SAFE_NAME = re.compile(r"\w[\w.-]*")

Inputs = Mapping[str, torch.Tensor]
"""Keyword inputs of the model; some transforms need the attention_mask."""

_NARROW = {torch.float16, torch.bfloat16}

_Named = list[tuple[str, torch.Tensor]]
_Transform = Callable[[str, torch.Tensor, OutputSection, Inputs], _Named]


def output_selector(config: OutputSection) -> Callable[..., Outputs]:
    """A function (model output, batch size, keyword inputs) -> selected and transformed outputs.

    It raises ConfigError if a selected output is missing or lacks one row per sample.
    """
    steps = [_TRANSFORMS[name] for name in config.transform if name != "none"]

    def select_all(returned: Any, size: int, inputs: Inputs = _NO_INPUTS) -> Outputs:
        outputs = _select(returned, config.select)
        for name, tensor in outputs:
            _check_rows(name, tensor, size)
        for step in steps:
            outputs = [new for output in outputs for new in step(*output, config, inputs)]
        return {name: _to_cpu(tensor) for name, tensor in outputs}

    def select_one(returned: Any, size: int, inputs: Inputs = _NO_INPUTS) -> Outputs:
        # The most common case; the lists above would add noticeable time per batch.
        if not isinstance(returned, torch.Tensor):
            return select_all(returned, size, inputs)
        _check_rows(DEFAULT_OUTPUT, returned, size)
        return {DEFAULT_OUTPUT: _to_cpu(returned)}

    return select_all if config.select or steps else select_one


def _to_cpu(value: torch.Tensor) -> torch.Tensor:
    """A detached CPU tensor whose memory contains its values, as numpy needs it."""
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    if value.requires_grad:
        value = value.detach()
    return value if value.is_cpu else value.cpu()


def _select(returned: Any, wanted: tuple[str, ...]) -> _Named:
    if isinstance(returned, torch.Tensor) and not wanted:
        return [(DEFAULT_OUTPUT, returned)]
    named = list(iter_tensors(returned))
    outputs = dict(named)
    if not outputs:
        raise ConfigError(
            f"the model returned {type(returned).__name__}; it must return a tensor, or a tuple, "
            "dict or dataclass of tensors",
            "model",
        )
    if len(outputs) < len(named):
        names = [name for name, _ in named]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"the model returns two outputs named {duplicate!r}", "model")
    if unknown := [name for name in wanted if name not in outputs]:
        raise ConfigError(
            f"the model has no output {unknown[0]!r}; {suggest(unknown[0], outputs)}",
            "output.select",
        )
    selected = [(name, outputs[name]) for name in wanted or outputs]
    if unsafe := [name for name, _ in selected if not _SAFE_NAME.fullmatch(name)]:
        raise ConfigError(
            f"the model has an output named {unsafe[0]!r}, which is not a safe file name; select "
            "other outputs",
            "output.select",
        )
    return selected if len(selected) > 1 else [(DEFAULT_OUTPUT, selected[0][1])]


def iter_tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in a nested structure with its path: "0", "logits", "states.1"."""
    if isinstance(value, torch.Tensor):
        yield name or "0", value
        return
    if isinstance(value, Mapping):
        items = list(value.items())
    elif dataclasses.is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, tuple | list):
        items = list(enumerate(value))
    else:
        return
    for key, item in items:
        yield from iter_tensors(item, f"{name}.{key}" if name else str(key))


def _check_rows(name: str, tensor: torch.Tensor, size: int) -> None:
    if tensor.layout != torch.strided:
        raise ConfigError(
            f"output {name!r} is a {str(tensor.layout).removeprefix('torch.')} tensor; only dense "
            "tensors are supported: return tensor.to_dense()",
            "output.select",
        )
    if tensor.ndim == 0 or tensor.shape[0] != size:  # len() takes three times as long
        raise ConfigError(
            f"output {name!r} has shape {list(tensor.shape)} for a batch of {size}; the first "
            "dimension must be the batch, with one row per sample. Choose other outputs with "
            "output.select",
            "output.select",
        )


def statements(config: OutputSection) -> Iterator[Statement]:
    """Yield the interpretations of the model's outputs."""
    if config.transform != ("none",):
        yield Statement(topic="outputs", text=" then ".join(config.transform))


# --- transforms --------------------------------------------------------------------------------


def _softmax(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    return [(name, torch.softmax(tensor, _class_dim("softmax", name, tensor, config)))]


def _argmax(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    return [(name, _most_likely(tensor, _class_dim("argmax", name, tensor, config))[1])]


def _classify(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    """The most likely class and its probability."""
    dim = _class_dim("classify", name, tensor, config)
    score, index = _most_likely(torch.softmax(tensor, dim), dim)
    prefix = "" if name == DEFAULT_OUTPUT else f"{name}."
    return [(f"{prefix}class", index), (f"{prefix}score", score)]


def _most_likely(scores: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest score and its index; MISSING_CLASS if the score is NaN or infinite."""
    best, index = torch.max(scores, dim)
    return best, index.masked_fill(~is_finite(best), MISSING_CLASS)


def _normalize(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    """Scale to length 1, for cosine similarity; in float32 for narrower types."""
    dim = _class_dim("normalize", name, tensor, config)
    return [(name, nn.functional.normalize(_widened(tensor), dim=dim))]


def _mean_pool(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    """Mean over the tokens without padding, [n, tokens, width] to [n, width]; at least float32."""
    tokens = _widened(tensor)
    mask = _mask("mean_pool", name, tensor, inputs).unsqueeze(-1).to(tokens.dtype)
    return [(name, (tokens * mask).sum(1) / mask.sum(1).clamp(min=1))]


def _cls(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    """The first token after any padding: [n, tokens, width] to [n, width]."""
    first = _mask("cls", name, tensor, inputs).argmax(1)
    return [(name, tensor[torch.arange(len(tensor), device=tensor.device), first])]


def _last_token(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    """The last token before any padding: [n, tokens, width] to [n, width]."""
    mask = _mask("last_token", name, tensor, inputs)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return [(name, tensor[torch.arange(len(tensor), device=tensor.device), last])]


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """float16 and bfloat16 as float32: a sum of hundreds of terms would lose their last digits."""
    return tensor.float() if tensor.dtype in _NARROW else tensor


def _mask(step: str, name: str, tensor: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The attention mask [n, tokens]: 0 for padding."""
    mask = inputs.get("attention_mask")
    if mask is None:
        raise ConfigError(
            f"{step} needs the input attention_mask to ignore padding, but the model does not have "
            "it",
            "output.transform",
        )
    if tensor.ndim != 3 or tensor.shape[:2] != mask.shape:
        raise ConfigError(
            f"{step} needs an output with one row per token, shape {[*mask.shape]} plus a width, "
            f"but {name!r} has shape {[*tensor.shape]}; try output.select: last_hidden_state",
            "output.transform",
        )
    return mask


def _topk(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    dim = _class_dim("topk", name, tensor, config)
    if config.k > tensor.shape[dim]:
        raise ConfigError(
            f"topk with k={config.k} exceeds the {tensor.shape[dim]} classes of output {name!r} "
            f"(shape {list(tensor.shape)})",
            "output.k",
        )
    values, indices = torch.topk(tensor, config.k, dim)
    prefix = "" if name == DEFAULT_OUTPUT else f"{name}."
    return [(f"{prefix}values", values), (f"{prefix}indices", indices)]


def _class_dim(step: str, name: str, tensor: torch.Tensor, config: OutputSection) -> int:
    dim = config.dim if config.dim >= 0 else tensor.ndim + config.dim
    if not 0 < dim < tensor.ndim:
        raise ConfigError(
            f"cannot apply {step} over dimension {config.dim} of output {name!r} with shape "
            f"{list(tensor.shape)}; dimension 0 is the batch, choose a later one",
            "output.dim" if tensor.ndim > 1 else "output.transform",
        )
    return dim


_TRANSFORMS: dict[str, _Transform] = {
    "softmax": _softmax,
    "argmax": _argmax,
    "classify": _classify,
    "topk": _topk,
    "mean_pool": _mean_pool,
    "cls": _cls,
    "last_token": _last_token,
    "normalize": _normalize,
}
