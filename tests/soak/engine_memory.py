"""Measure the memory of a driver that must wait for one slow worker.

Prints its largest resident memory in each tenth of the run. Ends with exit code 1 if it is larger
in the last tenth than in the second one by more than 5 % and 16 MiB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

import gradrun
from gradrun.core.progress import Progress

MIB = 2**20

NET = """
import os, sys, time
from pathlib import Path
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slow = False
        if any("gradrun.engines.worker" in word for word in sys.orig_argv):
            try:  # the first worker is the slow one
                Path(__file__).with_name("slow").touch(exist_ok=False)
                self.slow = True
            except FileExistsError:
                pass

    def forward(self, x):
        time.sleep(0.01 if self.slow else 0.001)
        return x * 2
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    process = psutil.Process()
    peaks = [0] * 10
    """Bytes, by tenth of the samples."""

    def watch(progress: Progress) -> None:
        if progress.total and progress.workers:
            tenth = min(9, 10 * progress.done // progress.total)
            peaks[tenth] = max(peaks[tenth], process.memory_info().rss)

    with tempfile.TemporaryDirectory(prefix="gradrun-soak-") as name:
        folder = Path(name)
        (folder / "net.py").write_text(NET)
        rows = np.lib.format.open_memmap(
            folder / "x.npy", mode="w+", dtype=np.float32, shape=(arguments.rows, 4)
        )
        rows[:] = np.arange(arguments.rows, dtype=np.float32)[:, None]
        del rows
        config = {
            "model": {"source": "python", "target": str(folder / "net.py") + ":Net"},
            "data": {
                "source": "arrays",
                "path": str(folder / "x.npy"),
                "batch_size": arguments.batch_size,
            },
            "run": {"threads": 1},
            "output": {"path": str(folder / "out")},
            "measure": {"memory": False},
            "engine": {"source": "processes", "workers": arguments.workers},
        }
        began = time.monotonic()
        result = gradrun.infer(config, trust_code=True, progress=watch)
        seconds = time.monotonic() - began
        written = np.load(folder / "out" / "predictions.npy", mmap_mode="r")
        equal = bool((written[:, 3] == 2 * np.arange(arguments.rows, dtype=np.float32)).all())
    for tenth, peak in enumerate(peaks):
        print(f"{10 * tenth} to {10 * tenth + 10} %: {peak / MIB:.0f} MiB")
    for worker in result.measurements[0].workers:
        print(f"worker {worker.worker}: {worker.samples:,} samples in {worker.busy:.0f} s")
    if not all(peaks):
        print("too few rows: a tenth passed between two looks")
        return 1
    flat = peaks[9] <= 1.05 * peaks[1] + 16 * MIB
    print(
        f"{arguments.rows:,} rows in {seconds:.0f} s; predictions {'' if equal else 'NOT '}equal; "
        f"memory {'flat' if flat else 'GROWS'}"
    )
    return int(not (flat and equal))


if __name__ == "__main__":
    sys.exit(main())
