"""CIFAR ResNets (He et al. 2015, arXiv 1512.03385, section 4.2) as the distillation papers use them.

Three groups of basic blocks, projection shortcuts (1x1 convolution and batch norm) where the shape
changes (``-a``: the paper's option A instead), and for ``x4`` four times the channels with a stem of 32
(RepDistiller, arXiv 1910.10699).
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from erde.networks.backbones.base import Backbone, initialise_convolutions, pooled_classifier


class PaddedShortcut(nn.Module):
    """The paper's option A: every ``stride``-th pixel, and ``channels`` of zeros, half before and half behind."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.before, self.behind, self.stride = channels // 2, channels - channels // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C + channels, H / stride, W / stride)."""
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, self.before, self.behind))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, ReLU after the sum."""

    def __init__(self, channels_in: int, channels: int, stride: int, padded_shortcut: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if padded_shortcut and (stride != 1 or channels_in != channels):
            self.shortcut = PaddedShortcut(channels - channels_in, stride)
        elif stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        # In place: no layer before needs the outputs of the sum and the norm.
        out = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        return functional.relu(self.norm2(self.conv2(out)) + self.shortcut(x), inplace=True)


def cifar_resnet(
    depth: int,
    classes: int,
    channels: int = 3,
    widths: tuple[int, int, int, int] = (16, 16, 32, 64),
    padded_shortcut: bool = False,
    stride: int = 1,
) -> Backbone:
    """A ResNet of ``depth`` = 6n + 2 layers; ``widths`` are the channels of the stem and the three groups.

    ``padded_shortcut`` takes the paper's option A, without parameters, where the shape changes. With a ``stride`` the
    stem's kernel is twice as wide, and all maps are smaller by it: CPUs compute many channels of a small map in less time
    than few of a large one.
    """
    assert (depth - 2) % 6 == 0, depth
    # Kernel, stride, padding.
    stem_shape = (3, 1, 1) if stride == 1 else (2 * stride, stride, stride // 2)
    stem = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels, widths[0], *stem_shape, bias=False),
            norm=nn.BatchNorm2d(widths[0]),
            relu=nn.ReLU(inplace=True),
        )
    )
    blocks: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    channels_in = widths[0]
    for group, width in enumerate(widths[1:], start=1):
        for number in range(1, (depth - 2) // 6 + 1):
            halved = 2 if group > 1 and number == 1 else 1
            blocks[f"group{group}_block{number}"] = BasicBlock(channels_in, width, halved, padded_shortcut)
            channels_in = width
    backbone = Backbone(blocks, pooled_classifier(channels_in, classes))
    initialise_convolutions(backbone)
    return backbone
