"""A model whose parts have known costs, for profile_bench.py."""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch import nn

clock = time.perf_counter_ns
times_of_parts: list[list[int]] = []
"""The time of each part in each forward pass of any Planted, in the units of `clock`."""


class Sleeps(nn.Module):
    """Sleeps for 5 ms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        return x


class Multiplies(nn.Module):
    """Multiplies matrices a number of times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.weight = times, nn.Parameter(torch.eye(256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = x @ self.weight
        return x


class Streams(nn.Module):
    """Reads and writes 64 MiB, which no cache keeps."""

    memory: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(16 * 1024 * 1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.memory.neg_()
        return x


class Planted(nn.Module):
    """Runs its parts one after the other, and notes the time of each."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeps, self.once, self.ten, self.streams = (
            Sleeps(), Multiplies(2), Multiplies(20), Streams(),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        times = [clock()]
        for part in (self.sleeps, self.once, self.ten, self.streams):
            x = part(x)
            times.append(clock())
        times_of_parts.append([b - a for a, b in pairwise(times)])
        return x
