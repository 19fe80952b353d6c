"""Several networks on the same batches, moving averages, batches in parts, and what is written meanwhile."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import erde
from erde.data.load import DataSplits
from erde.losses import cross_entropy_loss
from erde.losses.base import exit_cross_entropy
from erde.networks import checkpoint
from erde.networks.network import EarlyExitNetwork
from erde.recipe.losses import resolve_loss
from erde.recipe.schema import DistillationConfig
from erde.training import parallel
from erde.training.api import build_criterion
from erde.training.job import FINAL, Job
from erde.training.learner import Learner
from erde.training.loop import train_network, train_together
from erde.training.scalars import Scalars
from erde.training.teacher import Teacher
from tests.helpers.checks import entries, user_error
from tests.helpers.networks import plain_network
from tests.training.test_loop import (
    BATCH,
    STEPS,
    KilledError,
    Toy,
    differing,
    make_criterion,
    make_job,
    new_network,
    snapshot,
)

# ---------------------------------------------------------------- together


def arms(digits: DataSplits, teacher: EarlyExitNetwork) -> list[Job]:
    """Four that differ in loss, exits, dropout and phases."""
    jobs = []
    for number, (loss, exits) in enumerate((("kd", 3), ("erde", 2), ("ce", 3), ("ce", 1))):
        network = new_network(digits, exits=exits, seed=number, dropout=0.1 + 0.2 * number)
        criterion = make_criterion(digits, loss, network, teacher if loss != "ce" else None)
        settings = {"backbone_epochs": 1, "freeze_backbone": exits > 1}
        job = make_job(
            digits, criterion, network=network, teacher=teacher if loss != "ce" else None, **settings
        )
        jobs.append(dataclasses.replace(job, name=f"arm{number}"))
    return jobs


def test_together_is_bit_for_bit_apart(
    digits: DataSplits, tiny_network: EarlyExitNetwork, tmp_path: Path
) -> None:
    teacher = copy.deepcopy(tiny_network)
    apart = arms(digits, teacher)
    outcomes = [train_network(job) for job in apart]
    together = arms(digits, teacher)
    folders = [tmp_path / job.name for job in together]
    trained = train_together(together, folders)
    for mine, other, alone, outcome in zip(together, apart, trained, outcomes, strict=True):
        assert not differing(snapshot(mine.network), snapshot(other.network))
        assert alone.history == outcome.history
    assert [entries(folder) for folder in folders] == [[FINAL]] * 4


def test_the_teacher_is_asked_once_for_all(
    digits: DataSplits, tiny_network: EarlyExitNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = Teacher.ask

    def count(self: Any, images: Tensor) -> Any:
        asked.append(len(images))
        return ask(self, images)

    monkeypatch.setattr(Teacher, "ask", count)
    train_together(arms(digits, copy.deepcopy(tiny_network)), [None] * 4)
    # Not at all in the first of three epochs, which trains backbones alone.
    assert asked == [BATCH] * 2 * STEPS


@pytest.mark.parametrize("at", [2, 4])
def test_killed_together_and_between_two_checkpoints(
    at: int,
    digits: DataSplits,
    tiny_network: EarlyExitNetwork,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = copy.deepcopy(tiny_network)
    expected = [train_network(job) for job in arms(digits, teacher)]
    folders = [tmp_path / f"arm{number}" for number in range(4)]
    saves = [0]
    save = Learner.save

    def killed(self: Learner) -> None:
        saves[0] += 1
        # Two of the four have written their next step already.
        if saves[0] == 4 * at + 3:
            raise KilledError
        save(self)

    monkeypatch.setattr(Learner, "save", killed)
    with pytest.raises(KilledError):
        train_together(arms(digits, teacher), folders)
    steps = [checkpoint.load(folder / "last.safetensors")[1] for folder in folders]
    assert len({(entry["epoch"], entry["step"]) for entry in steps}) == 2
    again = arms(digits, teacher)
    resumed = train_together(again, folders)
    assert [outcome.history for outcome in resumed] == [outcome.history for outcome in expected]
    apart = arms(digits, teacher)
    for job, resumed_job in zip(apart, again, strict=True):
        train_network(job)
        assert not differing(snapshot(job.network), snapshot(resumed_job.network))
    # Those that are finished are not touched by one that is not.
    (folders[1] / FINAL).unlink()
    kept = [folder / FINAL for folder in folders if folder != folders[1]]
    before = [path.read_bytes() for path in kept]
    last = arms(digits, teacher)
    train_together(last, folders)
    assert [path.read_bytes() for path in kept] == before
    assert not differing(snapshot(last[1].network), snapshot(again[1].network))


def test_out_of_memory_together(digits: DataSplits) -> None:
    def no_memory() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    jobs = [make_job(digits, Toy()), dataclasses.replace(make_job(digits, Toy(1, no_memory)), name="other")]
    with user_error(
        r"out of memory while training 'arm' and 'other' on cpu .*: continue with train\.together=false --resume, or lower"
    ):
        train_together(jobs, [None, None])


# ---------------------------------------------------------------- in parts, averaged, smoothed


def one_step(digits: DataSplits, **settings: Any) -> dict[str, Tensor]:
    network = plain_network()
    criterion = make_criterion(digits, "ce", network, None)
    # Without momentum and decay the change at learning rate 1 is the gradient.
    plain = {"epochs": 1, "momentum": 0.0, "weight_decay": 0.0, "warmup_epochs": 0, "learning_rate": 1.0}
    start = snapshot(network)
    train_network(make_job(digits, criterion, network=network, images=BATCH, **plain, **settings))
    return {name: start[name] - tensor for name, tensor in snapshot(network).items()}


@pytest.mark.parametrize("parts", [2, 8])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(parts: int, digits: DataSplits) -> None:
    whole, split = one_step(digits), one_step(digits, accumulate=parts)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 1e-3, name


@pytest.mark.parametrize("parts", [1, 4])
def test_phuongs_temperature_rises_once_a_step(parts: int, digits: DataSplits) -> None:
    network = plain_network()
    # At so low a temperature the last exit is always too sure.
    loss = resolve_loss({"name": "phuong", "start_temperature": 0.1, "confidence": 0.2})
    criterion = build_criterion(loss, DistillationConfig(), network, None, digits)
    train_network(make_job(digits, criterion, network=network, epochs=1, accumulate=parts))
    assert float(criterion.state_dict()["annealed_temperature"]) == pytest.approx(0.1 * 1.05**STEPS)


def test_parts_keep_their_rows_together(digits: DataSplits) -> None:
    class Rows(Toy):
        def forward(  # type: ignore[override]
            self,
            logits: Tensor,
            _: Tensor | None,
            labels: Tensor,
            *,
            indices: Tensor,
            held_out_logits: Tensor,
        ) -> dict[str, Tensor]:
            assert len(indices) == len(labels) == logits.shape[1] == BATCH // 4
            assert torch.equal(torch.from_numpy(digits.train.labels)[indices], labels)
            assert torch.equal(held_out_logits[1, :, 0], indices.float() + 1000)
            return super().forward(logits, None, labels)

    images = STEPS * BATCH
    table = torch.arange(images)[:, None, None] + torch.tensor([0, 1000])[:, None] + torch.zeros(10)
    job = make_job(digits, Rows(), images=images, accumulate=4, epochs=1)
    job = dataclasses.replace(job, extras=("indices", "held_out_logits"), held_out_logits=table)
    train_network(job)
    assert job.criterion.calls == 4 * STEPS


def test_a_batch_that_does_not_divide(digits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    with user_error(rf"train\.accumulate is 5, which does not divide a batch of {BATCH} images a process"):
        make_job(digits, accumulate=5).check()
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    with user_error(rf"train\.batch_size is {BATCH}, which 3 processes cannot share equally"):
        make_job(digits).check()


def test_the_average_is_that_of_the_formula(digits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[Tensor] = []
    step = torch.optim.SGD.step

    def record(self: torch.optim.SGD, *arguments: Any) -> Any:
        value = step(self, *arguments)
        weights.append(job.network.heads[0].weight.detach().double().clone())
        return value

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    network = plain_network()
    average = network.heads[0].weight.detach().double().clone()
    job = make_job(digits, make_criterion(digits, "ce", network, None), network=network, ema=0.3, epochs=2)
    train_network(job)
    assert len(weights) == 2 * STEPS
    for number, current in enumerate(weights):
        decay = min(0.3, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * current
    torch.testing.assert_close(network.heads[0].weight.detach().double(), average, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(average, weights[-1], atol=1e-4)


def test_the_average_survives_a_kill(digits: DataSplits, tmp_path: Path) -> None:
    settings = {"ema": 0.9, "accumulate": 2, "gradient_clip": 1.0}
    whole = make_job(digits, **settings)
    train_network(whole)
    # The criterion is called twice a step.
    with pytest.raises(KilledError):
        train_network(make_job(digits, Toy(9), **settings), tmp_path)
    again = make_job(digits, network=new_network(digits, seed=4), **settings)
    train_network(again, tmp_path)
    assert not differing(snapshot(again.network), snapshot(whole.network))
    loaded = checkpoint.under_prefix("network", checkpoint.load(tmp_path / FINAL)[0])
    assert not differing(loaded, snapshot(whole.network))
    plain = make_job(digits)
    train_network(plain)
    assert differing(snapshot(plain.network), snapshot(whole.network))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_torchs(smoothing: float) -> None:
    logits, labels = torch.randn(3, 7, 5, dtype=torch.float64), torch.randint(5, (7,))
    values = exit_cross_entropy(logits, labels, smoothing)
    for index in range(3):
        expected = F.cross_entropy(logits[index], labels, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(values[index], expected)
    parts = cross_entropy_loss(logits, labels, label_smoothing=smoothing)
    assert float(parts["loss"]) == pytest.approx(float(values.mean(dim=1).sum()))


@pytest.mark.parametrize(("loss", "changes"), [("ce", True), ("kd", False)])
def test_label_smoothing_is_off_where_a_teacher_smooths(
    loss: str, changes: bool, digits: DataSplits, tiny_network: EarlyExitNetwork
) -> None:
    from erde import distill

    def history(**settings: Any) -> Any:
        arguments = {"epochs": 1, "batch_size": 256, "device": "cpu", **settings}
        return distill(plain_network(exits=3), tiny_network, digits, loss=loss, **arguments)

    assert (history(label_smoothing=0.2) != history()) == changes
    assert (history(distillation={"label_smoothing": 0.2}) != history()) == (loss == "kd")


# ---------------------------------------------------------------- TensorBoard, compile


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_scalars_for_tensorboard(digits: DataSplits, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"

    def job(*arguments: Any, **settings: Any) -> Job:
        made = make_job(digits, *arguments, tensorboard=True, **settings)
        return dataclasses.replace(made, scalars=tmp_path / "tensorboard")

    with pytest.raises(KilledError):
        train_network(job(Toy(8), checkpoint_seconds=3600), checkpoints)
    # Killed before its first checkpoint: what it wrote of epochs that come again is not shown twice.
    outcome = train_network(job(), checkpoints)
    scalars = read_scalars(tmp_path / "tensorboard")
    assert {f"accuracy/exit_{index}" for index in range(3)} < set(scalars)
    assert {"loss", "share", "learning_rate", "images_per_second", "ce/exit_2"} < set(scalars)
    for index in range(3):
        expected = [entry.parts["accuracy"][index] for entry in outcome.history]
        assert [step for step, _ in scalars[f"accuracy/exit_{index}"]] == [1, 2, 3]
        assert [value for _, value in scalars[f"accuracy/exit_{index}"]] == pytest.approx(expected)


def test_scalars_from_python(digits: DataSplits, tmp_path: Path) -> None:
    arguments = {"epochs": 1, "batch_size": 256, "device": "cpu"}
    erde.train(new_network(digits), digits, folder=tmp_path, tensorboard=True, **arguments)
    assert entries(tmp_path) == [FINAL, "tensorboard", "training.json"]
    with user_error("writes into the folder of the training: give one"):
        erde.train(new_network(digits), digits, tensorboard=True, **arguments)
    with user_error("train.together is for the arms of a recipe"):
        erde.train(new_network(digits), digits, together=True, **arguments)


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with user_error(
        r"train\.tensorboard needs tensorboard, which is not installed: pip install 'erde\[train\]'"
    ):
        Scalars(tmp_path)


def test_compile_that_does_not_work_here(digits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", fail)
    with user_error(
        r"train\.compile is on, and torch\.compile does not work here \(No working C\+\+ compiler found\)"
    ):
        train_network(make_job(digits, compile=True))


@pytest.mark.slow
def test_compiled_training_is_eager_training_within_rounding(
    digits: DataSplits, tiny_network: EarlyExitNetwork
) -> None:
    def trained(**settings: Any) -> Job:
        network = new_network(digits, dropout=0.0)
        teacher = copy.deepcopy(tiny_network)
        criterion = make_criterion(digits, "erde", network, teacher)
        job = make_job(digits, criterion, network=network, teacher=teacher, epochs=1, **settings)
        train_network(job)
        return job

    eager, compiled = trained(), trained(compile=True)
    for name, value in snapshot(eager.network).items():
        torch.testing.assert_close(snapshot(compiled.network)[name], value, rtol=1e-3, atol=1e-4)
