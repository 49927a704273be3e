"""Model outputs to named tensors: output.select and output.transform."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError
from gradrun.core.suggest import suggest
from gradrun.output.class_labels import DEFAULT_OUTPUT
from gradrun.output.columns import ValueColumn, describe_values
from gradrun.output.missing import MISSING_CLASS, is_finite
from gradrun.output.structure import OutputReader, fields_of
from gradrun.results.result import Statement

Outputs = dict[str, torch.Tensor | ValueColumn]
"""Output name to a tensor [n, ...] on the CPU without a gradient, or to n values."""

Tensors = dict[str, torch.Tensor]
"""Name to a tensor [n, ...]: outputs read back from files, or evidence of metrics."""

_NO_INPUTS: Mapping[str, torch.Tensor] = MappingProxyType({})
_SAFE_NAME = re.compile(r"\w[\w.-]*")

Inputs = Mapping[str, torch.Tensor]
"""Keyword inputs of the model; some transforms need the attention_mask."""


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


class ModelFacts(Protocol):
    """Facts about a model on which some transforms depend."""

    @property
    def embedding(self) -> nn.Module | None:
        """Maps tokens [n, tokens, width] and the attention mask to vectors, as sentence_embedding.

        It has a `description`, and `equivalent`: the same as a list of transforms, if possible.
        """

    @property
    def probabilities(self) -> str:
        """How a classifier's logits become probabilities: softmax, sigmoid, none; "": unknown."""


_Named = list[tuple[str, torch.Tensor]]
_Transform = Callable[[str, torch.Tensor, OutputSection, Inputs], _Named]
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
        self._functions = _TRANSFORMS | _transforms_of(model)
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

    def __call__(self, returned: Any, size: int, inputs: Inputs = _NO_INPUTS) -> Outputs:
        """Return the selected and transformed outputs of a batch.

        Raises:
            ConfigError: a selected output is missing or lacks one row per sample.
        """
        # The most common case first: the general one would add noticeable time per batch.
        if self._changed or not isinstance(returned, torch.Tensor) or returned.is_nested:
            return self.select(self.structured(returned, size), size, inputs, returned)
        check_rows(DEFAULT_OUTPUT, returned, size)
        return {DEFAULT_OUTPUT: to_cpu(returned)}

    def select(
        self, structured: Any, size: int, inputs: Inputs = _NO_INPUTS, returned: Any = None
    ) -> Outputs:
        """Return the outputs of what `structured` returned; `returned` serves error messages."""
        outputs: Outputs = {}
        for output in select_outputs(structured, self._config):
            check_rows(output.source, output.column, size, returned)
            steps = self._config.transforms_of(output.source)
            written = _apply(self._functions, steps, output, self._config, inputs)
            outputs |= {
                name: column if isinstance(column, ValueColumn) else to_cpu(column)
                for name, column in written
            }
        return outputs


def to_cpu(value: torch.Tensor) -> torch.Tensor:
    """A detached CPU tensor whose memory contains its values, as numpy needs it."""
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    if value.requires_grad:
        value = value.detach()
    return value if value.is_cpu else value.cpu()


def scored_outputs(
    returned: Any,
    config: OutputSection,
    inputs: Inputs = _NO_INPUTS,
    sources: Container[str] | None = None,
    model: ModelFacts | None = None,
) -> list[SelectedOutput]:
    """Return outputs as metrics read them: after pooling, before softmax, argmax and the like.

    Args:
        returned: the model's output for a batch.
        config: the output section.
        inputs: keyword inputs of the batch.
        sources: the model's names of the outputs; default: all, the written ones first.
        model: the facts of the model, if any.

    Raises:
        ConfigError: the config does not match the model's output.
    """
    selected = select_outputs(returned, config)
    known = {output.source for output in selected}
    if not isinstance(returned, torch.Tensor | ValueColumn):
        more = [(name, column) for name, column in iter_columns(returned) if name not in known]
        selected += [SelectedOutput(name, "", column) for name, column in more]
    functions = _TRANSFORMS | _transforms_of(model)
    scored = []
    for output in selected:
        if sources is None or output.source in sources:
            steps, _ = split_steps(config, output, model)
            column = _apply(functions, steps, output, config, inputs)[0][1]
            scored.append(output._replace(column=column))
    return scored


