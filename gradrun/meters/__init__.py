"""Meters: each measures one thing about a run and knows nothing of the others.

clock (time), tensors (bytes of tensors), process (resident set), accelerator (device memory).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradrun.meters import accelerator, tensors

FORWARD_MEMORY: dict[str, Callable[[Callable[[], Any]], tuple[int, int]]] = {
    "cpu": tensors.forward_memory,
    "cuda": accelerator.forward_memory,
}
"""device type -> meter: runs a call once and gives (peak, retained) in bytes above the start.

MPS is not here: it keeps no peak.
"""
