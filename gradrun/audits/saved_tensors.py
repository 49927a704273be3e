"""Bytes that autograd saves for the backward pass, per module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradrun.audits.target import AuditTarget
from gradrun.data.batch import Batch
from gradrun.inference.meters.cpu_memory import storages
from gradrun.inference.module_calls import track_module_calls
from gradrun.inference.module_state import preserve_module_state
from gradrun.output.transforms import iter_tensors
from gradrun.results.result import SavedForBackward

OUTPUTS = "(outputs)"


class _Saved:
    """A stand-in that the graph saves instead of a tensor; deleted with the graph's node."""

    def __init__(self, tensor: torch.Tensor, module: nn.Module | None) -> None:
        # Same storage without the graph: an operation that saves its own output would otherwise
        # form a reference cycle.
        self.tensor, self.module = tensor.detach(), module
        self.used = False

    def unpacked(self) -> torch.Tensor:
        """Return the tensor for a backward pass inside the forward."""
        self.used = True
        return self.tensor


def unused_saved_bytes(subject: AuditTarget) -> dict[str, int]:
    """Return the bytes that each module saves per batch for a backward pass that never runs.

    Modules that run a backward pass inside their forward are left out.
    """
    by_module: dict[str, int] = {}
    saved: list[_Saved] = []
    with preserve_module_state(subject.model), _packed(subject, saved.append) as batch:
        counted = _existing_storages(subject, batch)
        subject.run(batch)
    for one in saved:
        _count(subject, one, counted, by_module)
    for one in saved:
        if one.used and one.module is not None:
            by_module.pop(subject.label(one.module), None)
    return by_module


def saved_for_backward(subject: AuditTarget) -> tuple[SavedForBackward, ...]:
    """Return the bytes that the graph of one batch keeps alive per module, largest first.

    Storage shared by several modules counts once, for the first module that saved it. Parameters,
    buffers and inputs do not count. Further bytes of the outputs are listed as "(outputs)".
    """
    saved: list[weakref.ref[_Saved]] = []
    by_module: dict[str, int] = {}
    with preserve_module_state(subject.model):
        with _packed(subject, lambda one: saved.append(weakref.ref(one))) as batch:
            counted = _existing_storages(subject, batch)
            returned = subject.run(batch)
        for alive in filter(None, (reference() for reference in saved)):
            _count(subject, alive, counted, by_module)
        by_module[OUTPUTS] = sum(
            _new_bytes(tensor, counted) for _, tensor in iter_tensors(returned)
        )
    rows = sorted(by_module.items(), key=lambda row: -row[1])
    return tuple(SavedForBackward(module=module, bytes=count) for module, count in rows if count)


@contextmanager
def _packed(subject: AuditTarget, note: Callable[[_Saved], None]) -> Iterator[Batch]:
    """Call `note` for every tensor that is saved while the block runs; yield a batch to run."""
    with track_module_calls(lambda *_: None) as calls:

        def pack(tensor: torch.Tensor) -> _Saved:
            one = _Saved(tensor, calls.innermost)
            note(one)
            return one

        with torch.autograd.graph.saved_tensors_hooks(pack, _Saved.unpacked):
            yield subject.copy()


def _existing_storages(subject: AuditTarget, batch: Batch) -> set[int]:
    """Return the addresses of the storages that exist before the call."""
    tensors = [*batch.tensors(), *_tensors_of(subject.model)]
    return set(storages(tensors))


def _count(subject: AuditTarget, one: _Saved, counted: set[int], by_module: dict[str, int]) -> None:
    label = subject.label(subject.model if one.module is None else one.module)
    by_module[label] = by_module.get(label, 0) + _new_bytes(one.tensor, counted)


def _new_bytes(tensor: torch.Tensor, counted: set[int]) -> int:
    """Return the bytes of a tensor's storage and mark it counted; 0 if it was counted before."""
    new = {place: size for place, size in storages([tensor]).items() if place not in counted}
    counted.update(new)
    return sum(new.values())


def _tensors_of(model: nn.Module) -> list[torch.Tensor]:
    found: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        found += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return [tensor for tensor in found if not nn.parameter.is_lazy(tensor)]
