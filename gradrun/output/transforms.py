"""What a model returned to named tensors: output.select and output.transform.

Knows the shapes that models return (a tensor, tuples, dicts, dataclasses); not where they go.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError
from gradrun.core.suggest import suggest

DEFAULT_OUTPUT = "prediction"
"""The name of a model's only output."""

MISSING_CLASS = torch.iinfo(torch.int64).min
"""What argmax gives of scores of which a NaN or an infinity is the greatest."""

Outputs = dict[str, torch.Tensor]
"""Output name to a tensor [size, ...] on the CPU that needs no gradient."""

_NO_INPUTS: Mapping[str, torch.Tensor] = MappingProxyType({})
_SAFE_NAME = re.compile(r"\w[\w.-]*")


Inputs = Mapping[str, torch.Tensor]
"""What the model was called with by name; a transform may need its attention_mask."""


def output_selector(config: OutputSection) -> Callable[..., Outputs]:
    """A function (what the model returned, batch size, its inputs) to the outputs that are kept.

    It raises ConfigError where there are no such outputs or they are not one row a sample.
    """
    steps = [_TRANSFORMS[word] for word in config.transform if word != "none"]
    transform = _chain(steps)

    def read(returned: Any, size: int, inputs: Inputs = _NO_INPUTS) -> Outputs:
        kept: Outputs = {}
        for name, tensor in _select(returned, config.select):
            _check_rows(name, tensor, size)
            for kept_name, value in transform(name, tensor, config, inputs):
                kept[kept_name] = _plain(value)
        return kept

    def read_one(returned: Any, size: int, inputs: Inputs = _NO_INPUTS) -> Outputs:
        # The commonest case by far, in which the lists above would take much of the loop's time.
        if not isinstance(returned, torch.Tensor):
            return read(returned, size, inputs)
        _check_rows(DEFAULT_OUTPUT, returned, size)
        return {DEFAULT_OUTPUT: _plain(returned)}

    return read if config.select or steps else read_one


def _plain(value: torch.Tensor) -> torch.Tensor:
    """As numpy takes it: on the CPU, of no graph, with its own numbers in memory."""
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    if value.requires_grad:
        value = value.detach()
    return value if value.is_cpu else value.cpu()


def _select(returned: Any, wanted: tuple[str, ...]) -> list[tuple[str, torch.Tensor]]:
    if isinstance(returned, torch.Tensor) and not wanted:
        return [(DEFAULT_OUTPUT, returned)]
    named = list(iter_tensors(returned))
    found = dict(named)
    if not found:
        raise ConfigError(
            f"the model returned {type(returned).__name__}, where a tensor, or a tuple, dict or "
            "dataclass of tensors, is wanted",
            "model",
        )
    if len(found) < len(named):
        names = [name for name, _ in named]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"the model returns two outputs that are called {twice!r}", "model")
    if unknown := [name for name in wanted if name not in found]:
        raise ConfigError(
            f"the model has no output {unknown[0]!r}; {suggest(unknown[0], found)}", "output.select"
        )
    selected = [(name, found[name]) for name in wanted or found]
    if unsafe := [name for name, _ in selected if not _SAFE_NAME.fullmatch(name)]:
        raise ConfigError(
            f"the model names an output {unsafe[0]!r}, which is no file name, and what gradrun "
            "writes stays below output.path; select other outputs",
            "output.select",
        )
    return selected if len(selected) > 1 else [(DEFAULT_OUTPUT, selected[0][1])]


