"""Backbones by name. A new family is one new file here and its lines in ``BACKBONES``."""

from __future__ import annotations

from collections.abc import Callable

from erde.backbones.base import Backbone
from erde.backbones.resnet import cifar_resnet
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


def build_backbone(name: str, *, classes: int, channels: int = 3) -> Backbone:
    """The backbone ``name`` with fresh weights from torch's global generator."""
    if name not in BACKBONES:
        raise UserError(f"unknown backbone '{name}'{nearest(name, BACKBONES)}")
    return BACKBONES[name](classes, channels)


__all__ = ["BACKBONES", "Backbone", "build_backbone"]
