"""A backbone: named blocks in a row, and a classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


class Backbone(nn.Module):
    """Blocks that follow one another, and the classifier that turns the last feature map into logits.

    Block names ending in ``_<something>`` form groups by the part before the underscore. An exit may
    stand after any block from ``first_exit_block`` on.

    A family that was designed with exits brings its heads along: ``native_heads`` maps names of blocks to
    modules that turn the block's output into logits (B, K). Blocks hand over one tensor (B, C, H, W),
    or a tuple of them, which the next block, the native head and the classifier then take as it is.
    """

    def __init__(
        self,
        blocks: OrderedDict[str, nn.Module],
        classifier: nn.Module,
        first_exit_block: int = 1,
        native_heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(blocks)
        self.classifier = classifier
        self.first_exit_block = first_exit_block
        self.native_heads = nn.ModuleDict(native_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, K)."""
        output: Tensor = self.classifier(self.blocks(x))
        return output


class ConvolutionNormRelu(nn.Sequential):
    """A convolution with padding that keeps the size (at stride 1), batch norm, ReLU."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: int,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        convolution = nn.Conv2d(
            channels_in, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=bias
        )
        super().__init__(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(channels), relu=nn.ReLU()))


def pooled_classifier(channels: int, classes: int, *, activate: bool = False) -> nn.Sequential:
    """Global average pool and a linear layer: (B, C, H, W) to (B, K); ``activate`` with batch norm and ReLU before them."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if activate:
        layers.update(norm=nn.BatchNorm2d(channels), relu=nn.ReLU())
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, classes))
    return nn.Sequential(layers)


def initialise_linear(module: nn.Module) -> None:
    """Linear layers start with weights of standard deviation 0.01 and no bias, as in the authors' code."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=0.01)
            nn.init.zeros_(child.bias)


def initialise_convolutions(module: nn.Module) -> None:
    """He initialisation by fan-out for convolutions; batch norm starts as the identity (He et al. 2015)."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.BatchNorm2d):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
