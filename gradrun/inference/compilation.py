"""Detect models that torch.compile compiles, and count the graphs that it compiled."""

from __future__ import annotations

import sys

from torch import nn


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model, or a module in it, runs through torch.compile."""
    return any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )


def compiled_graphs() -> int:
    """Return the number of graphs that torch.compile has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # imported by the first compilation
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0
