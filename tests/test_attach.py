"""Exits on models of one's own: where they stand, what stays as it was, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from erde.cost import head_macs, network_cost
from erde.errors import UserError
from erde.exits import EarlyExitNetwork, attach_exits
from erde.export import export_stages
from erde.stages import StageRunner

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
    found = []
    for training in (False, True):
        torch.manual_seed(3)
        expected = model.train(training)(x)
        torch.manual_seed(3)
        found.append((expected, network.train(training).forward_final(x)))
    return found


# ---------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("exits", [1, 2, 4, ["blocks.0"], ["blocks.1.conv1"]])
def test_the_final_exit_is_the_model_in_evaluation_and_in_training(exits: Any, inplace: bool) -> None:
    model, network = make(Mine(inplace), exits)
    for expected, found in in_both_modes(model, network, images(8)):
        assert torch.allclose(expected, found, atol=1e-6)


def test_dropout_drop_path_and_batch_norm_follow_the_networks_mode() -> None:
    model, network = make()
    network.eval()
    assert torch.equal(network(images()), network(images()))
    before = [one.clone() for one in model.state_dict().values()]
    network(images())
    assert all(
        torch.equal(one, other) for one, other in zip(before, model.state_dict().values(), strict=True)
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


def test_weights_are_shared_and_frozen_ones_stay_frozen() -> None:
    model = Mine()
    model.stem.weight.requires_grad_(False)
    network = attach_exits(model, 3, input_size=SIZE)
    assert {id(one) for one in network.backbone_parameters()} == {id(one) for one in model.parameters()}
    assert not model.stem.weight.requires_grad
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(1.3)
    assert torch.equal(network.eval().forward_final(images()), model.eval()(images()))


def test_a_gradient_reaches_every_parameter_but_frozen_ones() -> None:
    _, network = make(dropout=0.0)
    network.eval()
    network(images(6)).square().sum().backward()
    assert all(one.grad is not None and bool(one.grad.abs().sum() > 0) for one in network.parameters())


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
    model, second = Mine(), attach_exits(Mine(), 3, input_size=SIZE)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first.eval()(images()), second.eval()(images()))
    heads = copy.deepcopy(second.heads[0].state_dict())
    second.load_original_state(model.state_dict())
    assert torch.equal(second.forward_final(images()), model.eval()(images()))
    assert all(torch.equal(one, heads[key]) for key, one in second.heads[0].state_dict().items())
    state = model.state_dict()
    del state["fc.weight"]
    with pytest.raises(UserError, match=r"'fc.weight' should have shape \(5, 8\), and it is missing"):
        second.load_original_state(state)


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
    assert [tuple(one.shape[1:]) for one in features] == list(network.feature_shapes(SIZE))
    assert network.feature_shapes(SIZE) == ((8, 8, 8), (8, 8, 8), (8, 8, 8))
    for index, one in enumerate(features):
        assert torch.equal(network.heads[index](one), logits[index])


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
        for one, other in zip(self.left, self.right, strict=True):
            left, right = torch.relu(one(left)), torch.relu(other(right))
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


class NoEmptyBatch(Small):
    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        return self.fc(x.reshape(x.shape[0], 4, -1).mean(dim=-1))


def test_a_model_that_takes_no_empty_batch_is_exported_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, network = make(NoEmptyBatch(), 2)
    check_stages(network, tmp_path / "stages")
    assert "this network takes no empty batch" in capsys.readouterr().err


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
        (AuxiliaryInTraining, "AuxiliaryInTraining computes something else in training than in evaluation"),
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
