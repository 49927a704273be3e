"""A plain multilayer perceptron, the network that measurements of overhead are made with.

It knows no weights: whoever builds it seeds them or loads them.
"""

from __future__ import annotations

import torch
from torch import nn


class Mlp(nn.Module):
    """`depth` times (Linear, ReLU), all of one width; input and output [N, width]."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Input, Linear and ReLU are alive at once here: three activations without gradients, where
        # an nn.Sequential, which drops its input between the two, would hold two.
        for linear in self.linears:
            x = torch.relu(linear(x))
        return x


def build(width: int = 64, depth: int = 8) -> nn.Module:
    """The perceptron, with random weights."""
    return Mlp(width, depth)
