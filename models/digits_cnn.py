"""A small convolutional classifier for 8x8 grey images of digits: [N, 1, 8, 8] in, ten logits out.

It knows neither its weights (train_digits.py writes them) nor how pixels are scaled to 0..1.
"""

from collections import OrderedDict

from torch import nn


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    # BatchNorm has its own shift, so a bias on the convolution would be redundant.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def build() -> nn.Module:
    """The network, with random weights."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            stage1=_stage(1, 32),
            stage2=_stage(32, 32),
            pool1=nn.MaxPool2d(2),
            stage3=_stage(32, 64),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            # The positions are kept, not averaged away: where a stroke lies tells 6 from 9.
            fc=nn.Linear(64 * 2 * 2, 10),
        )
    )
