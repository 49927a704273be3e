"""The models of python.yaml, digits_cnn with a second output, and of detect.yaml.

Its layers have the names used in models/digits_cnn.py, so that the same weights can be loaded.
"""

import torch
from torch import Tensor, nn


def stage(inputs: int, outputs: int) -> nn.Sequential:
    """Return a 3x3 convolution with batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class DigitNet(nn.Module):
    """Maps images [N, 1, 8, 8] to `logits` [N, classes] and `features` [N, 256]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stage1 = stage(1, 32)
        self.stage2 = stage(32, 32)
        self.stage3 = stage(32, 64)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(64 * 2 * 2, classes)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.pool(self.stage2(self.stage1(image)))
        features = self.pool(self.stage3(features)).flatten(1)
        return {"logits": self.fc(features), "features": features}


class InkDetector(nn.Module):
    """Finds the box around the ink of each picture [1, height, width] in a list of any sizes.

    Like a detector of torchvision, it returns a dict of boxes, labels and scores per picture.
    """

    class_names = ("paper", "ink")

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.detect(image[0]) for image in images]

    def detect(self, image: Tensor) -> dict[str, Tensor]:
        rows, columns = (image > self.threshold).nonzero(as_tuple=True)
        boxes = image.new_zeros((0, 4))
        if len(rows):
            corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            boxes = torch.stack(corners).to(image.dtype)[None]
        scores = image.mean()[None][: len(boxes)]
        labels = torch.ones(len(boxes), dtype=torch.int64)
        return {"boxes": boxes, "labels": labels, "scores": scores}
