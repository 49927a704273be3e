"""Compare the outputs of two variants and find the first module whose output differs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from gradrun.comparison.predictions import distances, same_values
from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.data.batch import Batch
from gradrun.inference.module_calls import track_module_calls
from gradrun.inference.module_state import preserve_module_state
from gradrun.output.columns import ValueColumn
from gradrun.output.structure import OutputReader
from gradrun.output.transforms import iter_columns, iter_tensors
from gradrun.results.result import Equivalence

_NamedTensors = list[tuple[str, torch.Tensor]]

_PRECISION_STEPS = {"bfloat16": 1.6e-2, "float16": 1e-3}
"""Relative tolerance by precision, the same as in torch.testing.assert_close."""


class ComparableModel(Protocol):
    """A variant that can run any of its batches."""

    name: str
    config: RunConfig
    batches: list[Batch]

    @property
    def model(self) -> nn.Module:
        """The module."""

    def execution_context(self) -> AbstractContextManager[None]:
        """Set the variant's gradient mode, autocast and threads."""

    def run_batch(self, number: int) -> Any:
        """Return the model's output for one batch."""


def equivalence(base: ComparableModel, candidate: ComparableModel) -> Equivalence:
    """Compare the outputs of two variants on the samples that both ran."""
    max_diff, bitwise, equal, compared = 0.0, True, True, False
    aligned = all(
        list(one.ids) == list(other.ids)
        for one, other in zip(base.batches, candidate.batches, strict=False)
    )
    common = range(min(len(base.batches), len(candidate.batches)))
    by_batch = (
        (_entries_of(_outputs(base, number)), _entries_of(_outputs(candidate, number)))
        for number in common
    )
    pairs = by_batch if aligned else _pairs_by_sample(base, candidate)
    for base_outputs, outputs in pairs:
        compared = True
        if [(n, t.shape) for n, t in base_outputs] != [(n, t.shape) for n, t in outputs]:
            max_diff, bitwise, equal = math.inf, False, False
            break
        for (_, one), (_, other) in zip(base_outputs, outputs, strict=True):
            bitwise &= one.dtype == other.dtype and _bitwise_equal(one, other)
            wide_one, wide_other = _widen(one, other), _widen(other, one)
            if one.numel():
                max_diff = max(max_diff, float(distances(wide_one, wide_other).max()))
            rtol, atol = _tolerance((base.config, candidate.config), wide_one)
            equal &= torch.allclose(wide_one, wide_other, rtol=rtol, atol=atol, equal_nan=True)
    bitwise &= compared
    return Equivalence(
        baseline=base.name,
        candidate=candidate.name,
        bitwise=bitwise,
        max_abs_diff=max_diff if compared else math.inf,
        equal=compared and (bitwise or equal),
        first_module=None if bitwise or not aligned else first_differing_module(base, candidate),
        compared=compared,
    )


def first_differing_module(base: ComparableModel, candidate: ComparableModel) -> str | None:
    """Return "path (Type)" of the first module whose output differs, or None.

    Modules are compared in the order in which they return. A module that one variant does not call
    is skipped: a fused path bypasses the modules inside it.
    """
    base_outputs = {name: outputs for name, _, outputs in _module_outputs(base)}
    for name, kind, outputs in _module_outputs(candidate):
        others = base_outputs.get(name)
        if others is None or len(others) != len(outputs):
            continue
        if not all(map(_bitwise_equal, others, outputs)):
            return f"{name or '(the model)'} ({kind})"
    return None


def _pairs_by_sample(
    base: ComparableModel, candidate: ComparableModel
) -> Iterator[tuple[_NamedTensors, _NamedTensors]]:
    """Match samples by id where batches differ in size or order; yield one output at a time."""
    base_rows, rows = _rows_by_sample(base), _rows_by_sample(candidate)
    shared = [sample for sample in base_rows if sample in rows]
    if not shared:
        return
    for name, first in next(iter(base_rows.values())).items():
        if not isinstance(first, torch.Tensor):
            for sample in shared:
                row, other = base_rows[sample][name], rows[sample].get(name)
                yield _entries(name, row), _entries(name, other)
            continue
        if any(name not in rows[sample] for sample in shared):
            yield [(name, first)], []
            continue
        pairs = [_crop_padding(base_rows[sample][name], rows[sample][name]) for sample in shared]
        if len({row.shape for pair in pairs for row in pair}) == 1:
            pairs = [(torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]))]
        for one, other in pairs:
            yield [(name, one)], [(name, other)]


