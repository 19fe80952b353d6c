"""Heads that cannot die, what counts as a dead unit, and the linear probe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

import erde
from erde.common.history import Health
from erde.data.load import DataSplits
from erde.networks import checkpoint
from erde.networks.heads import (
    ConvHead,
    ERDEHead,
    LinearHead,
    TokenHead,
    TowerHead,
    VectorHead,
    reset_head,
)
from erde.networks.network import EarlyExitNetwork
from erde.training import health
from erde.training.health import measure_health
from erde.training.job import LAST, Job, Outcome
from erde.training.loop import train_network, train_together
from tests.training.test_loop import (
    STEPS,
    KilledError,
    Toy,
    check_equal,
    differing,
    head_names,
    make_job,
    new_network,
    snapshot,
)

# ---------------------------------------------------------------- heads that cannot die


def train_head(make: Callable[[], nn.Module], learning_rate: float) -> tuple[int, float]:
    """A head alone on maps whose classes differ in their means: its dead units, and its accuracy."""
    generator = torch.Generator().manual_seed(0)
    means = 0.3 * torch.randn(10, 16, 16, 16, generator=generator)

    def draw(images: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (images,), generator=generator)
        return means[labels] + torch.randn(images, 16, 16, 16, generator=generator), labels

    torch.manual_seed(0)
    head = make()
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for _ in range(60):
        x, labels = draw(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), labels).backward()
        optimizer.step()
    network = EarlyExitNetwork(
        [nn.Identity(), nn.Identity()], [head, ERDEHead((16, 16, 16), 10)], ["0", "final"]
    )
    result = measure_health(network, [draw(256)])
    return result.dead_units[0], result.first_exit_accuracy


def trained_norm() -> nn.Module:
    """The head as it was up to 0.1: its norm is trained, and nothing is scaled."""
    head = ERDEHead((16, 16, 16), 10, dropout=0.0)
    nn.init.ones_(head.norm.weight)
    head.norm.requires_grad_(True)
    return head


def test_a_head_with_a_trained_norm_dies_and_ours_does_not() -> None:
    dead, accuracy = train_head(trained_norm, 0.3)
    assert (dead, accuracy < 0.2) == (16, True)
    dead, accuracy = train_head(lambda: ERDEHead((16, 16, 16), 10, dropout=0.0), 0.3)
    assert (dead, accuracy > 0.95) == (0, True)


def test_a_tower_lives(digits: DataSplits) -> None:
    # Alone at a high learning rate (those images differ at single places, which a tower does not tell apart), and by the
    # loop on digits at the usual one.
    assert train_head(lambda: TowerHead((16, 16, 16), 10, dropout=0.0), 0.3)[0] == 0
    torch.manual_seed(0)
    backbone = erde.build_backbone("resnet8x0.5", classes=10, channels=1)
    network = erde.attach_exits(backbone, 3, input_size=digits.input_size, head="tower")
    trained = erde.train(
        network, digits, epochs=6, batch_size=32, augmentation={"crop_padding": 1, "flip": False}
    )[-1].health
    assert trained is not None
    # Of the first tower the map's 8 channels and 32 of its layer: the map has 8 pixels a side.
    assert (trained.units, trained.dead_units) == ([8 + 32, 16 + 32], [0, 0])
    assert trained.first_exit_accuracy > 0.8


@pytest.mark.parametrize(
    "head",
    [
        ERDEHead((16, 8, 8), 5),
        LinearHead((512, 4, 4), 5),
        ConvHead((96, 16, 16), 5),
        TokenHead(300, range(4), 5),
        VectorHead(300, 5),
    ],
    ids=lambda head: type(head).__name__,
)
def test_norms_of_heads_are_fixed_and_fit_their_linear_layer(head: nn.Module) -> None:
    norms = [module for module in head.modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)]
    inputs = head.linear.in_features
    expected = min(1.0, (256 / inputs) ** 0.5)

    def check() -> None:
        assert torch.unique(norms[-1].weight).tolist() == pytest.approx([expected])
        for norm in norms:
            assert not norm.weight.requires_grad
            assert not norm.bias.requires_grad
            assert not norm.bias.any()

    check()
    before = snapshot(head)
    torch.manual_seed(1)
    reset_head(head)
    check()
    assert "linear.weight" in differing(snapshot(head), before)
    torch.manual_seed(1)
    again = snapshot(head)
    reset_head(head)
    assert not differing(snapshot(head), again)


# ---------------------------------------------------------------- dead units, the probe


def two_exits(head: nn.Module) -> EarlyExitNetwork:
    return EarlyExitNetwork([nn.Identity(), nn.Identity()], [head, nn.Flatten()], ["0", "final"])


def test_a_unit_is_dead_if_its_relu_is_never_on() -> None:
    head = ERDEHead((6, 4, 4), 3)
    with torch.no_grad():
        head.norm.bias[1] = -1e3
        head.norm.weight[4] = 0.0
    x = torch.randn(40, 6, 4, 4)
    result = measure_health(
        two_exits(head), [(x[:20], torch.zeros(20).long()), (x[20:], torch.zeros(20).long())]
    )
    assert (result.dead_units, result.units) == ([2], [6])
    # One place of 640 is enough to live: 0.16 % of them.
    lifted = torch.zeros(40, 6, 4, 4)
    lifted[0, 1, 0, 0] = 2e3
    result = measure_health(two_exits(head), [(x + lifted, torch.zeros(40).long())])
    assert result.dead_units == [1]


def test_a_token_head_has_a_dead_unit_where_nothing_reaches_its_linear_layer() -> None:
    head = TokenHead(8, range(5), 3)
    x = torch.randn(30, 5, 8)
    assert measure_health(two_exits(head), [(x, torch.zeros(30).long())]).dead_units == [0]
    with torch.no_grad():
        head.norm.weight[2] = 1e-6
    result = measure_health(two_exits(head), [(x, torch.zeros(30).long())])
    assert (result.dead_units, result.units) == ([1], [8])


def test_the_probe_is_a_ridge_regression_on_other_images() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(4, size=400)
    x = generator.normal(size=(400, 12)) * np.geomspace(0.01, 100, 12)
    x[:, :4] += 1.2 * np.eye(4)[labels] * np.geomspace(0.01, 100, 12)[:4]
    x[:, 7] = 3.0  # says nothing, and has no variance
    half = 200
    standard = np.where(x[:half].std(axis=0, ddof=1) > 1e-8, x[:half].std(axis=0, ddof=1), np.inf)
    scaled = (x - x[:half].mean(axis=0)) / standard
    ridge = Ridge(alpha=health.RIDGE * half).fit(scaled[:half], np.eye(4)[labels[:half]])
    expected = (ridge.predict(scaled[half:]).argmax(axis=1) == labels[half:]).mean()
    assert 0.4 < expected < 0.95

    head = nn.Sequential(nn.Linear(12, 4))
    network = two_exits(head)
    result = measure_health(network, [(torch.from_numpy(x).float(), torch.from_numpy(labels))])
    assert result.probe_accuracy == pytest.approx(expected)
    answers = head(torch.from_numpy(x[half:]).float()).argmax(dim=1).numpy()
    assert result.first_exit_accuracy == pytest.approx((answers == labels[half:]).mean())
    assert result.images == half
    # Fewer than 20 images of a class on each side make no probe; then all images count.
    few = measure_health(network, [(torch.from_numpy(x[:150]).float(), torch.from_numpy(labels[:150]))])
    assert (few.probe_accuracy, few.images) == (None, 150)


def test_the_line_warns_where_heads_are_in_trouble() -> None:
    well = Health(
        dead_units=[1, 0], units=[16, 32], first_exit_accuracy=0.66, probe_accuracy=0.68, images=1000
    )
    assert well.is_good
    expected = "dead units 1 of 16 / 0 of 32; first exit right on 66.0% of 1,000 train images, a linear probe on 68.0%"
    assert well.line() == expected
    for change in ({"dead_units": [0, 4]}, {"probe_accuracy": 0.7}):
        ill = well.model_copy(update=change)
        assert not ill.is_good
        assert "warning: the heads learn less than they could" in ill.line()
    assert well.model_copy(update={"probe_accuracy": None}).is_good


# ---------------------------------------------------------------- the refit


@pytest.fixture(scope="module")
def refitted(digits: DataSplits) -> tuple[Job, Outcome]:
    job = make_job(digits, refit_heads=2)
    return job, train_network(job)


def test_the_refit_changes_intermediate_heads_only(digits: DataSplits, refitted: tuple[Job, Outcome]) -> None:
    job, outcome = refitted
    plain = make_job(digits)
    history = train_network(plain).history
    changed = differing(snapshot(job.network), snapshot(plain.network))
    names = head_names(set(changed))
    assert changed == names
    assert {"heads.0.linear.weight", "heads.1.norm.running_mean"} <= changed
    # The final exit answers bit for bit as before.
    x = torch.randn(8, *digits.input_size)
    job.network.eval(), plain.network.eval()
    assert torch.equal(job.network(x)[-1], plain.network(x)[-1])
    assert not torch.equal(job.network(x)[0], plain.network(x)[0])
    assert [entry.phase for entry in outcome.history] == ["joint"] * 3 + ["refit"] * 2
    assert outcome.history[:3] == history
    # Both phases end with a look at the heads.
    assert [entry.health is not None for entry in outcome.history] == [False, False, True, False, True]
    # A schedule of its own: it starts where the first one did.
    assert outcome.history[3].learning_rate > outcome.history[2].learning_rate
    assert all(parameter.requires_grad for parameter in job.network.backbone_parameters())


def test_the_refit_starts_from_new_heads(digits: DataSplits) -> None:
    # Whatever the heads had become: here they are spoilt from the start, and hardly trained.
    job = make_job(digits, epochs=1, refit_heads=1, learning_rate=1e-9)
    with torch.no_grad():
        job.network.heads[0].linear.weight.fill_(7.0)
    train_network(job)
    weight = job.network.heads[0].linear.weight
    assert weight.abs().max() < 1


@pytest.mark.parametrize(("at", "epoch", "step"), [(8, 2, 2), (9, 3, 0), (10, 3, 1), (14, 4, 2)])
def test_a_killed_refit_ends_bit_for_bit_the_same(
    at: int,
    epoch: int,
    step: int,
    digits: DataSplits,
    refitted: tuple[Job, Outcome],
    tmp_path: Path,
) -> None:
    killed = make_job(digits, Toy(at), refit_heads=2)
    with pytest.raises(KilledError):
        train_network(killed, tmp_path)
    state = checkpoint.load(tmp_path / LAST)[1]
    assert (state["epoch"], state["step"]) == (epoch, step)
    again = make_job(digits, network=new_network(digits, seed=5), refit_heads=2)
    torch.manual_seed(99)
    check_equal(again, train_network(again, tmp_path), refitted)


@pytest.mark.parametrize("at", [10, 13])
def test_the_refit_works_on_the_averaged_network(at: int, digits: DataSplits, tmp_path: Path) -> None:
    plain, job = make_job(digits, ema=0.9), make_job(digits, ema=0.9, refit_heads=2)
    train_network(plain)
    outcome = train_network(job)
    changed = differing(snapshot(job.network), snapshot(plain.network))
    assert changed == head_names(changed)
    killed = make_job(digits, Toy(at), ema=0.9, refit_heads=2)
    with pytest.raises(KilledError):
        train_network(killed, tmp_path)
    again = make_job(digits, network=new_network(digits, seed=5), ema=0.9, refit_heads=2)
    check_equal(again, train_network(again, tmp_path), (job, outcome))


def test_refit_together_with_a_network_of_one_exit(
    digits: DataSplits, refitted: tuple[Job, Outcome], tmp_path: Path
) -> None:
    def jobs(at: int | None = None) -> list[Job]:
        plain = make_job(digits, network=new_network(digits, exits=1), refit_heads=2)
        return [dataclasses.replace(plain, name="plain"), make_job(digits, Toy(at), refit_heads=2)]

    alone = jobs()[0]
    expected = train_network(alone)
    assert [entry.phase for entry in expected.history] == ["joint"] * 3
    folders = [tmp_path / "plain", tmp_path / "arm"]
    with pytest.raises(KilledError):
        train_together(jobs(at=3 * STEPS + 1), folders)
    again = jobs()
    outcomes = train_together(again, folders)
    check_equal(again[0], outcomes[0], (alone, expected))
    check_equal(again[1], outcomes[1], refitted)


def test_gradient_norms_are_those_of_the_last_backward_pass(digits: DataSplits) -> None:
    # Without momentum, decay and warm-up one step moves each weight by the learning rate times its gradient.
    settings = {"momentum": 0.0, "weight_decay": 0.0, "warmup_epochs": 0, "learning_rate": 0.25}
    job = make_job(digits, images=32, epochs=1, **settings)
    start = {name: value.detach().clone() for name, value in job.network.named_parameters()}
    parts = train_network(job).history[0].parts
    moved = {name: (start[name] - value.detach()) / 0.25 for name, value in job.network.named_parameters()}

    def norm(belongs: Callable[[str], bool]) -> float:
        return float(torch.cat([value.flatten() for name, value in moved.items() if belongs(name)]).norm())

    heads = [norm(lambda name, index=index: name.startswith(f"heads.{index}.")) for index in (0, 1)]  # type: ignore[misc]
    assert parts["gradient_norm_heads"] == pytest.approx(heads, rel=1e-3)
    trunk = norm(lambda name: not name.startswith(("heads.0.", "heads.1.")))
    assert parts["gradient_norm_trunk"] == pytest.approx(trunk, rel=1e-3)
    # The first epoch of the backbone alone has no heads, the refit no trunk.
    phases = train_network(make_job(digits, epochs=2, backbone_epochs=1, refit_heads=1)).history
    assert ["gradient_norm_heads" in entry.parts for entry in phases] == [False, True, True]
    assert ["gradient_norm_trunk" in entry.parts for entry in phases] == [True, True, False]
