"""Check profiles against planted models and against themselves: `make bench`.

1. Shares of modules in a model with planted parts (a sleep, one and ten units of arithmetic, a pass
   over memory) against clocks in the model itself, in the same passes: within 2 points, and ranked
   alike.
2. The sum of all self times of five models against their forward pass without hooks: within 3 %.
3. The float32 peak of this machine, measured five times: within 5 %, and possible for its clock.

Other programs disturb all three: close them first. With --cpu-time, all clocks count the CPU time
of one thread instead, which other programs disturb less; a sleep takes none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import planted_model
import torch

import gradrun
from gradrun.core.cpu import available_cpus
from gradrun.profiling import peaks as the_peaks
from gradrun.profiling import profile as the_profile
from gradrun.results.profile import ProfileFigures

ROOT = Path(__file__).parent.parent
ZOO = ("mlp", "digits", "resnet18", "transformer_encoder")
QUIET = 0.05
"""CPUs that other programs may use while a peak is measured."""
FASTEST = 64 * 6e9
"""Operations per second that no core exceeds in float32: two AVX-512 units at 6 GHz."""


def planted(folder: Path, threads: int, budget: float) -> tuple[list[str], list[str], float]:
    """Return the parts ranked by the profile and by the model's clocks, and the largest error."""
    config = {
        "model": {"source": "python", "target": "planted_model:Planted"},
        "data": {
            "source": "synthetic",
            "inputs": {"x": {"shape": [256]}},
            "samples": 512,
            "batch_size": 256,
        },
        "run": {"threads": threads},
        "output": {"path": str(folder / "planted")},
    }
    measure = {"budget": budget}
    planted_model.times_of_parts.clear()
    result = gradrun.profile(config, trust_code=True, peaks=False, measure=measure)
    figures = ProfileFigures(result.profiles[0])
    shares = {m.calls.path: m.share.value for m in figures.modules[1:]}
    rounds = [[t / sum(times) for t in times] for times in planted_model.times_of_parts]
    true = {
        name: median(column) for name, column in zip(shares, zip(*rounds, strict=True), strict=True)
    }
    error = max(abs(shares[name] - true[name]) for name in true)
    print("   " + ", ".join(f"{n} {shares[n]:.1%} (true {true[n]:.1%})" for n in true))
    return sorted(shares, key=lambda n: -shares[n]), sorted(true, key=lambda n: -true[n]), error


def sums(folder: Path, threads: int, budget: float) -> Iterator[tuple[str, float, float]]:
    """Yield each model with the sum of its self times and the share of the hooks."""
    configs: dict[str, Any] = {name: ROOT / "configs" / f"{name}.yaml" for name in ZOO}
    if bert := _bert(folder):
        configs["bert"] = bert
    for name, config in configs.items():
        result = gradrun.profile(
            config,
            peaks=False,
            output={"path": str(folder / name)},
            run={"threads": threads},
            measure={"budget": budget},
        )
        figures = ProfileFigures(result.profiles[0])
        yield name, figures.sum_of_self_times, figures.overhead / figures.forward.value


def _bert(folder: Path) -> dict[str, Any] | None:
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        return None
    settings = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4}
    BertModel(BertConfig(intermediate_size=1024, **settings)).save_pretrained(folder / "model")
    return {
        "model": {
            "source": "huggingface",
            "path": str(folder / "model"),
            "auto_class": "AutoModel",
        },
        "data": {
            "source": "synthetic",
            "inputs": {
                "input_ids": {
                    "shape": [64],
                    "dtype": "int64",
                    "distribution": "randint",
                    "high": 30_000,
                }
            },
            "samples": 32,
            "batch_size": 8,
        },
        "output": {"path": str(folder / "bert"), "select": "pooler_output"},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="profiles of the planted model")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of each profile")
    parser.add_argument("--cpu-time", action="store_true", help="count the CPU time of one thread")
    args = parser.parse_args()
    if args.cpu_time:
        planted_model.clock, args.threads = time.thread_time_ns, 1
        for module in (the_profile, the_peaks):
            module.host_clock = lambda _: time.thread_time_ns  # type: ignore[attr-defined]
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for run in range(args.runs):
            ranked, true, error = planted(folder, args.threads, args.budget)
            print(f"planted {run + 1}: {error * 100:.1f} points, ranked {', '.join(ranked)}")
            if error > 0.02 or ranked != true:
                failures.append(f"planted {run + 1}: {error * 100:.1f} points")
        for model, total, hooks in sums(folder, args.threads, args.budget):
            print(f"{model}: self times add up to {total:.1%}; hooks {hooks:.1%}")
            if abs(total - 1) > 0.03:
                failures.append(f"{model}: {total:.1%}")
    rates = []
    for _ in range(20):
        peaks, noise = the_peaks.measure_peaks(torch.device("cpu"), args.threads)
        if noise.others > QUIET:
            print(f"other programs used {noise.others:.1f} CPUs: measured again")
            continue
        rates.append(peaks.rate("float32") or 0.0)
        print(f"float32 {rates[-1] / 1e9:.1f} GFLOP/s, copy {peaks.copy / 1e9:.1f} GB/s")
        if len(rates) == 5:
            break
    if len(rates) < 5:
        failures.append("other programs disturbed the peaks")
    spread = max(rates) / min(rates) - 1
    print(f"peaks within {spread:.1%}")
    if spread > 0.05 or max(rates) > FASTEST * args.threads:
        failures.append(f"peaks within {spread:.1%}, up to {max(rates) / 1e9:.0f} GFLOP/s")
    print("\n".join(failures) or "passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
