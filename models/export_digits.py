"""Write the trained digits_cnn as TorchScript and as exported program, and 50 digits as CSV.

Reads the files written by train_digits.py. Runs with the same torch write the same bytes.
"""

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from digits_cnn import build
from safetensors.torch import load_file
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "models" / "digits_cnn.safetensors"
CONFIGS = ROOT / "configs"

BATCH = 16  # the only batch size that the exported program accepts
ROWS = 50


def trained() -> nn.Module:
    """Return the trained network in eval mode."""
    model = build()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval().requires_grad_(False)


def save_torchscript(model: nn.Module, path: Path) -> None:
    """Write a trace of the network, which accepts any batch size."""
    buffer = io.BytesIO()
    traced = torch.jit.trace(model, torch.zeros(BATCH, 1, 8, 8))  # type: ignore[no-untyped-call]
    torch.jit.save(traced, buffer)
    # Omit the .debug_pkl files, which contain paths of this machine, and their checksum.
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(path, "w") as lean:
        for item in whole.infolist():
            if not item.filename.endswith((".debug_pkl", "/serialization_id")):
                lean.writestr(item, whole.read(item))


def save_exported(model: nn.Module, path: Path) -> None:
    """Write the network as a program for batches of BATCH."""
    program = torch.export.export(model, (torch.zeros(BATCH, 1, 8, 8),))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths
    torch.export.save(program, path)


def save_table(path: Path) -> None:
    """Write the first test images: an id, the true digit, and the pixels by row and column."""
    digits = np.load(CONFIGS / "digits.npz")
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["id", "digit", *(f"p{y}{x}" for y in range(8) for x in range(8))])
        for i in range(ROWS):
            rows.writerow([f"held-out-{i}", digits["labels"][i], *digits["images"][i]])


def main() -> None:
    """Write the three files into configs/."""
    torch.manual_seed(0)
    model = trained()
    save_torchscript(model, CONFIGS / "digits.pt")
    save_exported(model, CONFIGS / "digits.pt2")
    save_table(CONFIGS / "digits.csv")


if __name__ == "__main__":
    main()
