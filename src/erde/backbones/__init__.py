"""Backbones by name. A new family is one new file here and its lines in ``BACKBONES``; ``timm/<name>`` is timm's."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from erde.backbones.base import Backbone
from erde.backbones.densenet import densenet_bc
from erde.backbones.mobilenet import cifar_mobilenet_v2
from erde.backbones.msdnet import cifar_msdnet
from erde.backbones.resnet import cifar_resnet
from erde.backbones.shufflenet import cifar_shufflenet_v1, cifar_shufflenet_v2
from erde.backbones.timm import PREFIX, is_timm, timm_model
from erde.backbones.timm import check_name as check_timm_name
from erde.backbones.vgg import cifar_vgg
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
    "vgg8": lambda classes, channels: cifar_vgg(8, classes, channels),
    "vgg13": lambda classes, channels: cifar_vgg(13, classes, channels),
    "vgg16": lambda classes, channels: cifar_vgg(16, classes, channels),
    "mobilenetv2": cifar_mobilenet_v2,
    "shufflenetv1": cifar_shufflenet_v1,
    "shufflenetv2": cifar_shufflenet_v2,
    "densenet-bc-100-12": lambda classes, channels: densenet_bc(100, 12, classes, channels),
    "msdnet": lambda classes, channels: cifar_msdnet((4, *[2] * 9), classes, channels),
    "msdnet-7": lambda classes, channels: cifar_msdnet((4, *[2] * 6), classes, channels),
    "msdnet-budgeted": lambda classes, channels: cifar_msdnet((1, 2, 3, 4, 5), classes, channels),
}

# name -> one line for people, in the same order.
SUMMARIES: dict[str, str] = {
    "resnet8": "CIFAR ResNet of 8 layers",
    "resnet14": "CIFAR ResNet of 14 layers",
    "resnet20": "CIFAR ResNet of 20 layers",
    "resnet32": "CIFAR ResNet of 32 layers",
    "resnet44": "CIFAR ResNet of 44 layers",
    "resnet56": "CIFAR ResNet of 56 layers",
    "resnet110": "CIFAR ResNet of 110 layers",
    "resnet20-a": "CIFAR ResNet of 20 layers with shortcuts without parameters (option A)",
    "resnet32-a": "CIFAR ResNet of 32 layers with shortcuts without parameters (option A)",
    "resnet56-a": "CIFAR ResNet of 56 layers with shortcuts without parameters (option A)",
    "resnet8x0.25": "CIFAR ResNet of 8 layers with a quarter of the channels",
    "resnet8x0.5": "CIFAR ResNet of 8 layers with half of the channels",
    "resnet8x0.75": "CIFAR ResNet of 8 layers with three quarters of the channels",
    "resnet20x0.5": "CIFAR ResNet of 20 layers with half of the channels",
    "resnet8x4": "CIFAR ResNet of 8 layers with 4 times the channels (stem 32)",
    "resnet32x4": "CIFAR ResNet of 32 layers with 4 times the channels (stem 32)",
    "wrn-16-1": "wide ResNet of 16 layers, width 1",
    "wrn-16-2": "wide ResNet of 16 layers, width 2",
    "wrn-40-1": "wide ResNet of 40 layers, width 1",
    "wrn-40-2": "wide ResNet of 40 layers, width 2",
    "vgg8": "CIFAR VGG of 8 layers with batch norm",
    "vgg13": "CIFAR VGG of 13 layers with batch norm",
    "vgg16": "CIFAR VGG of 16 layers with batch norm",
    "mobilenetv2": "MobileNetV2 at half width, as in the distillation papers",
    "shufflenetv1": "ShuffleNet V1 with 3 groups, as in the distillation papers",
    "shufflenetv2": "ShuffleNet V2 at width 1, as in the distillation papers",
    "densenet-bc-100-12": "DenseNet-BC of 100 layers, growth rate 12",
    "msdnet": "MSDNet with 10 exits of its own, for anytime prediction",
    "msdnet-7": "MSDNet with 7 exits of its own, for anytime prediction",
    "msdnet-budgeted": "MSDNet with 5 exits of its own, wider and wider apart",
}


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
            f"backbone '{name}' has no pretrained weights: take one of timm's ({PREFIX}<name>), or give a file with weights"
        )
    return BACKBONES[name](classes, channels)


def check_backbone_name(name: str) -> None:
    """Refuse a name that is no backbone; timm is imported for its own names only."""
    if is_timm(name):
        check_timm_name(name)
    elif name not in BACKBONES:
        raise UserError(f"unknown backbone '{name}'{nearest(name, BACKBONES)}")


__all__ = ["BACKBONES", "SUMMARIES", "Backbone", "build_backbone", "check_backbone_name"]
