"""Measure worker processes against one process, in interleaved rounds; prints ratios.

Limits: one worker at most 1.05 x the time of one process; two workers of one thread at least
1.85 x as fast as one process of one thread, for the models in SCALING; `workers: auto` at most
1.1 x the time of the better choice; a worker ready within 1.3 x the time in which a new process
imports torch, loads the model and opens the data.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import gradrun
from gradrun.config.load import load_config
from gradrun.core.progress import ignore
from gradrun.engines import processes
from gradrun.engines.engine import EngineRequest

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {
        "model": {"source": "zoo", "name": "mlp"},
        "data": {"inputs": {"x": {"shape": [64]}}, "samples": 4_000_000, "batch_size": 64},
    },
    "digits_cnn": {
        "model": {"source": "zoo", "name": "digits_cnn"},
        "data": {"inputs": {"x": {"shape": [1, 8, 8]}}, "samples": 200_000, "batch_size": 64},
    },
    "resnet18": {
        "model": {"source": "zoo", "name": "resnet18"},
        "data": {"inputs": {"x": {"shape": [3, 64, 64]}}, "samples": 1600, "batch_size": 16},
    },
    "transformer_encoder": {
        "model": {"source": "zoo", "name": "transformer_encoder"},
        "data": {"inputs": {"x": {"shape": [64, 256]}}, "samples": 3200, "batch_size": 16},
    },
    "MiniLM-L6": {
        "model": {
            "source": "zoo",
            "name": "transformer_encoder",
            "args": {"d_model": 384, "heads": 12, "feedforward": 1536, "layers": 6},
        },
        "data": {"inputs": {"x": {"shape": [128, 384]}}, "samples": 640, "batch_size": 16},
    },
}  # fmt: skip
SCALING = ("mlp", "resnet18", "transformer_encoder")
"""Models with the limit for two workers."""

VARIANTS: dict[str, tuple[Any, Any]] = {
    "1x1": (0, 1), "1x2": (0, 2), "w1": (1, 1), "w2": (2, 1), "auto": ("auto", "auto")
}  # fmt: skip
"""Name -> workers (0: no engine) and threads."""

ALONE = """
import sys, torch
from gradrun.config.load import load_config
from gradrun.inference.device import device_context
from gradrun.inference.run_plan import RunOptions, open_run
config = load_config(sys.argv[1]).config
with device_context(config.run) as device:
    open_run(config, device, RunOptions())
"""


class Timing(NamedTuple):
    """The seconds of a timed pass, and the statement about the engine."""

    seconds: float
    engine: str


def config_of(model: str, folder: Path, workers: Any, threads: Any) -> dict[str, Any]:
    """Return the config of a run."""
    config = MODELS[model] | {
        "run": {"threads": threads},
        "measure": {"memory": False},
        "output": {"path": str(folder)},
    }
    config["data"] = {"source": "synthetic", **config["data"]}
    if workers:
        config["engine"] = {"source": "processes", "workers": workers}
    return config


def timing_of(config: dict[str, Any]) -> Timing:
    """Run a config."""
    result = gradrun.infer(config, overwrite=True)
    stated = [s.text for s in result.interpretation if s.topic == "engine"]
    return Timing(result.measurements[0].seconds, " ".join(stated))


def start_ratio(folder: Path, rounds: int) -> list[float]:
    """Return the time until a worker is ready, by that in which a fresh process opens the run."""
    config = config_of("resnet18", folder / "start", 1, 1)
    path = folder / "start.json"
    loaded = load_config(config)
    path.write_text(loaded.config.model_dump_json())
    ratios = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", ALONE, str(path)], check=True)
        middle = time.perf_counter()
        started = processes.start(EngineRequest(loaded.config, None, False, ignore))
        assert started.engine
        processes.await_ready(started.engine, 1)
        ended = time.perf_counter()
        started.engine.close()
        ratios.append((ended - middle) / (middle - began))
    return sorted(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=[*MODELS])
    arguments = parser.parse_args()
    within = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ratios = start_ratio(folder, arguments.rounds)
        within &= _print("start", "ready worker / fresh process", ratios, median(ratios) <= 1.3)
        for model in arguments.models:
            rounds: dict[str, list[Timing]] = {variant: [] for variant in VARIANTS}
            for number in range(arguments.rounds):
                order = list(VARIANTS.items())
                for variant, (workers, threads) in order[:: 1 if number % 2 else -1]:
                    config = config_of(model, folder / variant, workers, threads)
                    rounds[variant].append(timing_of(config))
            within &= _report(model, rounds)
    return int(not within)


def _report(model: str, rounds: dict[str, list[Timing]]) -> bool:
    """Print the median ratio of each pair with its range; return whether the limits hold."""

    def ratios(over: str, under: str) -> list[float]:
        pairs = zip(rounds[over], rounds[under], strict=True)
        return sorted(a.seconds / b.seconds for a, b in pairs)

    one, two, threads = ratios("w1", "1x1"), ratios("1x1", "w2"), ratios("1x2", "w2")
    scales = model not in SCALING or median(two) >= 1.85
    chosen = ["1x2" if t.engine.startswith("one process") else "w2" for t in rounds["auto"]]
    gain = median(threads)
    better = "w2" if gain > 1 else "1x2"
    right = all(choice == better for choice in chosen) or 1 / 1.1 <= gain <= 1.1
    for timing in rounds["auto"]:
        print(f"{model}: auto: {timing.engine}")
    return all(
        (
            _print(model, "one worker / one process, one thread", one, median(one) <= 1.05),
            _print(model, "speed of two workers / one process, one thread", two, scales),
            _print(model, "speed of two workers / one process, two threads", threads, right),
        )
    )


def _print(model: str, text: str, values: list[float], within: bool) -> bool:
    mark = "" if within else "  OVER THE LIMIT"
    spread = f"{values[0]:.3f} to {values[-1]:.3f}"
    print(f"{model}: {text}: {median(values):.3f} ({spread}){mark}", flush=True)
    return within


if __name__ == "__main__":
    sys.exit(main())
