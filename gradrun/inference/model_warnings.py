"""Warnings about a model that follow from its outputs, its modules or its timed pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from gradrun.core.grad_mode import GradMode
from gradrun.core.units import first_names, pluralize
from gradrun.data.source import BatchSource
from gradrun.output.output_facts import ReturnedOutputs
from gradrun.output.transforms import iter_tensors
from gradrun.results.result import Warning

if TYPE_CHECKING:
    from gradrun.inference.runner import Runner


def graph_warnings(returned: Any, mode: GradMode) -> Iterator[Warning]:
    """Warn of outputs with a gradient graph in a mode that should record none."""
    names = [name for name, tensor in iter_tensors(returned) if tensor.requires_grad]
    if names and mode is not GradMode.GRAD:
        yield Warning(
            code="graph_kept",
            text=f"output {names[0]} has a gradient graph in mode {mode}: code in the model "
            "enables gradients; run gradrun audit to find it",
        )


def activation_warnings(runner: Runner, first: ReturnedOutputs) -> Iterator[Warning]:
    """Warn if softmax or sigmoid reads probabilities, in the first and in the last batch."""
    found = [*first.double_activations()]
    size, samples = runner.data.batch_size, runner.data.samples
    # A full batch where possible, because few logits may be within 0 to 1 by chance.
    start = size if samples is None else (samples // size - 1) * size
    if found and start > 0:
        with suppress(Exception, SystemExit):  # then the first batch decides
            last = runner.to_device(runner.batch_with(start))
            last.raise_errors()
            again = runner.selector.structured(runner.model(*last.args, **last.kwargs), last.size)
            also = [*replace(first, structured=again, inputs=last.kwargs).double_activations()]
            found = [item for item in found if item in also]
    for output, activation in found:
        sums, instead = ", and those of a sample add up to 1", " or argmax"
        if activation == "sigmoid":
            sums, instead = "", ", or threshold with output.threshold: 0.5"
        yield Warning(
            code="double_activation",
            text=f"the values of output {output!r} before {activation} are all within 0 to 1"
            f"{sums}: they seem to be probabilities already, and {activation} changes them; use "
            f"output.transform: none{instead}",
        )


def class_dimension_warnings(model: nn.Module, first: ReturnedOutputs) -> Iterator[Warning]:
    """Warn if a transform uses another dimension than that of the last layer's outputs."""
    if (head := _last_layer(model)) is None:
        return
    name, classes = head
    for output, dim, size, other in first.misplaced_classes(classes):
        yield Warning(
            code="class_dimension",
            text=f"the transform of output {output!r} uses dimension {dim} with {size} values, but "
            f"the model's last layer, {name}, has {classes} outputs, as many as dimension "
            f"{other}: if these are the classes, set output.dim: {other}",
        )


def _last_layer(model: nn.Module) -> tuple[str, int] | None:
    """Return the name of the last linear or convolutional layer, and the number of its outputs."""
    sizes = [
        (name, getattr(module, "out_features", getattr(module, "out_channels", None)))
        for name, module in model.named_modules()
    ]
    return next(((name, n) for name, n in reversed(sizes) if isinstance(n, int)), None)


def training_mode_warnings(runner: Runner) -> Iterator[Warning]:
    """Warn about modules whose training mode affects predictions, if config disables it."""
    if getattr(runner.config.model, "training", False):
        return
    kinds = nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm
    modules = runner.model.named_modules()
    names = [name for name, m in modules if m.training and isinstance(m, kinds)]
    if names:
        yield Warning(
            code="training_inside",
            text=f"{first_names(names, 3)} ran in training mode, although model.training is "
            "off: dropout or batch norm affects the predictions; run gradrun audit for details",
        )


def compilation_warnings(data: BatchSource, graphs: int, hits: Sequence[str]) -> Iterator[Warning]:
    """Warn of graphs compiled, and messages of torch's limit, during the timed pass."""
    if graphs:
        remedy = (
            "data.padding: max_length gives all texts one length, or set model.compile: false"
            if data.of_texts
            else "keep the shapes of the inputs the same, or set model.compile.dynamic: true, or "
            "model.compile: false"
        )
        yield Warning(
            code="recompiled",
            text=f"torch.compile compiled {pluralize(graphs, 'graph')} during the timed pass, for "
            f"other shapes of the inputs, and the measured times include this; {remedy}",
        )
    if hits:
        yield Warning(
            code="recompilation_limit",
            text=f"{hits[0].splitlines()[0]}: batches of further shapes ran eagerly; set "
            "model.compile.dynamic: true, or keep the shapes of the inputs the same",
        )
