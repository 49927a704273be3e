"""ResNet-18 (He et al. 2015, arXiv:1512.03385): images [N, 3, 224, 224] to logits [N, classes].

The parameters have the names used by torchvision, so that its checkpoints can be loaded.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    # The BatchNorm after every convolution adds the bias.
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """Two 3x3 convolutions with a residual connection, which changes the size if necessary."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        # nn.Identity has no parameters, so it does not add a key to the state dict.
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                _conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.downsample(x))


def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, outputs, stride), Block(outputs, outputs, 1))


def build(classes: int = 1000) -> nn.Module:
    """Return the network with random weights."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=_conv(3, 64, 7, 2),
            bn1=nn.BatchNorm2d(64),
            relu=nn.ReLU(),
            maxpool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            layer1=_layer(64, 64, 1),
            layer2=_layer(64, 128, 2),
            layer3=_layer(128, 256, 2),
            layer4=_layer(256, 512, 2),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(512, classes),
        )
    )
