"""VGG, MobileNetV2, ShuffleNets and DenseNet-BC: sizes as published, shapes, cuts and export."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from erde.common.errors import UserError
from erde.exporting.onnx_files import export_stages
from erde.networks.attach import attach_exits
from erde.networks.backbones import Backbone, build_backbone
from erde.networks.backbones.densenet import densenet_bc
from erde.networks.backbones.shufflenet import shuffle_channels
from erde.networks.cost import count_macs, count_parameters
from erde.recipe.backbones import BACKBONES
from tests.cli.test_cli import run
from tests.helpers import family_costs
from tests.helpers.known_weights import scramble_norms
from tests.networks.test_msdnet import MSDNETS

torch.set_num_threads(1)

# name -> (parameters, MACs) of the network without exits by hand: classes, channels, pixels a side.
BY_HAND: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    "vgg8": lambda *size: family_costs.vgg(8, *size),
    "vgg13": lambda *size: family_costs.vgg(13, *size),
    "vgg16": lambda *size: family_costs.vgg(16, *size),
    "mobilenetv2": family_costs.mobilenet_v2_half,
    "shufflenetv1": family_costs.shufflenet_v1,
    "shufflenetv2": family_costs.shufflenet_v2,
    "densenet-bc-100-12": lambda *size: family_costs.densenet_bc(100, 12, *size),
}

# name -> classes, parameters: what the public definitions have. The KD papers' networks with 100 classes
# (github.com/HobbitLong/RepDistiller at b84f547, the same in megvii-research/mdistiller); DenseNet-BC with 10
# as listed by github.com/osmr/imgclsmob, 0.8 M in table 2 of arXiv 1608.06993.
PUBLISHED = {
    "vgg8": (100, 3965028),
    "vgg13": (100, 9462180),
    "vgg16": (100, 14774436),
    "mobilenetv2": (100, 812836),
    "shufflenetv1": (100, 949258),
    "shufflenetv2": (100, 1355528),
    "densenet-bc-100-12": (10, 769162),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize(("classes", "channels", "side"), [(100, 3, 32), (10, 1, 16)])
def test_parameters_and_macs_by_hand(name: str, classes: int, channels: int, side: int) -> None:
    backbone = build_backbone(name, classes=classes, channels=channels).eval()
    macs, logits = count_macs(backbone, torch.zeros(1, channels, side, side))
    assert (count_parameters(backbone), macs) == BY_HAND[name](classes, channels, side)
    assert logits.shape == (1, classes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name: str) -> None:
    classes, parameters = PUBLISHED[name]
    assert count_parameters(build_backbone(name, classes=classes)) == parameters


def test_dense_layers_hand_over_all_that_came_before() -> None:
    torch.manual_seed(0)
    backbone = densenet_bc(22, 12, classes=10).eval()
    x, widths = torch.randn(1, 3, 32, 32), {}
    with torch.no_grad():
        for name, block in backbone.blocks.named_children():
            before, x = x, block(x)
            widths[name] = x.shape[1:3]
            if name.startswith("dense"):
                assert torch.equal(x[:, : before.shape[1]], before)
    assert list(widths)[:5] == ["stem", "dense1_layer1", "dense1_layer2", "dense1_layer3", "transition1"]
    assert [tuple(widths[name]) for name in ("stem", "dense1_layer3", "transition1", "dense3_layer3")] == [
        (24, 32),
        (60, 32),
        (30, 16),
        (69, 8),
    ]


@pytest.mark.parametrize(("channels", "groups"), [(12, 3), (8, 2), (6, 1)])
def test_shuffle_against_a_loop(channels: int, groups: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, channels, 3, 4))
    expected = np.empty_like(x)
    each = channels // groups
    for group in range(groups):
        for index in range(each):
            expected[:, index * groups + group] = x[:, group * each + index]
    np.testing.assert_array_equal(shuffle_channels(torch.from_numpy(x), groups).numpy(), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", [(16, 32), (16, 32), (32, 16), (64, 8)]),
        ("wrn-16-1", [(16, 32), (16, 32), (32, 16), (64, 8)]),
        ("vgg8", [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]),
        (
            "mobilenetv2",
            [(16, 16), (8, 16), (12, 16), (16, 8), (32, 4), (48, 4), (80, 2), (160, 2), (1280, 2)],
        ),
        ("shufflenetv1", [(24, 32), (240, 16), (480, 8), (960, 4)]),
        ("shufflenetv2", [(24, 32), (116, 16), (232, 8), (464, 4), (1024, 4)]),
    ],
)
def test_maps_at_the_ends_of_groups(name: str, expected: list[tuple[int, int]]) -> None:
    backbone = build_backbone(name, classes=10).eval()
    x, ends = torch.zeros(1, 3, 32, 32), {}
    for block, module in backbone.blocks.named_children():
        x = module(x)
        ends[block.split("_")[0]] = (x.shape[1], x.shape[2])
    assert list(ends.values()) == expected


@pytest.mark.parametrize("name", ["vgg8", "mobilenetv2"])
def test_linear_layers_start_small(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, classes=100)
    linear = backbone.classifier.linear
    assert isinstance(linear, nn.Linear)
    assert float(linear.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    biases = [
        m.bias for m in backbone.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None
    ]
    assert all(not bias.any() for bias in biases)
    assert len(biases) == (6 if name == "vgg8" else 1)


@pytest.mark.parametrize("name", ["resnet8", *BY_HAND, *MSDNETS])
def test_the_seed_decides_the_weights(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_backbone(name, classes=10).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    weights = [key for key in states[0] if states[0][key].ndim == 4]
    assert all(not torch.equal(states[0][key], states[2][key]) for key in weights)


@pytest.mark.parametrize("name", ["vgg8", "densenet-bc-100-12"])
def test_images_that_are_too_small(name: str) -> None:
    with pytest.raises(UserError, match=r"does not take images of \(C, H, W\) = \(3, 2, 2\)"):
        attach_exits(build_backbone(name, classes=10), 2, input_size=(3, 2, 2))


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        ("vgg13", ["group2", "group3_block1"]),
        ("mobilenetv2", ["group2", "group5"]),
        ("shufflenetv1", ["group1", "group2"]),
        ("shufflenetv2", ["group1", "group2_block3"]),
        ("densenet-bc-100-12", ["dense1", "dense2"]),
    ],
)
def test_exits_by_name_share_the_weights(name: str, exits: list[str]) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, classes=10).eval()
    network = attach_exits(backbone, exits, input_size=(3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = network(x)
        torch.testing.assert_close(logits[-1], backbone(x), rtol=0, atol=0)
    assert logits.shape == (3, 2, 10)


def first_blocks(name: str, count: int, width: int) -> Backbone:
    """The first blocks of a backbone with a classifier of their own: all kinds of units, but few of each."""
    backbone = build_backbone(name, classes=10)
    blocks = OrderedDict(list(backbone.blocks.named_children())[:count])
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return Backbone(blocks, classifier)


SHORT: dict[str, Callable[[], Backbone]] = {
    "vgg8": lambda: first_blocks("vgg8", 3, 256),
    "mobilenetv2": lambda: first_blocks("mobilenetv2", 5, 16),
    "shufflenetv1": lambda: first_blocks("shufflenetv1", 3, 240),
    "shufflenetv2": lambda: first_blocks("shufflenetv2", 3, 116),
    "densenet-bc": lambda: densenet_bc(10, 12, classes=10),
}


def check_export(backbone: Backbone, exits: int, folder: Path) -> None:
    """The export compares with torch by itself, empty batches included."""
    scramble_norms(backbone)
    network = attach_exits(backbone, exits, input_size=(3, 32, 32))
    export_stages(network, (32, 32, 3), (0.5,) * 3, (0.25,) * 3, folder)
    assert len(list(folder.glob("*.onnx"))) == exits


@pytest.mark.parametrize("name", SHORT)
def test_export_parity(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check_export(SHORT[name](), 2, tmp_path / "stages")


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_HAND)
def test_export_parity_of_whole_networks(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check_export(build_backbone(name, classes=10), 3, tmp_path / "stages")


SUMMARIES = {name: entry.summary for name, entry in BACKBONES.items()}


def test_every_backbone_has_a_summary_of_one_line() -> None:
    assert all(0 < len(summary) <= 80 and "\n" not in summary for summary in SUMMARIES.values())
    assert len(set(SUMMARIES.values())) == len(SUMMARIES)


def test_list_prints_the_summaries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(monkeypatch, capsys, "list", "backbones", "--json")
    assert code == 0
    *lines, timm = [line.split(maxsplit=1) for line in out.splitlines()[:-1]]
    assert lines == [list(item) for item in SUMMARIES.items()]
    assert timm[0] == "timm/<name>"
