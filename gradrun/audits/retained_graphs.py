"""Graphs that outlive a call: outputs that keep one, and memory that grows with every batch.

Knows outputs and the memory meter; not which module saved what (saved.py does).
"""

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
"""Batches that may fill caches, and batches that must not hold on to anything."""

_MANY, _PATIENCE = 64, 2.0
"""Batches, or seconds, after which one that still leaves memory behind is no cache."""


def kept_graphs(subject: AuditTarget) -> Iterable[Finding]:
    """Outputs that hold a graph, with all that it needs, where nobody asked for one."""
    if subject.mode is GradMode.GRAD:
        return
    batch = subject.copy()
    with preserve_module_state(subject.model):
        returned = subject.run(batch)
        # A parameter that is returned as it is requires grad and has no graph.
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
        text=f"{listed} keeps its graph as long as it lives, and with it what backward needs"
        + (f": {format_bytes(retained)}" if retained else ""),
        advice="Find the block that turns gradients on, or detach() what is returned",
        cost=retained,
    )


def growth(subject: AuditTarget) -> Iterable[Finding]:
    """Bytes that stay behind with every batch, though nobody holds its outputs."""
    meter = FORWARD_MEMORY.get(subject.device.type)
    if meter is None:
        return
    before = {}
    left = []
    with preserve_module_state(subject.model):
        for number in range(_SETTLING + _WATCHED):
            if number == _SETTLING:
                before = dict(_held(subject))
            batch = subject.copy(number)
            left.append(meter(lambda batch=batch: _dropped(subject, batch)).retained)  # type: ignore[misc]
        after = dict(_held(subject))
        grown = [path for path, held in after.items() if held > before.get(path, 0)]
        lost = min(left[_SETTLING:])
        grows = lost > 0 and _goes_on(subject, meter, lost)
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
        text=f"Keeps {format_bytes(lost)} of every batch, {where}: a long run ends out of memory",
        advice="Keep numbers, not tensors: .item(), or .detach().cpu() where the tensor is needed",
        cost=lost,
    )


def _goes_on(subject: AuditTarget, meter: ForwardMeter, lost: int) -> bool:
    """Whether as much is left behind by each of many batches: a cache of bounded size fills up.

    In one go, since the meter does not see that a block is freed which is older than its look.
    """
    done = 0

    def many() -> None:
        nonlocal done
        deadline = time.monotonic() + _PATIENCE
        while done < _MANY and (done < 2 * _WATCHED or time.monotonic() < deadline):
            _dropped(subject, subject.copy(done))
            done += 1

    return meter(many).retained > 0.9 * lost * done


def _dropped(subject: AuditTarget, batch: Any) -> None:
    """Run, and let go of the outputs, cycles included."""
    subject.run(batch)
    gc.collect(1)  # what the call made is young; a full collection walks all of torch


def _held(subject: AuditTarget) -> Iterator[tuple[str, int]]:
    """Bytes of the tensors, graphs apart, in each plain attribute of each module."""
    for name, module in subject.model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in TABLES:
                continue
            values = (
                value if isinstance(value, list | tuple | dict | torch.Tensor) else _items(value)
            )
            held = cpu_memory.storage_bytes(t for _, t in iter_tensors(values))
            if held:
                yield f"{name}.{attribute}" if name else attribute, held


def _items(value: Any) -> list[Any]:
    """What a deque or a set holds."""
    from collections import deque

    return list(value) if isinstance(value, deque | set | frozenset) else []
