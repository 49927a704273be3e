"""Exact bytes of tensors on the CPU: weights, batches and the allocations of a forward pass.

Profiling slows the forward down, so it never runs in the timed pass.
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

from gradrun.inference.meters.timeline import Forward, downsample
from gradrun.inference.module_calls import track_module_calls

_MARK = "gradrun module "


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers; shared storage counts once."""
    return storage_bytes([*module.parameters(), *module.buffers()])


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages of some tensors; each storage counts once."""
    return sum(storages(tensors).values())


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the address and size in bytes of each storage of some tensors."""
    sizes = {}
    for tensor in tensors:
        for part in _strided_parts(tensor):
            sizes[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sizes


def _strided_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the strided tensors of a tensor: for sparse layouts the indices and values."""
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
            return []  # memory of another library, which torch does not expose


def forward_memory(call: Callable[[], Any], model: nn.Module | None = None) -> Forward:
    """Run `call` once and count its allocations on the CPU.

    Args:
        call: runs the forward pass.
        model: the model whose modules are candidates for the peak module.

    Returns:
        The peak of live bytes, and the bytes that are live after the call together with its
        output, both above the level before the call. Sizes come from torch's allocation events,
        which are the sizes of the tensors.
    """
    profile: Any = torch_profiler.profile  # not typed in torch
    profiler = profile(use_cpu=True, profile_memory=True, acc_events=False)
    # stderr stays quiet during the call: torch's allocator logs each older block that is freed.
    with quiet_stderr(), _module_marks(model) as labels, profiler:
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
    return Forward(peak, live, downsample(timeline), labels[at_peak] if at_peak >= 0 else None)


@contextmanager
def _module_marks(model: nn.Module | None) -> Iterator[list[str]]:
    """Add an event to the profile whenever the running module changes.

    The event's name ends in the index of the module in the yielded list of labels, or in -1
    outside the model. A compiled model gets no marks, because the hooks would recompile it and the
    compiler's allocations would be counted.
    """
    if model is None or any("_orig_mod" in part._modules for part in model.modules()):
        yield []
        return
    named = [(module, name or "(the model)") for name, module in model.named_modules()]
    indices = {module: index for index, (module, _) in enumerate(named)}

    def mark(index: int) -> None:
        with torch_profiler.record_function(f"{_MARK}{index}"):
            pass

    def running() -> int:
        return stack.calls[-1][1] if stack.calls else -1

    def enter(module: nn.Module, _: Any) -> int:
        index = indices.get(module, running())  # other modules count for the module around them
        mark(index)
        return index

    with track_module_calls(enter, lambda *_: mark(running())) as stack:
        yield [f"{name} ({type(module).__name__})" for module, name in named]


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop the log lines of kineto's C++ code, and nothing that Python writes.

    KINETO_LOG_LEVEL is not an option, because torch reads it only on import.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # the process has no stderr
        yield
        return
    if sys.stderr:
        sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        with _python_stderr_to(stderr):
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


@contextmanager
def _python_stderr_to(descriptor: int) -> Iterator[None]:
    """Redirect sys.stderr to a descriptor, if it writes to descriptor 2."""
    try:
        redirect = sys.stderr is not None and sys.stderr.fileno() == 2
    except (OSError, ValueError):  # a notebook's or a test's stream without a descriptor
        redirect = False
    if not redirect:
        yield
        return
    with open(descriptor, "w", closefd=False) as stream, redirect_stderr(stream):
        yield
