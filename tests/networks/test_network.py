from __future__ import annotations

import copy
import itertools
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erde.common.errors import UserError
from erde.networks.attach import attach_exits
from erde.networks.backbones import Backbone, build_backbone
from erde.networks.cost import count_macs, count_parameters, network_cost
from erde.networks.heads import HEADS, ERDEHead, LinearHead
from erde.networks.network import EarlyExitNetwork, keep_exits
from tests.helpers.checks import user_error
from tests.helpers.networks import plain_network
from tests.helpers.oracles import hooked_macs

torch.set_num_threads(1)

SIZE = (3, 8, 8)


def make(exits: Any = 3, name: str = "resnet14", **arguments: Any) -> tuple[Backbone, EarlyExitNetwork]:
    torch.manual_seed(0)
    backbone = build_backbone(name, classes=5)
    assert isinstance(backbone, Backbone)
    return backbone, attach_exits(backbone, exits, input_size=SIZE, **arguments)


def images(number: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(number, *SIZE, generator=torch.Generator().manual_seed(seed))


def never(module: nn.Module, *_: Any) -> None:
    raise AssertionError(f"{type(module).__name__} ran")


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("name", ["resnet14", "wrn-16-1"])
@pytest.mark.parametrize("exits", [1, 2, 3, ["group1"], ["group1_block1", "group2"]])
def test_final_exit_is_the_backbones_own_output(name: str, exits: Any) -> None:
    backbone, network = make(exits, name)
    # Statistics that are not the identity.
    backbone.train()(images(8))
    backbone.eval()
    network.eval()
    logits = network(images())
    assert logits.shape == (len(network.stages), 3, 5)
    assert torch.equal(logits[-1], backbone(images()))
    assert torch.equal(network.forward_final(images()), backbone(images()))


def test_weights_are_shared_not_copied() -> None:
    backbone, network = make()
    own = {id(parameter) for parameter in backbone.parameters()}
    assert own == {id(parameter) for parameter in network.backbone_parameters()}
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(1.5)
    assert torch.equal(network.eval()(images())[-1], backbone.eval()(images()))


def test_backbone_parameters_are_those_without_intermediate_heads() -> None:
    _, network = make()
    everything = {id(parameter) for parameter in network.parameters()}
    heads = {id(parameter) for head in network.heads[:-1] for parameter in head.parameters()}
    backbone = [id(parameter) for parameter in network.backbone_parameters()]
    assert set(backbone) == everything - heads
    assert len(backbone) == len(set(backbone))


@pytest.mark.parametrize("exit", [0, 1, 2])
def test_forward_until_is_a_prefix_and_runs_nothing_later(exit: int) -> None:
    _, network = make()
    network.eval()
    whole = network(images())
    for later in (*network.stages[exit + 1 :], *network.heads[exit + 1 :]):
        later.register_forward_hook(never)
    assert torch.equal(network.forward_until(images(), exit), whole[: exit + 1])
    if exit < 2:
        with pytest.raises(AssertionError, match="ran"):
            network(images())


def test_forward_features_and_forward_final() -> None:
    _, network = make()
    network.eval()
    features = network.forward_features(images())
    logits = network(images())
    assert len(features) == 3
    for index, feature in enumerate(features):
        assert torch.equal(network.heads[index](feature), logits[index])
    for head in network.heads[:-1]:
        head.register_forward_hook(never)
    assert torch.equal(network.forward_final(images()), logits[-1])


def test_each_stage_runs_once() -> None:
    _, network = make()
    runs = []
    for index, stage in enumerate(network.stages):
        stage.register_forward_hook(lambda *_, index=index: runs.append(index))
    network(images())
    assert runs == [0, 1, 2]


@pytest.mark.parametrize("head", HEADS)
def test_a_gradient_reaches_every_parameter(head: str) -> None:
    _, network = make(head=head, dropout=0.0)
    network.train()(images(6)).square().sum().backward()
    silent = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().sum() > 0)
    ]
    # The norms of heads are fixed, but for those inside a tower.
    norms = r"heads\.[01]\.norm\." if head == "tower" else r"heads\.[01]\.norm"
    assert silent == [name for name, _ in network.named_parameters() if re.match(norms, name)]


