"""MSDNet: its scales, its own exits, and what they cost by hand and by the authors' count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erde.exporting.onnx_files import export_stages
from erde.networks.attach import attach_exits
from erde.networks.backbones import Backbone, build_backbone
from erde.networks.backbones.msdnet import cifar_msdnet
from erde.networks.cost import count_macs, count_parameters, network_cost
from erde.networks.network import EarlyExitNetwork
from tests.helpers import family_costs
from tests.helpers.known_weights import scramble_norms
from tests.helpers.oracles import hooked_macs

torch.set_num_threads(1)

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


def build(name: str = "msdnet", classes: int = 10, channels: int = 3) -> Backbone:
    backbone = build_backbone(name, classes=classes, channels=channels)
    assert isinstance(backbone, Backbone)
    return backbone.eval()


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

    hooks = [child.register_forward_hook(count) for child in module.modules()]
    macs, _ = hooked_macs(module, x)
    for hook in hooks:
        hook.remove()
    return total + macs


@pytest.mark.parametrize("name", MSDNETS)
@pytest.mark.parametrize(("classes", "channels"), [(100, 3), (10, 1)])
def test_msdnet_per_exit_by_hand(name: str, classes: int, channels: int) -> None:
    backbone = build(name, classes, channels)
    expected = family_costs.msdnet(MSDNETS[name], classes, channels, 32)
    x, macs, parameters, result = torch.zeros(1, channels, 32, 32), 0, 0, []
    for block, head in native_stages(backbone):
        block_macs, x = count_macs(block, x)
        head_macs, logits = count_macs(head, x)
        assert logits.shape == (1, classes)
        macs += block_macs + head_macs
        parameters += count_parameters(block, head)
        result.append((parameters, macs))
    assert result == expected
    assert parameters == count_parameters(backbone)


@pytest.mark.parametrize("name", MSDNETS)
def test_msdnet_per_exit_as_the_authors_count(name: str) -> None:
    backbone = build(name, classes=100)
    operations, parameters, result = 0, 0, []
    x = torch.zeros(1, 3, 32, 32)
    for block, head in native_stages(backbone):
        operations += authors_operations(block, x)
        with torch.no_grad():
            x = block(x)
        operations += authors_operations(head, x)
        parameters += count_parameters(block, head)
        result.append((operations, parameters))
    columns = (AUTHORS_OPERATIONS[name], AUTHORS_PARAMETERS[name])
    assert result == list(
        zip(*([int(number) for number in column.split()] for column in columns), strict=True)
    )


def test_msdnet_hands_over_its_scales() -> None:
    backbone = build()
    x, shapes = torch.zeros(2, 3, 32, 32), []
    with torch.no_grad():
        for block in backbone.blocks:
            x = block(x)
            assert isinstance(x, tuple)
            shapes.append([tuple(scale.shape[1:]) for scale in x])
    # Channels of the coarsest scale as in the log of the authors' PyTorch code (check_msdnet/log.txt).
    assert [shape[-1][0] for shape in shapes] == [160, 208, 256, 164, 212, 260, 308, 188, 236, 284]
    sides = [32, 16, 8]
    for shape in shapes:
        finest = 3 - len(shape)
        assert shape == [(shape[-1][0] // 4 * 2**s, sides[s], sides[s]) for s in range(finest, 3)]
    assert [len(shape) for shape in shapes] == [3, 3, 3, 2, 2, 2, 2, 1, 1, 1]
    assert list(backbone.native_heads) == [f"block{number}" for number in range(1, 10)]
    assert backbone.first_exit_block == 0


def test_msdnet_coarse_scales_come_from_finer_ones_and_their_own() -> None:
    torch.manual_seed(0)
    layer: Any = build().blocks[0][1]
    scales = tuple(torch.randn(1, 16 * 2**s, 32 // 2**s, 32 // 2**s) for s in range(3))
    with torch.no_grad():
        before = layer(scales)
        for changed in range(3):
            now = layer(tuple(scale + (index == changed) for index, scale in enumerate(scales)))
            moved = [not torch.equal(*pair) for pair in zip(now, before, strict=True)]
            assert moved == [index in (changed, changed + 1) for index in range(3)]
    # What came in is handed on, first.
    assert all(torch.equal(out[:, : x.shape[1]], x) for out, x in zip(before, scales, strict=True))


@pytest.mark.parametrize("name", ["msdnet-7", "msdnet-budgeted"])
def test_every_native_exit_learns(name: str) -> None:
    torch.manual_seed(0)
    backbone = build(name, classes=5).train()
    logits = native_exits(backbone, torch.randn(4, 3, 32, 32))
    assert [rows.shape for rows in logits] == [(4, 5)] * len(MSDNETS[name])
    torch.stack(logits).square().sum().backward()
    silent = [
        key
        for key, parameter in backbone.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


def with_native_exits(backbone: Backbone, exits: int | list[str]) -> EarlyExitNetwork:
    return attach_exits(backbone, exits, input_size=(3, 32, 32), head="auto")


def test_msdnet_with_all_its_exits_costs_what_it_should() -> None:
    backbone = build(classes=100)
    network = with_native_exits(backbone, 10)
    assert network.exit_names == [*backbone.native_heads, "final"]
    cost = network_cost(network, (3, 32, 32))
    assert list(zip(cost.parameters, cost.macs, strict=True)) == family_costs.msdnet(
        MSDNETS["msdnet"], 100, 3, 32
    )
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(x), torch.stack(native_exits(backbone, x)), rtol=0, atol=0)


@pytest.mark.parametrize("exits", [3, ["block2", "block7"]])
def test_msdnet_with_some_of_its_exits(exits: int | list[str]) -> None:
    backbone = build()
    network = with_native_exits(backbone, exits)
    *places, final = network.exit_names
    assert (len(places), final) == (2, "final")
    assert places == exits or exits == 3
    x = torch.randn(2, 3, 32, 32)
    every = dict(zip([*backbone.native_heads, "final"], native_exits(backbone, x), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(network(x), torch.stack([every[name] for name in network.exit_names]))


@pytest.mark.parametrize(
    "steps",
    [
        # Two scales at the first exit, one at the second.
        (2, 1, 1),
        pytest.param(MSDNETS["msdnet"], marks=pytest.mark.slow),
    ],
)
def test_export_parity(steps: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = cifar_msdnet(steps, classes=10)
    scramble_norms(backbone)
    network = with_native_exits(backbone, 3)
    # The export compares with torch by itself, empty batches included.
    exported = export_stages(network, (32, 32, 3), (0.5,) * 3, (0.25,) * 3, tmp_path / "stages")
    assert exported.cost.exit_names[-1] == "final"
    assert len(list((tmp_path / "stages").glob("*.onnx"))) == 3
