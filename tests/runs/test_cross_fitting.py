from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erde.common.splits import TrainSplit
from erde.data.load import stratified_order
from erde.networks import checkpoint
from erde.recipe.load import load_config
from erde.recipe.schema import TEACHER
from erde.runs import cross_fitting
from erde.runs.folder import Run
from erde.runs.networks import new_network, trained_network
from erde.runs.opening import open_run
from erde.runs.training import distill, make_job, train
from erde.training.job import FINAL, Job
from erde.training.loop import train_network
from tests.helpers.checks import user_error

FOLDS = 3
HELD_OUT = "arms={erde: {loss: {name: erde, wrong_test: held_out}}}"


def start(folder: Path, *overrides: str) -> Run:
    small = ["data.train_subset=70", "teacher.backbone=resnet8x0.25", "train.epochs=1", "train.batch_size=16"]
    config = load_config("digits", [*small, HELD_OUT, "device=cpu", "threads=1", *overrides])
    return open_run(config, folder, resume=False)


def teacher_job(run: Run) -> Job:
    return make_job(run, TEACHER, new_network(run, TEACHER), None)


def normalised(run: Run, images: Any) -> Tensor:
    mean, std = torch.tensor(run.data.mean), torch.tensor(run.data.std)
    return ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_every_fold_has_its_share_of_every_class(folds: int) -> None:
    # Balanced classes in stratified order come round and round in the same order.
    labels = np.repeat(np.arange(10), 100)[stratified_order(np.repeat(np.arange(10), 100), 8)]
    fold = cross_fitting.fold_of(labels, folds)
    assert np.bincount(fold).tolist() == [1000 // folds + (index < 1000 % folds) for index in range(folds)]
    for index in range(folds):
        trained_on = np.bincount(labels[fold != index], minlength=10)
        assert np.abs(trained_on - 100 * (folds - 1) / folds).max() <= 1
    # A teacher may train on more images, or on fewer, than its students.
    assert (cross_fitting.fold_of(labels[:333], folds) == fold[:333]).all()


def test_each_image_is_judged_by_a_teacher_that_never_saw_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(
        tmp_path / "run", "teacher.disjoint=false", "teacher.train_subset=100", f"teacher.cross_fit={FOLDS}"
    )
    jobs: list[Job] = []
    train_fold = train_network

    def record(job: Job, *arguments: Any) -> Any:
        jobs.append(job)
        return train_fold(job, *arguments)

    monkeypatch.setattr(cross_fitting, "train_network", record)
    # Earlier versions kept teachers of other folds here.
    stale = run.arm_folder(TEACHER) / "folds" / "0"
    stale.mkdir(parents=True)
    (stale / FINAL).write_bytes(b"of other images")
    students = run.data.train_share(70)

    def held_out() -> Tensor:
        folder = run.arm_folder(TEACHER)
        return cross_fitting.keep_logits(
            folder,
            lambda: cross_fitting.cross_fit(
                folder,
                lambda load: new_network(run, TEACHER, load=load),
                teacher_job(run),
                students,
                FOLDS,
                run.log,
            ),
        )

    logits = held_out()
    assert logits.shape == (70, 3, 10)
    assert sorted(len(job.train) for job in jobs) == [66, 67, 67]
    for row in range(70):
        image = students.images[row : row + 1]
        seen = [any((other == image[0]).all() for other in job.train.images[:]) for job in jobs]
        # One of three did not see it, and that is whose word counts.
        assert seen.count(False) == 1, row
        path = run.arm_folder(TEACHER) / cross_fitting.FOLDS / str(seen.index(False)) / FINAL
        network = new_network(run, TEACHER)
        checkpoint.load_weights(network, path)
        with torch.no_grad():
            expected = network.eval()(normalised(run, image))[:, 0]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
    # Kept: nothing is trained a second time.
    assert torch.equal(held_out(), logits)
    assert len(jobs) == FOLDS


def test_answers_of_other_folds_are_not_taken_for_todays(tmp_path: Path) -> None:
    labels = np.arange(6) % 2
    folder, division = tmp_path / "teacher", cross_fitting.fold_of(labels, 2)
    logits = torch.rand(6, 1, 2)
    # Earlier versions did not say which folds they had.
    cross_fitting.keep_logits(folder, lambda: logits)
    with user_error(r"held_out\.safetensors is of other folds than today's: .*; start a new run"):
        cross_fitting.keep_logits(folder, lambda: logits, division)
    (folder / cross_fitting.HELD_OUT).unlink()
    for _ in range(2):
        assert torch.equal(cross_fitting.keep_logits(folder, lambda: logits, division), logits)
    with user_error("other folds"):
        cross_fitting.keep_logits(folder, lambda: logits, labels)


def test_a_run_that_is_trained_needs_no_held_out_answers(tmp_path: Path) -> None:
    run = start(tmp_path / "run", "teacher.disjoint=false", "teacher.train_subset=100", "teacher.cross_fit=2")
    train(run)
    distill(run)
    # As an earlier version left it.
    path = run.arm_folder(TEACHER) / cross_fitting.HELD_OUT
    checkpoint.save(path, {"logits": checkpoint.load(path)[0]["logits"]}, {})
    distill(run)
    (run.checkpoints("erde") / FINAL).unlink()
    with user_error("other folds than today's"):
        distill(run)


def test_the_largest_fold_leaves_enough_images_for_a_batch(tmp_path: Path) -> None:
    run = start(
        tmp_path / "run", "teacher.disjoint=false", "teacher.train_subset=100", f"teacher.cross_fit={FOLDS}"
    )
    # Places 1 to 4: the second fold has two images, the others have one.
    train = TrainSplit(run.data.train.images[:4], np.ones(4, np.int64))
    job = dataclasses.replace(teacher_job(run), train=train)

    def check(batch_size: int) -> None:
        config = job.config.model_copy(update={"batch_size": batch_size})
        cross_fitting.check(run.config.teacher, dataclasses.replace(job, config=config))

    check(2)
    with user_error(r"train\.batch_size is 3, 'teacher, fold 2 of 3' trains on 2 images"):
        check(3)


def test_a_teacher_of_other_images_is_asked_itself(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    train(run)
    distill(run)
    logits = checkpoint.load(run.arm_folder(TEACHER) / cross_fitting.HELD_OUT)[0]["logits"]
    students = run.data.train_share(70)
    with torch.no_grad():
        expected = trained_network(run, TEACHER).eval()(normalised(run, students.images[:]))
    torch.testing.assert_close(logits, expected.transpose(0, 1), rtol=1e-4, atol=1e-4)
    assert not (run.arm_folder(TEACHER) / cross_fitting.FOLDS).exists()


def test_nobody_to_ask(tmp_path: Path) -> None:
    with user_error(r"held-out teacher predictions: set teacher\.cross_fit=5 .* or teacher\.disjoint=true"):
        start(tmp_path / "run", "teacher.disjoint=false")
    assert not (tmp_path / "run").exists()
