"""The hand-written script for digits: load, run and save, without measuring."""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "models"))

from digits_cnn import build  # noqa: E402

model = build().eval()
model.load_state_dict(load_file(ROOT / "models" / "digits_cnn.safetensors"))
images = np.load(ROOT / "configs" / "digits.npz")["images"]
pixels = torch.from_numpy(images).float().mul(0.0625).reshape(-1, 1, 8, 8)
with torch.inference_mode():
    predicted = [model(batch).argmax(1) for batch in pixels.split(1)]
np.save(sys.argv[1], torch.cat(predicted).numpy())
