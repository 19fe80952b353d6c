"""The one training loop: for teachers, students, fixed networks and every method.

One batch goes: ``data.TrainBatches`` -> :meth:`_Trainer._epoch` here -> ``learner.Learner.step`` ->
``network.EarlyExitNetwork`` -> a criterion of ``losses/``. Several networks with the same batches and the
same teacher may go through it together.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erde.common import environment, progress
from erde.common.errors import UserError
from erde.data.batches import TrainBatches
from erde.data.streaming import explain_killed_worker
from erde.training import parallel
from erde.training.job import Job, Outcome
from erde.training.learner import Learner
from erde.training.teacher import Teacher
from erde.training.teacher_cache import CachedTeacher

# Whether freed memory may be kept, for the whole process and to its end: the command line's process is its own.
keeps_memory = False
# Of malloc.h.
MALLOPT = {"M_TRIM_THRESHOLD": -1, "M_TOP_PAD": -2, "M_MMAP_MAX": -4}


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where torch sees one; of several processes each takes its own."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch sees no GPU here: use device=cpu or device=auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return (
        torch.device("cuda", torch.cuda.current_device())
        if parallel.processes() > 1
        else torch.device("cuda")
    )


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """The environment of a run, with the name of its GPU: see :func:`erde.common.environment.describe`."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return environment.describe(str(device), threads, gpu)


def train_network(job: Job, folder: Path | None = None, log: progress.RunLog | None = None) -> Outcome:
    """Train ``job.network`` in place; with a ``folder``, checkpoints stand there and training continues from them.

    Raises:
        UserError: a loss that is not finite, no memory, a full disk, a killed worker; the last good checkpoint is kept.
    """
    return train_together([job], [folder], log)[0]


def train_together(
    jobs: Sequence[Job],
    folders: Sequence[Path | None],
    log: progress.RunLog | None = None,
    place: str = "",
) -> list[Outcome]:
    """Train several networks at once: each batch is made, and the teacher asked, once for all of them.

    Each ends as if it had been trained alone: bit for bit on a CPU, within rounding on a GPU. The jobs must
    agree in their batches, their schedule and their teacher. ``place`` stands in the progress line, "arm 2 of 3".

    Raises:
        UserError: as :func:`train_network`.
    """
    for job in jobs:
        job.check()
    first = jobs[0]
    for job in jobs[1:]:
        assert np.array_equal(job.train.labels, first.train.labels)
        assert (job.seed, job.augmentation, job.device) == (first.seed, first.augmentation, first.device)
        assert (job.config.epochs, job.config.batch_size) == (first.config.epochs, first.config.batch_size)
    if keeps_memory and first.device.type == "cpu" and isinstance(first.train.images, np.ndarray):
        # Not where images are decoded meanwhile: there, buffers of all sizes would pile up.
        _keep_memory()
    trainable = [
        parameter for job in jobs for parameter in job.network.parameters() if parameter.requires_grad
    ]
    try:
        return _Trainer(jobs, folders, log or progress.RunLog(None), place).run()
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(jobs) from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise _out_of_memory(jobs) from error
        explain_killed_worker(error)
        raise
    finally:
        # freeze_backbone belongs to this training, not to the network.
        for parameter in trainable:
            parameter.requires_grad_(True)


