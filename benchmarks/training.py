"""Images per second of a distillation step, teacher included: erde's loop against the usual way to write one.

    python benchmarks/training.py [RECIPE] [KEY=VALUE ...] --out FILE.json

Same networks, loss, batch size, optimiser and real train images. The usual way: a DataLoader whose workers
crop and flip each image with Pillow, NCHW, the teacher under no_grad, loss.item() after each step. All
variants take turns (A B C ... A B C ...); medians and quartiles over the rounds. See README.md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from erde.common.progress import RunLog
from erde.recipe.load import load_config
from erde.recipe.schema import TEACHER
from erde.runs.folder import Run
from erde.runs.networks import new_network
from erde.runs.training import make_job
from erde.training.job import Job
from erde.training.loop import _Trainer, describe_machine

Work = Callable[[], None]
ARMS = ("erde", "kd", "ce")


class UsualDataset(Dataset[tuple[Tensor, int]]):
    """One image at a time, with Pillow, as transforms of the usual libraries do it."""

    def __init__(self, job: Job) -> None:
        self.images, self.labels = np.asarray(job.train.images), job.train.labels
        self.padding, self.flip = job.augmentation.crop_padding, job.augmentation.flip
        self.mean, self.std = (torch.tensor(one).reshape(-1, 1, 1) for one in (job.mean, job.std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        array = self.images[index]
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        if self.padding:
            width, height = image.size
            image = ImageOps.expand(image, self.padding)
            left, top = torch.randint(2 * self.padding + 1, (2,)).tolist()
            image = image.crop((left, top, left + width, top + height))
        if self.flip and torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.array(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        x = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return (x - self.mean) / self.std, int(self.labels[index])


def usual(job: Job, workers: int, steps: int) -> Work:
    """The loop as most people write it."""
    device, network, criterion = job.device, job.network.to(job.device), job.criterion.to(job.device)
    assert job.teacher is not None
    teacher = job.teacher.to(device).eval()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=job.config.weight_decay
    )
    loader = DataLoader(
        UsualDataset(job),
        batch_size=job.config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    network.train()

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()

    def work() -> None:
        running = 0.0
        for images, labels in itertools.islice(batches, steps):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with torch.no_grad():
                teacher_logits = teacher(images)
            loss = criterion(network(images), teacher_logits, labels)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running += loss.item()

    return work


def ours(jobs: list[Job], steps: int) -> Work:
    """The same by erde's loop: all of ``jobs`` on each batch."""
    jobs = [
        dataclasses.replace(job, config=job.config.model_copy(update={"learning_rate": 0.01})) for job in jobs
    ]
    trainer = _Trainer(jobs, [None] * len(jobs), RunLog(None))
    teacher = trainer._teacher(jobs)
    for learner in trainer.learners:
        learner.enter_epoch()
    batches = itertools.chain.from_iterable(trainer.batches.epoch(epoch) for epoch in itertools.count())

    def work() -> None:
        for batch in itertools.islice(batches, steps):
            answer = teacher(batch) if teacher is not None else None
            for learner in trainer.learners:
                learner.step(batch, answer if learner.job.teacher is not None else None)
                learner.position = (0, 0)  # the schedule does not matter here

    return work


def main() -> None:
    """Measure and print; see ``--help``."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("recipe", nargs="?", default="cifar10-subset")
    arguments.add_argument("overrides", nargs="*")
    arguments.add_argument("--rounds", type=int, default=11)
    arguments.add_argument("--steps", type=int, default=16, help="steps per measurement")
    arguments.add_argument("--workers", type=int, default=2, help="of the usual way's DataLoader")
    arguments.add_argument("--views", type=int, default=8, help="of the teacher cache")
    arguments.add_argument("--compile", action="store_true", help="also with torch.compile")
    arguments.add_argument("--bf16", action="store_true", help="also in bf16 (on a GPU it is the default)")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()

    run = Run(load_config(given.recipe, given.overrides), Path("unused"))
    with tempfile.TemporaryDirectory() as folder:
        work = variants(run, given, Path(folder))
        seconds = measure(work, given.rounds, run)
    batch, images = (
        run.config.train.batch_size,
        len(make_job(run, TEACHER, new_network(run, TEACHER), None).train),
    )
    images = run.config.data.train_subset or images
    result = {
        "recipe": given.recipe,
        "overrides": given.overrides,
        "teacher": run.config.network_of(TEACHER).backbone,
        "student": run.config.network_of("erde").backbone,
        "batch_size": batch,
        "rounds": given.rounds,
        "steps": given.steps,
        "workers_of_the_usual_way": given.workers,
        "variants": {},
        "environment": describe_machine(run.device, run.threads),
    }
    for name, values in seconds.items():
        speeds = [given.steps * batch * networks(name) / one for one in values]
        ratios = [networks(name) * base / one for base, one in zip(seconds["usual"], values, strict=True)]
        median = statistics.median(speeds)
        result["variants"][name] = {
            "images_per_second": spread(speeds),
            "times_usual": spread(ratios),
            "seconds_per_epoch": round(images / median, 2),
            "seconds_for_240_epochs": round(240 * images / median),
        }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def networks(name: str) -> int:
    """How many networks a variant trains at once."""
    return len(ARMS) if name == "erde, three arms together" else 1


def variants(run: Run, given: argparse.Namespace, folder: Path) -> dict[str, Work]:
    """What takes turns; each with networks of its own, from the same start."""

    def job(arm: str = "erde", *, teacher: Any = None, **settings: Any) -> Job:
        teacher = teacher or new_network(run, TEACHER)
        made = make_job(run, arm, new_network(run, arm), teacher)
        return dataclasses.replace(made, config=made.config.model_copy(update=settings))

    def cached(**settings: Any) -> Job:
        made = job(**settings)
        augmentation = made.augmentation.model_copy(update={"views": given.views})
        return dataclasses.replace(made, augmentation=augmentation, teacher_cache=folder)

    shared = new_network(run, TEACHER)
    found = {
        "usual": usual(job(), given.workers, given.steps),
        "erde": ours([job()], given.steps),
        "erde, teacher cache": ours([cached()], given.steps),
        "erde, three arms together": ours([job(arm, teacher=shared) for arm in ARMS], given.steps),
    }
    if given.compile:
        found["erde, compiled"] = ours([job(compile=True)], given.steps)
        found["erde, teacher cache, compiled"] = ours([cached(compile=True)], given.steps)
    if given.bf16:
        found["erde, bf16"] = ours([job(precision="bf16")], given.steps)
    return found


def measure(work: dict[str, Work], rounds: int, run: Run) -> dict[str, list[float]]:
    """Seconds of each variant in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, call in work.items():
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "lower_quartile": round(low, 3), "upper_quartile": round(high, 3)}


if __name__ == "__main__":
    main()
