"""Exits on models of one's own: where they stand, what stays as it was, and what is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import erde
from erde.common.errors import UserError
from erde.exporting.onnx_files import export_stages
from erde.networks.attach import attach_exits
from erde.networks.backbones import Backbone
from erde.networks.cost import count_parameters, head_macs, network_cost
from erde.networks.network import EarlyExitNetwork
from erde.runtime.stages import StageRunner
from tests.helpers.checks import user_error

torch.set_num_threads(1)

SIZE = (3, 16, 16)


class DropPath(nn.Module):
    """Leaves out the whole branch for some images, in training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, 1) > 0.3).to(x) / 0.7


class Block(nn.Module):
    def __init__(self, channels: int, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.drop_path = DropPath()
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.drop_path(self.norm(self.conv2(torch.relu(self.conv1(x))))))


class Mine(nn.Module):
    """Stem, six residual blocks, dropout by function, a linear classifier, a buffer, and a parameter of its own."""

    scale: Tensor

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([Block(8, inplace) for _ in range(6)])
        self.fc = nn.Linear(8, 5)
        self.shift = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.register_buffer("scale", torch.full((1, 8, 1, 1), 1.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * self.scale + self.shift
        for block in self.blocks:
            x = block(x)
        batch, channels, *_ = x.shape
        x = nn.functional.dropout(x, 0.3, training=self.training)
        return self.fc(x.reshape(batch, channels, -1).mean(dim=-1))


def images(number: int = 3, seed: int = 1, size: tuple[int, ...] = SIZE) -> Tensor:
    return torch.randn(number, *size, generator=torch.Generator().manual_seed(seed))


def make(
    model: nn.Module | None = None, exits: Any = 3, **arguments: Any
) -> tuple[nn.Module, EarlyExitNetwork]:
    torch.manual_seed(0)
    model = model or Mine()
    return model, attach_exits(model, exits, input_size=SIZE, **arguments)


def in_both_modes(model: nn.Module, network: EarlyExitNetwork, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(the model's logits, the final exit's) in evaluation and in training, from the same random numbers."""
    result = []
    for training in (False, True):
        torch.manual_seed(3)
        expected = model.train(training)(x)
        torch.manual_seed(3)
        result.append((expected, network.train(training).forward_final(x)))
    return result


# ---------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("exits", [1, 2, 4, ["blocks.0"], ["blocks.1.conv1"]])
def test_the_final_exit_is_the_model_in_evaluation_and_in_training(exits: Any, inplace: bool) -> None:
    model, network = make(Mine(inplace), exits)
    for expected, result in in_both_modes(model, network, images(8)):
        assert torch.allclose(expected, result, atol=1e-6)


def test_dropout_drop_path_and_batch_norm_follow_the_networks_mode() -> None:
    model, network = make()
    network.eval()
    assert torch.equal(network(images()), network(images()))
    before = [tensor.clone() for tensor in model.state_dict().values()]
    network(images())
    assert all(
        torch.equal(tensor, other) for tensor, other in zip(before, model.state_dict().values(), strict=True)
    )
    network.train()
    assert not torch.equal(network.forward_final(images()), network.forward_final(images()))
    running = model.get_submodule("blocks.0.norm").running_mean
    assert not torch.equal(running, torch.zeros(8))
    # The model's own functional dropout, with everything else in evaluation.
    network.eval()
    network.heads[-1].training = True  # the dropout stands behind the last features
    assert not torch.equal(network.forward_final(images()), network.forward_final(images()))


@pytest.mark.parametrize("training", [True, False])
def test_attaching_leaves_the_model_alone(training: bool) -> None:
    model = Mine().train(training)
    model.get_submodule("blocks.2").train(not training)
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    names = set(vars(model))
    state = torch.get_rng_state()
    network = attach_exits(model, 1, input_size=SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(vars(model)) == names
    assert all(stage.training == training for stage in network.stages)


class Normalises(nn.Module):
    """Computes with buffers in its own forward."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3), persistent=False)
        self.blocks = nn.Sequential(*[nn.Conv2d(3 if block == 0 else 8, 8, 3) for block in range(3)])
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean.view(1, 3, 1, 1)) * (1 / self.std).view(1, 3, 1, 1)
        return self.fc(self.blocks(x).mean(dim=(2, 3)))


def test_what_is_computed_from_buffers_follows_them() -> None:
    model, network = make(Normalises())
    keys = list(network.state_dict())
    assert any(key.endswith("mean") for key in keys)
    assert not any(key.endswith("std") or "constant" in key for key in keys)
    assert isinstance(model, Normalises)
    model.std.fill_(0.25)
    model.load_state_dict({**model.state_dict(), "mean": torch.full((3,), 0.5)})
    for expected, result in in_both_modes(model, network, images()):
        assert torch.allclose(expected, result, rtol=1e-5)


class Averages(nn.Module):
    """A statistic of its own, which training assigns anew."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean
        if self.training:
            mean = x.mean((0, 2, 3))
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
        return x - mean.view(1, -1, 1, 1)


class Keeps(nn.Module):
    """A cache that is filled by the first image in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2))
        self.seen: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Keeps:
        if mode:
            self.seen.clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.weight.mean(1).view(1, -1, 1, 1)
        if "bias" not in self.seen:
            self.seen["bias"] = self.weight.mean(1)
        return x + self.seen["bias"].view(1, -1, 1, 1)


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize("inner", [Averages, Keeps])
def test_what_a_module_assigns_to_itself_is_as_before(inner: type[nn.Module], by_size: bool) -> None:
    class Holds(Small):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner()

        def forward(self, x: Tensor) -> Any:
            # Then tensors are traced with their sizes, without computing.
            if by_size and x.shape[-1] != 16:
                raise ValueError
            return self.fc(torch.relu(self.conv2(self.inner(torch.relu(self.conv(x))))).mean(dim=(2, 3)))

    model = Holds().eval()
    answer = model(images())
    network = attach_exits(model, 2, input_size=SIZE).eval()
    assert torch.equal(model.eval()(images()), answer)
    assert torch.allclose(network(images())[-1], answer, atol=1e-5)
    # Also after a refusal.
    with user_error("no module"):
        attach_exits(model, ["nowhere"], input_size=SIZE)
    assert torch.equal(model.eval()(images()), answer)


