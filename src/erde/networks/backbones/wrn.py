"""Wide ResNets (Zagoruyko and Komodakis 2016, arXiv 1605.07146) for CIFAR: wrn-<depth>-<width>."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from erde.networks.backbones.base import Backbone, initialise_convolutions, pooled_classifier


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; a 1x1 shortcut where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projection: nn.Module | None = None
        if channels_in != channels:
            self.projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        activated = torch.relu(self.norm1(x))
        # Where the shape changes, the shortcut starts after the activation, as in the authors' code.
        shortcut = x if self.projection is None else self.projection(activated)
        out: Tensor = self.conv2(torch.relu(self.norm2(self.conv1(activated))))
        return out + shortcut


def wide_resnet(depth: int, width: int, classes: int, channels: int = 3) -> Backbone:
    """A wide ResNet of ``depth`` = 6n + 4 layers, ``width`` times the channels 16, 32, 64."""
    assert (depth - 4) % 6 == 0, depth
    blocks: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(channels, 16, 3, padding=1, bias=False))
    channels_in = 16
    for group, channels_out in enumerate((16 * width, 32 * width, 64 * width), start=1):
        for number in range(1, (depth - 4) // 6 + 1):
            stride = 2 if group > 1 and number == 1 else 1
            blocks[f"group{group}_block{number}"] = PreActivationBlock(channels_in, channels_out, stride)
            channels_in = channels_out
    backbone = Backbone(blocks, pooled_classifier(channels_in, classes, activate=True))
    initialise_convolutions(backbone)
    return backbone
