"""VGG, MobileNetV2, ShuffleNets, DenseNet-BC and MSDNet: sizes as published, shapes, cuts and export."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from erde.backbones import BACKBONES, SUMMARIES, Backbone, build_backbone
from erde.backbones.densenet import densenet_bc
from erde.backbones.shufflenet import shuffle_channels
from erde.cost import count_macs, count_parameters
from erde.errors import UserError
from erde.exits import attach_exits
from erde.export import export_stages
from tests import family_costs, test_backbones
from tests.oracles import hooked_macs

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

MSDNETS = {
    "msdnet": (4, 2, 2, 2, 2, 2, 2, 2, 2, 2),
    "msdnet-7": (4, 2, 2, 2, 2, 2, 2),
    "msdnet-budgeted": (1, 2, 3, 4, 5),
}

# Per exit, 100 classes, 32x32: "FLOPs" and parameters so far as op_counter.py of the authors' PyTorch code
# (github.com/kalviny/MSDNet-PyTorch at f654595) counts them: MACs, one for each ReLU, each pooled pixel and
# each bias of a linear layer.
AUTHORS_OPERATIONS = {
    "msdnet": "15140452 25505992 37788460 52061840 62181620 74070872 87729596 100038944 110121860 121679336",
    "msdnet-7": "15140452 25505992 37095980 46331024 57335540 66960728 75937724",
    "msdnet-budgeted": "6859876 14350024 27536684 41714576 58480628",
}
AUTHORS_PARAMETERS = {
    "msdnet": "433876 876792 1381628 1827836 2279536 2793444 3369560 3864948 4378040 4955644",
    "msdnet-7": "433876 876792 1274952 1695548 2178352 2603252 3067960",
    "msdnet-budgeted": "299704 649740 1018308 1492424 2078924",
}
FAMILIES = [*BY_HAND, *MSDNETS]


def native_stages(backbone: Backbone) -> list[tuple[nn.Module, nn.Module]]:
    """Blocks and heads of a network with a native head at every block but the last."""
    blocks = dict(backbone.blocks.named_children())
    heads = [*backbone.native_heads.items(), (list(blocks)[-1], backbone.classifier)]
    assert [name for name, _ in heads] == list(blocks)
    return [(blocks[name], head) for name, head in heads]


def native_exits(backbone: Backbone, x: Tensor) -> list[Tensor]:
    """Logits of all exits that the family brings along, the final one included."""
    logits = []
    for block, head in native_stages(backbone):
        x = block(x)
        logits.append(head(x))
    return logits


def authors_operations(module: nn.Module, x: Tensor) -> int:
    """What the MSDNet authors' counter calls FLOPs, of a call without gradients."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal total
        if isinstance(layer, (nn.ReLU, nn.AdaptiveAvgPool2d)):
            total += inputs[0].numel()
        elif isinstance(layer, nn.Linear):
            total += layer.bias.numel()

    hooks = [one.register_forward_hook(count) for one in module.modules()]
    macs, _ = hooked_macs(module, x)
    for hook in hooks:
        hook.remove()
    return total + macs


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


@pytest.mark.parametrize("name", MSDNETS)
@pytest.mark.parametrize(("classes", "channels"), [(100, 3), (10, 1)])
def test_msdnet_per_exit_by_hand(name: str, classes: int, channels: int) -> None:
    backbone = build_backbone(name, classes=classes, channels=channels).eval()
    expected = family_costs.msdnet(MSDNETS[name], classes, channels, 32)
    x, macs, parameters, found = torch.zeros(1, channels, 32, 32), 0, 0, []
    for block, head in native_stages(backbone):
        block_macs, x = count_macs(block, x)
        head_macs, logits = count_macs(head, x)
        assert logits.shape == (1, classes)
        macs += block_macs + head_macs
        parameters += count_parameters(block, head)
        found.append((parameters, macs))
    assert found == expected
    assert parameters == count_parameters(backbone)


@pytest.mark.parametrize("name", MSDNETS)
def test_msdnet_per_exit_as_the_authors_count(name: str) -> None:
    backbone = build_backbone(name, classes=100).eval()
    operations, parameters, found = 0, 0, []
    x = torch.zeros(1, 3, 32, 32)
    for block, head in native_stages(backbone):
        operations += authors_operations(block, x)
        with torch.no_grad():
            x = block(x)
        operations += authors_operations(head, x)
        parameters += count_parameters(block, head)
        found.append((operations, parameters))
    columns = (AUTHORS_OPERATIONS[name], AUTHORS_PARAMETERS[name])
    assert found == list(zip(*([int(one) for one in column.split()] for column in columns), strict=True))


