"""The transforms of output.transform: functions of one tensor of the model's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import nn

from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError
from gradrun.output.class_labels import DEFAULT_OUTPUT
from gradrun.output.missing import MISSING_CLASS, is_finite

Inputs = Mapping[str, torch.Tensor]
"""Keyword inputs of the model; some transforms need the attention_mask."""


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


class Operand(NamedTuple):
    """An output of a batch before a transform."""

    step: str
    """The name of the transform."""
    name: str
    """The name of the output in the predictions."""
    tensor: torch.Tensor
    """[n, ...]"""
    config: OutputSection
    inputs: Inputs

    @property
    def prefix(self) -> str:
        """The start of the names if the transform returns several outputs."""
        return "" if self.name == DEFAULT_OUTPUT else f"{self.name}."


Named = list[tuple[str, torch.Tensor]]
"""The names and tensors [n, ...] of the outputs after a transform."""

Transform = Callable[[Operand], Named]


def _softmax(of: Operand) -> Named:
    return [(of.name, torch.softmax(_scores(of), class_dim(of)))]


def _sigmoid(of: Operand) -> Named:
    """The probability of each value, on its own: for one logit, or labels that may coincide."""
    return [(of.name, torch.sigmoid(_scores(of)))]


def _argmax(of: Operand) -> Named:
    return [(of.name, _most_likely(of.tensor, class_dim(of))[1])]


def _classify(of: Operand) -> Named:
    """The most likely class and its probability."""
    dim = class_dim(of)
    return _best(of, torch.softmax(_scores(of), dim), dim)


def _classify_labels(of: Operand) -> Named:
    """The most likely label and its probability, for labels that may coincide."""
    dim = _checked_dim(of)
    return _best(of, torch.sigmoid(_scores(of)), dim)


def _best(of: Operand, probabilities: torch.Tensor, dim: int) -> Named:
    score, index = _most_likely(probabilities, dim)
    return [(f"{of.prefix}class", index), (f"{of.prefix}score", score)]


def no_classes(of: Operand) -> Named:
    """Raise ConfigError, in place of the transforms of classes."""
    raise ConfigError(
        "the model predicts values, not classes (problem_type: regression in its config); use "
        "output.transform: none",
        "output.transform",
    )


def _scores(of: Operand) -> torch.Tensor:
    """Floating-point scores, of at least float32."""
    if not of.tensor.is_floating_point():
        raise ConfigError(
            f"{of.step} needs floating-point scores, but output {of.name!r} has dtype "
            f"{str(of.tensor.dtype).removeprefix('torch.')}; if these are classes already, use "
            "output.transform: none",
            "output.transform",
        )
    return widened(of.tensor)


def is_half(tensor: torch.Tensor) -> bool:
    """Whether a tensor has floating-point numbers of fewer than 32 bits."""
    return tensor.is_floating_point() and tensor.element_size() < 4


def _most_likely(scores: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest score and its index; MISSING_CLASS if the score is NaN or infinite."""
    best, index = torch.max(scores, dim)
    return best, index.masked_fill(~is_finite(best), MISSING_CLASS)


def _normalize(of: Operand) -> Named:
    """Scale to length 1, for cosine similarity; in float32 for narrower types."""
    return [(of.name, nn.functional.normalize(widened(of.tensor), dim=_checked_dim(of)))]


def _mean_pool(of: Operand) -> Named:
    """Mean over the tokens without padding, [n, tokens, width] to [n, width]; at least float32."""
    tokens = widened(of.tensor)
    mask = _mask(of).unsqueeze(-1).to(tokens.dtype)
    return [(of.name, (tokens * mask).sum(1) / mask.sum(1).clamp(min=1))]


def _cls(of: Operand) -> Named:
    """The first token after any padding: [n, tokens, width] to [n, width]."""
    return _token(of, _mask(of).argmax(1))


def _last_token(of: Operand) -> Named:
    """The last token before any padding: [n, tokens, width] to [n, width]."""
    mask = _mask(of)
    return _token(of, mask.shape[1] - 1 - mask.flip(1).argmax(1))


