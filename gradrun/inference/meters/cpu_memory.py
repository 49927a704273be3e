"""Bytes of tensors, exact: of a module's weights, a batch, and a forward pass on the CPU.

Knows torch's allocation events; it slows what it measures, so it never runs in a timed pass.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn
from torch.autograd import profiler as torch_profiler
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from gradrun.inference.meters.timeline import Forward, thinned

_MARK = "gradrun module "


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a module, shared storage counted once."""
    return storage_bytes([*module.parameters(), *module.buffers()])


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind some tensors, each piece counted once."""
    return sum(storages(tensors).values())


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address to size in bytes of each piece of memory behind some tensors."""
    found = {}
    for tensor in tensors:
        for part in _strided(tensor):
            found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return found


def _strided(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that one is made of: of a sparse one its indices and values."""
    match tensor.layout:
        case torch.strided:
            return [tensor]
        case torch.sparse_coo:
            return [tensor._indices(), tensor._values()]
        case torch.sparse_csr | torch.sparse_bsr:
            return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        case torch.sparse_csc | torch.sparse_bsc:
            return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
        case _:
            return []  # memory of another library, which torch does not tell of


def forward_memory(call: Callable[[], Any], model: nn.Module | None = None) -> Forward:
    """Run `call` once and count what it allocates on the CPU.

    Args:
        call: runs the forward pass.
        model: whose modules are to be named at the peak.

    Returns:
        The most bytes that were live at once, and what is still live when the call has returned
        and its result is held; both above what was live before. The sizes are those of torch's
        allocator events, which are the tensors' own.
    """
    # torch leaves its profiler without types.
    profiler: Any = torch_profiler.profile(use_cpu=True, profile_memory=True, acc_events=False)
    # Quiet for the call as well: torch's allocator reports each older block that it frees.
    with _quiet_stderr(), _marked(model) as labels, profiler:
        returned = call()
    live, timeline, running = 0, [0], -1
    peak, at_peak = 0, -1
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        name = event.name()
        if name.startswith(_MARK):
            running = int(name.removeprefix(_MARK))
        elif name == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU:
            live += event.nbytes()
            timeline.append(live)
            if live > peak:
                peak, at_peak = live, running
    del returned
    return Forward(peak, live, thinned(timeline), labels[at_peak] if at_peak >= 0 else None)


@contextmanager
def _marked(model: nn.Module | None) -> Iterator[list[str]]:
    """Mark in the profile where each module's forward begins and ends.

    A mark is an event named for the place, in the list that this yields, of the module that runs
    from there on; -1 where none does. A compiled model would be compiled anew for the hooks, and
    allocate meanwhile, so it stays unmarked.

    The hooks are the process's, not the modules': nn.TransformerEncoderLayer leaves its fused path
    when a module of its own has hooks.
    """
    if model is None or any("_orig_mod" in part._modules for part in model.modules()):
        yield []
        return
    named = [(module, name or "(the model)") for name, module in model.named_modules()]
    places = {id(module): place for place, (module, _) in enumerate(named)}
    under_way = [-1]

    def mark() -> None:
        with torch_profiler.record_function(f"{_MARK}{under_way[-1]}"):
            pass

    def entered(module: nn.Module, _: Any) -> None:
        if (place := places.get(id(module))) is not None:
            under_way.append(place)
            mark()

    def left(module: nn.Module, *_: Any) -> None:
        # A forward that raised, and was caught further out, has left no word.
        if (place := places.get(id(module))) in under_way:
            while under_way.pop() != place:
                pass
            mark()

    hooks = [register_module_forward_pre_hook(entered), register_module_forward_hook(left)]
    try:
        yield [f"{name} ({type(module).__name__})" for module, name in named]
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep kineto's C++ log lines from the user's terminal.

    KINETO_LOG_LEVEL would do, but is read when torch is imported, which may be long ago.
    """
    try:
        kept = os.dup(2)
    except OSError:  # a process without stderr has nothing to keep clean
        yield
        return
    if sys.stderr:
        sys.stderr.flush()
    void = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(void, 2)
        with _python_keeps(kept):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(void)


@contextmanager
def _python_keeps(descriptor: int) -> Iterator[None]:
    """Let Python's own stderr write to a descriptor: what a model says is not torch's to drop."""
    try:
        ours = sys.stderr is not None and sys.stderr.fileno() == 2
    except (OSError, ValueError):  # a notebook's or a test's, which has no descriptor
        ours = False
    if not ours:
        yield
        return
    with open(descriptor, "w", closefd=False) as stream, redirect_stderr(stream):
        yield