def test_msdnet_hands_over_its_scales() -> None:
    backbone = build_backbone("msdnet", classes=10).eval()
    x, shapes = torch.zeros(2, 3, 32, 32), []
    with torch.no_grad():
        for block in backbone.blocks:
            x = block(x)
            assert isinstance(x, tuple)
            shapes.append([tuple(one.shape[1:]) for one in x])
    # Channels of the coarsest scale as in the log of the authors' PyTorch code (check_msdnet/log.txt).
    assert [one[-1][0] for one in shapes] == [160, 208, 256, 164, 212, 260, 308, 188, 236, 284]
    sides = [32, 16, 8]
    for shape in shapes:
        finest = 3 - len(shape)
        assert shape == [(shape[-1][0] // 4 * 2**s, sides[s], sides[s]) for s in range(finest, 3)]
    assert [len(shape) for shape in shapes] == [3, 3, 3, 2, 2, 2, 2, 1, 1, 1]
    assert list(backbone.native_heads) == [f"block{number}" for number in range(1, 10)]
    assert backbone.first_exit_block == 0


def test_msdnet_coarse_scales_come_from_finer_ones_and_their_own() -> None:
    torch.manual_seed(0)
    layer = build_backbone("msdnet", classes=10).blocks[0][1].eval()
    scales = tuple(torch.randn(1, 16 * 2**s, 32 // 2**s, 32 // 2**s) for s in range(3))
    with torch.no_grad():
        before = layer(scales)
        for changed in range(3):
            now = layer(tuple(one + (index == changed) for index, one in enumerate(scales)))
            moved = [not torch.equal(one, other) for one, other in zip(now, before, strict=True)]
            assert moved == [index in (changed, changed + 1) for index in range(3)]
    # What came in is handed on, first.
    assert all(torch.equal(out[:, : x.shape[1]], x) for out, x in zip(before, scales, strict=True))


@pytest.mark.parametrize("name", ["msdnet-7", "msdnet-budgeted"])
def test_every_native_exit_learns(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, classes=5)
    logits = native_exits(backbone, torch.randn(4, 3, 32, 32))
    assert [one.shape for one in logits] == [(4, 5)] * len(MSDNETS[name])
    torch.stack(logits).square().sum().backward()
    silent = [key for key, one in backbone.named_parameters() if one.grad is None or not one.grad.any()]
    assert silent == []


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
    assert [tuple(widths[one]) for one in ("stem", "dense1_layer3", "transition1", "dense3_layer3")] == [
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
    assert all(not one.any() for one in biases)
    assert len(biases) == (6 if name == "vgg8" else 1)


@pytest.mark.parametrize("name", FAMILIES)
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


def exported_exits(backbone: Backbone, exits: int, folder: Path) -> int:
    """Export with batch norms that have seen something; the export itself checks parity, empty batches included."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    network = attach_exits(backbone, exits, input_size=(3, 32, 32))
    exported = export_stages(network, (32, 32, 3), (0.5,) * 3, (0.25,) * 3, folder)
    return len(list(folder.glob("*.onnx"))) if len(exported.files) == exits else 0


@pytest.mark.parametrize("name", SHORT)
def test_export_parity(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert exported_exits(SHORT[name](), 2, tmp_path / "stages") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_HAND)
def test_export_parity_of_whole_networks(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert exported_exits(build_backbone(name, classes=10), 3, tmp_path / "stages") == 3


def test_every_backbone_has_a_summary_of_one_line() -> None:
    assert list(SUMMARIES) == list(BACKBONES)
    assert all(0 < len(one) <= 80 and "\n" not in one for one in SUMMARIES.values())
    assert len(set(SUMMARIES.values())) == len(SUMMARIES)


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading of docs/families.md, without its own two first lines."""
    text = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    part = re.split(r"^## ", text, flags=re.M)
    found = next(one for one in part if one.startswith(heading + "\n"))
    rows = [line for line in found.splitlines() if line.startswith("|")][2:]
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]


def test_the_document_has_every_backbone_with_its_numbers() -> None:
    rows = {row[0]: row[2:] for row in table("Backbones")}
    published = {name: f"{number:,} [1]" for name, number in test_backbones.PUBLISHED.items()}
    published |= {name: f"{number:,} [1]" for name, (_, number) in PUBLISHED.items()}
    published["densenet-bc-100-12"] = f"{PUBLISHED['densenet-bc-100-12'][1]:,} with 10 classes [2]"
    published |= {name: f"{int(AUTHORS_PARAMETERS[name].split()[-1]):,} [3]" for name in MSDNETS}
    expected = {}
    for name in BACKBONES:
        backbone = build_backbone(name, classes=100).eval()
        network = _AllExits(backbone) if name in MSDNETS else backbone
        macs, _ = hooked_macs(network, torch.zeros(1, 3, 32, 32))
        expected[name] = [f"{count_parameters(backbone):,}", f"{macs:,}", published.get(name, "")]
    assert rows == expected


class _AllExits(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> list[Tensor]:
        return native_exits(self.backbone, x)


def test_the_document_has_the_exits_of_msdnet() -> None:
    rows = table("Exits of MSDNet")
    expected = []
    for name, steps in MSDNETS.items():
        macs = [f"{macs / 1e6:.2f}" for _, macs in family_costs.msdnet(steps, 100, 3, 32)]
        authors = [f"{int(one) / 1e6:.2f}" for one in AUTHORS_OPERATIONS[name].split()]
        expected.append([name, ", ".join(macs), ", ".join(authors)])
    assert rows == expected
