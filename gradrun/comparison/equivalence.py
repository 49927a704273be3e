"""Whether two variants give the same outputs, and where they first part.

Knows outputs and modules; not what the variants are for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from gradrun.config.schema import RunConfig
from gradrun.core.errors import ConfigError
from gradrun.data.batch import Batch
from gradrun.inference.module_calls import track_module_calls
from gradrun.inference.module_state import preserve_module_state
from gradrun.output.transforms import iter_tensors
from gradrun.results.result import Equivalence

_Named = list[tuple[str, torch.Tensor]]


class ComparableModel(Protocol):
    """What is compared: a variant that can run any of its batches."""

    name: str
    config: RunConfig
    model: nn.Module
    batches: list[Batch]

    def active(self) -> Any:
        """The variant's mode, threads and autocast."""

    def call(self, number: int) -> Any:
        """What the model returns for one batch."""


def equivalence(base: ComparableModel, candidate: ComparableModel) -> Equivalence:
    """The candidate's outputs beside the baseline's, on the batches that both have."""
    greatest, bitwise, equal, compared = 0.0, True, True, False
    alike = all(
        list(ours.ids) == list(theirs.ids)
        for ours, theirs in zip(base.batches, candidate.batches, strict=False)
    )
    for ours, theirs in _batchwise(base, candidate) if alike else _samplewise(base, candidate):
        compared = True
        if [(name, t.shape) for name, t in ours] != [(name, t.shape) for name, t in theirs]:
            greatest, bitwise, equal = math.inf, False, False
            break
        for (_, one), (_, other) in zip(ours, theirs, strict=True):
            bitwise &= one.dtype == other.dtype and _same_bits(one, other)
            wide = _wide(one, other), _wide(other, one)
            greatest = max(greatest, _greatest_difference(*wide))
            rtol, atol = _tolerance(candidate.config, wide[0])
            equal &= torch.allclose(*wide, rtol=rtol, atol=atol, equal_nan=True)
    bitwise &= compared
    return Equivalence(
        baseline=base.name,
        candidate=candidate.name,
        bitwise=bitwise,
        max_abs_diff=greatest if compared else math.inf,
        equal=compared and (bitwise or equal),
        first_module=None if bitwise or not alike else first_differing_module(base, candidate),
        compared=compared,
    )


def _tolerance(config: RunConfig, outputs: torch.Tensor) -> tuple[float, float]:
    """What the config asks for, and no less than the lowest precision in use can promise.

    The steps are those of torch.testing.assert_close: 1.6e-2 for bfloat16, 1e-3 for float16; here
    they are of the greatest output, since the smaller ones are differences of greater ones.
    """
    measure, kinds = config.measure, {getattr(config.model, "dtype", None), config.run.autocast}
    step = max((_STEPS.get(kind or "", 0.0) for kind in kinds), default=0.0)
    greatest = float(outputs.abs().max()) if step and outputs.numel() else 0.0
    return max(measure.rtol, step), max(measure.atol, step * greatest)


_STEPS = {"bfloat16": 1.6e-2, "float16": 1e-3}


def _batchwise(
    base: ComparableModel, candidate: ComparableModel
) -> Iterator[tuple[_Named, _Named]]:
    for number in range(min(len(base.batches), len(candidate.batches))):
        yield _outputs(base, number), _outputs(candidate, number)


def _samplewise(
    base: ComparableModel, candidate: ComparableModel
) -> Iterator[tuple[_Named, _Named]]:
    """The samples that both have, where they come in other batches: of other size or order."""
    ours, theirs = _samples(base), _samples(candidate)
    shared = [sample for sample in ours if sample in theirs]
    if not shared:
        return
    for name in next(iter(ours.values())):
        if any(name not in theirs[sample] for sample in shared):
            yield [(name, ours[shared[0]][name])], []
            continue
        pairs = [_cropped(ours[sample][name], theirs[sample][name]) for sample in shared]
        if len({row.shape for pair in pairs for row in pair}) == 1:
            pairs = [(torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]))]
        for mine, its in pairs:
            yield [(name, mine)], [(name, its)]


