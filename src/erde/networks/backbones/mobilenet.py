"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) at half width for 32x32 images, as in the KD papers.

The CIFAR variant of RepDistiller (arXiv 1910.10699, ``mobile_half``), which differs from the paper: ReLU in
place of ReLU6, the 24 channels' stride is 1, and the first inverted residual keeps its 1x1 expansion although
it expands by 1. The stem still halves the map, which ends at 2x2.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from erde.networks.backbones.base import (
    Backbone,
    ConvolutionNormRelu,
    initialise_convolutions,
    initialise_linear,
    pooled_classifier,
)

# Expansion, channels at full width, blocks, stride of the first block: one row a group.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM, LAST = 32, 1280


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection without activation; the input is added where shapes agree."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.expand = ConvolutionNormRelu(channels_in, inner, 1)
        self.depthwise = ConvolutionNormRelu(inner, inner, 3, stride, groups=inner)
        self.project = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.adds_input = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        out: Tensor = self.norm(self.project(self.depthwise(self.expand(x))))
        return x + out if self.adds_input else out


def cifar_mobilenet_v2(classes: int, channels: int = 3, width: float = 0.5) -> Backbone:
    """A MobileNetV2 with ``width`` times the paper's channels, the last 1280 excepted where ``width`` < 1."""
    channels_in = int(STEM * width)
    blocks: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvolutionNormRelu(channels, channels_in, 3, 2))
    for group, (expansion, full, count, first_stride) in enumerate(GROUPS, start=1):
        for number in range(1, count + 1):
            stride = first_stride if number == 1 else 1
            block = InvertedResidual(channels_in, int(full * width), stride, expansion)
            blocks[f"group{group}_block{number}"] = block
            channels_in = int(full * width)
    last = int(LAST * max(width, 1.0))
    blocks["widen"] = ConvolutionNormRelu(channels_in, last, 1)
    backbone = Backbone(blocks, pooled_classifier(last, classes))
    initialise_convolutions(backbone)
    initialise_linear(backbone)
    return backbone