def test_the_final_exits_gradient_reaches_the_first_stage() -> None:
    _, network = make()
    network.train()(images(6))[-1].square().sum().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in network.stages.parameters())
    gradients = [parameter.grad for head in network.heads[:-1] for parameter in head.parameters()]
    assert not any(bool(gradient.any()) for gradient in gradients if gradient is not None)


def test_state_dict_round_trip() -> None:
    _, first = make()
    first.train()(images(8))
    torch.manual_seed(7)
    second = attach_exits(build_backbone("resnet14", classes=5), 3, input_size=SIZE)
    before = second.eval()(images())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert not torch.equal(before, first.eval()(images()))
    assert torch.equal(second.eval()(images()), first.eval()(images()))


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("exits", range(1, 7))
def test_any_number_up_to_the_most(exits: int) -> None:
    # resnet14 has a stem and six blocks: five places behind blocks, and the end.
    _, network = make(exits)
    assert len(network.stages) == len(network.heads) == exits
    assert len(set(network.exit_names)) == exits
    assert network.exit_names[-1] == "final"
    assert all(len(stage) > 0 for stage in network.stages)
    assert [name for stage in network.stages for name, _ in stage.named_children()] == [
        name for name, _ in build_backbone("resnet14", classes=5).blocks.named_children()
    ]


@pytest.mark.parametrize("exits", [0, -1, 7])
def test_too_many_or_no_exits(exits: int) -> None:
    with pytest.raises(UserError, match=f"exits={exits} is not possible on this backbone: expected 1 to 6"):
        make(exits)


@pytest.mark.parametrize("name", ["resnet56", "wrn-40-1"])
@pytest.mark.parametrize("exits", [2, 3, 4, 5])
def test_exits_stand_at_equal_shares_of_the_macs(name: str, exits: int) -> None:
    backbone = build_backbone(name, classes=10)
    x, ends = torch.zeros(1, *SIZE), {}
    total = 0
    for block, module in backbone.blocks.named_children():
        macs, x = hooked_macs(module, x)
        total += macs
        ends[block] = total
    network = attach_exits(backbone, exits, input_size=SIZE)
    allowed = [end / total for block, end in ends.items() if block != "stem"][:-1]
    for number, place in enumerate(network.exit_names[:-1], start=1):
        best = min(abs(share - number / exits) for share in allowed)
        assert abs(ends[place] / total - number / exits) == pytest.approx(best)