def test_weights_are_shared_and_frozen_ones_stay_frozen() -> None:
    model = Mine()
    model.stem.weight.requires_grad_(False)
    network = attach_exits(model, 3, input_size=SIZE)
    assert {id(parameter) for parameter in network.backbone_parameters()} == {
        id(parameter) for parameter in model.parameters()
    }
    assert not model.stem.weight.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    assert torch.equal(network.eval().forward_final(images()), model.eval()(images()))


def test_a_gradient_reaches_every_parameter_but_frozen_ones() -> None:
    _, network = make(dropout=0.0)
    network.eval()
    network(images(6)).square().sum().backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        for parameter in network.parameters()
        if parameter.requires_grad
    )


def test_state_dict_has_the_models_own_names() -> None:
    model, network = make(exits=["blocks.0", "blocks.3"])
    keys = set(network.state_dict())
    assert {"stages.0.stem.weight", "stages.0.shift", "stages.1.blocks.3.norm.running_mean"} <= keys
    assert {"stages.2.blocks.5.conv1.weight", "heads.2.fc.weight", "heads.0.linear.weight"} <= keys
    own = {key.split(".", 2)[2] for key in keys if key.startswith(("stages.", "heads.2."))}
    assert own == set(model.state_dict())  # the buffer that is not saved is not


def test_state_dict_round_trip_and_pretrained_weights() -> None:
    _, first = make()
    torch.manual_seed(5)
    model, shared = Mine(), Mine()
    second = attach_exits(shared, 3, input_size=SIZE)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first.eval()(images()), second.eval()(images()))
    heads = copy.deepcopy(second.heads[0].state_dict())
    shared.load_state_dict(model.state_dict())
    assert torch.equal(second.forward_final(images()), model.eval()(images()))
    assert all(torch.equal(tensor, heads[key]) for key, tensor in second.heads[0].state_dict().items())


def test_a_copy_of_the_network_is_independent() -> None:
    model, network = make()
    other = copy.deepcopy(network)
    with torch.no_grad():
        model.get_submodule("fc").weight.zero_()
    x = images()
    assert not torch.equal(other.eval().forward_final(x), network.eval().forward_final(x))


# ---------------------------------------------------------------- stages and features


@pytest.mark.parametrize("exits", [3, ["blocks.0.conv1", "blocks.2"]])
def test_forward_until_is_a_prefix_and_runs_nothing_later(exits: Any) -> None:
    _, network = make(exits=exits)
    network.eval()
    whole = network(images())
    for exit in range(3):
        assert torch.equal(network.forward_until(images(), exit), whole[: exit + 1])
    network.stages[2].register_forward_hook(lambda *_: pytest.fail("a later stage ran"))
    network.forward_until(images(), 1)


