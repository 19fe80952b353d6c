from __future__ import annotations

import pytest
import torch
from torch import nn

from erde.common.errors import UserError
from erde.networks.backbones import build_backbone
from erde.networks.cost import count_macs, count_parameters
from erde.recipe.backbones import BACKBONES
from tests.helpers.oracles import hooked_macs

torch.set_num_threads(1)

# RepDistiller's public models (github.com/HobbitLong/RepDistiller), 100 classes.
PUBLISHED = {
    "resnet20": 278324,
    "resnet32": 472756,
    "resnet56": 861620,
    "resnet110": 1736564,
    "resnet8x4": 1233540,
    "resnet32x4": 7433860,
    "wrn-16-2": 703284,
    "wrn-40-1": 569780,
    "wrn-40-2": 2255156,
}


def resnet_parameters(depth: int, widths: tuple[int, ...], classes: int, channels: int) -> int:
    """Convolutions without bias, two numbers per normalised channel, a projection where the shape changes."""
    total, before = 9 * channels * widths[0] + 2 * widths[0], widths[0]
    for group, width in enumerate(widths[1:]):
        for block in range((depth - 2) // 6):
            total += 9 * before * width + 9 * width * width + 4 * width
            if before != width or (group > 0 and block == 0):
                total += before * width + 2 * width
            before = width
    return total + before * classes + classes


def wrn_parameters(depth: int, width: int, classes: int, channels: int) -> int:
    """Norms stand before the convolutions: the first has the block's input channels; one more at the end."""
    total, before = 9 * channels * 16, 16
    for group in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            total += 2 * before + 9 * before * group + 2 * group + 9 * group * group
            total += before * group if before != group else 0
            before = group
    return total + 2 * before + before * classes + classes


# The other families have their formulas in test_backbone_families.py.
RESNETS = [name for name in BACKBONES if name.startswith(("resnet", "wrn"))]


def by_formula(name: str, classes: int, channels: int = 3) -> int:
    if name.startswith("wrn"):
        _, depth, width = name.split("-")
        return wrn_parameters(int(depth), int(width), classes, channels)
    if name.endswith("-a"):  # the same without the projections, at 16 to 32 and 32 to 64 channels
        projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
        return by_formula(name.removesuffix("-a"), classes, channels) - projections
    if name.endswith("-s2"):  # the stem's kernel has 4 x 4 weights and not 3 x 3
        stem = 32 if "x2" in name else 16
        return by_formula(name.removesuffix("-s2"), classes, channels) + (16 - 9) * channels * stem
    depth, _, factor = name.removeprefix("resnet").partition("x")
    base = {"": 16, "0.25": 4, "0.5": 8, "0.75": 12, "2": 32, "4": 64}[factor]
    stem = {"4": 32}.get(factor, base)
    return resnet_parameters(int(depth), (stem, base, 2 * base, 4 * base), classes, channels)


def test_every_published_model_is_there() -> None:
    assert PUBLISHED.keys() <= BACKBONES.keys()


@pytest.mark.parametrize("name", RESNETS)
def test_parameters(name: str) -> None:
    result = count_parameters(build_backbone(name, classes=100))
    assert result == by_formula(name, 100)
    assert result == PUBLISHED.get(name, result)
    assert count_parameters(build_backbone(name, classes=10, channels=1)) == by_formula(name, 10, channels=1)


@pytest.mark.parametrize("name", BACKBONES)
def test_contract(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, classes=7, channels=1)
    # Four images: where the map ends at one pixel, a batch norm over two would leave only signs.
    logits = backbone(torch.randn(4, 1, 16, 16))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    silent = [
        key
        for key, parameter in backbone.named_parameters()
        if not key.startswith("native_heads.")
        if parameter.grad is None or not bool(parameter.grad.abs().sum() > 0)
    ]
    assert silent == []
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", BACKBONES)
def test_macs(name: str) -> None:
    backbone = build_backbone(name, classes=10).eval()
    image = torch.zeros(1, 3, 16, 16)
    expected, _ = hooked_macs(backbone, image)
    assert count_macs(backbone, image)[0] == expected


def test_known_macs_of_a_known_network() -> None:
    # 41 million is what the ResNet paper's CIFAR networks are quoted with; the exact sum of our shapes.
    assert (
        40.5e6
        < count_macs(build_backbone("resnet20", classes=10).eval(), torch.zeros(1, 3, 32, 32))[0]
        < 41.5e6
    )


@pytest.mark.parametrize("name", ["resnet8", "wrn-16-1"])
def test_weights_start_as_he_and_norms_as_identity(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, classes=10)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())
        elif isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("wrong", "meant"), [("resnet21", "resnet"), ("wrn-40_2", "wrn-40-2")])
def test_unknown_name(wrong: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"unknown backbone '{wrong}' .*'{meant}"):
        build_backbone(wrong, classes=10)
