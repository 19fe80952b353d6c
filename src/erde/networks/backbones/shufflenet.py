"""ShuffleNet V1 (Zhang et al. 2017, arXiv 1707.01083) and V2 (Ma et al. 2018, arXiv 1807.11164) for 32x32 images.

The CIFAR variants of RepDistiller (arXiv 1910.10699, ``ShuffleV1`` with 3 groups and ``ShuffleV2`` at width 1):
a 1x1 stem of 24 channels without stride or pool in place of the papers' 3x3 one with both, and in V1 a ReLU
after the depthwise convolution. Weights start as torch starts them, as in that code.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from erde.networks.backbones.base import Backbone, ConvolutionNormRelu, pooled_classifier

STEM = 24


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Channel i of group g becomes channel i * groups + g: (B, C, H, W) to the same shape."""
    # The batch axis is left alone: a view over all axes would bake its size into an exported graph.
    return torch.unflatten(x, 1, (groups, x.shape[1] // groups)).transpose(1, 2).flatten(1, 2)


class GroupedUnit(nn.Module):
    """V1: grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; added to the input, or put beside its 3x3 average."""

    def __init__(self, channels_in: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        # The convolutions give the channels that the pooled input does not fill.
        own = channels - channels_in if stride == 2 else channels
        # The stem's channels are too few to be grouped (section 3.2 of the paper).
        self.groups = 1 if channels_in == STEM else groups
        self.reduce = ConvolutionNormRelu(channels_in, own // 4, 1, groups=self.groups)
        self.depthwise = ConvolutionNormRelu(own // 4, own // 4, 3, stride, groups=own // 4)
        self.expand = nn.Conv2d(own // 4, own, 1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(own)
        self.pool = nn.AvgPool2d(3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        out = self.depthwise(shuffle_channels(self.reduce(x), self.groups))
        out = self.norm(self.expand(out))
        return torch.relu(torch.cat([out, self.pool(x)], 1) if self.stride == 2 else out + x)


def cifar_shufflenet_v1(classes: int, channels: int = 3, groups: int = 3) -> Backbone:
    """ShuffleNet V1 with 3 groups and 240, 480, 960 channels."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvolutionNormRelu(channels, STEM, 1))
    channels_in = STEM
    for group, (width, count) in enumerate(((240, 4), (480, 8), (960, 4)), start=1):
        for number in range(1, count + 1):
            stride = 2 if number == 1 else 1
            blocks[f"group{group}_block{number}"] = GroupedUnit(channels_in, width, stride, groups)
            channels_in = width
    return Backbone(blocks, pooled_classifier(channels_in, classes))


class Branch(nn.Sequential):
    """V2's right branch: 1x1 with ReLU, 3x3 depthwise without, 1x1 with ReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__(
            OrderedDict(
                reduce=ConvolutionNormRelu(channels_in, channels, 1),
                depthwise=nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
                norm=nn.BatchNorm2d(channels),
                expand=ConvolutionNormRelu(channels, channels, 1),
            )
        )


class SplitUnit(nn.Module):
    """V2, stride 1: half of the channels pass, half go through the branch; then both are shuffled together."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.passing = channels // 2
        self.branch = Branch(channels // 2, channels // 2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        passing, worked = x[:, : self.passing], x[:, self.passing :]
        return shuffle_channels(torch.cat([passing, self.branch(worked)], 1), 2)


class DownUnit(nn.Module):
    """V2, stride 2: both halves of the output come from all of the input, one by 3x3 depthwise and 1x1 only."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(
            OrderedDict(
                depthwise=nn.Conv2d(
                    channels_in, channels_in, 3, 2, padding=1, groups=channels_in, bias=False
                ),
                norm=nn.BatchNorm2d(channels_in),
                expand=ConvolutionNormRelu(channels_in, channels // 2, 1),
            )
        )
        self.branch = Branch(channels_in, channels // 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        return shuffle_channels(torch.cat([self.shortcut(x), self.branch(x)], 1), 2)


def cifar_shufflenet_v2(classes: int, channels: int = 3) -> Backbone:
    """ShuffleNet V2 at width 1: 116, 232, 464 channels, then 1024."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict(stem=ConvolutionNormRelu(channels, STEM, 1))
    channels_in = STEM
    for group, (width, count) in enumerate(((116, 4), (232, 8), (464, 4)), start=1):
        for number in range(1, count + 1):
            blocks[f"group{group}_block{number}"] = (
                DownUnit(channels_in, width) if number == 1 else SplitUnit(width)
            )
            channels_in = width
    blocks["widen"] = ConvolutionNormRelu(channels_in, 1024, 1)
    return Backbone(blocks, pooled_classifier(1024, classes))
