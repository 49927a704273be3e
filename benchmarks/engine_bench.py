"""Measure worker processes against one process, in interleaved rounds; prints ratios.

Limits: one worker at most 1.05 x the time of one process; two workers of one thread at least
1.85 x as fast as one process of one thread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import gradrun

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {
        "model": {"source": "zoo", "name": "mlp"},
        "data": {"inputs": {"x": {"shape": [64]}}, "samples": 400_000, "batch_size": 64},
    },
    "resnet18": {
        "model": {"source": "zoo", "name": "resnet18"},
        "data": {"inputs": {"x": {"shape": [3, 64, 64]}}, "samples": 800, "batch_size": 16},
    },
    "transformer_encoder": {
        "model": {"source": "zoo", "name": "transformer_encoder"},
        "data": {
            "inputs": {"x": {"shape": [64, 256]}},
            "samples": 1600,
            "batch_size": 16,
        },
    },
}  # fmt: skip
VARIANTS = {"1x1": (0, 1), "1x2": (0, 2), "w1": (1, 1), "w2": (2, 1)}
"""Name -> workers (0: no engine) and threads."""


def seconds_of(
    config: dict[str, Any], folder: Path, workers: int, threads: int
) -> tuple[float, float]:
    """Return the seconds of the timed pass and of the whole call."""
    changed = config | {
        "run": {"threads": threads},
        "measure": {"memory": False},
        "output": {"path": str(folder)},
    }
    changed["data"] = {"source": "synthetic", **config["data"]}
    if workers:
        changed["engine"] = {"source": "processes", "workers": workers}
    return gradrun.infer(changed, overwrite=True).measurements[0].seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=[*MODELS])
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        for model in arguments.models:
            rounds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
            for number in range(arguments.rounds):
                order = list(VARIANTS.items())
                for variant, (workers, threads) in order[:: 1 if number % 2 else -1]:
                    seconds = seconds_of(MODELS[model], Path(name) / variant, workers, threads)
                    rounds[variant].append(seconds)
            failed |= not _report(model, rounds)
    return int(failed)


def _report(model: str, rounds: dict[str, list[float]]) -> bool:
    """Print the median ratio of each pair with its range; return whether the limits hold."""

    def ratios(over: str, under: str) -> list[float]:
        return sorted(a / b for a, b in zip(rounds[over], rounds[under], strict=True))

    one, two = ratios("w1", "1x1"), ratios("1x1", "w2")
    limits = (median(one) <= 1.05, median(two) >= 1.85)
    for text, values, limit in (
        ("one worker / one process, one thread (at most 1.05)", one, limits[0]),
        (
            "speed of two workers / one process, one thread (at least 1.85)",
            two,
            limits[1],
        ),
        ("speed of two workers / one process, two threads", ratios("1x2", "w2"), True),
    ):
        mark = "" if limit else "  OVER THE LIMIT"
        spread = f"{values[0]:.3f} to {values[-1]:.3f}"
        print(f"{model}: {text}: {median(values):.3f} ({spread}){mark}", flush=True)
    return all(limits)


if __name__ == "__main__":
    sys.exit(main())
