"""ResNet-18 (He et al. 2015, arXiv:1512.03385): [N, 3, 224, 224] in, one logit per class out.

It knows no weights or class names; its parameters are named as torchvision names them, so that
checkpoints saved there load here.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    # A BatchNorm follows every convolution and brings the bias.
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """Two 3x3 convolutions whose result is added to their input, resized first if need be."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        # An Identity has no parameters, so it adds no key that a checkpoint would lack.
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
    """The network, with random weights; its state dict has the usual key names."""
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
