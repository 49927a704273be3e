"""Evidence: what a metric needs of an output, as one compact tensor for all samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from gradrun.config.output import OutputSection
from gradrun.core.errors import ConfigError
from gradrun.output.class_labels import DEFAULT_OUTPUT
from gradrun.output.formats import FORMATS
from gradrun.output.missing import is_finite
from gradrun.output.tensor_transforms import ModelFacts, widened
from gradrun.output.transforms import SelectedOutput, Tensors, split_steps

Task = Literal["binary", "multiclass", "multilabel", "classes", "values"]
"""An output is one score, scores of classes that exclude each other, scores of labels that may
coincide, class numbers, or numbers of another kind."""

MISSING = -1
"""Class of a sample or pixel whose score is NaN or infinite."""

_CLASS_STEPS = (("argmax",), ("softmax", "argmax"), ("classify",))
_RANKED_STEPS = (("topk",), ("softmax", "topk"))


@dataclass(frozen=True)
class Target:
    """An output that is compared with labels."""

    source: str
    """The model's name of the output."""
    name: str
    """The name in the predictions; empty if it is not written."""
    shape: tuple[int, ...]
    """Of one sample."""
    steps: tuple[str, ...]
    """Transforms of its scores in the predictions."""
    task: Task
    dim: int | None = None
    """Dimension of the classes or labels in `shape`."""
    logits: bool = False
    """Whether the model is known to return logits."""

    @property
    def classes(self) -> int:
        """Number of classes or labels; 0 if the output does not determine it."""
        if self.task == "binary":
            return 2
        return 0 if self.dim is None else self.shape[self.dim]

    @property
    def class_shape(self) -> tuple[int, ...]:
        """Shape of one sample without the dimension of exclusive classes."""
        if self.task != "multiclass":
            return self.shape
        return tuple(size for dim, size in enumerate(self.shape) if dim != self.dim)

    def rows(self, tensor: torch.Tensor, *, wide: bool) -> torch.Tensor:
        """Flatten samples [n, ...] to rows, one per sample or pixel, or [rows, classes] if wide."""
        if wide and self.dim is not None:
            tensor = tensor.reshape(len(tensor), *self.shape)
            return tensor.movedim(self.dim + 1, -1).reshape(-1, self.classes)
        return tensor.reshape(-1)


def find_target(
    output: SelectedOutput,
    label: tuple[int, ...],
    config: OutputSection,
    model: ModelFacts,
    *,
    values: bool,
) -> Target:
    """Determine how an output compares with labels.

    Args:
        output: the output for a batch, before transforms of its scores.
        label: shape of one sample's label.
        values: compare numbers instead of classes.

    Raises:
        ConfigError: the shapes do not match.
    """
    shape = tuple(output.tensor.shape[1:])
    _, steps = split_steps(config, output, model)
    task, dim = _task(output.tensor, label, config.dim, values=values)
    if task is None:
        size = f"shape {list(label)}" if label else "one number"
        raise ConfigError(
            f"labels with {size} per sample do not match output {output.source!r}, which has shape "
            f"{list(shape)} per sample",
            "data.labels",
        )
    logits = model.probabilities in {"softmax", "sigmoid"}
    return Target(output.source, output.name, shape, steps, task, dim, logits)


def _task(
    tensor: torch.Tensor, label: tuple[int, ...], given: int | None, *, values: bool
) -> tuple[Task | None, int | None]:
    """The task, and the dimension of the classes in one sample; (None, None) without a match."""
    shape = tuple(tensor.shape[1:])
    same = _squeezed(shape) == _squeezed(label)
    if values:
        return ("values", None) if same else (None, None)
    if same and not (tensor.is_floating_point() or tensor.dtype == torch.bool):
        return "classes", None
    if same and not _squeezed(shape):
        return "binary", None
    candidates = [given - 1 if given > 0 else len(shape) + given] if given is not None else []
    candidates = candidates or ([0] if len(shape) > 2 else list(range(len(shape))))
    if same and len(_squeezed(shape)) == len(shape) and len(shape) != 2:
        return "multilabel", candidates[0]
    if same:
        return "binary", None
    matches = [
        dim
        for dim in candidates
        if 0 <= dim < len(shape)
        and shape[dim] > 1
        and _squeezed(shape[:dim] + shape[dim + 1 :]) == _squeezed(label)
    ]
    if len(matches) > 1:
        raise ConfigError(
            f"the classes of an output of shape {list(tensor.shape)} may be in dimension 1 or 2; "
            "set output.dim",
            "output.dim",
        )
    return ("multiclass", matches[0]) if matches else (None, None)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


