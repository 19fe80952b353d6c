from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import erde
from erde.data.batches import TrainBatches
from erde.data.load import DataSplits
from erde.networks.network import EarlyExitNetwork
from erde.recipe.losses import resolve_loss
from erde.recipe.schema import AugmentationConfig
from erde.training.job import Job
from erde.training.loop import train_network
from erde.training.teacher import Answer, Teacher
from erde.training.teacher_cache import MANIFEST, SPARE_BYTES, CachedTeacher, network_hash
from tests.helpers.checks import entries, user_error
from tests.training.test_loop import (
    BATCH,
    IMAGES,
    KilledError,
    make_criterion,
    make_job,
    new_network,
    snapshot,
)

Usage = namedtuple("Usage", "total used free")
VIEWS = 3


def cached_job(
    digits: DataSplits, teacher: EarlyExitNetwork, cache: Path | None, loss: str = "kd", **settings: Any
) -> Job:
    """Three epochs on three views of each image, with or without a cache."""
    network = new_network(digits)
    job = make_job(
        digits, make_criterion(digits, loss, network, teacher), network=network, teacher=teacher, **settings
    )
    augmentation = AugmentationConfig(crop_padding=1, views=VIEWS)
    extras = resolve_loss(loss).extras
    return dataclasses.replace(job, augmentation=augmentation, teacher_cache=cache, extras=extras)


@pytest.fixture
def teacher(tiny_network: EarlyExitNetwork) -> EarlyExitNetwork:
    return copy.deepcopy(tiny_network)


def forbidden(*_: Any) -> Answer:
    raise AssertionError("the teacher was asked")


