"""Detect predictions that depend on the other samples of their batch.

A few samples of the first batch run alone, in another batch and without padding, and are compared
with their rows. Kernels differ between batch sizes, so small differences are expected. If a row
differs, the whole batch runs again, from the same seed, with copies of that sample as neighbors:
kernels and dropout masks are the same then, and only the neighbors can cause a difference.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradrun.config.schema import RunConfig
from gradrun.data.batch import Batch
from gradrun.inference.compilation import eager_model, without_compilation
from gradrun.inference.device import seed_generators
from gradrun.inference.module_calls import track_module_calls
from gradrun.inference.module_state import preserve_module_state
from gradrun.output.columns import ValueColumn, as_tensors
from gradrun.output.transforms import iter_columns, iter_tensors

_NEIGHBORS = 4
"""Samples of the other batch, which is small because the test must cost little."""

_STEP = 1e-5
"""Difference that kernels for another batch size may cause, relative to the largest output."""

_STEPS = {torch.bfloat16: 1.6e-2, torch.float16: 1e-3}
"""The same for lower precisions, as in torch.testing.assert_close."""

_LARGE = 0.01
"""Relative difference that kernels in float32 do not cause."""

_BATCH_FIRST = "its input has the batch first: set batch_first=True"
_ADVICE: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.RNNBase, _BATCH_FIRST),
    (nn.MultiheadAttention, _BATCH_FIRST),
    (nn.TransformerEncoderLayer, _BATCH_FIRST),
    (nn.TransformerDecoderLayer, _BATCH_FIRST),
    (nn.Softmax, "set its dim to a dimension after the first"),
    (nn.LogSoftmax, "set its dim to a dimension after the first"),
    (nn.modules.batchnorm._BatchNorm, "batch norm runs in training mode: call eval()"),
)
"""The usual cause for a type of module that mixes samples."""

Rows = dict[str, torch.Tensor]
"""Output name to a tensor [samples, ...]."""

ReadOutput = Callable[[Any, int], Any]
"""Returns the model's output for a batch of a size with columns in place of lists of samples."""


@dataclass(frozen=True)
class BatchDependence:
    """A sample whose outputs depend on its batch."""

    sample: int | str
    difference: float
    """Greatest absolute difference of an output; infinite if its shape changes."""
    padding: bool = False
    """Whether the padding of its batch is the cause, and not the other samples."""
    masked: bool = False
    """Whether an attention_mask marks the padding."""
    batch_dim: int | None = None
    """The dimension of the output that follows the samples, if it is another than the first."""
    module: nn.Module | None = None
    """The first module that mixes samples, if one does."""
    path: str = ""

    @property
    def label(self) -> str:
        """The module as "path (Type)", or ""."""
        if self.module is None:
            return ""
        kind = self.module._get_name()  # type: ignore[no-untyped-call]
        return f"{self.path or '(the model)'} ({kind})"

    @property
    def text(self) -> str:
        """The fact, without a full stop."""
        cause = "padding" if self.padding else "other samples"
        by = f" by up to {self.difference:.2g}" if math.isfinite(self.difference) else ""
        where = f", first in {self.label}" if self.module else ""
        return (
            f"predictions depend on the {cause} of their batch: those of sample {self.sample} "
            f"change{by}{where}"
        )

    @property
    def advice(self) -> str:
        """The remedy, without a full stop."""
        if self.padding and not self.masked:
            return (
                "the input key `lengths` passes the length of each sample to the model, which can "
                "ignore the fill after it; or set data.batch_size: 1"
            )
        if self.padding:
            return "make the model ignore tokens outside of attention_mask, also in its positions"
        if self.batch_dim is not None:
            return (
                f"dimension {self.batch_dim} of the output is the batch, not dimension 0: "
                "transpose it, or choose another output with output.select"
            )
        usual = (advice for kind, advice in _ADVICE if isinstance(self.module, kind))
        return next(
            usual,
            "results change with data.batch_size and the order of the data; if this is intended, "
            "set measure.batch_independence: false",
        )


def reference_rows(returned: Any, batch: Batch, config: RunConfig) -> Rows:
    """Copy the rows of a batch's outputs that `batch_dependence` compares with.

    `returned` is the model's output for the batch, after the ReadOutput. Without a test, there are
    no rows: the batch has one sample, or the config turns the test off.
    """
    if batch.size < 2 or not config.measure.batch_independence:
        return {}
    outputs = _outputs_of(returned, config)
    return {
        name: tensor[_tested_rows(batch)].clone()
        for name, tensor in outputs.items()
        if tensor.ndim and len(tensor) == batch.size
    }


