"""A multilayer perceptron with little arithmetic per layer, to measure overhead."""

from __future__ import annotations

import torch
from torch import nn


class Mlp(nn.Module):
    """`depth` pairs of Linear and ReLU of equal width; input and output [N, width]."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Three activations are alive at once here: input, Linear and ReLU. An nn.Sequential would
        # have two, because it releases the input between Linear and ReLU.
        for linear in self.linears:
            x = torch.relu(linear(x))
        return x


def build(width: int = 64, depth: int = 8) -> nn.Module:
    """Return the perceptron with random weights."""
    return Mlp(width, depth)