def test_features_are_what_the_heads_look_at() -> None:
    _, network = make()
    network.eval()
    logits, features = network.forward_with_features(images())
    assert torch.equal(logits, network(images()))
    assert [tuple(tensor.shape[1:]) for tensor in features] == list(network.feature_shapes(SIZE))
    assert network.feature_shapes(SIZE) == ((8, 8, 8), (8, 8, 8), (8, 8, 8))
    for index, tensor in enumerate(features):
        assert torch.equal(network.heads[index](tensor), logits[index])


class Writes(nn.Module):
    """The next layer writes over what an exit looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.second(self.relu(self.first(x))))
        return self.fc(x.mean(dim=(2, 3)))


def test_an_exit_before_a_step_that_writes_in_place() -> None:
    model, network = make(Writes(), ["first"])
    features = network.eval().forward_features(images())
    assert bool((features[0] < 0).any())  # not yet after the ReLU
    assert torch.equal(features[0], model.first(images()))
    network.train()(images(4)).sum().backward()


class Drops(nn.Module):
    """Dropout in place before each convolution: it writes in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.second = nn.Dropout(0.5, inplace=True), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.drop(self.norm(self.stem(x))))
        return self.fc(self.drop(x.mean(dim=(2, 3))))


def test_an_exit_before_a_step_that_writes_in_place_in_training_only() -> None:
    model = Drops().eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    attach_exits(model, 1, input_size=SIZE)  # no early head, which would draw its weights
    assert torch.equal(torch.get_rng_state(), state)
    network = attach_exits(model, ["norm"], input_size=SIZE)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    logits, features = network.train().forward_with_features(images(4))
    assert torch.equal(features[0], network.stages[0](images(4)))
    logits.sum().backward()
    # What the final exit reads too.
    torch.manual_seed(1)
    features = network.forward_with_features(images(4))[1]
    torch.manual_seed(1)
    assert torch.equal(features[1], network.stages[1](network.stages[0](images(4))))
    network(images(4)).sum().backward()


class TwoStreams(nn.Module):
    """Two streams that meet only at the classifier; sizes and batch are used late."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList([nn.Conv2d(3 if index == 0 else 4, 4, 3, padding=1) for index in range(3)])
        self.right = nn.ModuleList([nn.Conv2d(3 if index == 0 else 8, 8, 3, padding=1) for index in range(3)])
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, _ = x.shape
        left = right = x
        for left_layer, right_layer in zip(self.left, self.right, strict=True):
            left, right = torch.relu(left_layer(left)), torch.relu(right_layer(right))
        both = torch.cat([left, right], dim=1).reshape(batch, 12, height * height)
        return self.fc(both.mean(dim=-1))


def test_several_tensors_cross_where_no_single_one_does() -> None:
    model, network = make(TwoStreams(), 3)
    handed = network.stages[0](images())
    assert isinstance(handed, tuple)
    assert len(handed) == 2
    # The head looks at the wider one.
    assert network.feature_shapes(SIZE)[0] == (8, 16, 16)
    for number in (1, 2, 5):
        assert torch.equal(network.eval()(images(number))[-1], model(images(number)))


class Decides(nn.Module):
    """Looks at the size of the image, and makes a tensor of the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if index == 0 else 4, 4, 3, padding=1) for index in range(4)])
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2 == 0:
            x = x[..., :-1]
        for conv in self.convs:
            x = torch.relu(conv(x))
        offset = torch.zeros(x.shape[0], 4, device=x.device)
        return self.fc(x.mean(dim=(2, 3)) + offset)


def test_sizes_of_the_image_may_decide() -> None:
    model, network = make(Decides(), 3)
    assert network.feature_shapes(SIZE)[0] == (4, 16, 15)
    for number in (1, 4):
        assert torch.equal(network.eval()(images(number))[-1], model(images(number)))


# ---------------------------------------------------------------- export


def check_stages(network: EarlyExitNetwork, folder: Path, size: tuple[int, int, int] = SIZE) -> StageRunner:
    """Export; every exit and batch size, against torch on what the stage's own preprocessing gives."""
    channels, height, width = size
    exported = export_stages(network, (height, width, channels), (0.5,) * 3, (0.25,) * 3, folder)
    runner = StageRunner(exported.paths(folder), threads=1)
    for batch in (1, 2, 7):
        pixels = np.random.default_rng(batch).integers(0, 256, (batch, height, width, channels), np.uint8)
        normalised = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        with torch.no_grad():
            expected = network.eval()(normalised).numpy()
        assert np.allclose(runner.all_logits(pixels), expected, atol=1e-4)
    return runner


def test_several_tensors_are_packed_into_one_for_the_next_stage(tmp_path: Path) -> None:
    _, network = make(TwoStreams(), 3)
    runner = check_stages(network, tmp_path / "stages")
    features, _ = runner.run(0, np.zeros((2, 16, 16, 3), np.uint8))
    assert features is not None
    assert features.shape == (2, 12 * 16 * 16)


