"""MSDNet (Huang et al. 2017, arXiv 1703.09844) for 32x32 images: a network that was designed with exits.

Each layer keeps feature maps at three scales, joins to each new features from the finer scale and from its
own, and hands on all of it, so that coarse features, which exits need, are there from the start. A third of
the way and two thirds of the way the finest scale that is left is dropped and the rest halved (section 4,
"network reduction"). Numbers as in the authors' code (github.com/gaohuang/MSDNet and
github.com/kalviny/MSDNet-PyTorch): 16 channels, 6 more a layer, factors 1-2-4 from fine to coarse for both
and for the bottlenecks, reduction 0.5.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from erde.networks.backbones.base import (
    Backbone,
    ConvolutionNormRelu,
    initialise_convolutions,
    pooled_classifier,
)

Scales = tuple[Tensor, ...]

CHANNELS, GROWTH, REDUCTION = 16, 6, 0.5
# From the finest scale to the coarsest: of channels, of growth, and of the bottlenecks' width.
FACTORS = (1, 2, 4)
HEAD_CHANNELS = 128


class FirstLayer(nn.Module):
    """Images (B, C, H, W) to three scales: (B, 16, H, W), (B, 32, H/2, W/2), (B, 64, H/4, W/4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [CHANNELS * factor for factor in FACTORS]
        self.scales = nn.ModuleList(
            ConvolutionNormRelu(before, width, 3, stride)
            for before, width, stride in zip([channels, *widths], widths, (1, 2, 2), strict=False)
        )

    def forward(self, x: Tensor) -> Scales:
        """(B, C, H, W) to three scales, each made of the one before it."""
        out: list[Tensor] = []
        for scale in self.scales:
            x = scale(x)
            out.append(x)
        return tuple(out)


def _bottleneck(channels_in: int, channels: int, factor: int, stride: int) -> nn.Module:
    inner = min(channels_in, factor * channels)
    return nn.Sequential(
        OrderedDict(
            reduce=ConvolutionNormRelu(channels_in, inner, 1),
            conv=ConvolutionNormRelu(inner, channels, 3, stride),
        )
    )


class MultiScaleLayer(nn.Module):
    """One column of the network. ``width`` channels come in at factor 1, ``width + 6`` go out.

    Takes the scales from ``first_in`` on and hands over those from ``first_out`` on, each with its input at that
    scale, the features made from the finer scale (if that came in), and those made from its own.
    """

    def __init__(self, width: int, first_in: int, first_out: int) -> None:
        super().__init__()
        self.dropped = first_out - first_in
        self.down, self.same = nn.ModuleList(), nn.ModuleList()
        for scale in range(first_out, len(FACTORS)):
            growth = GROWTH * FACTORS[scale]
            if scale > first_in:
                finer, factor = width * FACTORS[scale - 1], FACTORS[scale - 1]
                growth //= 2
                self.down.append(_bottleneck(finer, growth, factor, stride=2))
            self.same.append(_bottleneck(width * FACTORS[scale], growth, FACTORS[scale], stride=1))

    def forward(self, scales: Scales) -> Scales:
        """Scales from fine to coarse, as many as there are, to as many or one less."""
        out = []
        without_finer = len(self.same) - len(self.down)
        for index, same in enumerate(self.same):
            own = scales[index + self.dropped]
            parts = [own]
            if index >= without_finer:
                parts.append(self.down[index - without_finer](scales[index + self.dropped - 1]))
            out.append(torch.cat([*parts, same(own)], 1))
        return tuple(out)


class Transition(nn.Module):
    """A 1x1 convolution at each scale, from ``width`` to ``reduced`` channels at factor 1."""

    def __init__(self, width: int, reduced: int, first: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            ConvolutionNormRelu(width * factor, reduced * factor, 1) for factor in FACTORS[first:]
        )

    def forward(self, scales: Scales) -> Scales:
        """Scales to as many scales of the same sizes."""
        return tuple(convolution(x) for convolution, x in zip(self.scales, scales, strict=True))


class ScaleHead(nn.Module):
    """The authors' exit: two 3x3 convolutions of stride 2 with 128 channels on the coarsest scale, pool, linear.

    Takes the scales that a block hands over and gives logits (B, K). The pool is over the whole map, which is
    the authors' 2x2 one at 32x32 images, and which makes other sizes possible.
    """

    def __init__(self, channels_in: int, classes: int) -> None:
        super().__init__()
        self.conv1 = ConvolutionNormRelu(channels_in, HEAD_CHANNELS, 3, 2)
        self.conv2 = ConvolutionNormRelu(HEAD_CHANNELS, HEAD_CHANNELS, 3, 2)
        self.classifier = pooled_classifier(HEAD_CHANNELS, classes)

    def reset_parameters(self) -> None:
        """Draw the convolutions as the backbone does."""
        initialise_convolutions(self)

    def forward(self, scales: Scales) -> Tensor:
        """Scales to logits (B, K); reads the last, coarsest alone."""
        logits: Tensor = self.classifier(self.conv2(self.conv1(scales[-1])))
        return logits


def cifar_msdnet(steps: Sequence[int], classes: int, channels: int = 3) -> Backbone:
    """An MSDNet with an exit after each block; ``steps`` are the layers of the blocks.

    Blocks ``block1`` and on; all but the last have a native head, the last has the classifier. A block
    hands over a tuple of scales from fine to coarse, (B, C * factor, H / factor, W / factor): three in the
    first third of the layers, then two, in the last third one (still a tuple), the coarsest always among them.
    """
    layers = sum(steps)
    third = math.ceil(layers / len(FACTORS))
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    heads: OrderedDict[str, nn.Module] = OrderedDict()
    width, layer, first_in = CHANNELS, 0, 0
    for number, step in enumerate(steps, start=1):
        parts: list[nn.Module] = [] if number > 1 else [FirstLayer(channels)]
        for _ in range(step):
            first_out = layer // third
            parts.append(MultiScaleLayer(width, first_in, first_out))
            width += GROWTH
            if first_out > first_in:
                reduced = int(width * REDUCTION)
                parts.append(Transition(width, reduced, first_out))
                width = reduced
            layer, first_in = layer + 1, first_out
        blocks[f"block{number}"] = nn.Sequential(*parts)
        heads[f"block{number}"] = ScaleHead(width * FACTORS[-1], classes)
    classifier = heads.popitem()[1]
    backbone = Backbone(blocks, classifier, first_exit_block=0, native_heads=heads)
    initialise_convolutions(backbone)
    return backbone
