"""A small convolutional classifier: grayscale digits [N, 1, 8, 8] in 0..1 to logits [N, 10].

train_digits.py trains it and writes its weights.
"""

from collections import OrderedDict

from torch import nn


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    # BatchNorm adds a bias, so the convolution does not need one.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def build() -> nn.Module:
    """Return the network with random weights."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            stage1=_stage(1, 32),
            stage2=_stage(32, 32),
            pool1=nn.MaxPool2d(2),
            stage3=_stage(32, 64),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            # No average pooling: the positions of strokes distinguish 6 from 9.
            fc=nn.Linear(64 * 2 * 2, 10),
        )
    )