def _rows_by_sample(variant: ComparableModel) -> dict[Any, dict[str, Any]]:
    """Map (id, occurrence) of each sample to its row, or list with its value, of every output."""
    rows: dict[Any, dict[str, Any]] = {}
    occurrences: Counter[int | str] = Counter()
    for number, batch in enumerate(variant.batches):
        outputs = _outputs(variant, number)
        for row, sample in enumerate(batch.ids):
            occurrences[sample] += 1
            rows[sample, occurrences[sample]] = {
                name: [column.values[row]]
                if isinstance(column, ValueColumn)
                else column[row]
                if column.ndim
                else column
                for name, column in outputs
            }
    return rows


def _crop_padding(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop both to their common shape: each was padded to the longest text of its own batch."""
    if one.ndim != other.ndim:
        return one, other
    common = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
    return one[common], other[common]


def _outputs(variant: ComparableModel, number: int) -> list[tuple[str, Any]]:
    """Run a batch and return copies of its outputs: tensors, or columns of values."""
    torch.manual_seed(variant.config.run.seed)  # the same dropout for both variants
    batch = variant.batches[number]
    with preserve_module_state(variant.model), _preserve_inputs(batch), variant.execution_context():
        returned = variant.run_batch(number)
        # Copy before the inputs are restored: an output can share memory with an input.
        structured = OutputReader()(returned, batch.size)
        outputs = [
            (name, column if isinstance(column, ValueColumn) else _copy_to_cpu(column))
            for name, column in iter_columns(structured)
        ]
    if not outputs:
        kind = type(returned).__name__
        raise ConfigError(f"the model returned {kind} instead of one or more tensors", "model")
    return outputs


def _entries_of(outputs: list[tuple[str, Any]]) -> _NamedTensors:
    """Return the tensors of outputs, and those in the values of each sample."""
    entries: _NamedTensors = []
    for name, column in outputs:
        if isinstance(column, ValueColumn):
            entries += _entries(name, column.values)
        else:
            entries.append((name, column))
    return entries


def _entries(name: str, value: Any) -> _NamedTensors:
    """Return the tensors and numbers in a value; their names contain the rest, such as texts."""
    if isinstance(value, list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [entry for key, item in items for entry in _entries(f"{name}.{key}", item)]
        return [(f"{name} has {len(value)}", torch.empty(0)), *parts]
    if value is None or isinstance(value, str):
        return [(f"{name} is {value!r}", torch.empty(0))]
    return [(name, torch.as_tensor(value))]


@contextmanager
def _preserve_inputs(batch: Batch) -> Iterator[None]:
    """Restore inputs that a model modifies in place, so that both variants get the same batch."""
    saved = [(tensor.requires_grad, tensor.detach().clone()) for tensor in batch.tensors()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, (requires_grad, value) in zip(batch.tensors(), saved, strict=True):
                tensor.requires_grad_(requires_grad).copy_(value)


def _module_outputs(variant: ComparableModel) -> list[tuple[str, str, list[torch.Tensor]]]:
    """Run the first batch and return (path, type, tensors) of every module call."""
    names = {module: name for name, module in variant.model.named_modules()}
    calls: list[tuple[str, str, list[torch.Tensor]]] = []

    def record(module: nn.Module, _: Any, returned: Any) -> None:
        if module in names:
            tensors = [_copy_to_cpu(tensor) for _, tensor in iter_tensors(returned)]
            calls.append((names[module], type(module).__name__, tensors))

    with track_module_calls(lambda *_: None, record):
        _outputs(variant, 0)
    return calls


def _copy_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor in dense form; a nested tensor is padded with zeros."""
    tensor = tensor.detach()
    if tensor.is_nested:
        # torch 2.6 cannot pad the layout jagged in every mode
        parts = torch.nested.nested_tensor(list(tensor.unbind()), layout=torch.strided)
        tensor = torch.nested.to_padded_tensor(parts, 0.0)
    return (tensor if tensor.layout == torch.strided else tensor.to_dense()).clone().cpu()


def _tolerance(configs: Sequence[RunConfig], outputs: torch.Tensor) -> tuple[float, float]:
    """Return (rtol, atol): the configured values, raised to the lowest precision in use.

    The absolute tolerance scales with the largest output, because small outputs can be differences
    of large intermediate values.
    """
    measure = configs[-1].measure
    kinds = (k for c in configs for k in (getattr(c.model, "dtype", None), c.run.autocast))
    step = max(_PRECISION_STEPS.get(kind or "", 0.0) for kind in kinds)
    finite = outputs[outputs.isfinite()]
    largest = float(finite.abs().max()) if step and finite.numel() else 0.0
    return max(measure.rtol, step), max(measure.atol, step * largest)


def _bitwise_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and (
        torch.equal(one, other) or bool(same_values(one, other).all())
    )


def _widen(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Convert to float64, or to complex128 if either tensor is complex."""
    either = tensor.is_complex() or other.is_complex()
    return tensor.to(torch.complex128 if either else torch.float64)
