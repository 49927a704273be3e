"""`gradrun tune` on five models: the confirmed ratio, and fresh comparisons that must contain it.

Each row starts from eager float32 in inference_mode with the system's allocator. `--rows` selects
rows by parts of their names, separated by semicolons; `--repeats` sets how often the confirmed
ratio is compared with that of a fresh `gradrun compare tuned.yaml --against base.yaml`, and
`--runs` how often the search is repeated. Nothing makes the model that sleeps faster: at most one
of 20 searches may name a setting for it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

import gradrun


class Row(NamedTuple):
    """A model with its data, and the constraints of the search."""

    model: dict[str, Any]
    shape: tuple[int, ...]
    samples: int
    batch: int
    tune: dict[str, Any]
    wanted: float
    """Ratio that was reached in the laboratory, on a CPU with AMX."""
    threads: int | str = "auto"


def _zoo(name: str, **args: Any) -> dict[str, Any]:
    return {"source": "zoo", "name": name, "args": args}


_REL = {"within": {"max_rel": 0.02}, "keep": ["data.batch_size"], "steady": True}
_BITS = {"within": "bitwise", "keep": ["data.batch_size"], "steady": True}
# Larger batches and more processes would sleep less often, or at the same time.
_ALONE = {"keep": ["data.batch_size", "engine", "model.compile"], "steady": True}
_SLEEPS = {"source": "python", "target": f"{Path(__file__).with_name('planted_model.py')}:Sleeps"}
_MINILM = _zoo("transformer_encoder", d_model=384, heads=12, layers=6, feedforward=1536)
ROWS = {
    "resnet18 b8, max_rel 0.02": Row(_zoo("resnet18"), (3, 224, 224), 400, 8, _REL, 4.5),
    "encoder b16, max_rel 0.02": Row(_zoo("transformer_encoder"), (128, 256), 800, 16, _REL, 4.0),
    "encoder b16, bitwise": Row(_zoo("transformer_encoder"), (128, 256), 800, 16, _BITS, 1.2),
    "minilm b32, bitwise": Row(_MINILM, (128, 384), 640, 32, _BITS, 1.2),
    # One thread: with two, the baseline is so erratic that any ratio can be had.
    "mlp, batch size free": Row(_zoo("mlp"), (64,), 65_536, 8, {"steady": True}, 20.0, 1),
    "a model that sleeps": Row(_SLEEPS, (8,), 4096, 8, _ALONE, 1.0, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--budget", type=float, default=600.0)
    options = parser.parse_args()
    table = Table("row", "status", "ratio", "95 %", "at least", "seconds", "compare contains it")
    with tempfile.TemporaryDirectory() as folder:
        for name, row in ROWS.items():
            if not any(part in name for part in options.rows.split(";")):
                continue
            for _ in range(options.runs):
                table.add_row(name, *_tune(Path(folder), row, options.budget, options.repeats))
    Console(width=120).print(table)


def _tune(folder: Path, row: Row, budget: float, repeats: int) -> list[str]:
    np.save(
        folder / "x.npy",
        np.random.default_rng(0).standard_normal((row.samples, *row.shape), dtype=np.float32),
    )
    base = folder / "base.yaml"
    config = {
        "model": row.model,
        "data": {"source": "arrays", "path": "x.npy", "batch_size": row.batch},
        "run": {"allocator": "system", "threads": row.threads},
        "output": {"path": "out"},
        "tune": row.tune | {"budget": budget},
    }
    base.write_text(yaml.safe_dump(config))
    began = time.monotonic()
    found = gradrun.tune(base, folder / "tuned.yaml", trust_code=True)
    seconds = time.monotonic() - began
    for trial in found.trials:
        ratio = "" if trial.ratio is None else f"{trial.ratio:.2f}"
        print(f"  {trial.name} [{trial.outcome}] {ratio} {trial.reason}", file=sys.stderr)
    print(f"  {found.phases}", file=sys.stderr)
    if found.status != "faster":
        return [found.status, "", "", f"{row.wanted}", f"{seconds:.0f}", ""]
    print(Path(found.file).read_text(), file=sys.stderr)
    (c,) = found.comparisons
    inside = 0
    for _ in range(repeats):
        (again,) = gradrun.compare(found.file, against=base, trust_code=True)
        print(f"  compare: {again.ratio:.3f} ({again.low:.3f}-{again.high:.3f})", file=sys.stderr)
        inside += again.low <= c.ratio <= again.high
    return [
        found.status,
        f"{c.ratio:.2f}",
        f"{c.low:.2f}-{c.high:.2f}",
        f"{row.wanted}",
        f"{seconds:.0f}",
        f"{inside} of {repeats}",
    ]


if __name__ == "__main__":
    main()
