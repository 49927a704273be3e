"""Kill a run at random moments, resume it, and compare with a run that nobody killed.

`kill.py [--kills N] [--seed S]`: real processes, SIGKILL, all sinks in turn. Prints where the kills
landed; exits 1 when a byte differs or a sample is missing or doubled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SINKS = ("npy", "jsonl", "safetensors")

_MODEL = """\
import time
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        time.sleep(0.002)
        return self.linear(x)
"""
_DRIVER = """\
import sys
import gradrun.keeping
import gradrun.sinks.safetensors
gradrun.keeping.SECONDS = gradrun.keeping._SHARE = 0.05
gradrun.sinks.safetensors.PART_BYTES = 900 * 12
import gradrun.runner
gradrun.runner._BEAT_NS = 20_000_000
gradrun.runner.WARM_UP_SECONDS = 0.01
from gradrun.cli import main
main()
"""
"""The command itself, with commits so frequent that a short run has many."""


class Folder:
    """A config of its own for each sink, and the command that runs it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "net.py").write_text(_MODEL)
        (path / "driver.py").write_text(_DRIVER)
        for sink in SINKS:
            config = {
                "model": {"source": "python", "target": "net.py:Net"},
                "data": {
                    "source": "synthetic",
                    "inputs": {"x": {"shape": [8]}},
                    "samples": 2000,
                    "batch_size": 4,
                },
                "run": {"threads": 1},
                "measure": {"memory": False},
                "output": {"path": sink, "format": sink},
            }
            (path / f"{sink}.yaml").write_text(json.dumps(config))

    def start(self, sink: str, out: str, *more: str) -> subprocess.Popen[bytes]:
        words = ["infer", f"{sink}.yaml", "--trust-code", "--quiet", "--output", out, *more]
        return subprocess.Popen(
            [sys.executable, "driver.py", *words],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def whole(self, sink: str) -> tuple[dict[str, bytes], float]:
        """The files of a run that nobody kills, and the seconds that it takes."""
        began = time.monotonic()
        self.ended(self.start(sink, f"{sink}-whole"))
        return self.files(f"{sink}-whole"), time.monotonic() - began

    def ended(self, process: subprocess.Popen[bytes]) -> None:
        _, said = process.communicate(timeout=120)
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {said.decode()}")

    def files(self, out: str) -> dict[str, bytes]:
        """The predictions, and nothing of the journal, whose ranges depend on the clock."""
        names = sorted((self.path / out).iterdir())
        return {
            file.name: file.read_bytes() for file in names if file.name.startswith("predictions")
        }

    def committed(self, out: str) -> int:
        """Samples that the journal tells of."""
        journal = self.path / out / "journal.jsonl"
        lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
        return json.loads(lines[-1])["stop"] if lines else 0


def kill_and_resume(
    folder: Folder, sink: str, moments: list[tuple[bool, float]], number: int
) -> list[str]:
    """Kill a run, and each resume but the last; where the kills landed.

    A moment is so many seconds after the start, or after the first commit.
    """
    out, landed = f"{sink}-{number}", []
    for from_commit, moment in moments:
        process = folder.start(sink, out, "--resume")
        before = folder.committed(out)
        while from_commit and folder.committed(out) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            landed.append("after its end")
        elif not (folder.path / out / "journal.jsonl").exists():
            landed.append("before the first write")
        else:
            landed.append("before a commit" if not folder.committed(out) else "between commits")
    folder.ended(folder.start(sink, out, "--resume"))
    return landed


def check(folder: Folder, sink: str, number: int, whole: dict[str, bytes]) -> None:
    """See that the files are those of the run that nobody killed."""
    found = folder.files(f"{sink}-{number}")
    if found != whole:
        differing = [name for name in {*found, *whole} if found.get(name) != whole.get(name)]
        raise SystemExit(f"{sink}-{number} in {folder.path}: {sorted(differing)} differ")
    if not (folder.path / f"{sink}-{number}" / "result.json").exists():
        raise SystemExit(f"{sink}-{number} in {folder.path}: no result.json")


def run(path: Path, kills: int, seed: int) -> Counter[tuple[str, str]]:
    """So many kills, spread over the sinks; how many landed where."""
    folder, draw = Folder(path), random.Random(seed)
    wholes = {sink: folder.whole(sink) for sink in SINKS}
    landed: Counter[tuple[str, str]] = Counter()
    number = 0
    while landed.total() < kills:
        sink = SINKS[number % len(SINKS)]
        whole, seconds = wholes[sink]
        times = min(draw.choice([1, 1, 2]), kills - landed.total())
        moments = [_moment(draw, seconds) for _ in range(times)]
        landed.update((sink, where) for where in kill_and_resume(folder, sink, moments, number))
        check(folder, sink, number, whole)
        number += 1
    return landed


def _moment(draw: random.Random, seconds: float) -> tuple[bool, float]:
    """Mostly while it predicts, which begins with the first commit and takes about a second."""
    if draw.random() < 0.75:
        return True, draw.uniform(0.0, 1.2)
    return False, draw.uniform(0.0, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        landed = run(Path(name), asked.kills, asked.seed)
    for (sink, where), count in sorted(landed.items()):
        print(f"{sink:12} {where:24} {count}")
    print(f"{landed.total()} kills: every file is byte for byte that of a run nobody killed")


if __name__ == "__main__":
    main()
