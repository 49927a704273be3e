"""Train digits_cnn on the 8x8 digits of scikit-learn; write its weights and the test images.

The test images are not used in training, which stops after a fixed number of epochs. Runs on the
same machine write the same bytes; another processor may round differently.
"""

from pathlib import Path

import numpy as np
import torch
from digits_cnn import build
from safetensors.torch import save
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "models" / "digits_cnn.safetensors"
HELD_OUT = ROOT / "configs" / "digits.npz"

SEED = 0
HELD_OUT_IMAGES = 500
SCALE = 0.0625  # pixels are 0..16
EPOCHS = 20  # chosen, like the rate, by cross-validation on the training images
BATCH = 64
PEAK_RATE = 0.01


def to_input(pixels: Tensor) -> Tensor:
    """Convert raw pixels [N, 64] to inputs of the model."""
    return pixels.float().mul(SCALE).view(-1, 1, 8, 8)


def train(images: Tensor, labels: Tensor) -> nn.Module:
    """Return a network trained on images [N, 1, 8, 8] and labels [N], in eval mode."""
    model = build().train()
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.split(torch.randperm(len(images)), BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of images that are classified correctly."""
    return float((model(images).argmax(dim=1) == labels).float().mean())


def main() -> None:
    """Train, print the accuracy on the test images, and write both files."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the order of sums, and so rounding, depends on the threads

    digits = load_digits()
    pixels, held_pixels, labels, held_labels = train_test_split(
        digits.data.astype(np.uint8),
        digits.target.astype(np.uint8),
        test_size=HELD_OUT_IMAGES,
        stratify=digits.target,
        random_state=SEED,
    )
    model = train(to_input(torch.from_numpy(pixels)), torch.from_numpy(labels).long())
    held_out = accuracy(
        model, to_input(torch.from_numpy(held_pixels)), torch.from_numpy(held_labels)
    )
    print(f"held-out accuracy: {held_out:.2%} of {HELD_OUT_IMAGES} images")

    WEIGHTS.write_bytes(save(dict(model.state_dict())))
    HELD_OUT.parent.mkdir(exist_ok=True)
    np.savez(HELD_OUT, images=held_pixels, labels=held_labels)


if __name__ == "__main__":
    main()
