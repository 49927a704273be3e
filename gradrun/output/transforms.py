"""Model outputs to named tensors: output.select and output.transform."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError
from gradrun.core.suggest import suggest
from gradrun.output.class_labels import DEFAULT_OUTPUT
from gradrun.output.columns import ValueColumn, describe_values
from gradrun.output.structure import OutputReader, fields_of
from gradrun.output.tensor_transforms import (
    SCORE_STEPS,
    Inputs,
    ModelFacts,
    Operand,
    Transform,
    transforms_for,
)

Outputs = dict[str, torch.Tensor | ValueColumn]
"""Output name to a tensor [n, ...] on the CPU without a gradient, or to n values."""

Tensors = dict[str, torch.Tensor]
"""Name to a tensor [n, ...]: outputs read back from files, or evidence of metrics."""

ToHost = Callable[[torch.Tensor], torch.Tensor]
"""Copies a tensor to host memory, as `to_cpu` does; the copy may complete later."""

_NO_INPUTS: Mapping[str, torch.Tensor] = MappingProxyType({})
_SAFE_NAME = re.compile(r"\w[\w.-]*")


class SelectedOutput(NamedTuple):
    """An output of the model for a batch."""

    source: str
    """Its name in the model's output."""
    name: str
    """Its name in the predictions; empty if it is not written."""
    column: torch.Tensor | ValueColumn

    @property
    def tensor(self) -> torch.Tensor:
        """The output as a tensor [n, ...].

        Raises:
            ConfigError: it consists of values of any size.
        """
        if isinstance(self.column, ValueColumn):
            raise values_error(self.source, self.column)
        return self.column


_Columns = list[tuple[str, torch.Tensor | ValueColumn]]


def resolve_output(config: OutputSection, model: ModelFacts) -> OutputSection:
    """Return the section with `auto` replaced, and with the output that an embedding needs."""
    if config.transform == ("auto",):
        embeds = model.embedding is not None and not config.select
        transform = ("sentence_embedding",) if embeds else ("none",)
        config = config.model_copy(update={"transform": transform})
    if "sentence_embedding" in config.transforms_of("") and not config.select:
        config = config.model_copy(update={"select": ("last_hidden_state",)})
    return config


def to_cpu(value: torch.Tensor) -> torch.Tensor:
    """A detached CPU tensor whose memory contains its values, as numpy needs it."""
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    if value.requires_grad:
        value = value.detach()
    return value if value.is_cpu else value.cpu()


class OutputSelector:
    """Selects and transforms the outputs of a batch: (model output, size, inputs) -> outputs.

    The first batch decides how lists in the model's output are read; see `OutputReader`.
    """

    def __init__(
        self,
        config: OutputSection,
        model: ModelFacts | None = None,
        decode: Callable[[Any], Any] | None = None,
    ) -> None:
        """Store the section, the model's facts and the user's function of output.transform."""
        self._config, self._decode = config, decode
        self._functions = transforms_for(model)
        self._changed = bool(config.select or config.name or config.transforms or decode)
        self._reader = (
            OutputReader(Path(config.decoder).name, "output.transform")
            if decode
            else OutputReader()
        )

    @property
    def key(self) -> str:
        """The config key that decides on the structure of the outputs."""
        return self._reader.key

    def structured(self, returned: Any, size: int) -> Any:
        """Return the model's output as tensors and columns, after the user's function if any.

        Raises:
            ConfigError: a list can be read in two ways, or its items cannot be written.
        """
        return self._reader(self._decode(returned) if self._decode else returned, size)

    def as_returned(self, returned: Any, size: int) -> Any:
        """Return the model's output before the user's function, if any, else `structured`."""
        return returned if self._decode else self._reader(returned, size)

    def __call__(
        self,
        returned: Any,
        size: int,
        inputs: Inputs = _NO_INPUTS,
        to_host: ToHost = to_cpu,
    ) -> Outputs:
        """Return the selected and transformed outputs of a batch, copied by `to_host`.

        Raises:
            ConfigError: a selected output is missing or lacks one row per sample.
        """
        # The most common case first: the general one would add noticeable time per batch.
        if self._changed or not isinstance(returned, torch.Tensor) or returned.is_nested:
            return self.select(self.structured(returned, size), size, inputs, returned, to_host)
        check_rows(DEFAULT_OUTPUT, returned, size)
        return {DEFAULT_OUTPUT: to_host(returned)}

    def select(
        self,
        structured: Any,
        size: int,
        inputs: Inputs = _NO_INPUTS,
        returned: Any = None,
        to_host: ToHost = to_cpu,
    ) -> Outputs:
        """Return the outputs of what `structured` returned; `returned` serves error messages."""
        outputs: Outputs = {}
        for output in select_outputs(structured, self._config):
            check_rows(output.source, output.column, size, returned)
            steps = self._config.transforms_of(output.source)
            written = apply_steps(self._functions, steps, output, self._config, inputs)
            outputs |= {
                name: column if isinstance(column, ValueColumn) else to_host(column)
                for name, column in written
            }
        return outputs


