"""Measure the memory of a run over many shards, in each tenth of the run.

Ends with exit code 1 if the resident memory is larger in the last tenth than in the second one by
more than 5 % and 16 MiB.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

import gradrun
from gradrun.core.progress import Progress

MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=300, help="rows of each shard")
    arguments = parser.parse_args()
    process = psutil.Process()
    peaks = [0] * 10
    """Bytes, by tenth of the samples."""

    def watch(progress: Progress) -> None:
        if progress.total:
            tenth = min(9, 10 * progress.done // progress.total)
            peaks[tenth] = max(peaks[tenth], process.memory_info().rss)

    with tempfile.TemporaryDirectory(prefix="gradrun-soak-") as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        rows = np.random.default_rng(0).normal(size=(arguments.rows, 64)).round(3).tolist()
        for number in range(arguments.shards):
            lines = (json.dumps({"key": f"{number}-{at}", "x": row}) for at, row in enumerate(rows))
            content = gzip.compress("\n".join(lines).encode(), 1)
            (folder / "shards" / f"part-{number}.jsonl.gz").write_bytes(content)
        config = {
            "model": {"source": "layers", "layers": [{"Linear": [64, 32]}]},
            "data": {
                "source": "records",
                "path": str(folder / "shards"),
                "id": "key",
                "inputs": {"x": {"columns": ["x"]}},
            },
            "run": {"threads": 1},
            "output": {"path": str(folder / "out"), "format": "jsonl"},
            "measure": {"memory": False},
        }
        began = time.monotonic()
        result = gradrun.infer(config, progress=watch)
    seconds = time.monotonic() - began
    listed = " ".join(f"{peak / MIB:.0f}" for peak in peaks)
    print(f"{result.predictions:,} rows of {arguments.shards:,} shards in {seconds:.0f} s")
    print(f"resident memory by tenth of the run, in MiB: {listed}")
    growth = peaks[-1] - peaks[1]
    return int(growth > max(0.05 * peaks[1], 16 * MIB))


if __name__ == "__main__":
    sys.exit(main())
