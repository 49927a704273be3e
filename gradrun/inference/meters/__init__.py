"""Meters: each measures one quantity of a run.

clock (time on the host or the device), cpu_memory (bytes of tensors), device_memory (the CUDA and
MPS allocators), process_memory (resident set), system_load (other processes), timeline (the result
of a memory meter).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gradrun.data.batch import Batch
from gradrun.inference.meters import cpu_memory, device_memory
from gradrun.inference.meters.timeline import Forward
from gradrun.inference.module_state import preserve_module_state
from gradrun.results.result import Memory

ForwardMeter = Callable[..., Forward]
"""(call, model=None) -> memory of the call, with the name of the module of `model` at the peak."""

FORWARD_MEMORY: dict[str, ForwardMeter] = {
    "cpu": cpu_memory.forward_memory,
    "cuda": device_memory.forward_memory,
}
"""Device type -> meter of a forward pass's memory. MPS is missing because it counts no peak."""


def model_memory(model: nn.Module, batch: Batch) -> Memory:
    """Return the bytes of a model's weights and of a batch, without running the model."""
    return Memory(
        weights=cpu_memory.weight_bytes(model), inputs=cpu_memory.storage_bytes(batch.tensors())
    )


def measure_forward_memory(model: nn.Module, batch: Batch, device: torch.device) -> Memory:
    """Run one forward pass and measure its memory in bytes.

    Buffers and attributes of the model are restored. Call this inside the execution context. The
    model may write into `batch`, so pass a copy.

    Returns:
        Weights and inputs; forward peak, retained bytes, timeline and peak module too if the
        device has a meter.
    """
    memory, meter = model_memory(model, batch), FORWARD_MEMORY.get(device.type)
    if meter is None:
        return memory
    with preserve_module_state(model):
        forward = meter(lambda: model(*batch.args, **batch.kwargs), model)
    return memory.replace(
        shape=batch.shape,
        forward_peak=forward.peak,
        retained=forward.retained,
        timeline=forward.timeline,
        peak_module=forward.peak_module,
    )
