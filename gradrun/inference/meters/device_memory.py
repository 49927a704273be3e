"""Peak memory of a device, read from its allocator. The CPU is measured in cpu_memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradrun.inference.meters.timeline import Forward


def forward_memory(call: Callable[[], Any], model: nn.Module | None = None) -> Forward:
    """Run `call` once and read CUDA's allocator before and after.

    Returns:
        Peak and retained bytes above the level before the call. The allocator counts in blocks of
        512 bytes (PyTorch documentation, "CUDA semantics", memory management) and has no timeline.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = call()
    torch.cuda.synchronize()
    peak, live = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del returned
    return Forward(peak - before, live - before)


def reset(device: torch.device) -> None:
    """Restart the peak counters, if the device has any."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> tuple[int | None, int | None]:
    """Return (allocated, reserved) peak bytes since reset(); None if the device has no counter.

    The reserved peak includes the pool's size at reset(), for example after warm-up. MPS counts no
    peaks; its driver's current allocation is used for the pool.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return None, torch.mps.driver_allocated_memory()
    return None, None
