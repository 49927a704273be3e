"""Run a million Parquet rows through a small model; print the resident set at each tenth in bytes.

bench.py runs this in a separate process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from pyarrow import parquet

import gradrun
from gradrun.core.progress import Progress

ROWS = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
FORMAT = sys.argv[3] if len(sys.argv) > 3 else "npy"
folder = Path(sys.argv[1])

file = folder / f"rows-{ROWS}.parquet"
if not file.exists():
    drawn = np.random.default_rng(0)
    with parquet.ParquetWriter(file, pa.schema({name: pa.float32() for name in "abcd"})) as out:
        for _ in range(0, ROWS, 100_000):  # in groups, like a table that does not fit into memory
            group = {
                name: drawn.normal(size=min(ROWS, 100_000)).astype(np.float32) for name in "abcd"
            }
            out.write_table(pa.table(group))

config = {
    "model": {"source": "layers", "layers": [{"Linear": [4, 3]}]},
    "data": {
        "source": "records",
        "path": str(file),
        "inputs": {"x": {"columns": list("abcd")}},
        "batch_size": 256,
    },
    "run": {"threads": 1},
    "output": {"path": str(folder / "out"), "format": FORMAT},
}
process, resident_sets = psutil.Process(), dict[int, int]()


def record(progress: Progress) -> None:
    """Record the resident set at each tenth."""
    if progress.total:  # not while the model and the data are opened
        tenth = 10 * progress.done // progress.total
        resident_sets.setdefault(tenth, process.memory_info().rss)


gradrun.infer(config, progress=record, overwrite=True)
resident_sets[10] = process.memory_info().rss
for tenth, resident in sorted(resident_sets.items()):
    print(tenth, resident)
