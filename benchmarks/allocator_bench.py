"""`run.allocator: retain` against `system`, in pairs of fresh processes that alternate.

For each model: the ratio of the times with its 95 % interval over pairs, the ratio of the process
peaks, and whether the predictions have the same SHA-256. Close other programs first; `--pairs 10`
takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from gradrun.results import stats

ROOT = Path(__file__).resolve().parents[1]

_RUN = """
import json, sys, gradrun
result = gradrun.infer(json.loads(sys.argv[1]), overwrite=True)
m = result.measurements[0]
print(json.dumps({
    "batch": sorted(m.batch_seconds)[len(m.batch_seconds) // 2],
    "peak": m.memory.process_peak,
    "allocator": result.environment.allocator,
}))
"""


def _synthetic(shape: list[int], samples: int, batch: int) -> dict[str, Any]:
    inputs = {"x": {"shape": shape}}
    return {"source": "synthetic", "inputs": inputs, "samples": samples, "batch_size": batch}


def _zoo(name: str) -> dict[str, Any]:
    return {"source": "zoo", "name": name}


# The shape of the sentence encoder MiniLM: 6 layers of 384, 12 heads.
_MINILM = {
    "source": "zoo",
    "name": "transformer_encoder",
    "args": {"d_model": 384, "heads": 12, "layers": 6, "feedforward": 1536},
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mlp b8": (_zoo("mlp"), _synthetic([64], 8 * 2000, 8)),
    "digits_cnn b8": (_zoo("digits_cnn"), _synthetic([1, 8, 8], 8 * 1000, 8)),
    "resnet18 b8": (_zoo("resnet18"), _synthetic([3, 224, 224], 8 * 25, 8)),
    "encoder b16": (_zoo("transformer_encoder"), _synthetic([128, 256], 16 * 25, 16)),
    "minilm b32": (_MINILM, _synthetic([128, 384], 32 * 12, 32)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--models", default="", help="parts of names, separated by commas")
    options = parser.parse_args()
    table = Table("model", "pairs", "ratio", "95 % interval", "peak ratio", "same bytes", "batch")
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, data) in MODELS.items():
            if not any(part in name for part in options.models.split(",")):
                continue
            rows = [_pair(Path(folder), model, data, pair) for pair in range(options.pairs)]
            ratios = [system["batch"] / retain["batch"] for system, retain in rows]
            estimate = stats.mean_over_processes(ratios)
            peaks = median(retain["peak"] / system["peak"] for system, retain in rows)
            same = all(system["sha256"] == retain["sha256"] for system, retain in rows)
            table.add_row(
                name,
                str(len(rows)),
                f"{median(ratios):.3f}",
                f"{estimate.low:.3f} to {estimate.high:.3f}",
                f"{peaks:.3f}",
                "yes" if same else "NO",
                f"{1e3 * median(retain['batch'] for _, retain in rows):.3g} ms",
            )
            print(name, [round(ratio, 3) for ratio in ratios], file=sys.stderr)
    Console().print(table)


def _pair(
    folder: Path, model: dict[str, Any], data: dict[str, Any], number: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    order = ["system", "retain"] if number % 2 else ["retain", "system"]
    found = {allocator: _run(folder, model, data, allocator) for allocator in order}
    assert found["retain"]["allocator"] == "retain", found["retain"]["allocator"]
    return found["system"], found["retain"]


def _run(
    folder: Path, model: dict[str, Any], data: dict[str, Any], allocator: str
) -> dict[str, Any]:
    config = {
        "model": model,
        "data": data,
        "run": {"allocator": allocator},
        "measure": {"memory": False, "batch_independence": False},
        "output": {"path": str(folder / "run"), "examples": 0},
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps(config)],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    written = folder / "run" / "predictions.npy"
    return json.loads(done.stdout) | {"sha256": hashlib.sha256(written.read_bytes()).hexdigest()}


if __name__ == "__main__":
    main()
