"""Measure gradrun.infer with a module and an array in memory against a loop by hand.

Interleaved in one process; prints the median of the paired ratios and their quartiles. Limit: 1.10.
"""

from __future__ import annotations

import sys
import time
from statistics import quantiles

import numpy as np
import torch
from torch import nn

import gradrun

LIMIT = 1.10
ROUNDS = 15
SAMPLES = 400_000
BATCH = 64


def main() -> int:
    """Run the benchmark; return 1 if the limit is exceeded."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    ).eval()
    rows = np.random.default_rng(0).normal(size=(SAMPLES, 64)).astype(np.float32)
    ratios = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        expected = loop(net, rows)
        by_hand = time.perf_counter() - began
        began = time.perf_counter()
        found = gradrun.infer(model=net, data=rows, mode="inference_mode", batch_size=BATCH)
        ratios.append((time.perf_counter() - began) / by_hand)
        np.testing.assert_array_equal(found.predictions["prediction"], expected)
    low, middle, high = quantiles(ratios)
    print(f"gradrun.infer / loop by hand: {middle:.3f} ({low:.3f} to {high:.3f}), limit {LIMIT}")
    return int(middle > LIMIT)


def loop(net: nn.Module, rows: np.ndarray) -> np.ndarray:
    """Return the outputs [samples, 10] of a loop without gradrun."""
    with torch.inference_mode():
        outputs = [net(batch) for batch in torch.from_numpy(rows).split(BATCH)]
    return torch.cat(outputs).numpy()


if __name__ == "__main__":
    sys.exit(main())