class FoldsWindows(nn.Module):
    """Moves pieces of the image into the batch, and cuts there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(batch * 4, 16, 12)
        x = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))
        return self.fc(x.reshape(batch, 64, 8).mean(dim=1))


def test_pieces_of_an_image_in_the_batch_are_handed_over_by_image(tmp_path: Path) -> None:
    model, network = make(FoldsWindows(), ["first", "second"])
    assert network.feature_shapes(SIZE)[0] == (4, 16, 8)
    for number in (1, 3):
        assert torch.equal(network.eval()(images(number))[-1], model(images(number)))
    check_stages(network, tmp_path / "stages")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv(x))))

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.features(x).mean(dim=(2, 3)))


class Again(Small):
    """The same block several times."""

    def features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for _ in range(4):
            x = torch.relu(self.conv2(x))
        return x


def test_a_block_that_is_called_again_has_its_parameters_once() -> None:
    model = Again()
    network = attach_exits(model, 3, input_size=SIZE)
    cost = network_cost(network, SIZE)
    assert cost.no_exit_parameters == count_parameters(model)
    assert cost.parameters[-1] == count_parameters(network)
    assert cost.macs[0] < cost.macs[1] < cost.macs[2]


class NoEmptyBatch(Small):
    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        return self.fc(x.reshape(x.shape[0], 4, -1).mean(dim=-1))


class Recurrent(nn.Module):
    """ONNX Runtime's LSTM ends the process at an empty batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.fc = nn.Conv2d(3, 4, 3), nn.LSTM(56, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows, _ = self.lstm(torch.relu(self.conv(x)).transpose(1, 2).flatten(2))
        return self.fc(rows[:, -1])


@pytest.mark.parametrize("model", [NoEmptyBatch, Recurrent])
def test_an_empty_batch_is_answered_whatever_the_model_makes_of_it(
    model: type[nn.Module], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, network = make(model(), ["conv"] if model is Recurrent else 2)
    runner = check_stages(network, tmp_path / "stages")
    assert runner.all_logits(np.zeros((0, 16, 16, 3), np.uint8)).shape == (2, 0, 5)
    assert capfd.readouterr() == ("", "")


class LooksAtBatch(nn.Module):
    """Stays whole, so that torch follows its decision; ONNX cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return x * 2 if x.shape[0] > 1 else x


class LooksAtOthers(nn.Module):
    """A batch norm of one's own that takes the statistics of whatever comes together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x - x.mean(dim=0, keepdim=True) / 2


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            LooksAtBatch,
            "at exit 'final' for a batch of 1, .*a part of the network looks at the size of the batch",
        ),
        (LooksAtOthers, "may not depend on the other images of its batch"),
    ],
)
def test_an_answer_that_depends_on_the_batch_is_not_exported(
    part: type[nn.Module], message: str, tmp_path: Path
) -> None:
    class Model(Small):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = part()  # type: ignore[assignment]

    model, network = make(Model(), ["conv"])
    for number in (1, 2):
        assert torch.equal(network.eval()(images(number))[-1], model.eval()(images(number)))
    with pytest.raises(UserError, match=message) as caught:
        check_stages(network, tmp_path / "stages")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class TwoViews(Small):
    """Each image and its mirror image, stacked behind one another: not image by image."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = super().forward(torch.cat([x, x.flip(3)])).chunk(2)
        return (first + second) / 2


def test_early_exits_that_mix_images_are_refused() -> None:
    with user_error("'conv'.* an image's answer depends on the other images of its batch"):
        make(TwoViews(), ["conv"])
    model, network = make(TwoViews(), 1)
    assert torch.allclose(network.eval()(images())[-1], model.eval()(images()), atol=1e-6)


# ---------------------------------------------------------------- places


def test_exits_stand_at_equal_shares_of_the_macs() -> None:
    _, network = make(exits=3)
    assert network.exit_names == ["blocks.1", "blocks.3", "final"]
    assert network.notes == ()
    cost = network_cost(network, SIZE)
    heads = head_macs(network, SIZE)
    # Stem 8x3x3x3 and each block twice 8x8x3x3, at 8x8 pixels; fc 8x5.
    stem, block = 8 * 27 * 64, 2 * 8 * 72 * 64
    assert cost.no_exit_macs == stem + 6 * block + 40
    assert cost.macs[0] == stem + 2 * block + heads[0]
    assert cost.macs[2] == stem + 6 * block + sum(heads)
    assert heads == (8 * 4 * 4 * 5, 8 * 4 * 4 * 5, 40)


@pytest.mark.parametrize("exits", [1, 2, 5, 7])
def test_any_number_up_to_the_places(exits: int) -> None:
    _, network = make(exits=exits)
    assert len(network.stages) == len(set(network.exit_names)) == exits


def test_auto_takes_every_place_but_no_more_than_eight() -> None:
    # Mine has six blocks, behind the last of which stands the final exit, and adds something before the first.
    _, network = make(exits="auto")
    assert network.exit_names == ["add", *(f"blocks.{index}" for index in range(5)), "final"]
    # Of 25 places more near the image than further on; every exit reads a single tensor.
    deep = attach_exits(erde.build_backbone("resnet56", classes=5), "auto", input_size=(3, 12, 12))
    cost = network_cost(deep, (3, 12, 12))
    shares = [macs / cost.no_exit_macs for macs in cost.macs[:-1]]
    assert len(deep.stages) == 8
    assert shares == pytest.approx([(number / 8) ** 1.5 for number in range(1, 8)], abs=0.03)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(768, 5)),
        Backbone(OrderedDict(only=nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Flatten(), nn.Linear(784, 5))),
    ],
)
def test_auto_needs_a_place(model: nn.Module) -> None:
    with user_error(
        rf"exits='auto' needs a place for an early exit, and {type(model).__name__} has none: give exits=1"
    ):
        make(model, "auto")


def test_a_list_of_modules_is_named_by_its_end() -> None:
    class Nested(Mine):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.ModuleList([Block(8)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in [*self.blocks, *self.more]:
                x = block(x)
            return self.fc(x.mean(dim=(2, 3)))

    _, network = make(Nested(), ["blocks"])
    assert network.exit_names == ["blocks.5", "final"]


def test_an_exit_inside_a_residual_branch_takes_the_nearest_place_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, network = make(exits=["blocks.2.conv1"])
    assert network.exit_names[0] == "blocks.2"
    assert len(network.notes) == 1
    assert "no exit can stand at 'blocks.2.conv1'" in network.notes[0]
    assert f"it stands at '{network.exit_names[0]}' instead" in network.notes[0]
    assert network.notes[0] in capsys.readouterr().err


class OneBranch(nn.Module):
    """Nearly all is one residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.a, self.b, self.c = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept = [x.flatten(2).long(), x.mean(dim=1)]
        y = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return self.fc((x + y + kept[0].reshape(x.shape) + kept[1].unsqueeze(1)).mean(dim=(2, 3)))