def _token(of: Operand, positions: torch.Tensor) -> Named:
    return [(of.name, of.tensor[torch.arange(len(of.tensor), device=of.tensor.device), positions])]


def _perplexity(of: Operand) -> Named:
    """The loss of a document, its exponential and the number of tokens that it is the mean over.

    Each token is predicted from those before it, so that the first has no loss.
    """
    ids = of.inputs.get("input_ids")
    if ids is None or of.tensor.ndim != 3 or of.tensor.shape[:2] != ids.shape:
        raise ConfigError(
            "perplexity needs the scores of the next token [n, tokens, vocabulary] and the input "
            f"input_ids, but output {of.name!r} has shape {[*of.tensor.shape]}; use a huggingface "
            "model with auto_class: AutoModelForCausalLM, and output.select: logits",
            "output.transform",
        )
    mask = of.inputs.get("attention_mask", torch.ones_like(ids)).bool()
    losses, counts = [], []
    # One document at a time: a copy of the scores in float32 needs the memory of one.
    for scores, tokens, real in zip(of.tensor, ids, mask, strict=True):
        known, own = scores[real], tokens[real]
        losses.append(nn.functional.cross_entropy(known[:-1].float(), own[1:]))
        counts.append(len(own) - 1)
    loss = torch.stack(losses)
    return [
        (f"{of.prefix}perplexity", loss.exp()),
        (f"{of.prefix}loss", loss),
        (f"{of.prefix}tokens", torch.tensor(counts)),
    ]


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32: sums and probabilities would lose their last digits."""
    return tensor.float() if is_half(tensor) else tensor


def _mask(of: Operand) -> torch.Tensor:
    """The attention mask [n, tokens]: 0 for padding."""
    mask = of.inputs.get("attention_mask")
    if mask is None:
        raise ConfigError(
            f"{of.step} needs the input attention_mask to ignore padding, but the model does not "
            "have it",
            "output.transform",
        )
    if of.tensor.ndim != 3 or of.tensor.shape[:2] != mask.shape:
        raise ConfigError(
            f"{of.step} needs an output with one row per token, shape {[*mask.shape]} plus a "
            f"width, but {of.name!r} has shape {[*of.tensor.shape]}; try output.select: "
            "last_hidden_state",
            "output.transform",
        )
    return mask


def _topk(of: Operand) -> Named:
    dim, k = class_dim(of), of.config.k
    if k > of.tensor.shape[dim]:
        raise ConfigError(
            f"topk with k={k} exceeds the {of.tensor.shape[dim]} classes of output {of.name!r} "
            f"(shape {list(of.tensor.shape)})",
            "output.k",
        )
    values, indices = torch.topk(of.tensor, k, dim)
    return [(f"{of.prefix}values", values), (f"{of.prefix}indices", indices)]


def _threshold_values(of: Operand) -> Named:
    """1 for values above output.threshold, else 0; MISSING_CLASS for NaN."""
    above = (of.tensor > threshold(of.config)).long()
    if of.tensor.is_floating_point():
        above = above.masked_fill(of.tensor.isnan(), MISSING_CLASS)
    return [(of.name, above)]


def threshold(config: OutputSection) -> float:
    """The value above which the transform `threshold` yields 1."""
    return 0.5 if config.threshold is None else config.threshold


def _uint8(of: Operand) -> Named:
    """The same whole numbers in one byte each, for class numbers of pixels."""
    tensor, converted = of.tensor, of.tensor.to(torch.uint8)
    if not torch.equal(converted.to(tensor.dtype), tensor):
        if tensor.dtype == torch.int64 and bool((tensor == MISSING_CLASS).any()):
            raise ConfigError(
                f"uint8 cannot represent output {of.name!r}, where values lack a class because "
                "their scores are NaN or infinite; remove uint8",
                "output.transform",
            )
        low, high = (float(value) for value in (tensor.min(), tensor.max()))
        raise ConfigError(
            f"uint8 represents only whole numbers from 0 to 255, and output {of.name!r} has values "
            f"from {low:g} to {high:g}; scores need argmax or threshold before it",
            "output.transform",
        )
    return [(of.name, converted)]


def class_dim(of: Operand) -> int:
    """The dimension of the classes.

    Raises:
        ConfigError: there is a single class, or the config does not determine the dimension.
    """
    mask, tensor = of.inputs.get("attention_mask"), of.tensor
    of_tokens = mask is not None and tensor.shape[:2] == mask.shape
    if of.config.dim is None and tensor.ndim == 3 and not of_tokens:
        raise ConfigError(
            f"output {of.name!r} has shape {list(tensor.shape)}; its classes may be in dimension 1 "
            f"({tensor.shape[1]}) or 2 ({tensor.shape[2]}): set output.dim to 1 or 2",
            "output.transform",
        )
    dim = 0 if tensor.ndim == 1 else _checked_dim(of)
    if tensor.ndim == 1 or tensor.shape[dim] == 1:
        advice = "sigmoid for one logit, or [sigmoid, threshold] for its class"
        if not tensor.is_floating_point():
            advice = "none, if these are classes already"
        raise ConfigError(
            f"{of.step} needs the scores of several classes, but output {of.name!r} has shape "
            f"{list(tensor.shape)}, one value per {'pixel' if tensor.ndim > 2 else 'sample'}; use "
            f"output.transform: {advice}",
            "output.transform",
        )
    return dim


def _checked_dim(of: Operand) -> int:
    """Return output.dim; by default 1 for images and volumes [n, classes, ...], else the last."""
    shape, ndim = list(of.tensor.shape), of.tensor.ndim
    given = (1 if ndim > 3 else ndim - 1) if of.config.dim is None else of.config.dim
    dim = given if given >= 0 else ndim + given
    if not 0 < dim < ndim:
        raise ConfigError(
            f"cannot apply {of.step} over dimension {given} of output {of.name!r} with shape "
            f"{shape}; dimension 0 is the batch, choose a later one",
            "output.dim" if ndim > 1 else "output.transform",
        )
    return dim


def _sentence_embedding(of: Operand) -> Named:
    raise ConfigError(
        "sentence_embedding needs a sentence-transformers folder (with modules.json) as model.path "
        "of a huggingface model with auto_class: AutoModel",
        "output.transform",
    )


def _embedding_by(module: nn.Module) -> Transform:
    return lambda of: [(of.name, module(of.tensor, _mask(of)))]


def transforms_for(model: ModelFacts | None) -> dict[str, Transform]:
    """All transforms by name, with those that the facts of a model define or replace."""
    return TRANSFORMS | own_transforms(model)


def own_transforms(model: ModelFacts | None) -> dict[str, Transform]:
    """The transforms that the facts of a model define or replace."""
    own: dict[str, Transform] = {}
    if model is None:
        return own
    if model.embedding is not None:
        own["sentence_embedding"] = _embedding_by(model.embedding)
    if model.probabilities == "sigmoid":
        own |= {"softmax": _sigmoid, "classify": _classify_labels}
    if model.probabilities == "none":
        own |= {"softmax": no_classes, "classify": no_classes, "argmax": no_classes}
    return own


TRANSFORMS: dict[str, Transform] = {
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
WORDS = {"perplexity": "perplexity, from the mean loss of the tokens after the first, natural log"}
"""Transforms that need more words than their names."""
POOLING_STEPS = {"mean_pool", "cls", "last_token"}
SCORE_STEPS = {"softmax", "sigmoid", "argmax", "classify", "topk", "threshold", "uint8"}
"""Transforms of scores; metrics read the output before the first of them."""
ACTIVATIONS = {"softmax", "sigmoid", "classify"}
"""Transforms of logits to probabilities."""
CLASS_STEPS = {"softmax", "argmax", "classify", "topk"}
"""Transforms over the dimension of the classes."""