def _samples(side: ComparableModel) -> dict[Any, dict[str, torch.Tensor]]:
    """Each sample's row of every output, by its id; of samples with one id by their order."""
    found: dict[Any, dict[str, torch.Tensor]] = {}
    seen: Counter[int | str] = Counter()
    for number, batch in enumerate(side.batches):
        outputs = _outputs(side, number)
        for row, name in enumerate(batch.ids):
            seen[name] += 1
            rows = {called: t[row] if t.ndim else t for called, t in outputs}
            found[name, seen[name]] = rows
    return found


def _cropped(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both without what only one has: the padding to the longest text of another batch."""
    if one.ndim != other.ndim:
        return one, other
    shared = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
    return one[shared], other[shared]


def first_differing_module(base: ComparableModel, candidate: ComparableModel) -> str | None:
    """The path and type of the first module whose output differs between the two, if one does.

    Modules are compared in the order in which they return. One that a variant does not call (a
    fused path skips the modules inside) is passed over.
    """
    with _recorded(base) as ours:
        _outputs(base, 0)
    with _recorded(candidate) as theirs:
        _outputs(candidate, 0)
    seen = {name: outputs for name, _, outputs in ours}
    for name, kind, outputs in theirs:
        others = seen.get(name)
        if others is None or len(others) != len(outputs):
            continue
        if not all(map(_same_bits, others, outputs)):
            return f"{name or '(the model)'} ({kind})"
    return None


def _outputs(side: ComparableModel, number: int) -> _Named:
    torch.manual_seed(side.config.run.seed)  # dropout in training mode falls alike
    with preserve_module_state(side.model), _inputs_kept(side.batches[number]), side.active():
        # Copied inside: an output may be the input, which is about to be as it was.
        returned = side.call(number)
        found = [(name, _dense(t.detach()).clone().cpu()) for name, t in iter_tensors(returned)]
    if not found:
        kind = type(returned).__name__
        raise ConfigError(
            f"the model returned {kind}, where a tensor or several are wanted", "model"
        )
    return found


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


@contextmanager
def _inputs_kept(batch: Batch) -> Iterator[None]:
    """Give a batch that a model writes into its values back, so that both sides get the same."""
    kept = [(tensor.requires_grad, tensor.detach().clone()) for tensor in batch.tensors()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, (requires_grad, value) in zip(batch.tensors(), kept, strict=True):
                tensor.requires_grad_(requires_grad).copy_(value)


@contextmanager
def _recorded(side: ComparableModel) -> Iterator[list[tuple[str, str, list[torch.Tensor]]]]:
    """Every module's outputs while the block runs, as (path, type, tensors)."""
    names = {module: name for name, module in side.model.named_modules()}
    calls: list[tuple[str, str, list[torch.Tensor]]] = []

    def record(module: nn.Module, _: Any, returned: Any) -> None:
        if module in names:
            kept = [_dense(t.detach()).clone().cpu() for _, t in iter_tensors(returned)]
            calls.append((names[module], type(module).__name__, kept))

    with track_module_calls(lambda *_: None, record):
        yield calls


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and (torch.equal(one, other) or bool(_same(one, other).all()))


def _same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where both hold the same value; a NaN is the same as a NaN, and as nothing else."""
    return (one == other) | (one.isnan() & other.isnan())


def _wide(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """In double precision, and complex where one of the two is."""
    either = tensor.is_complex() or other.is_complex()
    return tensor.to(torch.complex128 if either else torch.float64)


def _greatest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if not one.numel():
        return 0.0
    # Where both are the same infinity there is no difference, though inf - inf is NaN.
    difference = (one - other).abs().masked_fill(_same(one, other), 0.0)
    return float(difference.nan_to_num(nan=math.inf, posinf=math.inf).max())
