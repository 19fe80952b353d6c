from __future__ import annotations

import copy
import dataclasses
import errno
import io
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import erde
from erde.common import progress
from erde.common.history import Epoch
from erde.common.splits import TrainSplit
from erde.data.load import DataSplits
from erde.losses import cross_entropy_loss
from erde.networks import checkpoint
from erde.networks.heads import reset_head
from erde.networks.network import EarlyExitNetwork
from erde.recipe.losses import resolve_loss
from erde.recipe.schema import AugmentationConfig, DistillationConfig, TrainConfig
from erde.training import loop
from erde.training.api import build_criterion
from erde.training.job import FINAL, LAST, Job, Outcome
from erde.training.learner import learning_rate_factor
from erde.training.loop import choose_device, train_network
from erde.training.meter import Meter
from tests.helpers.checks import entries, user_error

BATCH = 32
STEPS = 3  # per epoch
IMAGES = STEPS * BATCH + 16  # the rest is less than a batch


class KilledError(Exception):
    """Stands for a kill."""


def stop() -> float:
    raise KilledError


class Toy(nn.Module):
    """Cross-entropy with a parameter and buffers of its own; before step ``at`` something happens."""

    calls: Tensor
    average: Tensor

    def __init__(self, at: int | None = None, event: Callable[[], float] = stop) -> None:
        super().__init__()
        self.at, self.event = at, event
        self.share = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(()))
        self.seen: list[tuple[torch.Size, torch.dtype]] = []

    def forward(self, logits: Tensor, _: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        factor = self.event() if self.calls == self.at else 1.0
        self.calls += 1
        self.seen.append((logits.shape, logits.dtype))
        parts = cross_entropy_loss(logits, labels)
        with torch.no_grad():
            self.average.mul_(0.9).add_(parts["ce"].mean(), alpha=0.1)
        loss = factor * parts["loss"] * (1 + self.share) * (1 + 0.1 * self.average) + self.share.square()
        return {"loss": loss, "ce": parts["ce"], "share": self.share.detach()}


def new_network(data: DataSplits, exits: int = 3, seed: int = 0, dropout: float = 0.5) -> EarlyExitNetwork:
    torch.manual_seed(seed)
    backbone = erde.build_backbone("resnet8x0.5", classes=10, channels=1)
    return erde.attach_exits(backbone, exits, input_size=data.input_size, dropout=dropout)


def make_job(
    data: DataSplits,
    criterion: nn.Module | None = None,
    *,
    network: EarlyExitNetwork | None = None,
    teacher: EarlyExitNetwork | None = None,
    seed: int = 0,
    images: int = IMAGES,
    **settings: Any,
) -> Job:
    """Three epochs of three steps, unless said otherwise."""
    defaults = {
        "epochs": 3,
        "batch_size": BATCH,
        "learning_rate": 0.05,
        "checkpoint_seconds": 0,
    }
    return Job(
        name="arm",
        network=network or new_network(data),
        criterion=criterion or Toy(),
        teacher=teacher,
        train=data.train_share(images),
        config=TrainConfig(**{**defaults, **settings}),
        augmentation=AugmentationConfig(crop_padding=1),
        mean=data.mean,
        std=data.std,
        seed=seed,
        device=torch.device("cpu"),
    )


def make_criterion(
    data: DataSplits, loss: str, network: EarlyExitNetwork, teacher: EarlyExitNetwork | None
) -> nn.Module:
    return build_criterion(resolve_loss(loss), DistillationConfig(), network, teacher, data)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def differing(state: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit for bit the same."""
    assert state.keys() == other.keys()
    return {key for key in state if not torch.equal(state[key], other[key])}


# ---------------------------------------------------------------- gradient equilibrium


@pytest.mark.parametrize("features", [False, True])
def test_equilibrium_divides_the_first_steps_of_each_stage(features: bool, digits: DataSplits) -> None:
    # Without momentum, decay and warm-up a step moves each weight by the learning rate times its gradient. Where the
    # last exit alone has a loss, the mean over the exits behind a stage is 1/3, 1/2 and all of it.
    class LastExit(nn.Module):
        def forward(
            self, logits: Tensor, _: Tensor | None, labels: Tensor, **extras: Any
        ) -> dict[str, Tensor]:
            assert set(extras) == ({"student_features"} if features else set())
            return {"loss": nn.functional.cross_entropy(logits[-1], labels)}

    def moved(**settings: Any) -> dict[str, Tensor]:
        job = make_job(
            digits, LastExit(), images=32, epochs=1, momentum=0, weight_decay=0, warmup_epochs=0, **settings
        )
        start = snapshot(job.network)
        train_network(dataclasses.replace(job, extras=("student_features",) if features else ()))
        return {name: value - start[name] for name, value in job.network.named_parameters()}

    plain, balanced = moved(), moved(gradient_equilibrium=True)
    for name, value in plain.items():
        share = {"stages.0": 1 / 3, "stages.1": 1 / 2}.get(name[:8], 1)
        torch.testing.assert_close(balanced[name], share * value, rtol=1e-3, atol=1e-6, msg=name)
    assert plain["stages.0.stem.conv.weight"].any()


# ---------------------------------------------------------------- learning rates


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("cosine", 0, [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
        ("cosine", 2, [1 / 3, 2 / 3, 1, 0.5]),
        ("step", 0, [1, 1, 0.1, 0.01]),
        ("step", 1, [0.5, 1, 0.1, 0.01]),
        ("onecycle", 0, [1, 0.75, 0.5, 0.25]),
        ("onecycle", 3, [0.25, 0.5, 0.75, 1]),
        # A warm-up as long as the training, or longer.
        ("cosine", 4, [0.2, 0.4, 0.6, 0.8]),
        ("onecycle", 9, [0.2, 0.4, 0.6, 0.8]),
        ("step", 9, [0.2, 0.4, 0.6, 0.8]),
    ],
)
def test_learning_rate_factor_by_hand(schedule: str, warmup: int, expected: list[float]) -> None:
    config = TrainConfig(schedule=schedule, milestones=[0.5, 0.75], gamma=0.1)
    factors = [learning_rate_factor(step, 4, warmup, config) for step in range(4)]
    assert factors == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_learning_rate_ends_near_zero(schedule: str) -> None:
    config = TrainConfig(schedule=schedule)
    factors = [learning_rate_factor(step, 1000, 100, config) for step in range(1000)]
    assert max(factors) == 1 == factors[100]
    assert factors[:101] == sorted(factors[:101])
    assert factors[100:] == sorted(factors[100:], reverse=True)
    assert 0 < factors[-1] < 0.0012


# ---------------------------------------------------------------- the loop


def test_steps_and_learning_rates_of_two_phases(digits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def record(self: torch.optim.SGD, *arguments: Any) -> Any:
        assert len({group["lr"] for group in self.param_groups}) == 1
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    criterion = Toy()
    settings = {"epochs": 3, "backbone_epochs": 1, "schedule": "onecycle", "warmup_epochs": 2 / 3}
    job = make_job(digits, criterion, learning_rate=0.3, **settings)
    outcome = train_network(job)
    # Each phase has a schedule of its own: 3 steps, then 6, two of each for the warm-up.
    expected = [1 / 3, 2 / 3, 1, 1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]
    assert rates == pytest.approx([0.3 * factor for factor in expected])
    assert [entry.epoch for entry in outcome.history] == [1, 2, 3]
    assert [entry.phase for entry in outcome.history] == ["backbone", "joint", "joint"]
    assert [entry.learning_rate for entry in outcome.history] == [rates[2], rates[5], rates[8]]
    assert outcome.images == 3 * STEPS * BATCH
    # The last batch, which is not full, is left out; the criterion sees the joint phase only.
    assert [shape for shape, _ in criterion.seen] == [torch.Size([3, BATCH, 10])] * 2 * STEPS
    assert len(outcome.history[0].parts["accuracy"]) == 1
    assert len(outcome.history[1].parts["accuracy"]) == 3
    assert job.network.stages[0].stem.norm.num_batches_tracked == 3 * STEPS
    assert job.network.heads[0].norm.num_batches_tracked == 2 * STEPS


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.05), ("adamw", 0.005)])
def test_the_loss_falls_on_digits(optimizer: str, rate: float, digits: DataSplits) -> None:
    network = new_network(digits, dropout=0.1)
    criterion = make_criterion(digits, "ce", network, None)
    job = make_job(
        digits,
        criterion,
        network=network,
        images=len(digits.train),
        epochs=6,
        optimizer=optimizer,
        learning_rate=rate,
    )
    history = train_network(job).history
    losses = [entry.parts["loss"] for entry in history]
    assert losses[0] < 3 * math.log(10) * 1.2
    assert losses[-1] < 0.7 * losses[0]
    first, last = (entry.parts["accuracy"] for entry in (history[0], history[-1]))
    assert isinstance(first, list)
    assert isinstance(last, list)
    assert min(last) > max(0.5, *first)


def test_the_seed_decides_everything(digits: DataSplits) -> None:
    def trained(seed: int) -> tuple[dict[str, Tensor], list[Any]]:
        job = make_job(digits, seed=seed, epochs=1)
        torch.seed()  # what was drawn before must not matter
        history = train_network(job).history
        return snapshot(job.network), history

    (first, one_history), (same, same_history), (other, other_history) = trained(0), trained(0), trained(1)
    assert not differing(first, same)
    assert one_history == same_history
    # Equal at the start, since the seed of the job draws order, augmentation and dropout only.
    assert "stages.0.stem.conv.weight" in differing(first, other)
    assert one_history != other_history


def test_arms_of_one_seed_see_the_same_batches(digits: DataSplits, tiny_network: EarlyExitNetwork) -> None:
    def batches(loss: str, exits: int, seed: int) -> list[Tensor]:
        network = new_network(digits, exits=exits, seed=exits, dropout=0.1 * exits)
        seen: list[Tensor] = []
        network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        teacher = copy.deepcopy(tiny_network) if loss == "kd" else None
        criterion = make_criterion(digits, loss, network, teacher)
        train_network(make_job(digits, criterion, network=network, teacher=teacher, seed=seed, epochs=2))
        assert len(seen) == 2 * STEPS
        return seen

    ce, kd, other = batches("ce", 3, 0), batches("kd", 2, 0), batches("ce", 3, 1)
    assert all(torch.equal(left, right) for left, right in zip(ce, kd, strict=True))
    assert not torch.equal(ce[0], other[0])
    # An epoch is no repetition of the last one.
    assert not torch.equal(ce[0], ce[STEPS])


# ---------------------------------------------------------------- exact resume


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.005},
    "two phases": {"backbone_epochs": 1, "freeze_backbone": True},
    "clipped": {"gradient_clip": 0.5, "schedule": "step", "channels_last": False},
    "one step an epoch": {"epochs": 5, "images": BATCH},
}


@pytest.fixture(scope="module")
def uninterrupted(digits: DataSplits) -> dict[str, tuple[Job, Outcome]]:
    """Every one of ``SETTINGS`` trained in one go, without checkpoints."""
    outcomes = {}
    for name, settings in SETTINGS.items():
        job = make_job(digits, **settings)
        outcomes[name] = job, train_network(job)
    return outcomes


def check_equal(job: Job, outcome: Outcome, expected: tuple[Job, Outcome]) -> None:
    expected_job, expected_outcome = expected
    assert not differing(snapshot(job.network), snapshot(expected_job.network))
    assert not differing(snapshot(job.criterion), snapshot(expected_job.criterion))
    assert outcome.history == expected_outcome.history
    assert outcome.images == expected_outcome.images


@pytest.mark.parametrize(
    ("name", "at", "epoch", "step"),
    [
        *((name, at, at // STEPS, at % STEPS) for name in ("sgd", "adamw") for at in (1, 3, 5, 8)),
        # Of the criterion's steps: the first phase has passed.
        ("two phases", 0, 1, 0),
        ("two phases", 2, 1, 2),
        ("clipped", 4, 1, 1),
        ("one step an epoch", 2, 2, 0),
    ],
)
def test_a_killed_training_ends_bit_for_bit_as_if_it_had_not_been(
    name: str,
    at: int,
    epoch: int,
    step: int,
    digits: DataSplits,
    uninterrupted: dict[str, tuple[Job, Outcome]],
    tmp_path: Path,
) -> None:
    killed = make_job(digits, Toy(at), **SETTINGS[name])
    with pytest.raises(KilledError):
        train_network(killed, tmp_path)
    assert entries(tmp_path) == [LAST]
    state = checkpoint.load(tmp_path / LAST)[1]
    assert (state["epoch"], state["step"]) == (epoch, step)
    # A new process knows nothing of the old one but the folder.
    again = make_job(digits, network=new_network(digits, seed=5), **SETTINGS[name])
    torch.manual_seed(99)
    outcome = train_network(again, tmp_path)
    check_equal(again, outcome, uninterrupted[name])
    # It did go on, and did not start over.
    steps = len(again.criterion.seen)
    assert steps == int(uninterrupted[name][0].criterion.calls) - at
    assert entries(tmp_path) == [FINAL]


def test_killed_before_every_single_step(
    digits: DataSplits, uninterrupted: dict[str, tuple[Job, Outcome]], tmp_path: Path
) -> None:
    for at in range(1, 3 * STEPS):
        with pytest.raises(KilledError):
            train_network(make_job(digits, Toy(at), network=new_network(digits, seed=at - 1)), tmp_path)
    job = make_job(digits)
    outcome = train_network(job, tmp_path)
    assert len(job.criterion.seen) == 1
    check_equal(job, outcome, uninterrupted["sgd"])


def test_finished_training_is_not_repeated(
    digits: DataSplits, uninterrupted: dict[str, tuple[Job, Outcome]], tmp_path: Path
) -> None:
    train_network(make_job(digits), tmp_path)
    content = (tmp_path / FINAL).read_bytes()
    job = make_job(digits, Toy(0), network=new_network(digits, seed=5))
    check_equal(job, train_network(job, tmp_path), uninterrupted["sgd"])
    assert job.criterion.seen == []
    assert (tmp_path / FINAL).read_bytes() == content


def test_killed_just_after_the_final_file_was_written(
    digits: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def kill(path: Path, missing_ok: bool = False) -> None:
        if path.name == LAST:
            raise KilledError
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill)
        with pytest.raises(KilledError):
            train_network(make_job(digits), tmp_path)
    assert (tmp_path / FINAL).exists()
    assert (tmp_path / LAST).exists()
    train_network(make_job(digits), tmp_path)
    assert entries(tmp_path) == [FINAL]


def test_checkpoints_are_as_far_apart_as_asked_for(
    digits: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[int, int]] = []
    save = checkpoint.save

    def record(path: Path, tensors: Any, state: Any) -> None:
        if path.name == LAST:
            saved.append((state["epoch"], state["step"]))
        save(path, tensors, state)

    monkeypatch.setattr(checkpoint, "save", record)
    train_network(make_job(digits, checkpoint_seconds=3600), tmp_path / "rare")
    assert saved == []
    train_network(make_job(digits, epochs=2), tmp_path / "often")
    # The end of the training has the final file.
    assert saved == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_writing_checkpoints_does_not_count_as_training(
    digits: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    save = checkpoint.save

    def slow(*arguments: Any) -> None:
        clock[0] += 1000
        save(*arguments)

    class Ticking(Toy):
        def forward(self, *arguments: Any) -> dict[str, Tensor]:
            clock[0] += 1
            return super().forward(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    outcome = train_network(make_job(digits, Ticking()), tmp_path)
    assert outcome.seconds == 3 * STEPS
    assert outcome.images_per_second == BATCH


def test_a_checkpoint_of_another_network_is_refused(digits: DataSplits, tmp_path: Path) -> None:
    train_network(make_job(digits, epochs=1), tmp_path)
    other = make_job(digits, network=new_network(digits, exits=2), epochs=1)
    with user_error(f"{FINAL} is not a checkpoint of this network and loss"):
        train_network(other, tmp_path)
    # A plain safetensors file has no state to go on from.
    checkpoint.save(
        tmp_path / FINAL,
        {
            **checkpoint.with_prefix("network", new_network(digits).state_dict()),
            **checkpoint.with_prefix("criterion", Toy().state_dict()),
        },
        {},
    )
    with user_error("is not a checkpoint of this network and loss"):
        train_network(make_job(digits, epochs=1), tmp_path)


# ---------------------------------------------------------------- teacher, phases, clipping


@pytest.mark.parametrize("loss", ["kd", "erde"])
def test_distillation_does_not_touch_the_teacher(
    loss: str, digits: DataSplits, tiny_network: EarlyExitNetwork
) -> None:
    # In training mode its batch norm would learn and its dropout would draw.
    teacher = copy.deepcopy(tiny_network).train()
    before, network = snapshot(teacher), new_network(digits)
    start = snapshot(network)
    criterion = make_criterion(digits, loss, network, teacher)
    job = make_job(digits, criterion, network=network, teacher=teacher, epochs=1)
    history = train_network(job).history
    assert not differing(snapshot(teacher), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert "kl" in history[0].parts
    assert "stages.0.stem.conv.weight" in differing(snapshot(network), start)


def test_the_teacher_answers_in_eval_mode(digits: DataSplits, tiny_network: EarlyExitNetwork) -> None:
    teacher, network = copy.deepcopy(tiny_network).train(), new_network(digits)
    images: list[Tensor] = []
    answers: list[Tensor] = []

    class Recorder(Toy):
        def forward(self, logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
            assert teacher_logits is not None
            answers.append(teacher_logits)
            return super().forward(logits, teacher_logits, labels)

    network.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0].clone()))
    train_network(make_job(digits, Recorder(), network=network, teacher=teacher, epochs=1))
    expected = tiny_network(images[0]).detach()
    torch.testing.assert_close(answers[0], expected, rtol=1e-4, atol=1e-4)
    assert not answers[0].requires_grad


def head_names(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(("heads.0", "heads.1"))}


# Of heads that are trained: scale and shift of their norms are fixed.
FIXED = {f"heads.{index}.norm.{part}" for index in (0, 1) for part in ("weight", "bias")}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_phase_one_trains_the_backbone_only(optimizer: str, digits: DataSplits) -> None:
    job = make_job(digits, epochs=1, backbone_epochs=1, optimizer=optimizer)
    start = snapshot(job.network)
    history = train_network(job).history
    everything = set(start)
    # Weights, biases and batch norm's statistics alike.
    assert differing(snapshot(job.network), start) == everything - head_names(everything)
    assert job.criterion.seen == []
    assert [entry.phase for entry in history] == ["backbone"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_from_the_start_only_heads_change(optimizer: str, digits: DataSplits) -> None:
    job = make_job(digits, epochs=1, freeze_backbone=True, optimizer=optimizer)
    start = snapshot(job.network)
    train_network(job)
    assert differing(snapshot(job.network), start) == head_names(set(start)) - FIXED
    # Freezing was this training's affair: the next one trains everything again.
    assert all(parameter.requires_grad for parameter in job.network.backbone_parameters())


def test_phase_one_alone_ends_with_the_average(digits: DataSplits) -> None:
    network = new_network(digits, exits=1)
    settings: dict[str, Any] = {"epochs": 2, "ema": 0.3}
    joint = make_job(digits, make_criterion(digits, "ce", network, None), network=network, **settings)
    alone = make_job(digits, network=new_network(digits, exits=1), backbone_epochs=2, **settings)
    raw = make_job(digits, network=new_network(digits, exits=1), epochs=2, backbone_epochs=2)
    for job in (joint, alone, raw):
        train_network(job)
    assert not differing(snapshot(alone.network), snapshot(joint.network))
    assert differing(snapshot(alone.network), snapshot(raw.network))


def test_the_joint_phase_has_an_average_of_its_own(digits: DataSplits) -> None:
    def train(epochs: int, **settings: Any) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        job, steps = make_job(digits, epochs=epochs, backbone_epochs=1, ema=0.999, **settings), []
        hook = register_optimizer_step_post_hook(
            lambda *_: steps.append(copy.deepcopy(snapshot(job.network)))
        )
        train_network(job)
        hook.remove()
        return snapshot(job.network), steps

    # The joint phase starts on the average of the first one; its own average starts there.
    start, _ = train(1)
    end, steps = train(2)
    average = {name: value.double() for name, value in start.items()}
    for step, weights in enumerate(steps[STEPS:]):
        for name, value in weights.items():
            average[name] += (1 - (1 + step) / (10 + step)) * (value.double() - average[name])
    for name in ("stages.0.stem.conv.weight", "heads.0.linear.weight", "heads.0.norm.running_mean"):
        torch.testing.assert_close(end[name].double(), average[name], rtol=1e-4, atol=1e-6)
    # A frozen backbone is the one that the heads learn on.
    changed = differing(train(2, freeze_backbone=True)[0], start)
    assert changed == head_names(changed)


def test_phase_one_smooths_labels_as_the_arm_does(digits: DataSplits) -> None:
    def first_loss(smoothing: float, **settings: Any) -> Any:
        network = new_network(digits, exits=1)
        criterion = build_criterion(
            resolve_loss("ce"), DistillationConfig(), network, None, digits, label_smoothing=smoothing
        )
        job = make_job(digits, criterion, network=network, epochs=1, images=BATCH, **settings)
        return train_network(job).history[0].parts["loss"]

    assert first_loss(0.3, backbone_epochs=1) == first_loss(0.3) != first_loss(0.0)


def test_frozen_after_phase_one(digits: DataSplits) -> None:
    first = make_job(digits, epochs=1, backbone_epochs=1)
    train_network(first)
    both = make_job(digits, epochs=2, backbone_epochs=1, freeze_backbone=True)
    train_network(both)
    changed = differing(snapshot(both.network), snapshot(first.network))
    assert changed == head_names(set(first.network.state_dict())) - FIXED


def test_a_network_of_one_exit_cannot_be_frozen(digits: DataSplits) -> None:
    job = make_job(digits, network=new_network(digits, exits=1), freeze_backbone=True)
    with user_error(r"train\.freeze_backbone leaves nothing to train in 'arm'"):
        train_network(job)


def test_gradient_clip_bounds_the_step(digits: DataSplits) -> None:
    def moved(clip: float | None) -> float:
        job = make_job(
            digits,
            images=BATCH,
            epochs=1,
            gradient_clip=clip,
            momentum=0,
            weight_decay=0,
            warmup_epochs=0,
            learning_rate=1.0,
        )

        def flat() -> Tensor:
            parameters = [*job.network.parameters(), job.criterion.share]
            return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])

        before = flat()
        train_network(job)
        return float((flat() - before).norm())

    # One step at learning rate 1: the global norm of the step is the norm of the gradient.
    assert moved(None) > 1.0
    assert moved(0.1) == pytest.approx(0.1, rel=1e-3)
    assert moved(1e6) == moved(None)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_layout_that_was_asked_for_reaches_the_network(channels_last: bool, digits: DataSplits) -> None:
    # One channel is both layouts at once.
    colour = TrainSplit(np.repeat(digits.train.images[:BATCH], 3, axis=-1), digits.train.labels[:BATCH])
    data = dataclasses.replace(digits, train=colour, mean=digits.mean * 3, std=digits.std * 3)
    backbone = erde.build_backbone("resnet8x0.5", classes=10)
    network = erde.attach_exits(backbone, 1, input_size=data.input_size)
    seen: list[bool] = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    erde.train(network, data, epochs=1, batch_size=BATCH, device="cpu", channels_last=channels_last)
    # The first look is a check of sizes.
    assert seen[-1] == (not channels_last)


def test_bf16_on_the_cpu(digits: DataSplits) -> None:
    half, full = make_job(digits, epochs=1, precision="bf16"), make_job(digits, epochs=1)
    history = train_network(half).history
    train_network(full)
    assert {dtype for _, dtype in half.criterion.seen} == {torch.bfloat16}
    assert {dtype for _, dtype in full.criterion.seen} == {torch.float32}
    assert {parameter.dtype for parameter in half.network.parameters()} == {torch.float32}
    assert math.isfinite(history[0].parts["loss"])


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite(digits: DataSplits, tmp_path: Path) -> None:
    job = make_job(digits, Toy(4, lambda: float("nan")))
    message = (
        r"the loss of 'arm' became nan in epoch 2: lower train\.learning_rate or set train\.gradient_clip"
    )
    with user_error(f"{message}.*; the last good checkpoint is {tmp_path / LAST}"):
        train_network(job, tmp_path)
    tensors, state = checkpoint.load(tmp_path / LAST)
    assert (state["epoch"], state["step"]) == (1, 1)
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


@pytest.mark.parametrize("seconds", [0, 3600])
def test_a_checkpoint_that_is_not_there_is_not_promised(
    seconds: int, digits: DataSplits, tmp_path: Path
) -> None:
    # With rare checkpoints the second epoch has none yet; with frequent ones the first step has none.
    job = make_job(digits, Toy(4 if seconds else 0, lambda: float("inf")), checkpoint_seconds=seconds)
    with user_error(
        r"became (inf|nan) in epoch \d: lower train\.learning_rate or set train\.gradient_clip=1$"
    ):
        train_network(job, tmp_path)
    assert entries(tmp_path) == []


def test_a_learning_rate_far_too_high(digits: DataSplits) -> None:
    with user_error("the loss of 'arm' became (nan|inf) in epoch 1"):
        train_network(make_job(digits, learning_rate=1e30))


def allocate_too_much() -> float:
    torch.empty(2**50)
    return 1.0


def fake_gpu_error() -> float:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")


@pytest.mark.parametrize("event", [allocate_too_much, fake_gpu_error])
def test_out_of_memory(event: Callable[[], float], digits: DataSplits, tmp_path: Path) -> None:
    with user_error(rf"out of memory while training 'arm' on cpu with train\.batch_size={BATCH}: lower"):
        train_network(make_job(digits, Toy(1, event)), tmp_path)
    assert entries(tmp_path) == [LAST]


def test_out_of_memory_while_the_images_are_brought_in(
    digits: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "TrainBatches", lambda *_, **__: fake_gpu_error())
    with user_error("out of memory while training 'arm'"):
        train_network(make_job(digits))


def test_other_errors_of_the_runtime_are_bugs_and_stay_as_they_are(digits: DataSplits) -> None:
    def bug() -> float:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match=r"^a bug$"):
        train_network(make_job(digits, Toy(1, bug)))


def test_a_full_disk_keeps_the_older_checkpoint(
    digits: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, contents = os.fsync, []

    def full_at_third(number: int) -> None:
        if (tmp_path / LAST).exists():
            contents.append((tmp_path / LAST).read_bytes())
        if len(contents) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    monkeypatch.setattr(os, "fsync", full_at_third)
    with user_error(f"no space left on the disk while writing {tmp_path / LAST}.*--resume"):
        train_network(make_job(digits), tmp_path)
    assert entries(tmp_path) == [LAST]
    assert (tmp_path / LAST).read_bytes() == contents[1]
    assert checkpoint.load(tmp_path / LAST)[1]["step"] == 2


def test_a_batch_larger_than_the_split(digits: DataSplits) -> None:
    with user_error(rf"train\.batch_size is {IMAGES + 1}, 'arm' trains on {IMAGES} images: lower"):
        train_network(make_job(digits, batch_size=IMAGES + 1))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with user_error("torch sees no GPU here: use device=cpu or device=auto"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


# ---------------------------------------------------------------- from Python


def test_train_from_python(digits: DataSplits, tmp_path: Path) -> None:
    network, arguments = new_network(digits), {"epochs": 2, "batch_size": 256, "device": "cpu"}
    start = snapshot(network)
    history = erde.train(network, digits, folder=tmp_path / "some", **arguments)
    assert [(entry.epoch, entry.phase) for entry in history] == [(1, "joint"), (2, "joint")]
    assert "stages.0.stem.conv.weight" in differing(snapshot(network), start)
    again = new_network(digits, seed=5)
    assert erde.train(again, digits, folder=tmp_path / "some", **arguments) == history
    assert not differing(snapshot(again), snapshot(network))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"name": "erde", "beta": 0.9}}, "loss.name is kd, now it is erde"),
        ({"epochs": 2}, "train.epochs is 1, now it is 2"),
        ({"distillation": {"alpha": 0.2}}, "distillation.alpha is rising, now it is 0.2"),
        ({"seed": 7}, "seed is 0, now it is 7"),
        ({"mean": (0.9,)}, r"data.mean is \[0.3.*\], now it is \[0.9\]"),
        ({"std": (0.05,)}, r"data.std is \[0.3.*\], now it is \[0.05\]"),
    ],
)
def test_a_folder_with_another_training_is_refused(
    change: dict[str, Any], message: str, digits: DataSplits, tiny_network: EarlyExitNetwork, tmp_path: Path
) -> None:
    arguments = {"loss": "kd", "epochs": 1, "batch_size": 256, "device": "cpu", "folder": tmp_path / "some"}

    def distill(teacher: EarlyExitNetwork, **changed: Any) -> list[Epoch]:
        normalised = {key: changed.pop(key) for key in ("mean", "std") if key in changed}
        data = dataclasses.replace(digits, **normalised)
        return erde.distill(new_network(digits, exits=2), teacher, data, **{**arguments, **changed})

    history = distill(copy.deepcopy(tiny_network))
    with user_error(f"holds another training: there {message}"):
        distill(copy.deepcopy(tiny_network), **change)
    # These change nothing.
    assert distill(copy.deepcopy(tiny_network), checkpoint_seconds=5.0) == history
    other = copy.deepcopy(tiny_network)
    with torch.no_grad():
        other.heads[0].linear.bias[0] += 1
    with user_error("holds another training: there teacher is"):
        distill(other)


def test_a_folder_of_an_earlier_version_is_gone_on_with(digits: DataSplits, tmp_path: Path) -> None:
    arguments = {"epochs": 1, "batch_size": 256, "device": "cpu", "folder": tmp_path}
    history = erde.train(new_network(digits), digits, **arguments)
    # It knew fewer keys.
    path = tmp_path / "training.json"
    written = json.loads(path.read_text())
    del written["data"], written["backbone"], written["train"]["gradient_equilibrium"]
    path.write_text(json.dumps(written))
    assert erde.train(new_network(digits), digits, **arguments) == history
    # What it did not know it did not do.
    with user_error("train.gradient_equilibrium is False, now it is True"):
        erde.train(new_network(digits), digits, gradient_equilibrium=True, **arguments)
    with user_error("seed is 0, now it is 1"):
        erde.train(new_network(digits), digits, seed=1, **arguments)
    path.write_text("[]")
    with user_error("training.json is damaged"):
        erde.train(new_network(digits), digits, **arguments)


def test_a_folder_with_another_frozen_backbone_is_refused(digits: DataSplits, tmp_path: Path) -> None:
    arguments = {"epochs": 1, "batch_size": 256, "device": "cpu", "folder": tmp_path, "freeze_backbone": True}
    history = erde.train(new_network(digits), digits, **arguments)
    with user_error("holds another training: there backbone is"):
        erde.train(new_network(digits, seed=5), digits, **arguments)
    # The heads' start is not compared.
    same = new_network(digits)
    reset_head(same.heads[0])
    assert erde.train(same, digits, **arguments) == history


@pytest.mark.parametrize("loss", ["kd", {"name": "erde", "beta": 0.5}])
def test_distill_from_python(loss: Any, digits: DataSplits, tiny_network: EarlyExitNetwork) -> None:
    def parts(alpha: float) -> dict[str, Any]:
        return erde.distill(
            new_network(digits, exits=2),
            copy.deepcopy(tiny_network),
            digits,
            loss=loss,
            distillation={"alpha": alpha},
            augmentation={"flip": False},
            epochs=1,
            batch_size=256,
            device="cpu",
        )[0].parts

    low, high = parts(0.1), parts(0.9)
    assert len(low["kl"]) == 2
    assert low["loss"] != high["loss"]


def test_a_teacher_that_shares_the_networks_weights(digits: DataSplits) -> None:
    torch.manual_seed(0)
    model = erde.build_backbone("resnet8x0.5", classes=10, channels=1)
    with torch.no_grad():
        model(torch.randn(64, *digits.input_size))  # batch norm has statistics
    teacher = erde.attach_exits(model, 1, input_size=digits.input_size)
    network = erde.attach_exits(model, 3, input_size=digits.input_size)
    arguments: dict[str, Any] = {"loss": "kd", "epochs": 1, "batch_size": 512, "device": "cpu"}
    with user_error("the teacher shares weights with the network, so it would change"):
        erde.distill(network, teacher, digits, **arguments)
    with user_error("the teacher shares weights with the network"):
        erde.distill(
            network, teacher, digits, freeze_backbone=True, backbone_epochs=1, **{**arguments, "epochs": 2}
        )
    before, seen = snapshot(teacher), torch.randn(5, *digits.input_size)
    answers = teacher.eval()(seen)
    erde.distill(network, teacher, digits, freeze_backbone=True, **arguments)
    assert not differing(snapshot(teacher), before)
    torch.testing.assert_close(teacher.eval()(seen), answers)
    # A loss without a teacher looks at none.
    erde.distill(network, teacher, digits, **{**arguments, "loss": "ce"})


def test_errors_from_python(digits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    network = new_network(digits)
    for loss in ("kd", "erde"):
        with user_error(f"the loss '{loss}' needs a teacher; without one use 'ce'"):
            erde.distill(network, None, digits, loss=loss)
    with user_error(r"unknown key 'train\.epoch' \(did you mean 'train\.epochs'\?\)"):
        erde.train(network, digits, epoch=3)
    with user_error(r"unknown key 'augmentation\.flips'"):
        erde.train(network, digits, augmentation={"flips": True})
    with user_error(r"train\.batch_size is 9999"):
        erde.train(network, digits, batch_size=9999)
    with user_error("the seed is -1, expected a whole number from 0"):
        erde.train(network, digits, seed=-1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with user_error("torch sees no GPU"):
        erde.train(network, digits, device="cuda")


# ---------------------------------------------------------------- meter, log, progress


def test_a_meter_with_the_parts_of_an_earlier_version_begins_anew() -> None:
    meter = Meter(torch.tensor([6.0, 1.0]).double(), 3, [["loss", 0], ["accuracy", 1]])
    parts = {"loss": torch.tensor(4.0), "accuracy": torch.ones(1), "gradient_norm_trunk": torch.tensor(0.5)}
    meter.add(parts)
    assert meter.means() == {"loss": 4.0, "accuracy": [1.0], "gradient_norm_trunk": 0.5}
    meter.add(parts)
    assert meter.steps == 2


def test_the_meter_is_a_plain_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    meter, losses, ce, right = Meter(), [], [], []
    for _ in range(7):
        logits, labels = (
            torch.randn(2, 6, 4, generator=generator),
            torch.randint(4, (6,), generator=generator),
        )
        parts = {"loss": torch.rand((), generator=generator), "ce": torch.rand(2, generator=generator)}
        accuracy = (logits.argmax(dim=-1) == labels).double().mean(dim=1)
        meter.add({**parts, "single": parts["ce"][:1], "accuracy": accuracy})
        losses.append(float(parts["loss"]))
        ce.append([float(value) for value in parts["ce"]])
        right.append(
            [
                sum(int(row.argmax()) == int(label) for row, label in zip(exit_logits, labels, strict=True))
                for exit_logits in logits
            ]
        )
    means = meter.means()
    assert list(means) == ["loss", "ce", "single", "accuracy"]
    assert means["loss"] == pytest.approx(sum(losses) / 7, rel=1e-12)
    for index in range(2):
        assert means["ce"][index] == pytest.approx(sum(values[index] for values in ce) / 7, rel=1e-12)
        assert means["accuracy"][index] == pytest.approx(
            sum(values[index] for values in right) / 42, rel=1e-12
        )
    # One value per exit stays a list where there is one exit.
    assert means["single"] == [means["ce"][0]]


@pytest.mark.parametrize("torn", [b"", b'{"event": "la', b'{"event": "last", "number": 1}'])
def test_the_log_goes_on_after_a_torn_line(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    progress.RunLog(path).write("first", number=1)
    with path.open("ab") as file:
        file.write(torn)
    progress.RunLog(path).write("second", number=2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["event"], line["number"]) for line in lines] == [("first", 1), ("second", 2)]
    assert all(line["time"] > 1.7e9 for line in lines)


def test_a_log_of_nothing_but_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "fi')
    progress.RunLog(path).write("first")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["first"]


def test_a_full_disk_while_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = progress.RunLog(tmp_path / "log.jsonl")

    def fail(number: int) -> Callable[..., Any]:
        def open_(*_: Any, **__: Any) -> Any:
            raise OSError(number, os.strerror(number))

        return open_

    monkeypatch.setattr(Path, "open", fail(errno.ENOSPC))
    with user_error("no space left on the disk while writing .*log.jsonl"):
        log.write("event")
    monkeypatch.setattr(Path, "open", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        log.write("event")


def test_what_the_loop_logs(digits: DataSplits, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    outcome = train_network(make_job(digits, epochs=2), tmp_path / "some", progress.RunLog(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == [
        *["checkpoint"] * 2,
        "epoch",
        *["checkpoint"] * 3,
        "epoch",
        "trained",
    ]
    epochs = [line for line in lines if line["event"] == "epoch"]
    assert [line["parts"] for line in epochs] == [entry.parts for entry in outcome.history]
    assert {line["arm"] for line in lines} == {"arm"}


def test_plain_progress_goes_to_stderr_only(
    digits: DataSplits, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.0)
    train_network(make_job(digits, epochs=2))
    out, err = capsys.readouterr()
    assert out == ""
    *lines, health = err.splitlines()
    assert health.startswith("arm: heads: dead units 0 of 8 / 0 of 16; first exit right on ")
    assert [line.split()[1] for line in lines] == [f"{step}/6" for step in range(1, 7)]
    assert all(line.startswith("arm: ") and "images/s" in line and "loss " in line for line in lines)
    assert "epoch 2/2" in lines[-1]
    assert "\x1b" not in err


def test_plain_progress_is_rare(digits: DataSplits, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.task("some", 100) as task:
        assert not task.due()
    assert progress.PLAIN_INTERVAL >= 5
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_bar_stays_on_one_line(width: int) -> None:
    text = "epoch 3/30  1,234 images/s  loss 1.234  cross_entropy 1.234/1.234/1.234  kl 0.123/0.123/0.123"
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    bar = progress._bar(console)
    bar.add_task("erde (arm 2 of 3)", total=100, completed=7, text=text)
    with console.capture() as capture:
        console.print(bar)
    lines = capture.get().splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= width
    assert re.match(r"erde \(arm 2 of 3\) .*  7 % --:-- left epoch 3/30", lines[0])


def test_plain_lines_say_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([100.0, 110.0, 130.0, 400.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    # Of a training that goes on at 40, what was done before took no time.
    with progress.task("some (arm 1 of 2)", 100, completed=40) as task:
        task.update(40, "nothing yet")
        task.update(45, "x 1")
        task.update(100)
    assert capsys.readouterr().err.splitlines() == [
        "some (arm 1 of 2): 40/100 nothing yet",
        "some (arm 1 of 2): 45/100 x 1  0:05:30 left",
        "some (arm 1 of 2): 100/100",
    ]


# ---------------------------------------------------------------- what Python is told of a wrong call


def test_a_wrong_network_or_wrong_data_is_said(digits: DataSplits, tmp_path: Path) -> None:
    network = erde.attach_exits(
        erde.build_backbone("resnet8x0.25", classes=10, channels=1), 2, input_size=digits.input_size
    )
    with user_error("data is None: expected .*erde.load_data"):
        erde.train(network, None)
    with user_error("data is a str: expected"):
        erde.train(network, "digits")
    with user_error("the network is a Linear: expected .*erde.attach_exits"):
        erde.train(torch.nn.Linear(2, 2), digits)
    with user_error("the teacher is a Linear: expected"):
        erde.distill(network, torch.nn.Linear(2, 2), digits)
    few = erde.attach_exits(
        erde.build_backbone("resnet8x0.25", classes=3, channels=1), 2, input_size=digits.input_size
    )
    with user_error("the network has 3 outputs, the data has 10 classes"):
        erde.train(few, digits)
    with user_error("the teacher has 3 outputs, the data has 10 classes"):
        erde.distill(network, few, digits)
    colour = erde.attach_exits(erde.build_backbone("resnet8x0.25", classes=10), 2, input_size=(3, 8, 8))
    with user_error("the network does not take the data's images, 1x8x8"):
        erde.train(colour, digits)
    assert colour.training
    with user_error(
        "train.backbone_epochs is 2, as many as train.epochs, so that the early exits would never"
    ):
        erde.train(network, digits, epochs=2, backbone_epochs=2)
    with user_error("name is 3: expected the name of a data set or a folder"):
        erde.load_data(3)
    with user_error("no data at"):
        erde.load_data(tmp_path / "nowhere")
    with user_error("classes is 0, expected 1 to 100,000"):
        erde.build_backbone("resnet8", classes=0)


def test_training_from_python_leaves_the_allocator_alone(
    digits: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[int] = []
    monkeypatch.setattr(loop, "_keep_memory", lambda: changed.append(1))
    monkeypatch.setattr(loop, "keeps_memory", False)  # the command sets it, in tests of this process too
    train_network(make_job(digits, epochs=1))
    assert not changed
    monkeypatch.setattr(loop, "keeps_memory", True)
    train_network(make_job(digits, epochs=1))
    assert changed


@pytest.mark.parametrize(
    ("precision", "device", "native", "expected"),
    [
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),
        ("auto", "cpu", True, False),
        ("bf16", "cuda", False, True),
        ("fp32", "cuda", True, False),
    ],
)
def test_auto_takes_bf16_where_a_gpu_has_it(
    precision: str,
    device: str,
    native: bool,
    expected: bool,
    digits: DataSplits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    job = make_job(digits, precision=precision)
    assert dataclasses.replace(job, device=torch.device(device)).autocast == expected
