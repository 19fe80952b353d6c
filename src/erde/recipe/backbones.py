"""Backbones by name. A new backbone is a line of ``BACKBONES``, a new family a file in ``erde.networks.backbones``.

``timm/<name>`` is a model of timm's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from erde.common.errors import UserError, nearest

TIMM = "timm/"


@dataclass(frozen=True)
class BackboneEntry:
    """A backbone: a line for people, its builder in ``erde.networks.backbones``, and the builder's arguments."""

    summary: str
    builder: str
    arguments: Mapping[str, Any]


def _entry(summary: str, builder: str, **arguments: Any) -> BackboneEntry:
    return BackboneEntry(summary, builder, arguments)


BACKBONES: dict[str, BackboneEntry] = {
    "resnet8": _entry("CIFAR ResNet of 8 layers", "resnet.cifar_resnet", depth=8),
    "resnet14": _entry("CIFAR ResNet of 14 layers", "resnet.cifar_resnet", depth=14),
    "resnet20": _entry("CIFAR ResNet of 20 layers", "resnet.cifar_resnet", depth=20),
    "resnet32": _entry("CIFAR ResNet of 32 layers", "resnet.cifar_resnet", depth=32),
    "resnet44": _entry("CIFAR ResNet of 44 layers", "resnet.cifar_resnet", depth=44),
    "resnet56": _entry("CIFAR ResNet of 56 layers", "resnet.cifar_resnet", depth=56),
    "resnet110": _entry("CIFAR ResNet of 110 layers", "resnet.cifar_resnet", depth=110),
    "resnet20-a": _entry(
        "CIFAR ResNet of 20 layers with shortcuts without parameters (option A)",
        "resnet.cifar_resnet",
        depth=20,
        padded_shortcut=True,
    ),
    "resnet32-a": _entry(
        "CIFAR ResNet of 32 layers with shortcuts without parameters (option A)",
        "resnet.cifar_resnet",
        depth=32,
        padded_shortcut=True,
    ),
    "resnet56-a": _entry(
        "CIFAR ResNet of 56 layers with shortcuts without parameters (option A)",
        "resnet.cifar_resnet",
        depth=56,
        padded_shortcut=True,
    ),
    "resnet8x0.25": _entry(
        "CIFAR ResNet of 8 layers with a quarter of the channels",
        "resnet.cifar_resnet",
        depth=8,
        widths=(4, 4, 8, 16),
    ),
    "resnet8x0.5": _entry(
        "CIFAR ResNet of 8 layers with half of the channels",
        "resnet.cifar_resnet",
        depth=8,
        widths=(8, 8, 16, 32),
    ),
    "resnet8x0.75": _entry(
        "CIFAR ResNet of 8 layers with three quarters of the channels",
        "resnet.cifar_resnet",
        depth=8,
        widths=(12, 12, 24, 48),
    ),
    "resnet8-s2": _entry(
        "ResNet of 8 layers whose stem halves the image",
        "resnet.cifar_resnet",
        depth=8,
        stride=2,
    ),
    "resnet8x2-s2": _entry(
        "ResNet of 8 layers whose stem halves the image, with twice the channels",
        "resnet.cifar_resnet",
        depth=8,
        widths=(32, 32, 64, 128),
        stride=2,
    ),
    "resnet32x2-s2": _entry(
        "ResNet of 32 layers whose stem halves the image, with twice the channels",
        "resnet.cifar_resnet",
        depth=32,
        widths=(32, 32, 64, 128),
        stride=2,
    ),
    "resnet20x0.5": _entry(
        "CIFAR ResNet of 20 layers with half of the channels",
        "resnet.cifar_resnet",
        depth=20,
        widths=(8, 8, 16, 32),
    ),
    "resnet8x4": _entry(
        "CIFAR ResNet of 8 layers with 4 times the channels (stem 32)",
        "resnet.cifar_resnet",
        depth=8,
        widths=(32, 64, 128, 256),
    ),
    "resnet32x4": _entry(
        "CIFAR ResNet of 32 layers with 4 times the channels (stem 32)",
        "resnet.cifar_resnet",
        depth=32,
        widths=(32, 64, 128, 256),
    ),
    "wrn-16-1": _entry("wide ResNet of 16 layers, width 1", "wrn.wide_resnet", depth=16, width=1),
    "wrn-16-2": _entry("wide ResNet of 16 layers, width 2", "wrn.wide_resnet", depth=16, width=2),
    "wrn-40-1": _entry("wide ResNet of 40 layers, width 1", "wrn.wide_resnet", depth=40, width=1),
    "wrn-40-2": _entry("wide ResNet of 40 layers, width 2", "wrn.wide_resnet", depth=40, width=2),
    "vgg8": _entry("CIFAR VGG of 8 layers with batch norm", "vgg.cifar_vgg", depth=8),
    "vgg13": _entry("CIFAR VGG of 13 layers with batch norm", "vgg.cifar_vgg", depth=13),
    "vgg16": _entry("CIFAR VGG of 16 layers with batch norm", "vgg.cifar_vgg", depth=16),
    "mobilenetv2": _entry(
        "MobileNetV2 at half width, as in the distillation papers", "mobilenet.cifar_mobilenet_v2"
    ),
    "shufflenetv1": _entry(
        "ShuffleNet V1 with 3 groups, as in the distillation papers", "shufflenet.cifar_shufflenet_v1"
    ),
    "shufflenetv2": _entry(
        "ShuffleNet V2 at width 1, as in the distillation papers", "shufflenet.cifar_shufflenet_v2"
    ),
    "densenet-bc-100-12": _entry(
        "DenseNet-BC of 100 layers, growth rate 12", "densenet.densenet_bc", depth=100, growth=12
    ),
    "msdnet": _entry(
        "MSDNet with 10 exits of its own, for anytime prediction", "msdnet.cifar_msdnet", steps=(4, *[2] * 9)
    ),
    "msdnet-7": _entry(
        "MSDNet with 7 exits of its own, for anytime prediction", "msdnet.cifar_msdnet", steps=(4, *[2] * 6)
    ),
    "msdnet-budgeted": _entry(
        "MSDNet with 5 exits of its own, wider and wider apart", "msdnet.cifar_msdnet", steps=(1, 2, 3, 4, 5)
    ),
}


def is_timm(name: str) -> bool:
    """Whether a backbone's name is one of timm's."""
    return name.startswith(TIMM)


def check_backbone_name(name: str) -> None:
    """Raise if the name is unknown; names of timm are checked when the network is built."""
    if name not in BACKBONES and not is_timm(name):
        raise UserError(f"unknown backbone '{name}'{nearest(name, BACKBONES)}")
