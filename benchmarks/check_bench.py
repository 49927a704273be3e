"""By hand, in half an hour: does `gradrun check --against` find what is planted, and nothing else?

A model of linear layers stands in a git repository of its own; its working copy is slower,
quicker, larger or the same. Prints how often each was called what; exits 1 where not often enough.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import gradrun

CONFIG = """\
model: {source: python, target: net.py:Net}
data: {source: synthetic, inputs: {x: {shape: [256]}}, samples: 640, batch_size: 64}
run: {threads: 1}
output: {path: runs/net}
check: {smoke: false, regression: {time: 5%, forward_peak: 1%}}
"""
NET = """\
import torch
from torch import nn

BLOCKS, EXTRA = {blocks}, {extra}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(22))

    def forward(self, x):
        grown = torch.empty(EXTRA)
        first = x
        for block in self.blocks[:BLOCKS]:
            # The sum is the same whatever the number of blocks is.
            x = first + 0.0 * torch.relu(block(x))
        return x
"""
PLANTED = {
    "unchanged": ({"blocks": 20, "extra": 0}, "pass"),
    "+10 % time": ({"blocks": 22, "extra": 0}, "time"),
    "-10 % time": ({"blocks": 18, "extra": 0}, "pass"),
    "+2 % forward peak": ({"blocks": 20, "extra": 2048}, "forward peak"),
}
"""What is planted -> the working copy, and which check must fail, if any."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="of each that was planted")
    parser.add_argument("--unchanged", type=int, default=40)
    asked = parser.parse_args()
    bad = False
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        os.environ["GRADRUN_TRUST_CODE"] = "1"
        Path("gradrun.yaml").write_text(CONFIG)
        Path(".gitignore").write_text("runs\n")
        _plant(blocks=20, extra=0)
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
            git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
            subprocess.run([*git, *words], check=True)
        for title, (plant, expected) in PLANTED.items():
            _plant(**plant)
            runs = asked.unchanged if title == "unchanged" else asked.runs
            began = time.monotonic()
            told = Counter(_told(expected) for _ in range(runs))
            seconds = (time.monotonic() - began) / max(1, runs)
            print(f"{title}: {dict(told)}, {seconds:.0f} s each", flush=True)
            wrong = runs - told["as planted"]
            doubts = told["inconclusive"]
            if title == "unchanged":
                bad |= wrong > doubts or doubts > runs // 20
            elif title == "+2 % forward peak":
                bad |= wrong > 0
            else:
                bad |= wrong > runs // 10
    sys.exit(bad)


def _plant(blocks: int, extra: int) -> None:
    Path("net.py").write_text(NET.format(blocks=blocks, extra=extra))


def _told(expected: str) -> str:
    result = gradrun.check("gradrun.yaml", against="HEAD")
    failed = {o.check.partition(" vs ")[0] for o in result.outcomes if o.status == "fail"}
    if expected == "pass":
        return "as planted" if result.status == "pass" else _why(result.status, failed)
    return "as planted" if expected in failed else _why(result.status, failed)


def _why(status: str, failed: set[str]) -> str:
    return f"failed by {', '.join(sorted(failed))}" if failed else status


if __name__ == "__main__":
    main()
