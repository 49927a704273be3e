"""What tests of remote data start from: a folder of their own, quick repeats, weights, a config."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gradrun.core import remote

ROWS = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
WEIGHT = torch.arange(12, dtype=torch.float32).reshape(3, 4)
EXPECTED = ROWS @ WEIGHT.numpy().T


def enter_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter a folder with weights, repeat failed requests at once, and start without a cache."""
    monkeypatch.setenv("GRADRUN_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "_blocks", remote._Blocks())
    save_file({"0.weight": WEIGHT, "0.bias": torch.zeros(3)}, "w.safetensors")


def config(data: dict[str, Any], **model: Any) -> dict[str, Any]:
    """Return a config of the linear model whose weights `enter_folder` writes."""
    return {
        "model": {"source": "layers", "layers": [{"Linear": [4, 3]}], "weights": "w.safetensors"}
        | model,
        "data": {"batch_size": 16} | data,
        "output": {"path": "out"},
        "measure": {"memory": False},
    }


def npy(array: np.ndarray[Any, Any] = ROWS) -> bytes:
    """Return the content of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