@pytest.mark.parametrize("loss", ["kd", "erde", "crd"])
def test_training_from_the_cache_is_bit_for_bit_that_without(
    loss: str, digits: DataSplits, teacher: EarlyExitNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = cached_job(digits, teacher, None, loss)
    expected = train_network(plain).history
    cached = cached_job(digits, teacher, tmp_path, loss)
    assert train_network(cached).history == expected
    assert all(
        torch.equal(tensor, snapshot(plain.network)[name])
        for name, tensor in snapshot(cached.network).items()
    )
    # A second arm, or a second run: the teacher is asked for one batch only, to learn its shapes.
    asked: list[Tensor] = []
    ask = Teacher.ask

    def count(self: Teacher, images: Tensor) -> Answer:
        asked.append(images)
        return ask(self, images)

    monkeypatch.setattr(Teacher, "ask", count)
    again = cached_job(digits, teacher, tmp_path, loss)
    assert train_network(again).history == expected
    assert len(asked) == 1


def test_what_lies_on_disk(digits: DataSplits, teacher: EarlyExitNetwork, tmp_path: Path) -> None:
    train_network(cached_job(digits, teacher, tmp_path, epochs=1))
    (folder,) = tmp_path.iterdir()
    assert entries(folder) == ["logits.f32", MANIFEST]
    assert (folder / "logits.f32").stat().st_size == 4 * VIEWS * IMAGES * 3 * 10
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["done"] == VIEWS * IMAGES
    assert manifest["teacher"] == network_hash(teacher)
    # Another teacher, and other images, get a cache of their own beside it.
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.heads[0].linear.bias[0] += 1e-3
    assert network_hash(other) != network_hash(teacher)
    train_network(cached_job(digits, other, tmp_path, epochs=1))
    train_network(cached_job(digits, teacher, tmp_path, epochs=1, images=IMAGES - 8))
    assert len(entries(tmp_path)) == 3


def batches_for(job: Job) -> TrainBatches:
    return TrainBatches(
        job.train,
        batch_size=BATCH,
        seed=job.seed,
        augmentation=job.augmentation,
        mean=job.mean,
        std=job.std,
        device=job.device,
    )


def test_features_are_kept_too(digits: DataSplits, teacher: EarlyExitNetwork, tmp_path: Path) -> None:
    job = cached_job(digits, teacher, tmp_path)
    direct = Teacher(teacher, job.device, features=True)
    batches = batches_for(job)
    cached = CachedTeacher(direct, batches, tmp_path, len(job.train), {})
    batch = next(batches.epoch(1))
    answer, expected = cached(batch), direct(batch)
    assert torch.equal(answer.logits, expected.logits)
    assert [feature.shape for feature in answer.features] == [
        feature.shape for feature in teacher.forward_features(batch.images)
    ]
    for feature, other in zip(answer.features, expected.features, strict=True):
        assert torch.equal(feature, other)


def test_folding_batch_norm_changes_nothing_but_the_last_bits(
    digits: DataSplits, teacher: EarlyExitNetwork
) -> None:
    images = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        expected, features = teacher.eval().forward_with_features(images)
    asked = Teacher(copy.deepcopy(teacher), torch.device("cpu"), features=True)
    answer = asked.ask(images)
    # Those behind convolutions are gone; heads begin with one of their own.
    norms = [
        sum(isinstance(module, nn.BatchNorm2d) for module in of.modules()) for of in (teacher, asked._call)
    ]
    assert norms[0] > norms[1] == 2
    torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-5)
    for feature, other in zip(answer.features, features, strict=True):
        torch.testing.assert_close(feature, other, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_cannot_be_traced_is_asked_as_it_is(teacher: EarlyExitNetwork) -> None:
    class Undecided(EarlyExitNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > -1e9 else super().forward(-x)

    odd = Undecided(list(teacher.stages), list(teacher.heads), teacher.exit_names).eval()
    images = torch.randn(2, 1, 8, 8)
    answer = Teacher(odd, torch.device("cpu"), channels_last=False).ask(images)
    with torch.no_grad():
        assert torch.equal(answer.logits, odd(images))


# ---------------------------------------------------------------- a fill that was interrupted


def test_a_killed_fill_goes_on_where_it_was(
    digits: DataSplits, teacher: EarlyExitNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_network(cached_job(digits, teacher, tmp_path / "whole", epochs=1))
    monkeypatch.setattr("erde.training.teacher_cache.SAVE_SECONDS", 0.0)
    ask, calls = Teacher.ask, [0]

    def killed(self: Teacher, images: Tensor) -> Answer:
        calls[0] += 1
        if calls[0] == 7:
            raise KilledError
        return ask(self, images)

    monkeypatch.setattr(Teacher, "ask", killed)
    with pytest.raises(KilledError):
        train_network(cached_job(digits, teacher, tmp_path / "killed", epochs=1))
    (folder,) = (tmp_path / "killed").iterdir()
    # One call for the shapes, five batches of 4 per view: a whole view and one batch of the next.
    assert json.loads((folder / MANIFEST).read_text())["done"] == IMAGES + BATCH
    # What lies behind the mark is not believed.
    values = np.memmap(folder / "logits.f32", dtype="<f4", mode="r+", shape=(VIEWS, IMAGES, 3, 10))
    values[1, BATCH:] = np.nan
    values.flush()
    before = calls[0]
    train_network(cached_job(digits, teacher, tmp_path / "killed", epochs=1))
    assert calls[0] - before == 1 + 3 + 4
    (whole,) = (tmp_path / "whole").iterdir()
    assert (folder / "logits.f32").read_bytes() == (whole / "logits.f32").read_bytes()


# ---------------------------------------------------------------- what goes wrong


def test_too_little_disk_is_said_before(
    digits: DataSplits, teacher: EarlyExitNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, SPARE_BYTES + 1000))
    monkeypatch.setattr(TrainBatches, "epoch", forbidden)
    with user_error(
        r"the teacher cache takes 0\.00 GB in .*, where 0\.00 GB can be used: set teacher\.cache to a larger"
    ):
        train_network(cached_job(digits, teacher, tmp_path))
    assert list(tmp_path.glob("*/*.f32")) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            "the disk of .* is full: set teacher.cache to a larger disk, or lower data.augmentation.views",
        ),
        (
            errno.EROFS,
            "cannot be written to .*: Read-only file system; set teacher.cache to a folder that you may",
        ),
    ],
)
def test_a_disk_that_is_full_or_read_only(
    number: int,
    message: str,
    digits: DataSplits,
    teacher: EarlyExitNetwork,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with user_error(message):
        train_network(cached_job(digits, teacher, tmp_path))


def test_the_cache_of_another_teacher(digits: DataSplits, teacher: EarlyExitNetwork, tmp_path: Path) -> None:
    train_network(cached_job(digits, teacher, tmp_path, epochs=1))
    (folder,) = tmp_path.iterdir()
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "teacher": "0" * 64}))
    with user_error(
        f"{folder} is the cache of another teacher, or of other images: set teacher.cache to another"
    ):
        train_network(cached_job(digits, teacher, tmp_path, epochs=1))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with (folder / "logits.f32").open("r+b") as file:
        file.truncate(1000)
    with user_error(f"the teacher cache {folder} is damaged: remove it"):
        train_network(cached_job(digits, teacher, tmp_path, epochs=1))
    for damaged in ("[1", "[1]"):
        (folder / MANIFEST).write_text(damaged)
        with user_error("is not the manifest of a teacher cache: remove"):
            train_network(cached_job(digits, teacher, tmp_path, epochs=1))


def test_views_without_number(digits: DataSplits, teacher: EarlyExitNetwork, tmp_path: Path) -> None:
    job = dataclasses.replace(
        cached_job(digits, teacher, tmp_path), augmentation=AugmentationConfig(cutout=2)
    )
    with user_error(r"teacher\.cache needs views that can be numbered.*data\.augmentation\.cutout=0"):
        train_network(job)


