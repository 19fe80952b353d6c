"""Boosted exits: the sum that each exit answers with, its gradient, its stages as files, and what it is refused with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import erde
from erde.common.splits import TrainSplit, TuneSplit
from erde.data.load import DataSplits
from erde.exporting.onnx_files import export_int8_stages, export_plain, export_stages
from erde.networks import checkpoint
from erde.networks.cost import count_macs, count_parameters, network_cost
from erde.networks.network import EarlyExitNetwork
from erde.runtime.stages import StageRunner
from tests.helpers.checks import user_error
from tests.networks.test_gradients import Pair

torch.set_num_threads(1)


def make(boosted: bool = True, exits: int = 3, head: str = "auto") -> EarlyExitNetwork:
    torch.manual_seed(0)
    backbone = erde.build_backbone("resnet8x0.25", classes=10, channels=1)
    network = erde.attach_exits(
        backbone, exits, input_size=(1, 8, 8), dropout=0.0, head=head, boosted=boosted
    )
    network.train()(torch.randn(16, 1, 8, 8))  # statistics that are not the identity
    return network.eval()


def own_logits(network: EarlyExitNetwork, x: Tensor) -> list[Tensor]:
    """Each head's own logits."""
    result, handed = [], x
    for stage, head, position in zip(network.stages, network.heads, network.looks_at, strict=True):
        handed = stage(handed)
        result.append(head(handed if position is None else handed[position]))
    return result


@pytest.mark.parametrize("boosted", [False, True])
def test_without_exits_counts_what_the_final_exit_takes(boosted: bool) -> None:
    network = make(boosted)
    cost = network_cost(network, (1, 8, 8))
    assert cost.no_exit_macs == count_macs(network.forward_final, torch.zeros(1, 1, 8, 8))[0]
    # A boosted final exit adds to the logits of all heads before it; a plain one needs none of them.
    parts = [*network.stages, *(network.heads if boosted else network.heads[-1:])]
    assert cost.no_exit_parameters == count_parameters(nn.ModuleList(parts))
    assert (cost.no_exit_macs == cost.macs[-1]) == boosted


def test_each_exit_adds_half_of_the_one_before_and_trains_its_own_head_alone() -> None:
    network = make()
    x, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    logits, own = network(x), own_logits(network, x)
    for index in range(3):
        # Written out: f_i + f_(i-1) / 2 + f_(i-2) / 4 + ...
        expected = sum(0.5 ** (index - earlier) * own[earlier] for earlier in range(index + 1))
        torch.testing.assert_close(logits[index], expected)
        assert torch.equal(network.forward_until(x, index)[-1], logits[index])
    assert torch.equal(network.forward_with_features(x)[0], logits)
    assert torch.equal(network.forward_final(x), logits[-1])
    # As in the authors' code, F_i = (F_(i-1) + f_i) / 2 and the loss of f_i + F_(i-1) with F_(i-1) fixed.
    parameters = list(network.parameters())
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    computed = torch.autograd.grad(
        sum(nn.functional.cross_entropy(rows, labels) for rows in logits), parameters
    )
    so_far: Tensor = torch.zeros(6, 10)
    loss = torch.zeros(())
    for rows in own:
        loss = loss + nn.functional.cross_entropy(rows + so_far.detach(), labels)
        so_far = (so_far + rows) / 2
    for result, wanted in zip(computed, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-6)


def test_boosting_costs_no_macs_and_no_weights() -> None:
    boosted, without = (network_cost(make(kind), (1, 8, 8)) for kind in (True, False))
    assert (boosted.macs, boosted.parameters) == (without.macs, without.parameters)
    assert make().state_dict().keys() == make(False).state_dict().keys()
    plain = make(exits=1)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(plain(x)[0], plain.forward_final(x))


def tuples() -> EarlyExitNetwork:
    torch.manual_seed(0)
    heads = [nn.Linear(6, 10) for _ in range(3)]
    return EarlyExitNetwork(
        [Pair(64), Pair(12), Pair(12)], heads, ["0", "1", "final"], [1, 0, 1], boosted=True
    )


@pytest.mark.parametrize("kind", ["tower", "tuples"])
def test_stages_give_the_boosted_logits(kind: str, tmp_path: Path) -> None:
    network = tuples() if kind == "tuples" else make(head=kind)
    export_stages(network, (8, 8, 1), (0.5,), (0.25,), tmp_path / "stages")
    paths = [tmp_path / "stages" / f"stage_{index}.onnx" for index in range(len(network.stages))]
    images = np.random.default_rng(1).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    with torch.no_grad():
        expected = network((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25).numpy()
    np.testing.assert_allclose(
        StageRunner(paths, threads=1).all_logits(images), expected, rtol=1e-4, atol=1e-4
    )
    export_plain(network, (8, 8, 1), (0.5,), (0.25,), tmp_path / "plain.onnx")
    plain = StageRunner([tmp_path / "plain.onnx"], threads=1).all_logits(images)
    np.testing.assert_allclose(plain[0], expected[-1], rtol=1e-4, atol=1e-4)


def test_in_int8_the_logits_are_added_in_float(digits: DataSplits, tmp_path: Path) -> None:
    network = make()
    shape = digits.image_shape
    export_stages(network, shape, digits.mean, digits.std, tmp_path / "float", images=digits.train.images)
    train = TrainSplit(digits.train.images[:64], digits.train.labels[:64])
    tune = TuneSplit(digits.tune.images[:64], digits.tune.labels[:64])
    export_int8_stages(tmp_path / "float", tmp_path / "int8", train, tune)
    for index in range(3):
        graph = onnx.load(tmp_path / "int8" / f"stage_{index}.onnx").graph
        last = next(node for node in graph.node if "logits" in node.output)
        assert last.op_type == ("Gemm" if index == 0 else "Add")
    paths = {
        name: [tmp_path / name / f"stage_{index}.onnx" for index in range(3)] for name in ("float", "int8")
    }
    images = digits.tune.images[:200]
    before, after = (StageRunner(paths[name], threads=1).all_logits(images) for name in ("float", "int8"))
    assert np.abs(after - before).max() < 0.1 * np.abs(before).max()


@pytest.mark.parametrize("settings", [{"backbone_epochs": 1}, {"freeze_backbone": True}, {"refit_heads": 1}])
def test_boosted_exits_are_trained_together(settings: dict[str, Any], digits: DataSplits) -> None:
    message = rf"train.{next(iter(settings))} and boosted exits do not go together in 'network'"
    with user_error(message):
        erde.train(make(), digits, epochs=2, batch_size=64, **settings)


def test_boosted_weights_are_for_boosted_networks(digits: DataSplits, tmp_path: Path) -> None:
    erde.train(make(), digits, folder=tmp_path, epochs=1, batch_size=512)
    path = tmp_path / "final.safetensors"
    plain, message = (
        make(boosted=False),
        r"final\.safetensors is of a network with boosted exits, and this one is not boosted: set boosted=true",
    )
    before = [value.clone() for value in plain.state_dict().values()]
    for load in (checkpoint.load_weights, erde.load_teacher_weights):
        load(make(), path)
        with user_error(message):
            load(plain, path)
    with user_error(message):
        erde.train(plain, digits, folder=tmp_path, epochs=1, batch_size=512)
    assert all(map(torch.equal, before, plain.state_dict().values()))
    # Of one exit both are the same; and who wrote no such mark is believed.
    checkpoint.save(path, plain.state_dict(), {})
    checkpoint.load_weights(make(), path)
    assert not checkpoint.is_boosted(make(exits=1))
