"""Configs and code for tests of commands."""

from __future__ import annotations

CONFIG = """\
model:
  source: layers
  layers: [{Linear: [4, 3]}]
data:
  source: synthetic
  inputs: {x: {shape: [4]}}
  samples: 7
  batch_size: 3
run: {warmup: 0}
output: {path: out}
"""
PYTHON = CONFIG.replace(
    "source: layers\n  layers: [{Linear: [4, 3]}]", "source: python\n  target: m.py:Net"
)
NET = """\
from pathlib import Path
import torch
Path(__file__).with_name("imported").touch()
class Net(torch.nn.Module):
    def forward(self, x):
        return x.sum(1)
"""
