"""What a backbone is to erde: named blocks in a row, and a classifier."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


class Backbone(nn.Module):
    """Blocks that follow one another, and the classifier that turns the last feature map into logits.

    Block names ending in ``_<something>`` form groups by what stands before the underscore. An exit may
    stand after any block from ``first_exit_block`` on.
    """

    def __init__(
        self, blocks: OrderedDict[str, nn.Module], classifier: nn.Module, first_exit_block: int = 1
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(blocks)
        self.classifier = classifier
        self.first_exit_block = first_exit_block

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, K)."""
        output: Tensor = self.classifier(self.blocks(x))
        return output


def initialise_convolutions(module: nn.Module) -> None:
    """He initialisation by fan-out for convolutions; batch norm starts as the identity (He et al. 2015)."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(child, nn.BatchNorm2d):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