def batch_dependence(
    model: nn.Module,
    batch: Batch,
    reference: Rows,
    config: RunConfig,
    device: torch.device,
    read: ReadOutput = lambda returned, _: returned,
) -> BatchDependence | None:
    """Find a sample whose outputs depend on its batch; call this inside the execution context.

    Args:
        model: its state is restored.
        batch: a batch that the model can run.
        reference: `reference_rows` of the outputs for this batch, from the present state.
        config: names the outputs, the seed and the precision.
        device: that of the model.
        read: finds lists of samples in the model's output.

    Returns:
        The sample with the greatest difference; None if no sample depends on its batch, or if that
        cannot be tested: there are no reference rows, or the model's results are not repeatable.
    """
    if not reference:
        return None
    # A model may raise anything, and its warnings about small batches do not concern the run.
    with suppress(Exception), warnings.catch_warnings(action="ignore"), without_compilation():
        return _BatchTest(eager_model(model), batch, config, device, read).run(reference)
    return None


# --- the samples under test ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """Rows of a batch in another batch."""

    rows: list[int]
    batch: Batch
    tokens: torch.Tensor | None = None
    """Positions of the tokens that remain without padding."""
    padded: int = 0
    """The number of tokens with padding."""


def _trials(batch: Batch) -> Iterator[_Trial]:
    """Yield the last sample alone, samples in another order and number, and one unpadded."""
    last = batch.size - 1
    yield _Trial([last], batch.select([last]))
    if last > 1:
        rows = _other_rows(batch.size)
        yield _Trial(rows, batch.select(rows))
    if (padded := _padded_row(batch)) is not None:
        mask = _mask(batch)
        yield _unpadded(batch, padded) if mask is None else _unmasked(batch, padded, mask)


def _unmasked(batch: Batch, row: int, mask: torch.Tensor) -> _Trial:
    """Return a text without its padding, which the mask marks on either side."""
    tokens = mask[row].nonzero().flatten()
    alone = batch.select([row])
    trimmed = {
        name: value[:, tokens] if value.shape[1:2] == mask.shape[1:] else value
        for name, value in alone.kwargs.items()
    }
    return _Trial([row], alone._replace(kwargs=trimmed), tokens, mask.shape[1])


def _unpadded(batch: Batch, row: int) -> _Trial:
    """Return a sample without the padding at the end of its inputs."""
    alone = batch.select([row])
    trimmed = alone.tensors()
    for position, lengths in batch.lengths.items():
        tensor, longest = trimmed[position], int(lengths.max())
        dim = list(tensor.shape).index(longest, 1)
        trimmed[position] = tensor.narrow(dim, 0, int(lengths[row]))
    remaining = iter(trimmed)
    lengths = next(iter(batch.lengths.values()))
    tokens = torch.arange(int(lengths[row]))
    return _Trial([row], alone.map(lambda _: next(remaining)), tokens, int(lengths.max()))


def _tested_rows(batch: Batch) -> list[int]:
    """Return every row of the trials, ascending."""
    padded = _padded_row(batch)
    rows = {batch.size - 1, *_other_rows(batch.size), *([] if padded is None else [padded])}
    return sorted(rows)