def test_an_exit_far_from_any_place_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"no exit can stand at 'b' \(at 67% of the MACs\).*the nearest is 'stem' at"
    ):
        make(OneBranch(), ["b"])


# ---------------------------------------------------------------- what is refused


class ByValue(Small):
    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        if x.mean() > 0:
            x = x * 2
        return self.fc(x.mean(dim=(2, 3)))


class ByBatch(Small):
    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        if x.shape[0] > 2:
            x = x * 2
        return self.fc(x.mean(dim=(2, 3)))


class Alone(Small):
    """Two images or three give no hint."""

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        if x.shape[0] > 1:
            x = x * 2
        return self.fc(x.mean(dim=(2, 3)))


class AloneByLength(Small):
    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        if len(x) > 1:
            x = x * 2
        return self.fc(x.mean(dim=(2, 3)))


class Large(Small):
    def forward(self, x: Tensor) -> Any:
        alone = x.shape[0] < 2
        x = self.features(x)
        if x.size(0) * 2 > 40 or alone:
            x = x * 2
        return self.fc(x.mean(dim=(2, 3)))


class ByNumber(Small):
    """No decision, but a number that is the same for two images and for three, and made before a cut."""

    def forward(self, x: Tensor) -> Any:
        number = 4 // (x.shape[0] + 1)
        return self.fc((self.features(x) * number).mean(dim=(2, 3)))


class Tuple(Small):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Mapping(Small):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


class Maps(Small):
    def forward(self, x: Tensor) -> Any:
        return self.features(x)


class NoClassifier(Small):
    num_classes = 0

    def forward(self, x: Tensor) -> Any:
        return self.features(x).mean(dim=(2, 3))


class Detached(Small):
    def forward(self, x: Tensor) -> Any:
        return self.fc(self.features(x).mean(dim=(2, 3)).detach())


class AuxiliaryInTraining(Small):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return (logits, x) if self.training else logits


class OtherInTraining(Small):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return logits * 2 + logits if self.training else logits


