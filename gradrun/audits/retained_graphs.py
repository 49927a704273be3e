"""Detect autograd graphs that outlive a call, and memory that grows with every batch."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gradrun.audits.target import AuditTarget, source_of
from gradrun.core.grad_mode import GradMode
from gradrun.core.units import format_bytes
from gradrun.inference.meters import FORWARD_MEMORY, ForwardMeter, cpu_memory
from gradrun.inference.module_state import TABLES, preserve_module_state
from gradrun.output.transforms import iter_tensors
from gradrun.results.result import Finding

_SETTLING, _WATCHED = 2, 3
"""Batches that may fill caches, then batches that must not retain memory."""

_MANY, _PATIENCE = 64, 2.0
"""Batches, or seconds, after which continued growth is not a cache."""


def retained_graphs(subject: AuditTarget) -> Iterable[Finding]:
    """Report outputs that keep an autograd graph alive in a mode without gradients."""
    if subject.mode is GradMode.GRAD:
        return
    batch = subject.copy()
    with preserve_module_state(subject.model):
        returned = subject.run(batch)
        # A parameter returned unchanged requires grad, but has no graph.
        names = [name for name, tensor in iter_tensors(returned) if tensor.grad_fn is not None]
        del returned
    if not names:
        return
    meter = FORWARD_MEMORY.get(subject.device.type)
    retained = None
    if meter:
        with preserve_module_state(subject.model):
            retained = meter(lambda: subject.run(batch))[1]
    listed = ", ".join(names) if len(names) > 1 or names[0] != "0" else "The output"
    yield Finding(
        severity="warning",
        code="keeps_graph",
        modes=(subject.mode,),
        module=subject.label(subject.model),
        source=source_of(subject.model),
        text=f"{listed} keeps its autograd graph and the tensors saved for backward alive"
        + (f": {format_bytes(retained)}" if retained else ""),
        advice="Remove the block that enables gradients, or detach() the output",
        cost=retained,
    )


def memory_growth(subject: AuditTarget) -> Iterable[Finding]:
    """Report memory that remains allocated after each batch although its outputs are deleted."""
    meter = FORWARD_MEMORY.get(subject.device.type)
    if meter is None:
        return
    before: dict[str, int] = {}
    remaining = []
    with preserve_module_state(subject.model):
        for number in range(_SETTLING + _WATCHED):
            if number == _SETTLING:
                before = dict(_attribute_bytes(subject))
            batch = subject.copy(number)
            remaining.append(meter(lambda batch=batch: _run_and_discard(subject, batch)).retained)
        after = dict(_attribute_bytes(subject))
        grown = [path for path, size in after.items() if size > before.get(path, 0)]
        lost = min(remaining[_SETTLING:])
        grows = lost > 0 and _keeps_growing(subject, meter, lost)
    if not grows:
        return
    path = grown[0] if grown else ""
    owner = dict(subject.model.named_modules())[path.rpartition(".")[0]]
    where = f"in {path}" if path else "outside the model's attributes"
    yield Finding(
        severity="error",
        code="memory_grows",
        modes=(subject.mode,),
        module=subject.label(owner),
        source=source_of(owner),
        text=f"Retains {format_bytes(lost)} of every batch {where}; a long run will run out of "
        "memory",
        advice="Store numbers instead of tensors (.item()), or .detach().cpu() copies",
        cost=lost,
    )


def _keeps_growing(subject: AuditTarget, meter: ForwardMeter, lost: int) -> bool:
    """Return whether many batches retain as much each; a cache of bounded size fills up.

    All batches run within one measurement, because the meter misses the release of a block that
    was allocated before it started.
    """
    done = 0

    def many() -> None:
        nonlocal done
        deadline = time.monotonic() + _PATIENCE
        while done < _MANY and (done < 2 * _WATCHED or time.monotonic() < deadline):
            _run_and_discard(subject, subject.copy(done))
            done += 1

    return meter(many).retained > 0.9 * lost * done


def _run_and_discard(subject: AuditTarget, batch: Any) -> None:
    """Run the model and delete its outputs, including reference cycles."""
    subject.run(batch)
    gc.collect(1)  # the outputs are young objects; a full collection visits all of torch


def _attribute_bytes(subject: AuditTarget) -> Iterator[tuple[str, int]]:
    """Yield "path.attribute" and tensor bytes of each plain attribute of each module."""
    for name, module in subject.model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in TABLES:
                continue
            values = (
                value if isinstance(value, list | tuple | dict | torch.Tensor) else _items(value)
            )
            size = cpu_memory.storage_bytes(t for _, t in iter_tensors(values))
            if size:
                yield f"{name}.{attribute}" if name else attribute, size


def _items(value: Any) -> list[Any]:
    """Return the items of a deque or set; empty for other types."""
    from collections import deque

    return list(value) if isinstance(value, deque | set | frozenset) else []
