"""Peak memory of the device, as its own allocator counts it.

Knows CUDA's and MPS's counters; the CPU has none here (meters/tensors.py counts its tensors).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradrun.inference.meters.timeline import Forward


def forward_memory(call: Callable[[], Any], model: nn.Module | None = None) -> Forward:
    """Run `call` once and read CUDA's allocator around it.

    Returns:
        Peak and retained bytes above what was live before; the allocator counts in blocks of 512
        bytes (PyTorch documentation, "CUDA semantics", memory management) and keeps no timeline.
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
    """Begin to count the peak anew, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> tuple[int | None, int | None]:
    """(allocated, reserved) in bytes since reset(); None where the device does not say.

    What is reserved counts from the pool's size at reset(): warming up may have filled it. MPS
    keeps no peaks; what its driver holds at the end stands for the pool's.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return None, torch.mps.driver_allocated_memory()
    return None, None