class Remembers(Small):
    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            ByValue,
            r"ByValue cannot be cut at test_attach.py:\d+, `if x.mean\(\) > 0:`: its control flow depends on what it",
        ),
        (ByBatch, r"ByBatch cannot be cut at test_attach.py:\d+, `if x.shape\[0\] > 2:`"),
        (
            Alone,
            r"Alone cannot be cut at test_attach.py:\d+, `if x.shape\[0\] > 1:`: its control flow depends on the number of",
        ),
        (
            AloneByLength,
            r"AloneByLength cannot be cut at test_attach.py:\d+, `if len\(x\) > 1:`: .*x.shape\[0\]",
        ),
        (Large, r"Large cannot be cut at test_attach.py:\d+, `if x.size\(0\) \* 2 > 40 or alone:`"),
        (ByNumber, r"ByNumber gives other logits than before \(by .*, for a batch of 1\)"),
        (Tuple, "Tuple gives a tuple, expected a tensor of logits"),
        (Mapping, "Mapping gives a dict, expected a tensor of logits"),
        (Maps, r"Maps gives shape \('B', 4, 12, 12\) for a batch of B, expected logits \(B, K\)"),
        (NoClassifier, "NoClassifier has num_classes=0, so it gives features and no logits"),
        (Detached, "Detached's classifier is detached from its features"),
        (AuxiliaryInTraining, "AuxiliaryInTraining gives a tuple in training and logits in evaluation"),
        (OtherInTraining, "OtherInTraining computes something else in training than in evaluation"),
        (Remembers, "cut at its exits Remembers gives other logits than before"),
        (nn.Flatten, "Flatten has no parameters"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5)),
            "exits=2 is not possible on this model: expected 1 to 1",
        ),
        (
            lambda: nn.Sequential(nn.Linear(16, 5), nn.Flatten()),
            "Sequential has no place before its last layer",
        ),
    ],
)
def test_models_that_are_refused(model: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(model(), 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (
            ["block.1"],
            r"no place 'block.1' for an exit: no module has that path \(did you mean 'blocks.1'\?\)",
        ),
        (["blocks.9"], r"no place 'blocks.9' for an exit.*did you mean 'blocks"),
        (["blocks.5"], "exit 'blocks.5' stands at the end of the network"),
        (["fc"], "exit 'fc' stands at the end of the network"),
        (0, "exits=0 is not possible"),
        (99, r"exits=99 is not possible on this model: expected 1 to \d+"),
    ],
)
def test_places_that_are_refused(exits: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(exits=exits)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_called() -> None:
    model = Mine()
    model.spare = nn.Linear(3, 3)
    with pytest.raises(UserError, match="no exit can stand at 'spare': the model does not call it"):
        make(model, ["spare"])


@pytest.mark.parametrize("size", [(1, 16, 16), (3, 1, 1)])
def test_images_that_do_not_fit(size: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=r"Small does not take images of \(C, H, W\) = \("):
        attach_exits(Small(), 2, input_size=size)


@pytest.mark.parametrize(
    ("head", "message"), [("convv", "did you mean 'conv'"), ("native", "bring exit heads along")]
)
def test_heads_that_are_refused(head: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(head=head)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (3.0, r"exits=3\.0: expected a whole number, 'auto', or a list"),
        (1.5, r"exits=1\.5: expected a whole number, 'auto', or a list"),
        (True, "exits=True: expected a whole number, 'auto', or a list"),
        (None, "exits=None: expected a whole number, 'auto', or a list"),
        ("blocks.1", r"exits='blocks\.1' is a single name: write exits=\['blocks\.1'\]"),
        (["blocks.1", 3], r"exits=\['blocks.1', 3\]: 3 is not a module path"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_exits_of_another_type(exits: Any, message: str, own: bool) -> None:
    model = Mine() if own else erde.build_backbone("resnet8", classes=5)
    with user_error(message):
        make(model, exits)


def test_exits_in_numpy_and_in_a_tuple() -> None:
    assert len(make(exits=np.int64(3))[1].stages) == 3
    assert make(exits=("blocks.1",))[1].exit_names == ["blocks.1", "final"]


@pytest.mark.parametrize(
    "size", [(8, 8), 16, (3, 16.0, 16), "3x8x8", (3, 0, 8), (3, -8, 8), (True, 8, 8), None]
)
@pytest.mark.parametrize("own", [True, False])
def test_input_sizes_that_are_none(size: Any, own: bool) -> None:
    model = Mine() if own else erde.build_backbone("resnet8", classes=5)
    with user_error(r"input_size=.*: expected \(C, H, W\), three whole numbers"):
        attach_exits(model, 2, input_size=size)


def compiled_inside() -> nn.Module:
    model = Mine()
    model.blocks[1].compile()
    return model


def quantised(module: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Small, "Small is a class: pass an instance"),
        (lambda: torch.relu, "the model is a builtin_function_or_method, expected a torch.nn.Module"),
        (lambda: torch.compile(Small()), "OptimizedModule is compiled: put exits on it before"),
        (lambda: nn.Sequential(cast(nn.Module, torch.compile(Small()))), "'0' in Sequential is compiled"),
        (compiled_inside, r"'blocks\.1' in Mine is compiled"),
        (lambda: torch.jit.script(Small()), "RecursiveScriptModule is a scripted or traced module"),
        (
            lambda: torch.jit.trace(Small(), torch.zeros(2, *SIZE)),
            "TopLevelTracedModule is a scripted or traced",
        ),
        (lambda: quantised(Small()), r"'fc' in Small is quantised \(Linear\): put exits on the float model"),
        (
            lambda: quantised(nn.Sequential(nn.Flatten(), nn.Linear(768, 9), nn.ReLU(), nn.Linear(9, 5))),
            "'1' in Sequential is quantised",
        ),
        (
            lambda: Small().half(),
            r"Small has parameters of float16 \('conv.weight'\), expected float32: call model.float",
        ),
        (lambda: Small().bfloat16(), "Small has parameters of bfloat16"),
    ],
)
def test_kinds_of_models_that_are_refused(model: Any, message: str) -> None:
    given = model()
    with user_error(message):
        attach_exits(given, 2, input_size=SIZE)


def test_a_network_in_half_precision_is_not_exported(tmp_path: Path) -> None:
    _, network = make()
    with user_error(r"the network has parameters of float16 \('stages.0.shift'\)"):
        export_stages(network.half(), (16, 16, 3), (0.5,) * 3, (0.25,) * 3, tmp_path / "stages")
    with user_error("the network is a Mine: put exits on it first"):
        export_stages(Mine(), (16, 16, 3), (0.5,) * 3, (0.25,) * 3, tmp_path / "stages")
    assert list(tmp_path.iterdir()) == []


class FrozenStem(Mine):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(dim=(2, 3)) + self.shift.flatten(1))


