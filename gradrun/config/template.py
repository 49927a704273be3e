"""The commented config that `gradrun init` writes."""

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
  source: python           # runs your code: needs --trust-code
  target: %s
  # args: {width: 64}                  # keyword arguments of the target
  # weights: weights.safetensors       # or a checkpoint of torch.save
"""

_TEMPLATE = """\
# A gradrun config: the model, the data, how to run, and where to write the predictions.
# Validate: gradrun validate FILE. Run: gradrun infer FILE. Paths are relative to this file.

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
  # labels: {path: labels.npy}         # true classes or values, for metrics

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
    """Return a config that runs unchanged, or one for a `target` (file.py:Name) to complete."""
    if target is None:
        return _TEMPLATE % (_MODEL, "")
    # A JSON string is valid YAML, and can represent every file name.
    quoted = target if _PLAIN.fullmatch(target) else json.dumps(target)
    return _TEMPLATE % (_TARGET % quoted, ": adapt to your model")
