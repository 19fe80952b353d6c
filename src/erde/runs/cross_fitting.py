"""What a teacher says of images that it was not trained on, although it was trained on all of them.

A teacher that has memorised its train images is wrong on none of them, and then nothing tells a student
where to doubt. Cross-fitting trains one more teacher per fold, on all images but the fold's, and asks it about
those. A teacher that never saw the students' images (``teacher.disjoint``) is simply asked itself.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from erde.common import progress
from erde.common.errors import UserError
from erde.common.files import make_folder
from erde.common.splits import TrainSplit
from erde.data.sources import part_of
from erde.networks import checkpoint
from erde.networks.network import EarlyExitNetwork
from erde.training import parallel
from erde.training.job import FINAL, Job
from erde.training.loop import train_network
from erde.training.teacher import Teacher

if TYPE_CHECKING:
    from erde.runs.pipeline import Run

HELD_OUT = "held_out.safetensors"
BATCH = 500


def check(run: Run, teacher_job: Job) -> None:
    """:class:`UserError` unless the recipe says where held-out predictions come from, and the folds can be trained on."""
    folds = run.config.teacher.cross_fit
    if folds is not None:
        # The first fold is the largest: it leaves the fewest.
        rest = np.flatnonzero(np.arange(len(teacher_job.train)) % folds != 0)
        train = TrainSplit(part_of(teacher_job.train.images, rest), teacher_job.train.labels[rest])
        dataclasses.replace(teacher_job, name=_fold_name(0, folds), train=train).check()
    elif not run.config.teacher.disjoint:
        raise UserError(
            "the loss asks for held-out teacher predictions: set teacher.cross_fit=5 to train a teacher for each of "
            "five parts of the images, or teacher.disjoint=true for a teacher that never sees the students' images"
        )


def held_out_logits(run: Run, teacher_job: Job) -> Tensor:
    """Raw logits (N, Et, K) for the images that students train on, in their order, without augmentation.

    ``teacher_job`` is the teacher's own job: images, loss and settings of the folds' teachers. Kept in the
    run folder, as are the folds' teachers, so a stopped run goes on.
    """
    folder = make_folder(run.arm_folder("teacher"))
    path = folder / HELD_OUT
    # All look before the first one can have written it.
    parallel.wait()
    if not path.exists():
        students = run.data.train_share(run.config.data.train_subset)
        if run.config.teacher.disjoint:
            found = _answers(run, run.trained_network("teacher"), students, teacher_job)
        else:
            found = _cross_fit(run, teacher_job, students)
        if parallel.is_first():
            checkpoint.save(path, {"logits": found}, {})
        parallel.wait()
    return checkpoint.load(path)[0]["logits"]


def _cross_fit(run: Run, teacher_job: Job, students: TrainSplit) -> Tensor:
    folds = run.config.teacher.cross_fit
    assert folds is not None
    # The train split is in stratified order: every folds-th image is a stratified part. Students and teacher
    # both take their images from its start.
    seen, asked = np.arange(len(teacher_job.train)), np.arange(len(students))
    found: Tensor | None = None
    for fold in range(folds):
        rest = seen[seen % folds != fold]
        train = TrainSplit(part_of(teacher_job.train.images, rest), teacher_job.train.labels[rest])
        folder = run.arm_folder("teacher") / "folds" / str(fold)
        network = run.new_network("teacher", load=not (folder / FINAL).exists())
        job = dataclasses.replace(
            teacher_job,
            scalars=None,
            name=_fold_name(fold, folds),
            network=network,
            train=train,
        )
        train_network(job, folder, run.log)
        rows = asked[asked % folds == fold]
        part = TrainSplit(part_of(students.images, rows), students.labels[rows])
        answers = _answers(run, network, part, teacher_job)
        if found is None:
            found = torch.empty(len(students), *answers.shape[1:])
        found[rows] = answers
    assert found is not None
    right = (found.argmax(dim=-1) == torch.from_numpy(students.labels)[:, None]).double().mean(dim=0)
    progress.say(
        "teacher on images that it was not trained on: "
        + " / ".join(f"{100 * one:.1f} %" for one in right.tolist())
    )
    return found


def _fold_name(fold: int, folds: int) -> str:
    return f"teacher, fold {fold + 1} of {folds}"


def _answers(run: Run, network: EarlyExitNetwork, split: TrainSplit, teacher_job: Job) -> Tensor:
    teacher = Teacher(network, run.device, channels_last=teacher_job.config.channels_last)
    scale = torch.tensor([1 / (255 * one) for one in run.data.std])
    shift = torch.tensor([-mean / std for mean, std in zip(run.data.mean, run.data.std, strict=True)])
    found = []
    for images in split.batches(BATCH):
        x = (torch.from_numpy(images).to(torch.float32) * scale + shift).permute(0, 3, 1, 2)
        found.append(teacher.ask(x.to(run.device)).logits.transpose(0, 1).float().cpu())
    return torch.cat(found)
