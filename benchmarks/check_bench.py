"""How reliably `gradrun check --against` finds planted regressions, and nothing else; half an hour.

A model of linear layers is committed to a temporary git repository; its working copy is slower,
faster, larger or unchanged. Prints the results of each case; exits with 1 if too many are wrong.
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
            # The output does not depend on the number of blocks.
            x = first + 0.0 * torch.relu(block(x))
        return x
"""
PLANTED = {
    "unchanged": ({"blocks": 20, "extra": 0}, "pass"),
    "+10 % time": ({"blocks": 22, "extra": 0}, "time"),
    "-10 % time": ({"blocks": 18, "extra": 0}, "pass"),
    "+2 % forward peak": ({"blocks": 20, "extra": 2048}, "forward peak"),
}
"""Case -> parameters of the working copy, and the check that must fail, if any."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="of each planted regression")
    parser.add_argument("--unchanged", type=int, default=40)
    options = parser.parse_args()
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
            runs = options.unchanged if title == "unchanged" else options.runs
            start = time.monotonic()
            results = Counter(_run_check(expected) for _ in range(runs))
            seconds = (time.monotonic() - start) / max(1, runs)
            print(f"{title}: {dict(results)}, {seconds:.0f} s each", flush=True)
            wrong = runs - results["as planted"]
            inconclusive = results["inconclusive"]
            if title == "unchanged":
                bad |= wrong > inconclusive or inconclusive > runs // 20
            elif title == "+2 % forward peak":
                bad |= wrong > 0
            else:
                bad |= wrong > runs // 10
    sys.exit(bad)


def _plant(blocks: int, extra: int) -> None:
    Path("net.py").write_text(NET.format(blocks=blocks, extra=extra))


def _run_check(expected: str) -> str:
    result = gradrun.check("gradrun.yaml", against="HEAD")
    failed = {o.check.partition(" vs ")[0] for o in result.outcomes if o.status == "fail"}
    if expected == "pass":
        return "as planted" if result.status == "pass" else _why(result.status, failed)
    return "as planted" if expected in failed else _why(result.status, failed)


def _why(status: str, failed: set[str]) -> str:
    return f"failed by {', '.join(sorted(failed))}" if failed else status


if __name__ == "__main__":
    main()
