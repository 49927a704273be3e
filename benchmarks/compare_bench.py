"""How reliable the verdicts of `gradrun compare` are, measured with the real command.

`compare_bench.py [aa] [repeat] [power] [cost] [--runs N]`; all four sections take most of an hour.
Prints each figure with its limit; exits with 1 if one is not met.
"""

from __future__ import annotations

import argparse
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.table import Table

from gradrun.results.result import Comparison, RunResult

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
_POLL_INTERVAL = 1.0
"""Seconds between two samples of the process; more frequent samples would disturb it."""


@dataclass
class Figures:
    """Rows of the table: title, figure, limit, and whether it is met (None: no limit)."""

    rows: list[tuple[str, str, str, bool | None]] = field(default_factory=list)

    def add(self, title: str, figure: str, limit: str = "", met: bool | None = None) -> None:
        self.rows.append((title, figure, limit, met))
        print(f"  {title}: {figure}", file=sys.stderr, flush=True)


@dataclass
class Answer:
    """The result of one command, its seconds, and the share of a core that the parent used."""

    result: RunResult
    seconds: float
    parent_share: float

    @property
    def last(self) -> Comparison:
        return self.result.comparisons[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--runs", type=int, help="runs per section, instead of its default")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    figures = Figures()
    with tempfile.TemporaryDirectory() as name:
        for section, (measure, runs) in SECTIONS.items():
            if not options.sections or section in options.sections:
                print(section, file=sys.stderr, flush=True)
                measure(Path(name), options.runs or runs, figures)
    table = Table("figure", "measured", "limit", "")
    for title, figure, limit, met in figures.rows:
        table.add_row(
            title, figure, limit, "" if met is None else "ok" if met else "[red]missed[/]"
        )
    Console().print(table)
    sys.exit(any(met is False for _, _, _, met in figures.rows))


# --- the sections ------------------------------------------------------------------------------


def against_itself(folder: Path, runs: int, figures: Figures) -> None:
    """A/A: the same mode twice gets no verdict of a difference, and a narrow interval."""
    for name in ("mlp", "transformer_encoder"):
        comparisons = [
            compare(folder, CONFIGS / f"{name}.yaml", "inference_mode,inference_mode").last
            for _ in range(runs)
        ]
        called = sum(c.verdict in {"faster", "slower"} for c in comparisons)
        allowed = runs * 2 // 40
        figures.add(
            f"A/A {name}: called faster or slower",
            f"{called} of {runs} ({_verdicts(comparisons)})",
            f"at most {allowed}",
            called <= allowed,
        )
        width = median(c.relative_width for c in comparisons)
        limit = ("at most 1%", width <= 0.01) if name == "mlp" else ("", None)
        figures.add(f"A/A {name}: median interval", f"±{width:.2%}", *limit)
        covered = sum(c.low <= 1 <= c.high for c in comparisons)
        figures.add(f"A/A {name}: interval contains 1", f"{covered} of {runs}")


def repeatability(folder: Path, runs: int, figures: Figures) -> None:
    """grad / inference_mode of the mlp repeatedly, alternating with the Timer of torch."""
    comparisons, timers = [], []
    for _ in range(runs):
        comparisons.append(compare(folder, CONFIGS / "mlp.yaml", "grad,inference_mode").last)
        timers.append(timer_ratio())
    ratios = [c.ratio for c in comparisons]
    spread = max(ratios) / min(ratios)
    pairs = [(one, two) for one in comparisons for two in comparisons]
    missed = max(max(0.0, one.low / two.high - 1) for one, two in pairs)
    figures.add(
        "repeat: spread of ratios (max/min)", f"{spread:.4f}", "at most 1.04", spread <= 1.04
    )
    figures.add(
        "repeat: ratios", f"{min(ratios):.3f} to {max(ratios):.3f} ({_verdicts(comparisons)})"
    )
    figures.add(
        "repeat: largest gap between two intervals", f"{missed:.2%}", "< 0.5%", missed < 0.005
    )
    figures.add("repeat: torch Timer, spread", f"{max(timers) / min(timers):.4f}")
    figures.add("repeat: torch Timer, ratios", f"{min(timers):.3f} to {max(timers):.3f}")


def power(folder: Path, runs: int, figures: Figures) -> None:
    """More work in inference_mode only: 3 % is detected, and 1 % is never reported as faster."""
    (folder / "planted.py").write_text(PLANTED)
    for percent in (3.0, 1.0):
        config = folder / f"planted-{percent:g}.yaml"
        config.write_text(
            f"model: {{source: python, target: planted.py:Net, args: {{percent: {percent}}}}}\n"
            "data: {source: synthetic, inputs: {x: {shape: [64]}}, samples: 256, batch_size: 8}\n"
            "run: {threads: 1}\n"
            "output: {path: planted}\n"
        )
        comparisons = [
            compare(folder, config, "grad,inference_mode", "--trust-code").last for _ in range(runs)
        ]
        slower = sum(c.verdict == "slower" for c in comparisons)
        measured = [c.ratio for c in comparisons]
        ratios = f"{min(measured):.4f} to {max(measured):.4f}"
        figures.add(f"power {percent:g} %: ratios", ratios, f"about {1 / (1 + percent / 100):.4f}")
        if percent == 3.0:
            required = math.ceil(0.9 * runs)
            figures.add(
                "power 3 %: called slower",
                f"{slower} of {runs} ({_verdicts(comparisons)})",
                f"at least {required}",
                slower >= required,
            )
        else:
            faster = sum(c.verdict == "faster" for c in comparisons)
            figures.add(
                "power 1 %: called faster",
                f"{faster} of {runs} ({_verdicts(comparisons)})",
                "never",
                not faster,
            )


def cost(folder: Path, runs: int, figures: Figures) -> None:
    """Time of a complete comparison of three modes, and the processor time of the parent."""
    for name, seconds in (("digits", 25), ("mlp", 20)):
        answers = [
            compare(folder, CONFIGS / f"{name}.yaml", "grad,no_grad,inference_mode")
            for _ in range(runs)
        ]
        slowest = max(answer.seconds for answer in answers)
        processes = [len({m.process for m in a.result.measurements}) for a in answers]
        figures.add(
            f"cost {name}: slowest complete comparison",
            f"{slowest:.1f} s (median {median(a.seconds for a in answers):.1f} s, "
            f"{min(processes)} to {max(processes)} processes)",
            f"at most {seconds} s",
            slowest <= seconds,
        )
        share = max(answer.parent_share for answer in answers)
        figures.add(
            f"cost {name}: share of a core used by the parent, without its start",
            f"{share:.2%}",
            "less than 2%",
            share < 0.02,
        )
        widths = [c.relative_width for a in answers for c in a.result.comparisons]
        figures.add(f"cost {name}: widest interval", f"±{max(widths):.2%}")


# --- measuring ---------------------------------------------------------------------------------

PLANTED = """\
import torch
from torch import nn


class Net(nn.Module):
    \"\"\"A busy loop with a few per cent more steps when gradients are off.

    It counts steps instead of reading a clock, so both modes do the same per step.
    \"\"\"

    def __init__(self, percent, steps=10_000):
        super().__init__()
        self.steps = steps
        self.more = round(steps * percent / 100)

    def forward(self, x):
        steps = self.steps
        if not torch.is_grad_enabled():
            steps += self.more
        for _ in range(steps):
            pass
        return x
"""

TIMER = """\
import sys
import torch
from torch.utils.benchmark import Timer
sys.path.insert(0, sys.argv[1])
import mlp
torch.manual_seed(0)
model, x = mlp.build().eval(), torch.randn(8, 64)
seconds = {}
for mode, guard in (("grad", torch.enable_grad), ("inference_mode", torch.inference_mode)):
    with guard():
        timer = Timer("model(x)", globals={"model": model, "x": x}, num_threads=1)
        seconds[mode] = timer.blocked_autorange(min_run_time=1.0).median
print(seconds["grad"] / seconds["inference_mode"])
"""


def compare(folder: Path, config: Path, modes: str, *more: str) -> Answer:
    """Run `python -m gradrun compare`, and sample the processor time of the parent process."""
    words = [str(config), "--modes", modes, "--json", "-", "--quiet", *more]
    target = f"output.path={folder / 'runs' / config.stem}"
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "gradrun", "compare", *words, "--set", target],
        stdout=subprocess.PIPE,
        env=_environment(),
    )
    assert process.stdout
    parent = psutil.Process(process.pid)
    samples: list[tuple[float, float]] = []  # (time, processor seconds) while it has workers
    while not select.select([process.stdout], [], [], _POLL_INTERVAL)[0]:
        with suppress(psutil.Error):
            used = parent.cpu_times()
            if parent.children():
                samples.append((time.perf_counter(), used.user + used.system))
    out = process.stdout.read()
    seconds = time.perf_counter() - start
    if process.wait():
        sys.exit(f"{config.name}: exit code {process.returncode}")
    (first, least), (last, most) = samples[0], samples[-1]
    return Answer(RunResult.model_validate_json(out), seconds, (most - least) / (last - first))


def timer_ratio() -> float:
    """Return grad / inference_mode of the mlp from torch.utils.benchmark, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", TIMER, str(ROOT / "models")],
        capture_output=True,
        text=True,
        check=True,
        env=_environment() | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    return float(done.stdout)


def _environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _verdicts(comparisons: list[Comparison]) -> str:
    counts = Counter(c.verdict for c in comparisons)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())


SECTIONS: dict[str, tuple[Callable[[Path, int, Figures], None], int]] = {
    "aa": (against_itself, 40),
    "repeat": (repeatability, 10),
    "power": (power, 10),
    "cost": (cost, 3),
}


if __name__ == "__main__":
    main()