def _keep_memory() -> None:
    """Ask glibc, where it is there, to keep freed memory.

    Every step allocates and frees activations of some megabytes. By default the system takes each back and maps it
    anew, page by page: about a tenth of a step on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in (("M_MMAP_MAX", 0), ("M_TRIM_THRESHOLD", 2**31 - 1), ("M_TOP_PAD", 2**26)):
            libc.mallopt(MALLOPT[parameter], value)


def _out_of_memory(jobs: Sequence[Job]) -> UserError:
    names, first = " and ".join(f"'{job.name}'" for job in jobs), jobs[0]
    remedy = "lower the batch size or raise train.accumulate, in a new run"
    if len(jobs) > 1:
        remedy = f"continue with train.together=false --resume, or {remedy}"
    return UserError(
        f"out of memory while training {names} on {first.device} with train.batch_size={first.config.batch_size}: {remedy}"
    )


class _Trainer:
    def __init__(
        self, jobs: Sequence[Job], folders: Sequence[Path | None], log: progress.RunLog, place: str = ""
    ) -> None:
        self.place = place
        first = jobs[0]
        self.config = first.config
        if self.config.compile:
            _check_compile(first.device)
        self.batches = TrainBatches(
            first.train,
            batch_size=first.config.batch_size,
            seed=first.seed,
            augmentation=first.augmentation,
            mean=first.mean,
            std=first.std,
            device=first.device,
            workers=first.workers,
            share=(parallel.rank(), parallel.processes()),
        )
        self.learners = [
            Learner(job, folder, log, self.batches.steps) for job, folder in zip(jobs, folders, strict=True)
        ]
        self.checkpoints = all(folder is not None for folder in folders)
        self.saved_at = time.monotonic()

    # ------------------------------------------------------------ the loop

    def run(self) -> list[Outcome]:
        parallel.wait()
        waiting = [learner for learner in self.learners if not learner.restore()]
        if waiting:
            self._train(waiting)
        parallel.wait()
        return [learner.outcome for learner in self.learners]

    def _train(self, learners: list[Learner]) -> None:
        teacher = self._teacher([learner.job for learner in learners])
        # After a kill in the middle of writing they may stand at different steps. A network with one exit has no heads
        # to refit, and waits for the others at its end.
        start, first = min(
            (learner.position for learner in learners if learner.position[0] < learner.epochs), default=(0, 0)
        )
        name, steps = " + ".join(learner.job.name for learner in learners), self.batches.steps
        if self.place:
            name = f"{name} ({self.place})"
        epochs = max(learner.epochs for learner in learners)
        with progress.task(name, epochs * steps, start * steps + first) as task:
            for epoch in range(start, epochs):
                active = [learner for learner in learners if learner.position[0] == epoch < learner.epochs]
                if active:
                    self._epoch(active, epoch, first, teacher, task)
                first = 0
                if self._save_is_due() and epoch + 1 < epochs:
                    self._save(learners)
        for learner in learners:
            learner.finish()

    def _epoch(
        self,
        learners: list[Learner],
        epoch: int,
        first: int,
        teacher: Teacher | CachedTeacher | None,
        task: progress.Task,
    ) -> None:
        for learner in learners:
            learner.enter_epoch()
        clock = _Clock(learners, self.batches.batch_size)
        for step, batch in enumerate(self.batches.epoch(epoch, first), start=first):
            active = [learner for learner in learners if learner.position[1] == step]
            asked = any(learner.asks_teacher for learner in active)
            answer = teacher(batch) if asked and teacher is not None else None
            for learner in active:
                learner.step(batch, answer if learner.asks_teacher else None)
            clock.steps += 1
            if task.due():
                done = epoch * self.batches.steps + step + 1
                task.update(done, _describe(learners, epoch, clock))
            # After the last step the epoch's end has its own bookkeeping.
            if step + 1 < self.batches.steps and self._save_is_due():
                clock.stop()
                self._save(learners)
                clock = _Clock(learners, self.batches.batch_size)
        clock.stop()
        for learner in learners:
            learner.end_epoch(self.batches)

    def _teacher(self, jobs: list[Job]) -> Teacher | CachedTeacher | None:
        asking = [job for job in jobs if job.teacher is not None]
        if not asking:
            return None
        first = asking[0]
        assert first.teacher is not None
        assert all(job.teacher is first.teacher for job in asking)
        features = any("teacher_features" in job.extras for job in asking)
        teacher = Teacher(
            first.teacher,
            first.device,
            features=features,
            autocast=first.autocast,
            channels_last=first.config.channels_last,
            compiled=first.config.compile,
        )
        if first.teacher_cache is None:
            return teacher
        identity = {"train": first.train.fingerprint(), "mean": list(first.mean), "std": list(first.std)}
        return CachedTeacher(teacher, self.batches, first.teacher_cache, len(first.train), identity)

    # ------------------------------------------------------------ checkpoints

    def _save_is_due(self) -> bool:
        if not self.checkpoints or not parallel.is_first():
            return False
        return time.monotonic() - self.saved_at >= self.config.checkpoint_seconds

    def _save(self, learners: Sequence[Learner]) -> None:
        for learner in learners:
            learner.save()
        self.saved_at = time.monotonic()


class _Clock:
    """Counts the seconds and images of a stretch of steps, for the networks that took part."""

    def __init__(self, learners: Sequence[Learner], batch_size: int) -> None:
        self.steps = 0
        self._learners, self._batch_size, self._started = learners, batch_size, time.perf_counter()

    def images_per_second(self) -> float:
        return self.steps * self._batch_size / (time.perf_counter() - self._started)

    def stop(self) -> None:
        seconds = time.perf_counter() - self._started
        for learner in self._learners:
            # Together they share the time: each has its part of it.
            learner.outcome.seconds += seconds / len(self._learners)
            learner.outcome.images += self.steps * self._batch_size


def _describe(learners: Sequence[Learner], epoch: int, clock: _Clock) -> str:
    phase = learners[0].phase
    refit = "refit of the heads, " if phase.name == "refit" else ""
    texts = [f"{refit}epoch {epoch + 1}/{learners[0].epochs}  {clock.images_per_second():,.0f} images/s"]
    for learner in learners:
        means = learner.means()
        if len(learners) > 1:
            texts.append(f"{learner.job.name} {means['loss']:.3f}")
            continue
        for name, value in means.items():
            if name.startswith("gradient_norm"):
                continue  # in the history
            numbers = value if isinstance(value, list) else [value]
            texts.append(f"{name} " + "/".join(f"{number:.3f}" for number in numbers))
    return "  ".join(texts)


def _check_compile(device: torch.device) -> None:
    """Raise, before anything is trained, if ``torch.compile`` cannot compile a tiny function."""
    try:
        torch.compile(lambda x: (x + 1).sum())(torch.zeros(8, device=device))
    except Exception as error:  # compilers fail in many ways
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(
            f"train.compile is on, and torch.compile does not work here ({reason[:200]}): install a C++ compiler "
            "(on a GPU also Triton), or set train.compile=false"
        ) from error