def test_what_no_grad_keeps_from_learning_would_learn() -> None:
    with user_error(r"FrozenStem keeps 'stem.weight' and 1 more from learning by no_grad\(\)"):
        make(FrozenStem())
    # The way out that the message names.
    model = FrozenStem()
    for parameter in model.stem.parameters():
        parameter.requires_grad_(False)
    make(model)


class Lowers(Small):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


def test_what_is_switched_on_for_a_while_is_named() -> None:
    with user_error(r"gives other logits than before .*\(torch.autocast\)"):
        make(Lowers(), 2)


class AsksForTypes(nn.Module):
    """As in Hugging Face's vision transformers: an inner module asks for dtypes and sizes before its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([Block(8) for _ in range(6)])

    def forward(self, pixel_values: Tensor) -> Tensor:
        expected_dtype = self.stem.weight.dtype
        if pixel_values.dtype != expected_dtype:
            pixel_values = pixel_values.to(expected_dtype)
        if pixel_values.shape[1] != 3 or pixel_values.shape[-1] % 2:
            raise ValueError("channels or size")
        x = self.stem(pixel_values)
        for block in self.blocks:
            x = block(x)
        return x


class Inner(nn.Module):
    def __init__(self, inner: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.inner, self.fc = inner, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("exits", [3, ["inner.blocks.1", "inner.blocks.3"]])
def test_an_inner_module_may_ask_for_types_and_sizes(exits: Any) -> None:
    model, network = make(Inner(AsksForTypes()), exits)
    assert network.exit_names == ["inner.blocks.1", "inner.blocks.3", "final"]
    assert network.notes == ()
    for number in (1, 2, 5):
        assert torch.equal(network.eval()(images(number))[-1], model.eval()(images(number)))


class GivesMapping(AsksForTypes):
    """The inner module's output is a mapping, as Hugging Face's is."""

    def forward(self, pixel_values: Tensor) -> Any:
        return {"features": super().forward(pixel_values), "none": None}


class TakesMapping(Inner):
    def forward(self, x: Tensor) -> Tensor:
        outputs = self.inner(x)
        return self.fc(outputs["features"].mean(dim=(2, 3)))


def test_an_inner_module_may_give_a_mapping() -> None:
    model, network = make(TakesMapping(GivesMapping()), 3)
    assert network.exit_names == ["inner.blocks.1", "inner.blocks.3", "final"]
    assert torch.equal(network.eval()(images(1))[-1], model.eval()(images(1)))


class AsksForValues(AsksForTypes):
    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.max() > 1e9:
            raise ValueError("not normalised")
        return super().forward(pixel_values)


def test_why_a_module_stays_whole_is_said() -> None:
    why = r"\(AsksForValues\): at test_attach.py:\d+, `if pixel_values.max\(\) > 1e9:`: its control flow depends"
    with user_error(
        rf"exits=3 is not possible on this model: expected 1 to \d.*; 'inner', \d+% of .* stays whole {why}"
    ):
        make(Inner(AsksForValues()))
    with user_error(rf"no exit can stand at 'inner.blocks.1': 'inner' can only be run as a whole {why}"):
        make(Inner(AsksForValues()), ["inner.blocks.1"])


def test_a_module_that_stays_whole_may_decide_by_values() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Inner(AsksForValues()))
    _, network = make(model, ["0"])
    assert torch.equal(network.eval()(images())[-1], model.eval()(images()))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.patches, self.encoder, self.fc = (
            nn.Conv2d(3, 16, 4, 4),
            nn.TransformerEncoder(layer, 4),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(dim=1))


@pytest.mark.filterwarnings("ignore")
def test_a_module_of_torchs_own_stays_whole_and_it_is_said() -> None:
    why = r"\(TransformerEncoder\): it is a module of torch's own; call its layers in a loop"
    with user_error(
        rf"exits=4 is not possible on this model: .*'encoder', 9\d% of the MACs, stays whole {why}"
    ):
        make(Encoder(), 4)
    with user_error(rf"no exit can stand at 'encoder.layers.1': 'encoder' can only be run as a whole {why}"):
        make(Encoder(), ["encoder.layers.1"])


class TakesLists(nn.Module):
    """As in SelecSLS: a block takes a tensor or a list, which a traced value is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Any) -> Any:
        if not isinstance(x, list):
            x = [x]
        return [torch.relu(self.conv(x[0]))]


class GivesLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(TakesLists() for _ in range(6)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x))[0].mean(dim=(2, 3)))


def test_a_block_that_takes_a_tensor_or_a_list() -> None:
    model, network = make(GivesLists(), 3)
    assert len(network.stages) == 3
    for number in (1, 2):
        assert torch.equal(network.eval()(images(number))[-1], model.eval()(images(number)))


class Outputs(NamedTuple):
    logits: Tensor
    auxiliary: Tensor


class NamedAuxiliary(Small):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return Outputs(logits, x) if self.training else logits


def test_auxiliary_classifiers_are_named() -> None:
    with user_error(
        r"NamedAuxiliary gives a Outputs in training and logits in evaluation: .*aux_logits=False"
    ):
        make(NamedAuxiliary(), 2)


def test_hooks_of_the_model_itself_are_not_called_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = Mine()
    model.register_forward_hook(lambda *_: None)
    make(model)
    assert "the forward hooks of Mine itself are not called by the network" in capsys.readouterr().err


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_a_module_inside_are_called(register: str) -> None:
    model, calls = Normalises(), list[int]()
    getattr(model.blocks, register)(lambda *_: calls.append(1))
    _, network = make(model, 1)
    network(images().requires_grad_()).sum().backward()
    assert len(calls) == 1


class ChannelsLast(nn.Module):
    """As in Swin: channels last, twice as many at each halving; once as many as pixels a side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.merge, self.third, self.fc = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(self.stem(x).permute(0, 2, 3, 1))))
        x = x.unflatten(1, (8, 2)).unflatten(3, (8, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3)
        return self.fc(self.third(torch.relu(self.merge(x))).mean(dim=(1, 2)))


class TurnsOver(ChannelsLast):
    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(self.stem(x).permute(0, 2, 3, 1))))
        x = x.unflatten(1, (8, 2)).unflatten(3, (8, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3)
        x = self.third(torch.relu(self.merge(x))).permute(0, 3, 1, 2)
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def test_as_many_channels_as_pixels_a_side() -> None:
    _, network = make(ChannelsLast(), ["second"])
    assert network.feature_shapes(SIZE)[0] == (16, 16, 16)
    assert type(network.heads[0][0]).__name__ == "ChannelsFirst"
    # The features turn over before they are pooled, as in torchvision's Swin: the nearest shape that tells counts.
    _, network = make(TurnsOver(), ["second"])
    assert network.feature_shapes(SIZE)[0] == (16, 16, 16)
    assert type(network.heads[0][0]).__name__ == "ChannelsFirst"
    # The other layout, by the same shape.
    convolutions = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 3)]
    channels_first = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    _, network = make(channels_first, ["0"])
    assert network.feature_shapes(SIZE)[0] == (16, 16, 16)
    assert type(network.heads[0][0]).__name__ != "ChannelsFirst"