@dataclass(frozen=True)
class Evidence:
    """What a metric needs: class numbers, the best classes or all scores of an output."""

    target: Target
    kind: Literal["class", "top", "scores"]
    k: int = 1
    """top: number of classes."""
    threshold: float = 0.0
    """class, of a task other than multiclass: scores above it are 1."""
    sigmoid: bool = False
    """Apply sigmoid before the threshold."""

    @property
    def name(self) -> str:
        """The same for equal evidence; safe in a file name."""
        detail = f".{self.k}" if self.kind == "top" else ""
        if self.kind == "class" and self.target.task in {"binary", "multilabel"}:
            detail = f".{'sigmoid.' if self.sigmoid else ''}above.{self.threshold!r}"
        return f"{self.target.source}.{self.kind}{detail}"

    def of(self, scores: torch.Tensor) -> torch.Tensor:
        """Reduce an output [n, ...], before transforms of its scores."""
        task, dim = self.target.task, self.target.dim
        if self.kind == "scores":
            return scores
        if task == "classes":
            return scores.long()
        scores = widened(scores)
        if task == "multiclass":
            assert dim is not None
            count = self.k if self.kind == "top" else 1
            # topk takes several times as long as max.
            best, index = (
                scores.topk(count, dim + 1) if count > 1 else scores.max(dim + 1, keepdim=True)
            )
            finite = is_finite(best.narrow(dim + 1, 0, 1))
            index = index.masked_fill(~finite, MISSING).to(_integer(self.target.classes))
            return index if self.kind == "top" else index.squeeze(dim + 1)
        scores = scores.sigmoid() if self.sigmoid else scores
        above = (scores > self.threshold).to(torch.int8)
        return above.masked_fill(~is_finite(scores), MISSING)

    # --- in the predictions ----------------------------------------------------------------------

    def in_predictions(self, config: OutputSection) -> bool:
        """Whether the written predictions contain this evidence, without loss."""
        target, steps = self.target, self._written_steps()
        if not target.name or FORMATS[config.format].joins_outputs(target.name):
            return False
        if not steps:
            return True
        if target.task == "multiclass":
            # The transforms find the classes of three dimensions by other means than labels.
            if len(target.shape) == 2 and config.dim is None and target.dim != 1:
                return False
            # A softmax rounds different scores to equal probabilities, many of them to 0.
            ranked = steps in _RANKED_STEPS and len(target.shape) == 1
            if self.kind == "class":
                return steps in _CLASS_STEPS or ranked
            return self.kind == "top" and steps == ("topk",) and ranked and self.k <= config.k
        if self.kind == "class" and self.sigmoid:
            threshold = 0.5 if config.threshold is None else config.threshold
            above = steps == ("sigmoid", "threshold") and self.threshold == threshold
            return above or steps == ("sigmoid",)
        return False

    def read(self, rows: Tensors) -> torch.Tensor:
        """Return this evidence from predictions [n, ...] that contain it."""
        target, steps, name = self.target, self._written_steps(), self.target.name
        if not steps or steps == ("sigmoid",):
            scores = rows[name].reshape(-1, *target.shape)
            return replace(self, sigmoid=self.sigmoid and not steps).of(scores)
        prefix = "" if name == DEFAULT_OUTPUT else f"{name}."
        if steps in _RANKED_STEPS:
            count = self.k if self.kind == "top" else 1
            finite = is_finite(rows[f"{prefix}values"][:, :1])
            best = rows[f"{prefix}indices"][:, :count].long().masked_fill(~finite, MISSING)
            return best if self.kind == "top" else best[:, 0]
        classes = rows[f"{prefix}class" if steps == ("classify",) else name]
        return classes.reshape(-1, *target.class_shape).long().clamp(min=MISSING)

    def _written_steps(self) -> tuple[str, ...]:
        """The transforms of the scores, without uint8 at the end, which changes no number."""
        steps = self.target.steps
        return steps[:-1] if steps[-1:] == ("uint8",) else steps


def _integer(classes: int) -> torch.dtype:
    """The smallest signed integer type for class numbers and MISSING."""
    for dtype in (torch.int8, torch.int16):
        if classes - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32