def iter_tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a nest, named by its path: "0", "logits", "states.1"."""
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


class ClassLabels:
    """What a model calls its classes, for the outputs that hold their numbers."""

    def __init__(self, config: OutputSection | None = None, classes: Sequence[str] = ()) -> None:
        # Over another dimension than the last a number may be that of something else.
        numbered = config is not None and config.dim == -1
        self.word = config.transform[-1] if config and numbered and classes else ""
        self.classes = classes

    def columns(self, names: Iterable[str]) -> dict[str, str]:
        """Of each output of class numbers, the name of the column that spells them out."""
        if self.word == "argmax":
            return {name: "label" if name == DEFAULT_OUTPUT else f"{name}.label" for name in names}
        for word, ending, called in (("topk", "indices", "labels"), ("classify", "class", "label")):
            if self.word == word:
                numbers = [name for name in names if name.endswith(ending)]
                return {name: f"{name.removesuffix(ending)}{called}" for name in numbers}
        return {}

    def names_of(self, numbers: Any) -> Any:
        """The names for a nest of numbers; one that has none stays a number, as text."""
        if isinstance(numbers, list):
            return [self.names_of(number) for number in numbers]
        if numbers == MISSING_CLASS:
            return ""
        known = 0 <= numbers < len(self.classes)
        return self.classes[numbers] if known else str(numbers)


def nonfinite_rows(tensors: Iterable[torch.Tensor]) -> int:
    """How many rows hold a NaN, an infinity or NO_CLASS in any of some tensors [n, ...]."""
    bad: torch.Tensor | None = None
    for tensor in tensors:
        if can_be_missing(tensor.dtype):
            good = _finite(tensor) if tensor.dtype != torch.int64 else tensor != MISSING_CLASS
            here = ~good.reshape(len(good), -1).all(1)
            bad = here if bad is None else bad | here
    return 0 if bad is None else int(bad.sum())


def can_be_missing(dtype: torch.dtype) -> bool:
    """Whether a value of this type can say that there is none."""
    return dtype.is_floating_point or dtype.is_complex or dtype == torch.int64


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    # float8 has no isfinite of its own.
    return (tensor if tensor.element_size() > 1 else tensor.float()).isfinite()


def _check_rows(name: str, tensor: torch.Tensor, size: int) -> None:
    if tensor.layout != torch.strided:
        raise ConfigError(
            f"output {name!r} is a {str(tensor.layout).removeprefix('torch.')} tensor, which has "
            "no plain rows; let the model return it.to_dense()",
            "output.select",
        )
    if tensor.ndim == 0 or tensor.shape[0] != size:  # len() takes three times as long
        raise ConfigError(
            f"output {name!r} has shape {list(tensor.shape)} for a batch of {size}: its first "
            "dimension must be the batch's, one row a sample; output.select keeps other outputs",
            "output.select",
        )


# --- transforms --------------------------------------------------------------------------------

_Kept = list[tuple[str, torch.Tensor]]
_Transform = Callable[[str, torch.Tensor, OutputSection, Inputs], _Kept]


def _chain(steps: list[_Transform]) -> _Transform:
    """One transform after the other, each on what the one before it gave."""
    first, *others = steps or [_none]
    if not others:
        return first
    rest = _chain(others)

    def chained(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Kept:
        made = first(name, tensor, config, inputs)
        return [kept for item in made for kept in rest(*item, config, inputs)]

    return chained


def _none(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Kept:
    return [(name, tensor)]


def _softmax(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Kept:
    return [(name, torch.softmax(tensor, _class_dim("softmax", name, tensor, config)))]


def _argmax(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Kept:
    return [(name, _likeliest(tensor, _class_dim("argmax", name, tensor, config))[1])]


def _classify(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Kept:
    """The likeliest class and its probability."""
    dim = _class_dim("classify", name, tensor, config)
    score, place = _likeliest(torch.softmax(tensor, dim), dim)
    prefix = "" if name == DEFAULT_OUTPUT else f"{name}."
    return [(f"{prefix}class", place), (f"{prefix}score", score)]


def _likeliest(scores: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest score and its place; a NaN wins over every number, and has no class."""
    best, place = torch.max(scores, dim)
    return best, place.masked_fill(~_finite(best), MISSING_CLASS)


def _normalize(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Kept:
    """To length 1, as a cosine needs it."""
    dim = _class_dim("normalize", name, tensor, config)
    return [(name, nn.functional.normalize(tensor, dim=dim))]


def _mean_pool(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Kept:
    """The mean over the tokens that are no padding: [size, tokens, width] to [size, width]."""
    mask = _mask("mean_pool", name, tensor, inputs).unsqueeze(-1).to(tensor.dtype)
    return [(name, (tensor * mask).sum(1) / mask.sum(1).clamp(min=1))]


def _cls(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Kept:
    """The first token that is no padding: [size, tokens, width] to [size, width]."""
    first = _mask("cls", name, tensor, inputs).argmax(1)
    return [(name, tensor[torch.arange(len(tensor), device=tensor.device), first])]


def _mask(step: str, name: str, tensor: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Which tokens of an output are no padding, [size, tokens]."""
    mask = inputs.get("attention_mask")
    if mask is None:
        raise ConfigError(
            f"{step} needs to know which tokens are padding, and the model gets no input called "
            "attention_mask",
            "output.transform",
        )
    if tensor.ndim != 3 or tensor.shape[:2] != mask.shape:
        raise ConfigError(
            f"{step} takes an output of a row a token, {[*mask.shape]} and a width, and output "
            f"{name!r} has shape {[*tensor.shape]}; output.select: last_hidden_state keeps one",
            "output.transform",
        )
    return mask


def _topk(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Kept:
    dim = _class_dim("topk", name, tensor, config)
    if config.k > tensor.shape[dim]:
        raise ConfigError(
            f"top {config.k} of {tensor.shape[dim]} classes (output {name!r} has shape "
            f"{list(tensor.shape)})",
            "output.k",
        )
    values, indices = torch.topk(tensor, config.k, dim)
    prefix = "" if name == DEFAULT_OUTPUT else f"{name}."
    return [(f"{prefix}values", values), (f"{prefix}indices", indices)]


def _class_dim(step: str, name: str, tensor: torch.Tensor, config: OutputSection) -> int:
    dim = config.dim if config.dim >= 0 else tensor.ndim + config.dim
    if not 0 < dim < tensor.ndim:
        raise ConfigError(
            f"{step} over dimension {config.dim} of output {name!r}, which has shape "
            f"{list(tensor.shape)}; dimension 0 is the batch's, and classes lie in one behind it",
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
    "normalize": _normalize,
}
