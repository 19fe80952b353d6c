"""DenseNet-BC (Huang et al. 2016, arXiv 1608.06993, sections 3 and 4.2) for 32x32 images."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from erde.networks.backbones.base import Backbone, initialise_convolutions, pooled_classifier


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 1x1 to 4k channels, the same again with 3x3 to k; the result is put beside the input.

    Takes (B, C, H, W) and hands over (B, C + k, H, W), the input included: a stage needs nothing else.
    """

    def __init__(self, channels_in: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C + k, H, W)."""
        inner = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(inner)))], 1)


def _transition(channels_in: int, channels: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(channels_in),
            relu=nn.ReLU(),
            conv=nn.Conv2d(channels_in, channels, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )


def densenet_bc(depth: int, growth: int, classes: int, channels: int = 3) -> Backbone:
    """A DenseNet-BC of ``depth`` = 6n + 4 layers that adds ``growth`` (the paper's k) channels in each.

    Blocks: ``stem``, ``dense1_layer1`` and on, ``transition1``, ``dense2_layer1`` and on, and so forth: an
    exit at ``dense1`` stands before the transition.
    """
    assert (depth - 4) % 6 == 0, depth
    width = 2 * growth
    blocks: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Conv2d(channels, width, 3, padding=1, bias=False)
    )
    for group in (1, 2, 3):
        for number in range(1, (depth - 4) // 6 + 1):
            blocks[f"dense{group}_layer{number}"] = DenseLayer(width, growth)
            width += growth
        if group < 3:
            blocks[f"transition{group}"] = _transition(width, width // 2)
            width //= 2
    classifier = pooled_classifier(width, classes, activate=True)
    backbone = Backbone(blocks, classifier)
    initialise_convolutions(backbone)
    nn.init.zeros_(classifier.get_parameter("linear.bias"))
    return backbone
