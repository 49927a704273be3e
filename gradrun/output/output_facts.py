"""Interpretations of the model's outputs, and doubts about them: classes, probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gradrun.config.output import OutputSection
from gradrun.output.columns import ValueColumn, describe_values
from gradrun.output.tensor_transforms import (
    ACTIVATIONS,
    CLASS_STEPS,
    POOLING_STEPS,
    WORDS,
    Inputs,
    ModelFacts,
    Operand,
    class_dim,
    is_half,
    no_classes,
    own_transforms,
    threshold,
    transforms_for,
)
from gradrun.output.transforms import SelectedOutput, apply_steps, select_outputs
from gradrun.results.result import Statement


@dataclass(frozen=True)
class ReturnedOutputs:
    """The model's outputs of a batch, as a config reads them."""

    config: OutputSection
    structured: Any
    """What `OutputSelector.structured` returned."""
    inputs: Inputs
    """Of the model, for the batch."""
    model: ModelFacts | None

    def statements(self) -> Iterator[Statement]:
        """Yield the interpretations of the outputs, with their shapes."""
        yield from _embedding_statement(self.config, self.model)
        outputs = select_outputs(self.structured, self.config)
        for output in outputs:
            topic = "output" if len(outputs) == 1 else f"output {output.source}"
            if isinstance(output.column, ValueColumn):
                text = f"{describe_values(output.column)}, one per sample"
                yield Statement(topic=topic, text=text)
            elif self.config.transforms:
                text = self._describe_steps(output.source, output.tensor)
                yield Statement(topic=topic, text=text)

    def class_counts(self) -> dict[str, int]:
        """Return the number of classes of each written output that has class numbers or scores."""
        own, functions = own_transforms(self.model), transforms_for(self.model)
        counts: dict[str, int] = {}
        for output, of, steps in self._walk():
            if of.step in CLASS_STEPS and of.step not in own:
                count = of.tensor.shape[class_dim(of)]
                written = apply_steps(functions, steps, output, self.config, self.inputs)
                counts = {name: count for name, _ in written} | counts
        return counts

    def misplaced_classes(self, classes: int) -> Iterator[tuple[str, int, int, int]]:
        """Yield outputs whose classes seem to be in another dimension than a transform uses.

        Yields:
            The output, the dimension in use, its size, and the one dimension of size `classes`.
        """
        own = own_transforms(self.model)
        for output, of, steps in self._walk():
            first = steps == self.config.transforms_of(output.source)
            if first and of.step in CLASS_STEPS and of.step not in own:
                dim, shape = class_dim(of), of.tensor.shape
                others = [other for other in range(1, len(shape)) if shape[other] == classes]
                if len(others) == 1 and dim not in others:
                    yield output.source, dim, shape[dim], others[0]

    def double_activations(self) -> Iterator[tuple[str, str]]:
        """Yield (output, transform) where softmax or sigmoid would read probabilities.

        Values are taken for probabilities if they differ and all are within 0 to 1; for softmax,
        those of a sample must also add up to 1. The transform is the one that is applied, which is
        sigmoid where the model's config asks for it.
        """
        own = own_transforms(self.model)
        for output, of, _ in self._walk():
            if of.step in ACTIVATIONS and own.get(of.step) is not no_classes:
                activation = "sigmoid" if of.step == "sigmoid" or of.step in own else "softmax"
                dim = class_dim(of) if activation == "softmax" else None
                if _are_probabilities(of.tensor, dim):
                    yield output.source, activation

    def _walk(self) -> Iterator[tuple[SelectedOutput, Operand, tuple[str, ...]]]:
        """Yield each written output before each of its transforms, with this and all later ones."""
        functions = transforms_for(self.model)
        for output in select_outputs(self.structured, self.config):
            steps = self.config.transforms_of(output.source)
            for i in range(len(steps)):
                of = Operand(steps[i], output.name, output.tensor, self.config, self.inputs)
                yield output, of, steps[i:]
                column = functions[steps[i]](of)[0][1]
                output = output._replace(column=column)

    def _describe_steps(self, name: str, tensor: torch.Tensor) -> str:
        """Describe the shape of an output and its transforms, with the dimension of the classes."""
        config, own, functions = self.config, own_transforms(self.model), transforms_for(self.model)
        shape, words = _row_shape(tensor), []
        precision = ", in float32" if config.transforms_of(name) and is_half(tensor) else ""
        for step in config.transforms_of(name):
            of = Operand(step, name, tensor, config, self.inputs)
            if step in own and step in CLASS_STEPS:
                words.append(f"{step} by sigmoid, as the model's config asks")
            elif step in CLASS_STEPS:
                dim = class_dim(of)
                words.append(f"{step} over dimension {dim} ({tensor.shape[dim]} classes)")
            else:
                words.append(
                    f"above {threshold(config):g}" if step == "threshold" else WORDS.get(step, step)
                )
            tensor = functions[step](of)[0][1]
        pools = {*POOLING_STEPS, "sentence_embedding"}.intersection(config.transforms_of(name))
        result = f", to {_row_shape(tensor)}" if pools else ""
        return f"{shape}: {', then '.join(words) or 'as returned'}{precision}{result}"


def planned_statements(config: OutputSection, model: ModelFacts) -> Iterator[Statement]:
    """Yield the interpretations of outputs of which none has been returned yet."""
    yield from _embedding_statement(config, model)
    every = config.transform if isinstance(config.transform, dict) else {"": config.transform}
    for name, steps in every.items() if config.transforms else ():
        yield Statement(topic=f"output {name}".rstrip(), text=", ".join(steps))


def other_pooling(config: OutputSection, model: ModelFacts) -> str:
    """Describe the pooling of a sentence-transformers folder if the config pools in another way."""
    embedding: Any = model.embedding
    steps = config.transforms_of("")
    if embedding is None or not POOLING_STEPS & {*steps} or steps == embedding.equivalent:
        return ""
    return str(embedding.description)


def _embedding_statement(config: OutputSection, model: ModelFacts | None) -> Iterator[Statement]:
    embedding: Any = model.embedding if model else None
    if embedding is None:
        return
    steps, text = config.transforms_of(""), str(embedding.description)
    if "sentence_embedding" not in steps and steps != embedding.equivalent:
        text = f"not the folder's own, which is: {text}"
    yield Statement(topic="embedding", text=text)


def _row_shape(tensor: torch.Tensor) -> str:
    return f"[{', '.join(['n', *map(str, tensor.shape[1:])])}]"


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
    return bool(((sums - 1).abs() < (0.02 if is_half(tensor) else 1e-3)).all())
