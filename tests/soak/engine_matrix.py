"""Run every output format over every data source on 1, 2 and 4 workers, and compare SHA-256.

Prints one line per cell, and ends with exit code 1 if a file differs from that of one process.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import gradrun
from gradrun.engines import dispatch
from tests.support.engine_runs import COUNT, DATA, FORMATS, config_for, write_inputs

SOURCES = [*DATA, "parquet"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--sources", nargs="*", default=SOURCES)
    arguments = parser.parse_args()
    # A worker of a small run would do everything while the others start.
    dispatch.SPAN_SECONDS = 0.0
    cells = different = 0
    with tempfile.TemporaryDirectory(prefix="gradrun-soak-") as name:
        folder = Path(name)
        write_inputs(folder)
        values = np.random.default_rng(0).normal(size=(COUNT, 3)).astype(np.float32)
        columns = {name: values[:, column] for column, name in enumerate("abc")}
        pq.write_table(pa.table(columns), folder / "x.parquet", row_group_size=16)
        for source in arguments.sources:
            for form in FORMATS:
                found = {
                    workers: _checksums(_config(source, folder, folder / "out", form), workers)
                    for workers in [0, *arguments.workers]
                }
                equal = all(found[0] and found[workers] == found[0] for workers in found)
                cells, different = cells + 1, different + (not equal)
                text = f"equal {min(found[0].values())}" if equal else f"DIFFERENT {found}"
                print(f"{source} to {form}: {text}", flush=True)
    print(f"{cells} cells on {arguments.workers} workers, {different} different")
    return int(different > 0)


def _config(source: str, inputs: Path, folder: Path, form: str) -> dict[str, Any]:
    if source != "parquet":
        return config_for(source, inputs, folder, form)
    config = config_for("csv", inputs, folder, form)
    config["data"]["path"] = str(inputs / "x.parquet")
    return config


def _checksums(config: dict[str, Any], workers: int) -> dict[str, str]:
    """Run a config on some workers, or in this process; return the SHA-256 of its predictions."""
    if workers:
        config["engine"] = {"source": "processes", "workers": workers}
    gradrun.infer(config, overwrite=True)
    folder = Path(config["output"]["path"])
    files = (path for path in folder.rglob("predictions*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


if __name__ == "__main__":
    sys.exit(main())