def _other_rows(size: int) -> list[int]:
    """Return up to four rows in descending order, evenly spaced, without the first."""
    count = min(_NEIGHBORS, size - 1)
    return [size - 1 - index * (size - 1) // count for index in range(count)]


def _padded_row(batch: Batch) -> int | None:
    """Return the row with most padding, if the longest text of the batch determines it."""
    mask = _mask(batch)
    lengths = next(iter(batch.lengths.values()), None) if mask is None else (mask != 0).sum(1)
    if lengths is None:
        return None
    shortest, longest = int(lengths.argmin()), int(lengths.max())
    if mask is None:
        tensors = batch.tensors()
        full = all(int(n.max()) in tensors[index].shape[1:] for index, n in batch.lengths.items())
    else:
        full = mask.shape[1] == longest
    return shortest if full and 0 < int(lengths[shortest]) < longest else None


def _mask(batch: Batch) -> torch.Tensor | None:
    """Return the attention mask [samples, tokens] of texts."""
    mask = batch.kwargs.get("attention_mask")
    return None if mask is None or mask.ndim != 2 else mask


# --- runs and comparisons ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Suspect:
    """A row that another batch changes."""

    row: int
    difference: float
    large: bool
    """Whether the difference exceeds those of kernels for another batch size."""
    padding: bool


@dataclass(frozen=True)
class _Recorded:
    """A run of the whole batch: the parts of its tensors that may belong to one sample."""

    outputs: dict[str, _Parts]
    calls: list[tuple[str, nn.Module, list[_Parts]]]
    """Module calls in the order in which they return."""
    random: bool
    """Whether the run drew random numbers."""


_Parts = dict[int | str, torch.Tensor]
"""Dimension or layout to the part of a tensor that belongs to a sample under this assumption."""


@dataclass(frozen=True)
class _BatchTest:
    model: nn.Module
    batch: Batch
    config: RunConfig
    device: torch.device
    read: ReadOutput

    def run(self, reference: Rows) -> BatchDependence | None:
        """Try samples in other batches and confirm the greatest difference."""
        suspects: list[_Suspect] = []
        failed = True
        for trial in _trials(self.batch):
            with suppress(Exception):  # a model may need batches of one size
                outputs = self._outputs(self._forward(trial.batch), trial.batch)
                suspects += self._suspects(trial, reference, outputs)
                failed = False
        if failed:  # only neighbors at the same size can be tested
            suspects = [_Suspect(self.batch.size - 1, 0.0, large=False, padding=False)]
        for padding in (False, True):
            alike = [suspect for suspect in suspects if suspect.padding is padding]
            worst = max(alike, key=lambda s: (s.large, s.difference), default=None)
            if worst and (found := self._confirm(worst)):
                return found
        return None

    def _suspects(self, trial: _Trial, reference: Rows, outputs: Rows) -> Iterator[_Suspect]:
        kept = _tested_rows(self.batch)
        for name, rows in reference.items():
            scale, step = _scale(rows), self._step(rows)
            for index, row in enumerate(trial.rows):
                expected, actual = rows[kept.index(row)], outputs[name]
                if len(trial.rows) == 1 and actual.shape == expected.shape:
                    continue  # the model removes the batch dimension of a single sample
                if actual.shape[:1] != (len(trial.rows),):
                    yield _Suspect(row, math.inf, large=True, padding=False)
                    continue
                if trial.tokens is not None:
                    expected = _without_padding(expected, actual[index], trial)
                difference = _difference(expected, actual[index])
                if difference > step * scale:
                    large = difference > max(_LARGE, 10 * step) * scale
                    yield _Suspect(row, difference, large, padding=trial.tokens is not None)

    def _confirm(self, suspect: _Suspect) -> BatchDependence | None:
        """Decide whether a suspect depends on its batch, from runs of the same size."""
        row, size = suspect.row, self.batch.size
        first, again = self._record(self.batch, row), self._record(self.batch, row)
        if self._changes(first, again):
            return None  # its results are not repeatable
        sample = self.batch.ids[row]
        if suspect.padding:
            depends = suspect.large and not first.random
            masked = _mask(self.batch) is not None
            found = BatchDependence(sample, suspect.difference, padding=True, masked=masked)
            return found if depends else None
        other = self._record(self.batch.select([row] * size), row)
        changes = self._changes(first, other)
        if not changes and (first.random or not suspect.large):
            return None
        path, module = self._first_mixing_module(first, other) if changes else ("", None)
        dims = [self._equal_dims(first.outputs[name], other.outputs[name]) for name in changes]
        return BatchDependence(
            sample,
            max([suspect.difference, *changes.values()]),
            batch_dim=next((dim for equal in dims for dim in equal), None),
            module=module,
            path=path,
        )

    def _forward(self, batch: Batch) -> Any:
        seed_generators(self.config.run.seed, self.device)
        copy = batch.map(torch.clone)
        with preserve_module_state(self.model):
            return self.model(*copy.args, **copy.kwargs)

    def _outputs(self, returned: Any, batch: Batch) -> Rows:
        return _outputs_of(self.read(returned, batch.size), self.config)

    def _record(self, batch: Batch, row: int) -> _Recorded:
        paths = {module: path for path, module in self.model.named_modules()}
        calls: list[tuple[str, nn.Module, list[_Parts]]] = []

        def record(module: nn.Module, _: Any, returned: Any) -> None:
            if module in paths:
                parts = [_parts(tensor, batch.size, row) for _, tensor in iter_tensors(returned)]
                calls.append((paths[module], module, parts))

        with track_module_calls(lambda *_: None, record):
            returned = self._forward(batch)
        random = self._generator_state()
        seed_generators(self.config.run.seed, self.device)
        outputs = self._outputs(returned, batch)
        return _Recorded(
            {name: _parts(tensor, batch.size, row) for name, tensor in outputs.items()},
            calls,
            random=not torch.equal(random, self._generator_state()),
        )

    def _generator_state(self) -> torch.Tensor:
        cuda = self.device.type == "cuda"
        return torch.cuda.get_rng_state(self.device) if cuda else torch.get_rng_state()

    def _changes(self, one: _Recorded, other: _Recorded) -> dict[str, float]:
        """Return the differences of the sample's row that are not noise, by output."""
        rows = {
            name: (parts[0], other.outputs.get(name, {}).get(0))
            for name, parts in one.outputs.items()
            if 0 in parts
        }
        return {
            name: math.inf if after is None else _difference(before, after)
            for name, (before, after) in rows.items()
            if after is None or not self._equal(before, after)
        }

    def _equal_dims(self, one: _Parts, other: _Parts) -> list[int]:
        """Return the dimensions after the first whose part of the sample is unchanged."""
        return [
            dim
            for dim, part in one.items()
            if isinstance(dim, int) and dim and self._equal(part, other[dim])
        ]

    def _first_mixing_module(
        self, one: _Recorded, other: _Recorded
    ) -> tuple[str, nn.Module | None]:
        """Return the first module whose output changes for the sample in every layout."""
        for (path, module, before), (other_path, _, after) in zip(
            one.calls, other.calls, strict=False
        ):
            if path != other_path:
                break  # the calls depend on the data
            for parts, others in zip(before, after, strict=False):
                same_layouts = parts and parts.keys() == others.keys()
                if same_layouts and not any(self._equal(parts[k], others[k]) for k in parts):
                    return path, module
        return "", None

    def _equal(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        return _difference(one, other) <= self._step(one) * max(_scale(one), _scale(other))

    def _step(self, tensor: torch.Tensor) -> float:
        """Return the relative difference that rounding may cause; 0 for integers."""
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return 0.0
        weights = next((p.dtype for p in self.model.parameters()), tensor.dtype)
        autocast = getattr(torch, self.config.run.autocast or "float32")
        return max(_STEPS.get(dtype, _STEP) for dtype in (tensor.dtype, weights, autocast))


def _without_padding(expected: torch.Tensor, actual: torch.Tensor, trial: _Trial) -> torch.Tensor:
    """Select the tokens of a trial in each dimension that has one entry per token."""
    assert trial.tokens is not None
    if expected.ndim == actual.ndim:
        for dim, length in enumerate(expected.shape):
            if length == trial.padded and actual.shape[dim] == len(trial.tokens):
                expected = expected.index_select(dim, trial.tokens.to(expected.device))
    return expected


def _outputs_of(returned: Any, config: RunConfig) -> Rows:
    """Return the selected outputs that are dense tensors or values, as tensors."""
    wanted = () if config.output.decoder else config.output.select
    outputs = {
        name: column if isinstance(column, ValueColumn) else column.detach()
        for name, column in iter_columns(returned)
        if not wanted or name in wanted
        if isinstance(column, ValueColumn)
        or (column.layout == torch.strided and not column.is_nested)
    }
    return as_tensors(outputs)


def _parts(tensor: torch.Tensor, size: int, row: int) -> _Parts:
    """Return copies of the parts of a tensor that may belong to a row of a batch.

    The batch may be any of the first three dimensions, or the first dimension combines it with
    another, such as windows or tokens.
    """
    if tensor.layout != torch.strided or tensor.is_nested:
        return {}
    tensor = tensor.detach()
    parts: _Parts = {
        dim: tensor.select(dim, row).clone()
        for dim, length in enumerate(tensor.shape[:3])
        if length == size
    }
    if tensor.ndim and len(tensor) > size and len(tensor) % size == 0:
        count = len(tensor) // size
        parts["major"] = tensor[row * count : (row + 1) * count].clone()
        parts["minor"] = tensor[row::size].clone()
    return parts


def _scale(tensor: torch.Tensor) -> float:
    """Return the greatest finite magnitude of a tensor."""
    magnitudes = tensor.abs().nan_to_num(nan=0.0, posinf=0.0) if tensor.numel() else tensor
    return float(magnitudes.max()) if tensor.numel() else 0.0


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the greatest difference of the common part; infinite for NaN on one side only."""
    if one.ndim != other.ndim:
        return math.inf
    common = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
    kind = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
    one, other = one[common].cpu().to(kind), other[common].cpu().to(kind)
    if not one.numel():
        return 0.0
    same = (one == other) | (one.isnan() & other.isnan())
    difference = (one - other).abs().masked_fill(same, 0.0)
    return float(difference.nan_to_num(nan=math.inf, posinf=math.inf).max())