def test_no_exit_before_the_first_block_that_may_have_one() -> None:
    _, network = make(6)
    assert network.exit_names[0] == "group1_block1"
    backbone, _ = make(1)
    backbone.first_exit_block = 3
    assert attach_exits(backbone, 4, input_size=SIZE).exit_names[0] == "group2_block1"
    with pytest.raises(UserError, match="expected 1 to 4"):
        attach_exits(backbone, 5, input_size=SIZE)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["group1"], ["group1_block2", "final"]),
        (["group2_block1", "group1"], ["group1_block2", "group2_block1", "final"]),
        (["stem"], ["stem", "final"]),
        (("group1_block1", "group3_block1"), ["group1_block1", "group3_block1", "final"]),
    ],
)
def test_places_by_name(given: Any, expected: list[str]) -> None:
    _, network = make(given)
    assert network.exit_names == expected


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (["grup1"], r"no place 'grup1' for an exit \(did you mean 'group1'\?\)"),
        (["group1_block9"], r"no place 'group1_block9'.*did you mean 'group1_block"),
        (["group3"], "exit 'group3' stands at the end of the backbone"),
        (["group3_block2", "group1"], "exit 'group3_block2' stands at the end of the backbone"),
        (["group1", "group3", "group2"], "exit 'group3' stands at the end of the backbone"),
    ],
)
def test_wrong_places(exits: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(exits)
    assert "\n" not in str(caught.value)


def test_names_in_any_order() -> None:
    _, network = make(["group3_block2", "group1_block1"], "resnet20")
    assert network.exit_names == ["group1_block1", "group3_block2", "final"]


def test_unknown_head() -> None:
    with pytest.raises(UserError, match=r"unknown exit head 'erd' \(did you mean 'erde'\?\)"):
        make(head="erd")


@pytest.mark.parametrize("size", [(1, 8, 8), (4, 8, 8)])
def test_an_input_that_does_not_fit(size: tuple[int, int, int]) -> None:
    backbone = build_backbone("resnet8", classes=5)
    with pytest.raises(UserError, match=r"does not take images of \(C, H, W\)") as caught:
        attach_exits(backbone, 2, input_size=size)
    assert "\n" not in str(caught.value)
    assert backbone.training


def test_attaching_leaves_mode_and_statistics_alone() -> None:
    backbone = build_backbone("resnet8", classes=5)
    before = copy.deepcopy(backbone.state_dict())
    attach_exits(backbone, 3, input_size=SIZE)
    assert backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    network = attach_exits(backbone.eval(), 3, input_size=SIZE)
    assert not any(module.training for module in network.modules())


def test_a_backbone_of_ones_own() -> None:
    backbone = Backbone(
        OrderedDict(one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(4, 6, 3), three=nn.Conv2d(6, 8, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(8 * 2 * 2, 5)),
        first_exit_block=0,
    )
    network = attach_exits(backbone, 3, input_size=SIZE).eval()
    assert network.exit_names == ["one", "two", "final"]
    assert torch.equal(network(images())[-1], backbone.eval()(images()))


def test_nearly_all_macs_at_the_end_leave_a_place_for_every_exit() -> None:
    narrow = [nn.Conv2d(3, 3, 1) for _ in range(4)]
    blocks = OrderedDict(
        (f"block{number}", block) for number, block in enumerate([*narrow, nn.Conv2d(3, 64, 5)])
    )
    backbone = Backbone(blocks, nn.Sequential(nn.Flatten(), nn.Linear(64 * 4 * 4, 5)))
    assert attach_exits(backbone, 4, input_size=SIZE).exit_names == ["block1", "block2", "block3", "final"]


# ---------------------------------------------------------------- heads


def test_structure_of_the_heads() -> None:
    layers = [type(layer) for layer in ERDEHead((16, 8, 8), 10)]
    assert layers == [nn.BatchNorm2d, nn.ReLU, nn.AvgPool2d, nn.Flatten, nn.Dropout, nn.Linear]
    layers = [type(layer) for layer in LinearHead((16, 8, 8), 10)]
    assert layers == [nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout, nn.Linear]


@pytest.mark.parametrize(("side", "pooled"), [(8, 4), (7, 3), (2, 1), (1, 1)])
def test_erde_head_pools_two_by_two(side: int, pooled: int) -> None:
    head = ERDEHead((16, side, side), 10).eval()
    assert head.linear.in_features == 16 * pooled * pooled
    assert head(torch.randn(2, 16, side, side)).shape == (2, 10)


def test_erde_head_by_hand() -> None:
    head = ERDEHead((2, 2, 2), 1).eval()
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 10.0]]))
        head.linear.bias.fill_(0.5)
        head.norm.running_mean.fill_(1.0)
        head.norm.eps = 0.0
    x = torch.tensor([[[[1.0, 3.0], [5.0, -7.0]], [[2.0, 2.0], [2.0, 2.0]]]])
    # Less the mean 1, ReLU, mean over 2x2: (0 + 2 + 4 + 0) / 4 and 1.
    assert float(head(x).detach()) == pytest.approx(1.5 + 10 * 1 + 0.5)


