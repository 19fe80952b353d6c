"""Backbones by name. A new family is one new file here and its lines in ``BACKBONES``; ``timm/<name>`` is timm's."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from erde.backbones.base import Backbone
from erde.backbones.resnet import cifar_resnet
from erde.backbones.timm import PREFIX, is_timm, timm_model
from erde.backbones.timm import check_name as check_timm_name
from erde.backbones.wrn import wide_resnet
from erde.errors import UserError, nearest

# name -> builder(classes, channels)
BACKBONES: dict[str, Callable[[int, int], Backbone]] = {
    "resnet8": lambda classes, channels: cifar_resnet(8, classes, channels),
    "resnet14": lambda classes, channels: cifar_resnet(14, classes, channels),
    "resnet20": lambda classes, channels: cifar_resnet(20, classes, channels),
    "resnet32": lambda classes, channels: cifar_resnet(32, classes, channels),
    "resnet44": lambda classes, channels: cifar_resnet(44, classes, channels),
    "resnet56": lambda classes, channels: cifar_resnet(56, classes, channels),
    "resnet110": lambda classes, channels: cifar_resnet(110, classes, channels),
    "resnet20-a": lambda classes, channels: cifar_resnet(20, classes, channels, padded_shortcut=True),
    "resnet32-a": lambda classes, channels: cifar_resnet(32, classes, channels, padded_shortcut=True),
    "resnet56-a": lambda classes, channels: cifar_resnet(56, classes, channels, padded_shortcut=True),
    "resnet8x0.25": lambda classes, channels: cifar_resnet(8, classes, channels, widths=(4, 4, 8, 16)),
    "resnet8x0.5": lambda classes, channels: cifar_resnet(8, classes, channels, widths=(8, 8, 16, 32)),
    "resnet8x0.75": lambda classes, channels: cifar_resnet(8, classes, channels, widths=(12, 12, 24, 48)),
    "resnet20x0.5": lambda classes, channels: cifar_resnet(20, classes, channels, widths=(8, 8, 16, 32)),
    "resnet8x4": lambda classes, channels: cifar_resnet(8, classes, channels, widths=(32, 64, 128, 256)),
    "resnet32x4": lambda classes, channels: cifar_resnet(32, classes, channels, widths=(32, 64, 128, 256)),
    "wrn-16-1": lambda classes, channels: wide_resnet(16, 1, classes, channels),
    "wrn-16-2": lambda classes, channels: wide_resnet(16, 2, classes, channels),
    "wrn-40-1": lambda classes, channels: wide_resnet(40, 1, classes, channels),
    "wrn-40-2": lambda classes, channels: wide_resnet(40, 2, classes, channels),
}


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
        UserError: an unknown name; ``pretrained`` for a backbone that has no published weights, or that cannot be had.
    """
    if is_timm(name):
        return timm_model(
            name, classes=classes, channels=channels, image_size=image_size, pretrained=pretrained
        )
    check_backbone_name(name)
    if pretrained:
        raise UserError(
            f"backbone '{name}' has no pretrained weights: take one of timm's ({PREFIX}<name>), or give a file with weights"
        )
    return BACKBONES[name](classes, channels)


def check_backbone_name(name: str) -> None:
    """Refuse a name that is no backbone; timm is imported for its own names only."""
    if is_timm(name):
        check_timm_name(name)
    elif name not in BACKBONES:
        raise UserError(f"unknown backbone '{name}'{nearest(name, BACKBONES)}")


__all__ = ["BACKBONES", "Backbone", "build_backbone", "check_backbone_name"]
