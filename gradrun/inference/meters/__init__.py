"""Meters: each measures one thing about a run and knows nothing of the others.

clock (time), tensors (bytes of tensors), forward (what is told of them), process (resident set),
accelerator (device memory).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from gradrun.inference.meters import cpu_memory, device_memory
from gradrun.inference.meters.timeline import Forward


class ForwardMeter(Protocol):
    """Runs a call once and tells what it took; names the modules of `model`, where it can."""

    def __call__(self, call: Callable[[], Any], model: nn.Module | None = None) -> Forward: ...


FORWARD_MEMORY: dict[str, ForwardMeter] = {
    "cpu": cpu_memory.forward_memory,
    "cuda": device_memory.forward_memory,
}
"""device type -> meter of a forward pass's memory above the start.

MPS is not here: it keeps no peak.
"""