def scored_outputs(
    returned: Any,
    config: OutputSection,
    inputs: Inputs = _NO_INPUTS,
    sources: Container[str] | None = None,
    model: ModelFacts | None = None,
) -> list[SelectedOutput]:
    """Return outputs as metrics read them: after pooling, before softmax, argmax and the like.

    Args:
        sources: the model's names of the outputs; default: all, the written ones first.

    Raises:
        ConfigError: the config does not match the model's output.
    """
    selected = select_outputs(returned, config)
    known = {output.source for output in selected}
    if not isinstance(returned, torch.Tensor | ValueColumn):
        more = [(name, column) for name, column in iter_columns(returned) if name not in known]
        selected += [SelectedOutput(name, "", column) for name, column in more]
    functions = transforms_for(model)
    scored = []
    for output in selected:
        if sources is None or output.source in sources:
            steps, _ = split_steps(config, output, model)
            column = apply_steps(functions, steps, output, config, inputs)[0][1]
            scored.append(output._replace(column=column))
    return scored


def split_steps(
    config: OutputSection, output: SelectedOutput, model: ModelFacts | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the transforms of an output before its scores, such as pooling, and those of them.

    Where the model's config asks for sigmoid, softmax is sigmoid, and classify is classify_labels.
    """
    steps: tuple[str, ...] = config.transforms_of(output.source) if output.name else ()
    first = next((i for i, step in enumerate(steps) if step in SCORE_STEPS), len(steps))
    of_scores = steps[first:]
    if model and model.probabilities == "sigmoid":
        renamed = {"softmax": "sigmoid", "classify": "classify_labels"}
        of_scores = tuple(renamed.get(step, step) for step in of_scores)
    return steps[:first], of_scores


def apply_steps(
    functions: Mapping[str, Transform],
    steps: Sequence[str],
    output: SelectedOutput,
    config: OutputSection,
    inputs: Inputs,
) -> _Columns:
    """Return the columns of an output after some transforms, with their names."""
    if not steps:
        return [(output.name, output.column)]
    named = [(output.name, output.tensor)]
    for step in steps:
        named = [
            new for old in named for new in functions[step](Operand(step, *old, config, inputs))
        ]
    return [*named]


def select_outputs(returned: Any, config: OutputSection) -> list[SelectedOutput]:
    """Return the outputs to write, as the model returned them.

    Raises:
        ConfigError: the model returned no tensors, or none with a name in the config.
    """
    selected: _Columns
    if isinstance(returned, torch.Tensor | ValueColumn) and not config.select:
        selected = [(DEFAULT_OUTPUT, returned)]
    else:
        selected = _named_outputs(returned, config.select)
    names = [name for name, _ in selected]
    if isinstance(config.transform, dict):
        for name in config.transform:
            if name not in names:
                hint = suggest(name, names)
                raise ConfigError(f"no output {name!r} is selected; {hint}", "output.transform")
    if len(selected) == 1:
        return [SelectedOutput(names[0], config.name or DEFAULT_OUTPUT, selected[0][1])]
    if config.name:
        raise ConfigError(
            f"output.name names one output, and there are {len(names)}: {', '.join(names)}; choose "
            "one with output.select",
            "output.name",
        )
    return [SelectedOutput(name, name, column) for name, column in selected]


def _named_outputs(returned: Any, wanted: tuple[str, ...]) -> _Columns:
    named = list(iter_columns(returned))
    outputs = dict(named)
    if not outputs:
        raise ConfigError(
            f"the model returned {type(returned).__name__}; it must return a tensor, a tuple, dict "
            "or dataclass of tensors, or a list with one item per sample",
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
    if unsafe := [name for name, _ in selected if not is_safe_name(name)]:
        raise ConfigError(
            f"the model has an output named {unsafe[0]!r}, which is not a safe file name; select "
            "other outputs",
            "output.select",
        )
    return selected


def is_safe_name(name: str) -> bool:
    """Report whether an output's name can be part of a file name."""
    return _SAFE_NAME.fullmatch(name) is not None


def iter_tensors(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in a nested structure with its path: "0", "logits", "states.1"."""
    for path, column in iter_columns(value):
        if isinstance(column, torch.Tensor):
            yield path, column


def iter_columns(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor | ValueColumn]]:
    """Yield every tensor and column in a nested structure with its path."""
    if isinstance(value, torch.Tensor | ValueColumn):
        yield name or "0", value
        return
    items: Iterable[tuple[Any, Any]] | None = fields_of(value)
    if items is None:
        items = enumerate(value) if isinstance(value, tuple | list) else ()
    for key, item in items:
        yield from iter_columns(item, f"{name}.{key}" if name else str(key))


def values_error(name: str, column: ValueColumn) -> ConfigError:
    """Return the error for values of any size where a tensor [n, ...] is needed."""
    return ConfigError(
        f"output {name!r} has one value per sample ({describe_values(column)}), and transforms and "
        "metrics need one tensor with a row per sample; convert it in output.transform: "
        "FILE.py:FUNCTION",
        "output.transform",
    )


def check_rows(
    name: str, tensor: torch.Tensor | ValueColumn, size: int, returned: Any = None
) -> None:
    """Check that an output is dense and has one row per sample.

    Raises:
        ConfigError: it is not, or has not; `returned`, the whole output of the model, gives a hint.
    """
    if isinstance(tensor, ValueColumn):
        if len(tensor) != size:
            raise ConfigError(
                f"output {name!r} has {len(tensor)} items for a batch of {size}; return one per "
                "sample",
                "model",
            )
        return
    if tensor.layout != torch.strided:
        raise ConfigError(
            f"output {name!r} is a {str(tensor.layout).removeprefix('torch.')} tensor; only dense "
            "tensors are supported: return tensor.to_dense()",
            "output.select",
        )
    if tensor.ndim == 0 or tensor.shape[0] != size:  # len() takes three times as long
        raise _row_error(name, tensor, size, returned)


def _row_error(name: str, tensor: torch.Tensor, size: int, returned: Any) -> ConfigError:
    """Return the error for an output without one row per sample, with a way to get one."""
    if isinstance(returned, list | tuple) and len(returned) == size > 1:
        kind = type(returned[0]).__name__
        if all(type(item).__name__ == kind for item in returned):
            items = "tensors" if isinstance(returned[0], torch.Tensor) else f"{kind} items"
            return ConfigError(
                f"the model returns a tuple of {size} {items}; if each belongs to a sample, return "
                "them as a list",
                "model",
            )
    problem = (
        f"output {name!r} has shape {list(tensor.shape)} for a batch of {size}; the first "
        "dimension must be the batch, with one row per sample"
    )
    fitting = [
        other
        for other, value in iter_tensors(returned)
        if not value.is_nested and value.ndim and value.shape[0] == size
    ]
    if fitting:
        return ConfigError(f"{problem}. Choose {' or '.join(fitting)}", "output.select")
    way = "return one row per sample"
    if size > 1 and size in tensor.shape:
        way = f"dimension {list(tensor.shape).index(size)} may be the batch: transpose the output"
    return ConfigError(f"{problem}; {way}", "model")