def test_a_cache_from_python(digits: DataSplits, teacher: EarlyExitNetwork, tmp_path: Path) -> None:
    def distilled(cache: Path | None) -> Any:
        return erde.distill(
            new_network(digits),
            teacher,
            digits,
            loss="kd",
            augmentation={"flip": False, "crop_padding": 0},
            teacher_cache=cache,
            epochs=1,
            batch_size=256,
            device="cpu",
        )

    assert distilled(tmp_path) == distilled(None)
    assert len(entries(tmp_path)) == 1


# ---------------------------------------------------------------- in a recipe


def start(folder: Path, *overrides: str) -> Any:
    from erde.recipe.load import load_config
    from erde.runs.opening import open_run

    small = ["arms={kd: {loss: kd}}", "export.arm=kd", "device=cpu", "threads=1"]
    return open_run(load_config("digits", [*small, *overrides]), folder, resume=False)


def test_what_is_wrong_with_a_cache_is_said_before_the_teacher_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with user_error(r"teacher\.cache needs views that can be numbered.*set data\.augmentation\.cutout=0"):
        start(tmp_path / "run", "teacher.cache=true", "data.augmentation.cutout=2")
    (tmp_path / "file").write_text("")
    with user_error("cannot create the folder"):
        start(tmp_path / "run", f"teacher.cache={tmp_path / 'file'}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with user_error(
            r"the teacher cache cannot be written to .* is read-only; set teacher\.cache to a folder"
        ):
            start(tmp_path / "run", "teacher.cache=true")
    with monkeypatch.context() as patch:
        # 9 views of 500 images, 3 exits and 10 classes, 4 bytes each: 540,000.
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, SPARE_BYTES + 539_999))
        with user_error(r"the teacher cache takes 0\.00 GB in .*: set teacher\.cache to a larger disk"):
            start(tmp_path / "run", "teacher.cache=true")
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, SPARE_BYTES + 540_000))
        start(tmp_path / "other", "teacher.cache=true")
    assert not (tmp_path / "run").exists()


def test_keys_that_would_do_nothing(tmp_path: Path) -> None:
    with user_error(r"teacher\.cross_fit is set, and no arm asks for held-out predictions"):
        start(tmp_path / "run", "teacher.cross_fit=3", "teacher.disjoint=false")
    with user_error("disjoint and cross_fit are two ways"):
        start(tmp_path / "run", "teacher.cross_fit=3")
    with user_error("match is for a teacher that was trained elsewhere"):
        start(tmp_path / "run", "teacher.match=order")


def test_a_run_goes_on_with_other_means(tmp_path: Path) -> None:
    from erde.recipe.load import load_config
    from erde.runs.opening import open_run

    start(tmp_path / "run")
    small = ["arms={kd: {loss: kd}}", "export.arm=kd", "device=cpu", "threads=1"]
    config = load_config("digits", [*small, "train.together=true", "teacher.cache=true", "data.workers=0"])
    assert open_run(config, tmp_path / "run", resume=True).config.train.together
    assert load_config(tmp_path / "run" / "config.yaml") == config
    other = load_config("digits", [*small, "train.epochs=3"])
    with user_error(r"belongs to another recipe: there train\.epochs is 40, now it is 3"):
        open_run(other, tmp_path / "run", resume=True)


@pytest.mark.parametrize("how", ["list", "tensor", "array", "buffer", "mapping"])
def test_networks_that_differ_in_an_attribute_alone(how: str) -> None:
    class Norm(nn.Module):
        def __init__(self, mean: float) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            with torch.no_grad():
                self.linear.weight.fill_(1)
                self.linear.bias.fill_(1)
            value = torch.tensor([mean])
            if how == "buffer":
                self.register_buffer("mean", value, persistent=False)
            else:
                kept = {"list": [mean], "tensor": value, "array": value.numpy(), "mapping": {"mean": (mean,)}}
                self.mean = kept[how]

    assert network_hash(Norm(0.0)) != network_hash(Norm(3.0))
    assert network_hash(Norm(3.0)) == network_hash(copy.deepcopy(Norm(3.0)).eval())
    assert network_hash(Norm(3.0)) != network_hash(Norm(3.0).bfloat16())


def test_networks_that_differ_in_code_alone(teacher: EarlyExitNetwork) -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    class Power(nn.Module):
        def __init__(self, exponent: float) -> None:
            super().__init__()
            self.exponent = exponent

        def forward(self, x: Tensor) -> Tensor:
            return x**self.exponent

    def graph(function: Any) -> str:
        class Own(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return function(x)

        return network_hash(torch.fx.symbolic_trace(Own()))

    assert network_hash(Power(2.0)) != network_hash(Power(3.0))
    assert network_hash(Square()) != network_hash(Power(2.0))
    assert graph(torch.relu) != graph(torch.tanh)
    assert graph(torch.relu) == graph(torch.relu)