@pytest.mark.parametrize("head", HEADS)
def test_dropout_reaches_the_heads(head: str) -> None:
    for dropout in (0.5, 0.25):
        _, network = make(head=head, dropout=dropout)
        assert [module.dropout.p for module in network.heads[:-1]] == [dropout, dropout]
    assert isinstance(network.heads[0], HEADS[head])


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize("name", ["resnet14", "wrn-16-2"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("exits", [1, 3])
def test_cost_against_the_independent_counter(name: str, head: str, exits: int) -> None:
    backbone, network = make(exits, name, head=head)
    cost = network_cost(network, SIZE)
    x, expected = torch.zeros(1, *SIZE), []
    stage_total = head_total = 0
    for stage, module in zip(network.stages, network.heads, strict=True):
        macs, x = hooked_macs(stage, x)
        stage_total += macs
        head_total += hooked_macs(module, x)[0]
        expected.append(stage_total + head_total)
    assert cost.macs == tuple(expected)
    assert cost.no_exit_macs == hooked_macs(backbone, torch.zeros(1, *SIZE))[0]
    assert cost.no_exit_parameters == count_parameters(backbone)
    assert cost.exit_names == tuple(network.exit_names)
    if exits == 1:
        assert cost.macs == (cost.no_exit_macs,)
    else:
        assert cost.macs[-1] > cost.no_exit_macs


@pytest.mark.parametrize("module", [nn.Linear(8, 4), nn.Conv2d(3, 4, 3, padding=1), nn.LSTM(8, 4)])
def test_macs_in_inference_mode(module: nn.Module) -> None:
    x = torch.zeros(1, 3, 8, 8) if isinstance(module, nn.Conv2d) else torch.zeros(3, 8)
    expected = count_macs(module, x)[0]
    with torch.inference_mode():
        assert count_macs(module, x)[0] == expected > 0


def test_cost_in_inference_mode() -> None:
    network = make(3)[1]
    expected = network_cost(network, SIZE)
    with torch.inference_mode():
        assert network_cost(network, SIZE) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_macs_of_an_exit_are_those_of_running_until_it() -> None:
    _, network = make(4)
    cost = network_cost(network, SIZE)

    class Until(nn.Module):
        def __init__(self, exit: int) -> None:
            super().__init__()
            self.network, self.exit = network, exit

        def forward(self, x: Tensor) -> Tensor:
            return self.network.forward_until(x, self.exit)

    assert cost.macs == tuple(hooked_macs(Until(exit), torch.zeros(1, *SIZE))[0] for exit in range(4))


def test_parameters_are_cumulative_and_end_at_all_of_them() -> None:
    _, network = make(4)
    parts = [count_parameters(stage, head) for stage, head in zip(network.stages, network.heads, strict=True)]
    assert network_cost(network, SIZE).parameters == tuple(itertools.accumulate(parts))
    assert network_cost(network, SIZE).parameters[-1] == sum(
        parameter.numel() for parameter in network.parameters()
    )


@pytest.mark.parametrize("training", [True, False])
def test_cost_leaves_mode_and_statistics_alone(training: bool) -> None:
    _, network = make()
    network.train(training)
    before = copy.deepcopy(network.state_dict())
    network_cost(network, SIZE)
    assert all(module.training == training for module in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


# ---------------------------------------------------------------- tuples, and heads of the backbone's own


class Scales(nn.Module):
    """From one tensor or several to two scales: (B, 4, 8, 8) and (B, 6, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.LazyConv2d(4, 3, padding=1), nn.LazyConv2d(6, 3, stride=2, padding=1)

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        first = x if isinstance(x, Tensor) else x[0]
        return torch.relu(self.fine(first)), torch.relu(self.coarse(first))


class CoarseHead(nn.Module):
    """A native head: it takes all scales, and looks at the coarse one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        logits: Tensor = self.linear(x[-1].mean(dim=(2, 3)))
        return logits


def scales(native: tuple[str, ...] = ("one", "two")) -> Backbone:
    torch.manual_seed(0)
    blocks = OrderedDict((name, Scales()) for name in ("one", "two", "three", "four"))
    backbone = Backbone(blocks, CoarseHead(), first_exit_block=0)
    backbone.native_heads = nn.ModuleDict({name: CoarseHead() for name in native})
    with torch.no_grad():
        backbone(images())
    return backbone


@pytest.mark.parametrize("head", ["auto", "native"])
def test_native_heads_stand_where_the_backbone_has_them(head: str) -> None:
    backbone = scales()
    network = attach_exits(backbone, 3, input_size=SIZE, head=head).eval()
    assert network.exit_names == ["one", "two", "final"]
    assert list(network.heads[:2]) == list(backbone.native_heads.values())
    handed = network.stages[0](images())
    assert torch.equal(network(images())[0], backbone.native_heads["one"](handed))
    assert torch.equal(network(images())[-1], backbone.eval()(images()))
    # For losses, the last of what is handed over stands for an exit.
    assert network.feature_shapes(SIZE) == ((6, 4, 4),) * 3
    logits, features = network.forward_with_features(images())
    assert torch.equal(features[0], handed[-1])
    assert torch.equal(logits, network(images()))


def test_generic_heads_on_tuples_look_at_the_tensor_with_most_channels() -> None:
    network = attach_exits(scales(), ["one", "three"], input_size=SIZE, head="linear").eval()
    assert network.looks_at == [1, 1, None]
    logits, features = network.forward_with_features(images())
    assert torch.equal(network.heads[0](features[0]), logits[0])
    assert torch.equal(network.forward_until(images(), 0), logits[:1])
    assert network_cost(network, SIZE).macs[0] == 64 * 4 * 27 + 16 * 6 * 27 + 6 * 5


@pytest.mark.parametrize(
    ("exits", "head", "message"),
    [
        (4, "auto", "exits=4 is not possible on this backbone: expected 1 to 3"),
        (["three"], "native", "the backbone brings no head for an exit at 'three': it has them at one, two"),
    ],
)
def test_native_heads_that_there_are_not(exits: Any, head: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach_exits(scales(), exits, input_size=SIZE, head=head)


def test_a_backbone_without_native_heads() -> None:
    with pytest.raises(UserError, match="this backbone brings no exit heads of its own: choose auto, erde"):
        make(head="native")


# ---------------------------------------------------------------- fewer exits


@pytest.mark.parametrize("backbone", ["resnet8x0.25", "msdnet"])
def test_a_network_with_fewer_exits_gives_the_very_logits(backbone: str) -> None:
    torch.manual_seed(0)
    model = build_backbone(backbone, classes=10)
    network = attach_exits(model, "auto", input_size=(3, 32, 32)).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
        for kept in ([], network.exit_names[:1], network.exit_names[1:-1:2]):
            reduced = keep_exits(network, reversed(kept))
            assert reduced.exit_names == [*kept, "final"]
            assert len(reduced.stages) == len(reduced.heads) == len(kept) + 1
            places = [network.exit_names.index(name) for name in reduced.exit_names]
            assert torch.equal(reduced(images), expected[places])
            assert torch.equal(reduced.forward_final(images), expected[-1])
            assert not any(module.training for module in reduced.modules())


def test_a_network_with_fewer_exits_shares_weights_and_costs_less() -> None:
    network = plain_network(exits=4).train()
    reduced = keep_exits(network, ["layer1"])
    assert reduced.training
    assert all(module.training for module in reduced.modules())
    assert {id(weight) for weight in reduced.parameters()} < {id(weight) for weight in network.parameters()}
    assert {id(weight) for weight in reduced.backbone_parameters()} == {
        id(weight) for weight in network.backbone_parameters()
    }
    whole, cost = network_cost(network, (1, 8, 8)), network_cost(reduced, (1, 8, 8))
    assert cost.no_exit_macs == whole.no_exit_macs
    # One head of 12 times 10 less before the first exit, two less before the last.
    assert cost.macs == (whole.macs[1] - 120, whole.macs[3] - 240)


def test_exits_that_are_not_there_cannot_be_kept() -> None:
    network = plain_network(exits=3)
    with user_error(r"the network has no exit 'layer7' \(did you mean 'layer"):
        keep_exits(network, ["layer7"])
    with user_error(r"names='layer1' is a single name: write \['layer1'\]"):
        keep_exits(network, "layer1")
