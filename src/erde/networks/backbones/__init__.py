"""Backbones, a file for each family; their names stand in ``erde.recipe.backbones``."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from erde.common.errors import UserError
from erde.networks.backbones.base import Backbone
from erde.networks.backbones.timm import timm_model
from erde.recipe.backbones import BACKBONES, TIMM, check_backbone_name, is_timm

# A network beyond these is a slip of the pen, and would take memory and time before it says so.
MAX_CLASSES, MAX_CHANNELS, MAX_SIDE = 100_000, 1024, 4096


def build_backbone(
    name: str,
    *,
    classes: int,
    channels: int = 3,
    image_size: tuple[int, int] | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """The backbone ``name`` with fresh weights from torch's global generator, a ``Backbone`` or a model of timm's.

    ``image_size`` (H, W) is for those of timm's models that are built for one size, and ``pretrained`` takes timm's
    weights; erde's own backbones look at neither size nor weights.

    Raises:
        UserError: an unknown name; numbers that no network has; ``pretrained`` for a backbone that has no published
            weights, or that cannot be had.
    """
    for key, value, highest in (("classes", classes, MAX_CLASSES), ("channels", channels, MAX_CHANNELS)):
        if not 1 <= value <= highest:
            raise UserError(f"{key} is {value}, expected 1 to {highest:,}")
    if image_size is not None and not all(1 <= side <= MAX_SIDE for side in image_size):
        raise UserError(
            f"the image size is {'x'.join(str(side) for side in image_size)}, expected 1 to {MAX_SIDE} pixels a side"
        )
    if is_timm(name):
        return timm_model(
            name, classes=classes, channels=channels, image_size=image_size, pretrained=pretrained
        )
    check_backbone_name(name)
    if pretrained:
        raise UserError(
            f"backbone '{name}' has no pretrained weights: take one of timm's ({TIMM}<name>), or give a file with weights"
        )
    entry = BACKBONES[name]
    module, builder = entry.builder.split(".")
    family = import_module(f"erde.networks.backbones.{module}")
    network: nn.Module = getattr(family, builder)(classes=classes, channels=channels, **entry.arguments)
    return network


__all__ = ["Backbone", "build_backbone"]