def split_steps(
    config: OutputSection, output: SelectedOutput, model: ModelFacts | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the transforms of an output before its scores, such as pooling, and those of them.

    Where the model's config asks for sigmoid, softmax is sigmoid, and classify is classify_labels.
    """
    steps: tuple[str, ...] = config.transforms_of(output.source) if output.name else ()
    first = next((i for i, step in enumerate(steps) if step in _SCORE_STEPS), len(steps))
    of_scores = steps[first:]
    if model and model.probabilities == "sigmoid":
        renamed = {"softmax": "sigmoid", "classify": "classify_labels"}
        of_scores = tuple(renamed.get(step, step) for step in of_scores)
    return steps[:first], of_scores


def _apply(
    functions: Mapping[str, _Transform],
    steps: Sequence[str],
    output: SelectedOutput,
    config: OutputSection,
    inputs: Inputs,
) -> _Columns:
    if not steps:
        return [(output.name, output.column)]
    named = [(output.name, output.tensor)]
    for step in steps:
        named = [new for old in named for new in functions[step](*old, config, inputs)]
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


def iter_tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in a nested structure with its path: "0", "logits", "states.1"."""
    for path, column in iter_columns(value, name):
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

    Args:
        name: of the output.
        tensor: the output.
        size: the number of samples.
        returned: everything that the model returned, for a hint.

    Raises:
        ConfigError: it is not, or has not.
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


def statements(
    config: OutputSection,
    returned: Any = None,
    inputs: Inputs = _NO_INPUTS,
    model: ModelFacts | None = None,
) -> Iterator[Statement]:
    """Yield the interpretations of the model's outputs.

    Args:
        config: the output section, resolved.
        returned: outputs of the model for a batch, to state shapes; None if there are none yet.
        inputs: keyword inputs of the same batch.
        model: the facts of the model, if any.
    """
    if text := _describe_embedding(config, model):
        yield Statement(topic="embedding", text=text)
    if returned is None:
        every = config.transform if isinstance(config.transform, dict) else {"": config.transform}
        for name, steps in every.items() if config.transforms else ():
            yield Statement(topic=f"output {name}".rstrip(), text=", ".join(steps))
        return
    outputs = select_outputs(returned, config)
    for output in outputs:
        topic = "output" if len(outputs) == 1 else f"output {output.source}"
        if isinstance(output.column, ValueColumn):
            text = f"{describe_values(output.column)}, one per sample"
            yield Statement(topic=topic, text=text)
        elif config.transforms:
            own = _transforms_of(model)
            text = _describe_steps(output.source, output.tensor, config, inputs, own)
            yield Statement(topic=topic, text=text)


def other_pooling(config: OutputSection, model: ModelFacts) -> str:
    """Describe the pooling of a sentence-transformers folder if the config pools in another way."""
    embedding: Any = model.embedding
    steps = config.transforms_of("")
    if embedding is None or not _POOLING_STEPS & {*steps} or steps == embedding.equivalent:
        return ""
    return str(embedding.description)


def _describe_embedding(config: OutputSection, model: ModelFacts | None) -> str:
    embedding: Any = model.embedding if model else None
    if model is None or embedding is None:
        return ""
    steps = config.transforms_of("")
    if "sentence_embedding" in steps or steps == embedding.equivalent:
        return str(embedding.description)
    return f"not the folder's own, which is: {embedding.description}"


def _describe_steps(
    name: str,
    tensor: torch.Tensor,
    config: OutputSection,
    inputs: Inputs,
    own: dict[str, _Transform],
) -> str:
    """Describe the shape of an output and its transforms, with the dimension of the classes."""
    shape, words = _row_shape(tensor), []
    precision = ", in float32" if config.transforms_of(name) and _is_half(tensor) else ""
    for step in config.transforms_of(name):
        if step in own and step in _CLASS_STEPS:
            words.append(f"{step} by sigmoid, as the model's config asks")
        elif step in _CLASS_STEPS:
            dim = _class_dim(step, name, tensor, config, inputs)
            words.append(f"{step} over dimension {dim} ({tensor.shape[dim]} classes)")
        else:
            words.append(
                f"above {_threshold(config):g}" if step == "threshold" else _WORDS.get(step, step)
            )
        tensor = (_TRANSFORMS | own)[step](name, tensor, config, inputs)[0][1]
    pools = {*_POOLING_STEPS, "sentence_embedding"}.intersection(config.transforms_of(name))
    result = f", to {_row_shape(tensor)}" if pools else ""
    return f"{shape}: {', then '.join(words) or 'as returned'}{precision}{result}"


def _row_shape(tensor: torch.Tensor) -> str:
    return f"[{', '.join(['n', *map(str, tensor.shape[1:])])}]"


def class_counts(
    config: OutputSection,
    returned: Any,
    inputs: Inputs = _NO_INPUTS,
    model: ModelFacts | None = None,
) -> dict[str, int]:
    """Return the number of classes of each written output that has class numbers or scores."""
    own = _transforms_of(model)
    functions = _TRANSFORMS | own
    counts: dict[str, int] = {}
    for output in select_outputs(returned, config):
        steps = config.transforms_of(output.source)
        for i, step in enumerate(steps):
            if step in _CLASS_STEPS and step not in own:
                dim = _class_dim(step, output.name, output.tensor, config, inputs)
                written = _apply(functions, steps[i:], output, config, inputs)
                counts |= {name: output.tensor.shape[dim] for name, _ in written}
                break
            column = _apply(functions, [step], output, config, inputs)[0][1]
            output = output._replace(column=column)
    return counts


def misplaced_classes(
    classes: int,
    config: OutputSection,
    returned: Any,
    inputs: Inputs = _NO_INPUTS,
    model: ModelFacts | None = None,
) -> Iterator[tuple[str, int, int, int]]:
    """Yield outputs whose classes seem to be in another dimension than a transform uses.

    Args:
        classes: the number of classes of the model.
        config: the output section, resolved.
        returned: outputs of the model for a batch.
        inputs: keyword inputs of the same batch.
        model: the facts of the model, if any.

    Yields:
        The output, the dimension in use, its size, and the one dimension of size `classes`.
    """
    own = _transforms_of(model)
    for output in select_outputs(returned, config):
        steps = config.transforms_of(output.source)
        if steps and steps[0] in _CLASS_STEPS and steps[0] not in own:
            shape = output.tensor.shape
            dim = _class_dim(steps[0], output.name, output.tensor, config, inputs)
            others = [other for other in range(1, len(shape)) if shape[other] == classes]
            if len(others) == 1 and dim not in others:
                yield output.source, dim, shape[dim], others[0]


def double_activations(
    config: OutputSection,
    returned: Any,
    inputs: Inputs = _NO_INPUTS,
    model: ModelFacts | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (output, transform) where softmax or sigmoid would read probabilities.

    Values are taken for probabilities if they differ and all are within 0 to 1; for softmax, those
    of a sample must also add up to 1. The transform is the one that is applied, which is sigmoid
    where the model's config asks for it.
    """
    own = _transforms_of(model)
    functions = _TRANSFORMS | own
    for output in select_outputs(returned, config):
        for step in config.transforms_of(output.source):
            if step in _ACTIVATIONS and own.get(step) is not _no_classes:
                activation = "sigmoid" if step == "sigmoid" or step in own else "softmax"
                dim = None
                if activation == "softmax":
                    dim = _class_dim(step, output.name, output.tensor, config, inputs)
                if _are_probabilities(output.tensor, dim):
                    yield output.source, activation
            column = _apply(functions, [step], output, config, inputs)[0][1]
            output = output._replace(column=column)


_FEW_VALUES = 4
"""Fewer logits than this may all be within 0 to 1 by chance."""


def _are_probabilities(tensor: torch.Tensor, dim: int | None) -> bool:
    """Whether values seem to be probabilities, with a sum of 1 over the dimension if given."""
    if not tensor.is_floating_point() or tensor.numel() < _FEW_VALUES:
        return False
    low, high = tensor.min(), tensor.max()
    if not (low >= 0 and high <= 1 and low < high):
        return False
    if dim is None:
        return True
    sums = tensor.float().sum(dim)
    return bool(((sums - 1).abs() < (0.02 if _is_half(tensor) else 1e-3)).all())


# --- transforms --------------------------------------------------------------------------------


def _softmax(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    dim = _class_dim("softmax", name, tensor, config, inputs)
    return [(name, torch.softmax(_scores("softmax", name, tensor), dim))]


def _sigmoid(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    """The probability of each value, on its own: for one logit, or labels that may coincide."""
    return [(name, torch.sigmoid(_scores("sigmoid", name, tensor)))]


def _argmax(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    dim = _class_dim("argmax", name, tensor, config, inputs)
    return [(name, _most_likely(tensor, dim)[1])]


def _classify(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    """The most likely class and its probability."""
    dim = _class_dim("classify", name, tensor, config, inputs)
    return _best(name, torch.softmax(_scores("classify", name, tensor), dim), dim)


def _classify_labels(
    name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs
) -> _Named:
    """The most likely label and its probability, for labels that may coincide."""
    dim = _checked_dim("classify", name, tensor, config, _default_dim(tensor))
    return _best(name, torch.sigmoid(_scores("classify", name, tensor)), dim)


def _best(name: str, probabilities: torch.Tensor, dim: int) -> _Named:
    score, index = _most_likely(probabilities, dim)
    prefix = "" if name == DEFAULT_OUTPUT else f"{name}."
    return [(f"{prefix}class", index), (f"{prefix}score", score)]


def _no_classes(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    raise ConfigError(
        "the model predicts values, not classes (problem_type: regression in its config); use "
        "output.transform: none",
        "output.transform",
    )


def _scores(step: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Floating-point scores, of at least float32."""
    if not tensor.is_floating_point():
        raise ConfigError(
            f"{step} needs floating-point scores, but output {name!r} has dtype "
            f"{str(tensor.dtype).removeprefix('torch.')}; if these are classes already, use "
            "output.transform: none",
            "output.transform",
        )
    return widened(tensor)


def _is_half(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _most_likely(scores: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest score and its index; MISSING_CLASS if the score is NaN or infinite."""
    best, index = torch.max(scores, dim)
    return best, index.masked_fill(~is_finite(best), MISSING_CLASS)


def _normalize(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    """Scale to length 1, for cosine similarity; in float32 for narrower types."""
    dim = _checked_dim("normalize", name, tensor, config, _default_dim(tensor))
    return [(name, nn.functional.normalize(widened(tensor), dim=dim))]


def _mean_pool(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    """Mean over the tokens without padding, [n, tokens, width] to [n, width]; at least float32."""
    tokens = widened(tensor)
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


def _perplexity(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    """The loss of a document, its exponential and the number of tokens that it is the mean over.

    Each token is predicted from those before it, so that the first has no loss.
    """
    ids = inputs.get("input_ids")
    if ids is None or tensor.ndim != 3 or tensor.shape[:2] != ids.shape:
        raise ConfigError(
            "perplexity needs the scores of the next token [n, tokens, vocabulary] and the input "
            f"input_ids, but output {name!r} has shape {[*tensor.shape]}; use a huggingface model "
            "with auto_class: AutoModelForCausalLM, and output.select: logits",
            "output.transform",
        )
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    losses, counts = [], []
    # One document at a time: a copy of the scores in float32 needs the memory of one.
    for scores, tokens, real in zip(tensor, ids, mask, strict=True):
        known, own = scores[real], tokens[real]
        losses.append(nn.functional.cross_entropy(known[:-1].float(), own[1:]))
        counts.append(len(own) - 1)
    loss, prefix = torch.stack(losses), "" if name == DEFAULT_OUTPUT else f"{name}."
    return [
        (f"{prefix}perplexity", loss.exp()),
        (f"{prefix}loss", loss),
        (f"{prefix}tokens", torch.tensor(counts)),
    ]


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32: sums and probabilities would lose their last digits."""
    return tensor.float() if _is_half(tensor) else tensor


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
    dim = _class_dim("topk", name, tensor, config, inputs)
    if config.k > tensor.shape[dim]:
        raise ConfigError(
            f"topk with k={config.k} exceeds the {tensor.shape[dim]} classes of output {name!r} "
            f"(shape {list(tensor.shape)})",
            "output.k",
        )
    values, indices = torch.topk(tensor, config.k, dim)
    prefix = "" if name == DEFAULT_OUTPUT else f"{name}."
    return [(f"{prefix}values", values), (f"{prefix}indices", indices)]


def _threshold_values(
    name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs
) -> _Named:
    """1 for values above output.threshold, else 0; MISSING_CLASS for NaN."""
    above = (tensor > _threshold(config)).long()
    if tensor.is_floating_point():
        above = above.masked_fill(tensor.isnan(), MISSING_CLASS)
    return [(name, above)]


def _threshold(config: OutputSection) -> float:
    return 0.5 if config.threshold is None else config.threshold


def _uint8(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
    """The same whole numbers in one byte each, for class numbers of pixels."""
    converted = tensor.to(torch.uint8)
    if not torch.equal(converted.to(tensor.dtype), tensor):
        if tensor.dtype == torch.int64 and bool((tensor == MISSING_CLASS).any()):
            raise ConfigError(
                f"uint8 cannot represent output {name!r}, where values lack a class because their "
                "scores are NaN or infinite; remove uint8",
                "output.transform",
            )
        low, high = (float(value) for value in (tensor.min(), tensor.max()))
        raise ConfigError(
            f"uint8 represents only whole numbers from 0 to 255, and output {name!r} has values "
            f"from {low:g} to {high:g}; scores need argmax or threshold before it",
            "output.transform",
        )
    return [(name, converted)]


def _class_dim(
    step: str, name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs
) -> int:
    """The dimension of the classes, which must have several."""
    mask = inputs.get("attention_mask")
    of_tokens = mask is not None and tensor.shape[:2] == mask.shape
    if config.dim is None and tensor.ndim == 3 and not of_tokens:
        raise ConfigError(
            f"output {name!r} has shape {list(tensor.shape)}; its classes may be in dimension 1 "
            f"({tensor.shape[1]}) or 2 ({tensor.shape[2]}): set output.dim to 1 or 2",
            "output.transform",
        )
    if tensor.ndim == 1:
        dim, classes = 0, 1
    else:
        dim = _checked_dim(step, name, tensor, config, _default_dim(tensor))
        classes = tensor.shape[dim]
    if classes == 1:
        advice = "sigmoid for one logit, or [sigmoid, threshold] for its class"
        if not tensor.is_floating_point():
            advice = "none, if these are classes already"
        raise ConfigError(
            f"{step} needs the scores of several classes, but output {name!r} has shape "
            f"{list(tensor.shape)}, one value per {'pixel' if tensor.ndim > 2 else 'sample'}; use "
            f"output.transform: {advice}",
            "output.transform",
        )
    return dim


def _default_dim(tensor: torch.Tensor) -> int:
    """Dimension 1 of images and volumes [n, classes, height, width], else the last."""
    return 1 if tensor.ndim > 3 else tensor.ndim - 1


def _checked_dim(
    step: str, name: str, tensor: torch.Tensor, config: OutputSection, default: int
) -> int:
    given = default if config.dim is None else config.dim
    dim = given if given >= 0 else tensor.ndim + given
    if not 0 < dim < tensor.ndim:
        raise ConfigError(
            f"cannot apply {step} over dimension {given} of output {name!r} with shape "
            f"{list(tensor.shape)}; dimension 0 is the batch, choose a later one",
            "output.dim" if tensor.ndim > 1 else "output.transform",
        )
    return dim


def _sentence_embedding(
    name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs
) -> _Named:
    raise ConfigError(
        "sentence_embedding needs a sentence-transformers folder (with modules.json) as model.path "
        "of a huggingface model with auto_class: AutoModel",
        "output.transform",
    )


def _embedding_by(module: nn.Module) -> _Transform:
    def embed(name: str, tensor: torch.Tensor, config: OutputSection, inputs: Inputs) -> _Named:
        mask = _mask("sentence_embedding", name, tensor, inputs)
        return [(name, module(tensor, mask))]

    return embed


def _transforms_of(model: ModelFacts | None) -> dict[str, _Transform]:
    """The transforms that the facts of a model define or replace."""
    own: dict[str, _Transform] = {}
    if model is None:
        return own
    if model.embedding is not None:
        own["sentence_embedding"] = _embedding_by(model.embedding)
    if model.probabilities == "sigmoid":
        own |= {"softmax": _sigmoid, "classify": _classify_labels}
    if model.probabilities == "none":
        own |= {"softmax": _no_classes, "classify": _no_classes, "argmax": _no_classes}
    return own


_TRANSFORMS: dict[str, _Transform] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "argmax": _argmax,
    "classify": _classify,
    "topk": _topk,
    "threshold": _threshold_values,
    "uint8": _uint8,
    "mean_pool": _mean_pool,
    "cls": _cls,
    "last_token": _last_token,
    "sentence_embedding": _sentence_embedding,
    "normalize": _normalize,
    "perplexity": _perplexity,
}
_WORDS = {"perplexity": "perplexity, from the mean loss of the tokens after the first, natural log"}
"""Transforms that need more words than their names."""
_POOLING_STEPS = {"mean_pool", "cls", "last_token"}
_SCORE_STEPS = {"softmax", "sigmoid", "argmax", "classify", "topk", "threshold", "uint8"}
"""Transforms of scores; metrics read the output before the first of them."""
_ACTIVATIONS = {"softmax", "sigmoid", "classify"}
"""Transforms of logits to probabilities."""
_CLASS_STEPS = {"softmax", "argmax", "classify", "topk"}
"""Transforms over the dimension of the classes."""
