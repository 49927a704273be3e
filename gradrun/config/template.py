"""The commented config that `gradrun init` writes. Knows text only."""

from __future__ import annotations

import json
import re

_PLAIN = re.compile(r"[\w./][\w./:-]*")

_MODEL = """\
  source: layers           # torch.nn layers by name; or zoo, python, torchscript, exported
  layers: [{Linear: [64, 32]}, ReLU, {Linear: [32, 10]}]
  # weights: weights.safetensors       # or a checkpoint of torch.save
"""

_TARGET = """\
  source: python           # runs code of yours: gradrun asks for --trust-code
  target: %s
  # args: {width: 64}                  # what the target is called with
  # weights: weights.safetensors       # or a checkpoint of torch.save
"""

_TEMPLATE = """\
# A run of gradrun: what to run, over which data, how, and where the predictions go.
# Check it with `gradrun validate`, run it with `gradrun infer`. Paths start at this file.

model:
%s
data:
  source: synthetic        # random numbers; or arrays (.npy, .npz, .safetensors), records (.csv)
  inputs: {x: {shape: [64]}}           # the shape of one sample%s
  # inputs: {ids: {shape: [40], dtype: int64, distribution: randint, high: 1000}}
  samples: 10000
  batch_size: 64
  # source: arrays
  # path: inputs.npy
  # labels: {path: labels.npy}         # what metrics hold the predictions against

run:
  mode: inference_mode     # or no_grad, grad
  device: auto             # or cpu, cuda, cuda:1, mps

output:
  path: runs/first         # a new folder for predictions.npy and result.json
  transform: none          # or softmax, argmax, classify, topk

# metrics: [accuracy]      # or f1, auroc, mse
# check: {limits: {forward_peak: 60 MiB, accuracy: ">= 0.97"}}     # for gradrun check
"""


def config_template(target: str | None = None) -> str:
    """A config that runs as it is, or one for a `target` (file.py:Name) to be filled in."""
    if target is None:
        return _TEMPLATE % (_MODEL, "")
    # JSON's quotes are YAML's too, and hold whatever a file name may hold.
    quoted = target if _PLAIN.fullmatch(target) else json.dumps(target)
    return _TEMPLATE % (_TARGET % quoted, ": yours may differ")
