"""VGG for 32x32 images (Simonyan and Zisserman 2014, arXiv 1409.1556) as the distillation papers use it.

Five groups of 3x3 convolutions, each with a bias, batch norm and ReLU; a 2x2 max pool before groups 2, 3 and
4; a global average pool and one linear layer in place of the three of ImageNet (RepDistiller, arXiv
1910.10699, ``vgg8_bn`` and so on: every KD table's "vgg8" is the one with batch norm).
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from erde.networks.backbones.base import (
    Backbone,
    ConvolutionNormRelu,
    initialise_convolutions,
    initialise_linear,
    pooled_classifier,
)

# Layers with weights -> convolutions in each of the five groups; the classifier is the layer that is left.
CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
WIDTHS = (64, 128, 256, 512, 512)


def cifar_vgg(depth: int, classes: int, channels: int = 3) -> Backbone:
    """A VGG of ``depth`` layers: a key of ``CONVOLUTIONS``."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    channels_in = channels
    for group, (count, width) in enumerate(zip(CONVOLUTIONS[depth], WIDTHS, strict=True), start=1):
        for number in range(1, count + 1):
            block: nn.Sequential = ConvolutionNormRelu(channels_in, width, 3, bias=True)
            if number == 1 and group in (2, 3, 4):
                # The pool opens a group, so that an exit sees the map from which the papers take their hints.
                pool = nn.MaxPool2d(2)
                block = nn.Sequential(OrderedDict([("pool", pool), *block.named_children()]))
            blocks[f"group{group}_block{number}"] = block
            channels_in = width
    backbone = Backbone(blocks, pooled_classifier(channels_in, classes))
    initialise_convolutions(backbone)
    initialise_linear(backbone)
    return backbone
