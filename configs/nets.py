"""A network in a file of the user's own, for python.yaml: digits_cnn with a second answer.

Its layers are named as in models/digits_cnn.py, so that the weights trained there load here.
"""

from torch import Tensor, nn


def stage(inputs: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution, batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class DigitNet(nn.Module):
    """Images [N, 1, 8, 8] to `logits` [N, classes] and the `features` [N, 256] behind them."""

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
