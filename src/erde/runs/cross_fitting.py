"""The teacher's answers to images that it was not trained on, although it was trained on all of them.

A teacher that has memorised its train images is wrong on none of them, and then nothing tells a student
where to doubt. Cross-fitting trains one more teacher per fold, on all images but the fold's, and asks it about
those. A teacher that never saw the students' images (``teacher.disjoint``) is simply asked itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erde.common import progress
from erde.common.errors import UserError
from erde.common.files import make_folder
from erde.common.splits import Labels, TrainSplit
from erde.data.encoded import Index
from erde.data.normalise import Normalise
from erde.data.sources import part_of
from erde.networks import checkpoint
from erde.networks.network import EarlyExitNetwork
from erde.recipe.schema import TeacherConfig
from erde.training import parallel
from erde.training.job import FINAL, Job
from erde.training.loop import train_network
from erde.training.teacher import Teacher

HELD_OUT = "held_out.safetensors"
# Not "folds": checkpoints do not say which images they were trained on, and earlier versions cut other folds.
FOLDS = "stratified-folds"
BATCH = 500


def fold_of(labels: Labels, folds: int) -> Labels:
    """The fold of each image (N,): each class dealt out in turn, class k from fold k on, so that folds are of even size.

    The images of a train split's start are in the same folds as without the others.
    """
    # Not every folds-th image: a train split's order may repeat its classes with a period.
    place = labels.copy()
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        place[rows] += np.arange(len(rows))
    return place % folds


def check(config: TeacherConfig, teacher_job: Job) -> None:
    """:class:`UserError` unless the recipe says where held-out predictions come from, and the folds can be trained on."""
    folds = config.cross_fit
    if folds is not None:
        division = fold_of(teacher_job.train.labels, folds)
        # It leaves the fewest images to train on.
        largest = int(np.bincount(division).argmax())
        rest = np.flatnonzero(division != largest)
        dataclasses.replace(
            teacher_job, name=_fold_name(largest, folds), train=_part(teacher_job.train, rest)
        ).check()
    elif not config.disjoint:
        raise UserError(
            "the loss asks for held-out teacher predictions: set teacher.cross_fit=5 to train a teacher for each of "
            "five parts of the images, or teacher.disjoint=true for a teacher that never sees the students' images"
        )


def keep_logits(folder: Path, compute: Callable[[], Tensor], division: Labels | None = None) -> Tensor:
    """Held-out logits (N, Et, K), computed once and kept in ``folder`` with the images' folds (N,), if there are any.

    Raises:
        UserError: logits of another division into folds are there, such as an earlier version of erde made.
    """
    folds = {} if division is None else {"folds": torch.from_numpy(division)}
    path = make_folder(folder) / HELD_OUT
    # All processes look before the first one can have written it.
    parallel.wait()
    if not path.exists():
        logits = compute()
        if parallel.is_first():
            checkpoint.save(path, {"logits": logits, **folds}, {})
        parallel.wait()
    kept = checkpoint.load(path)[0]
    if any(name not in kept or not torch.equal(kept[name], fold) for name, fold in folds.items()):
        raise UserError(
            f"{path} is of other folds than today's: an earlier version of erde could hold out whole classes; start a new run"
        )
    return kept["logits"]


def cross_fit(
    folder: Path,
    new_teacher: Callable[[bool], EarlyExitNetwork],
    teacher_job: Job,
    students: TrainSplit,
    folds: int,
    log: progress.RunLog,
) -> Tensor:
    """Raw logits (N, Et, K) for the students' images, in their order, without augmentation.

    ``teacher_job`` is the teacher's own job: images, loss and settings of the folds' teachers.
    ``new_teacher(load)`` gives a fresh teacher, from its starting weights with ``load``. The folds' teachers are kept in
    ``folder``, so a stopped run goes on.
    """
    # Students and teacher both take their images from the train split's start.
    seen, asked = fold_of(teacher_job.train.labels, folds), fold_of(students.labels, folds)
    logits: Tensor | None = None
    for fold in np.unique(asked).tolist():
        checkpoints = folder / FOLDS / str(fold)
        network = new_teacher(not (checkpoints / FINAL).exists())
        job = dataclasses.replace(
            teacher_job,
            scalars=None,
            name=_fold_name(fold, folds),
            network=network,
            train=_part(teacher_job.train, np.flatnonzero(seen != fold)),
        )
        train_network(job, checkpoints, log)
        rows = np.flatnonzero(asked == fold)
        answers = ask_teacher(network, _part(students, rows), teacher_job)
        if logits is None:
            logits = torch.empty(len(students), *answers.shape[1:])
        logits[rows] = answers
    assert logits is not None
    right = (logits.argmax(dim=-1) == torch.from_numpy(students.labels)[:, None]).double().mean(dim=0)
    progress.say(
        "teacher on images that it was not trained on: "
        + " / ".join(f"{100 * share:.1f} %" for share in right.tolist())
    )
    return logits


def _part(split: TrainSplit, rows: Index) -> TrainSplit:
    return TrainSplit(part_of(split.images, rows), split.labels[rows])


def _fold_name(fold: int, folds: int) -> str:
    return f"teacher, fold {fold + 1} of {folds}"


def ask_teacher(network: EarlyExitNetwork, split: TrainSplit, teacher_job: Job) -> Tensor:
    """Raw logits (N, Et, K) of a teacher for a split that it was not trained on."""
    teacher = Teacher(network, teacher_job.device, channels_last=teacher_job.config.channels_last)
    normalise = Normalise(teacher_job.mean, teacher_job.std)
    parts = []
    for images in split.batches(BATCH):
        x = normalise(torch.from_numpy(images)).permute(0, 3, 1, 2)
        parts.append(teacher.ask(x.to(teacher_job.device)).logits.transpose(0, 1).float().cpu())
    return torch.cat(parts)
