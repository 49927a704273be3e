"""The data of own_dataset.yaml: handwritten digits as a torch Dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """Images [1, 8, 8] with their digit, from an .npz file beside this one."""

    def __init__(self, file: str = "digits.npz") -> None:
        arrays = np.load(Path(__file__).with_name(file))
        self.images, self.labels = arrays["images"], arrays["labels"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = self.images[index].reshape(1, 8, 8).astype(np.float32)
        return torch.from_numpy(pixels / 16), int(self.labels[index])
