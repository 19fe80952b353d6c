"""The one training loop: for teachers, students, fixed networks and every method.

One batch goes: ``data.TrainBatches`` -> :meth:`_Trainer._step` here -> ``exits.EarlyExitNetwork`` ->
a criterion of ``losses/`` -> :class:`_Meter` here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erde import checkpoint, progress
from erde.config import AugmentationConfig, DistillationConfig, LossConfig, TrainConfig, validate
from erde.cost import network_cost
from erde.data import DataSplits, TrainBatches
from erde.errors import UserError
from erde.exits import EarlyExitNetwork
from erde.files import make_folder
from erde.losses import LOSSES, ExitSettings, build_loss, cross_entropy_loss
from erde.results import Epoch
from erde.splits import TrainSplit

LAST = "last.safetensors"
FINAL = "final.safetensors"


@dataclass(frozen=True)
class Job:
    """One network to train: what the loop needs, all of it resolved."""

    name: str
    network: EarlyExitNetwork
    criterion: nn.Module
    teacher: EarlyExitNetwork | None
    train: TrainSplit
    config: TrainConfig
    augmentation: AugmentationConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    device: torch.device
    workers: int = 0

    def check(self) -> None:
        """What only shows when training starts, before it starts."""
        if self.config.batch_size > len(self.train):
            raise UserError(
                f"train.batch_size is {self.config.batch_size}, '{self.name}' trains on {len(self.train):,} images: "
                "lower the batch size"
            )
        if self.config.freeze_backbone and len(self.network.stages) == 1:
            raise UserError(
                f"train.freeze_backbone leaves nothing to train in '{self.name}', which has one exit: "
                "give it more exits, or set train.freeze_backbone=false"
            )


@dataclass
class Outcome:
    """What the loop found: one entry per epoch, and the clock (which says nothing of another machine)."""

    history: list[Epoch] = field(default_factory=list)
    seconds: float = 0.0
    images: int = 0

    @property
    def images_per_second(self) -> float:
        """Training throughput, teacher included, checkpoints excluded."""
        return self.images / self.seconds if self.seconds else 0.0


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where torch sees one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch sees no GPU here: use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def learning_rate_factor(step: int, steps: int, warmup: int, config: TrainConfig) -> float:
    """The share of the peak learning rate at ``step`` of ``steps``: a pure function, so resume needs no state.

    ``cosine`` and ``step`` rise linearly over ``warmup`` steps first; ``onecycle`` rises linearly over
    them and falls linearly to 0.
    """
    warmup = min(warmup, steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "onecycle":
        return 1 - done
    return float(config.gamma ** sum(step / steps >= milestone for milestone in config.milestones))


def train_network(job: Job, folder: Path | None = None, log: progress.RunLog | None = None) -> Outcome:
    """Train ``job.network`` in place; with a ``folder``, checkpoints stand there and training continues from them.

    Raises:
        UserError: a loss that is not finite, no memory, a full disk; the last good checkpoint is kept.
    """
    job.check()
    trained = [parameter for parameter in job.network.parameters() if parameter.requires_grad]
    try:
        return _Trainer(job, folder, log or progress.RunLog(None)).run()
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(job) from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise _out_of_memory(job) from error
        raise
    finally:
        # freeze_backbone is of this training, not of the network.
        for parameter in trained:
            parameter.requires_grad_(True)


def _out_of_memory(job: Job) -> UserError:
    return UserError(
        f"out of memory while training '{job.name}' on {job.device} with train.batch_size={job.config.batch_size}: "
        "lower the batch size, then start again (finished networks are kept with --resume)"
    )


class _Trainer:
    def __init__(self, job: Job, folder: Path | None, log: progress.RunLog) -> None:
        self.job, self.folder, self.log = job, folder, log
        self.network = job.network.to(job.device)
        if job.config.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.criterion = job.criterion.to(job.device)
        self.teacher = None
        if job.teacher is not None:
            self.teacher = job.teacher.to(job.device).eval()
            if job.config.channels_last:
                self.teacher = self.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.batches = TrainBatches(
            job.train,
            batch_size=job.config.batch_size,
            seed=job.seed,
            augmentation=job.augmentation,
            mean=job.mean,
            std=job.std,
            device=job.device,
            workers=job.workers,
        )
        self.optimizer = _build_optimizer(job)
        self.autocast = (
            job.device.type == "cuda" and job.config.precision == "auto"
        ) or job.config.precision == "bf16"
        self.outcome = Outcome()
        self.meter = _Meter()
        self.epoch, self.step_in_epoch = 0, 0
        self.saved_at = time.monotonic()

    # ------------------------------------------------------------ the loop

    def run(self) -> Outcome:
        job = self.job
        if self._restore():
            return self.outcome
        # Dropout is the only thing that draws from the global generator from here on.
        if self.epoch == 0 and self.step_in_epoch == 0:
            torch.manual_seed(job.seed)
        total = job.config.epochs * self.batches.steps
        with progress.task(job.name, total, self.epoch * self.batches.steps + self.step_in_epoch) as task:
            while self.epoch < job.config.epochs:
                self._enter_epoch()
                started, first = time.perf_counter(), self.step_in_epoch
                for images, labels in self.batches.epoch(self.epoch, first):
                    self._step(images, labels)
                    self.step_in_epoch += 1
                    if task.due():
                        task.update(
                            self.epoch * self.batches.steps + self.step_in_epoch,
                            self._describe(started, first),
                        )
                    if self._save_is_due():
                        self._clock(started, first)
                        self._save()
                        started, first = time.perf_counter(), self.step_in_epoch
                self._clock(started, first)
                self._end_epoch()
                if self._save_is_due() and self.epoch < job.config.epochs:
                    self._save()
        if self.folder is not None:
            self._save_final()
        return self.outcome

    def _step(self, images: Tensor, labels: Tensor) -> None:
        config = self.job.config
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        with torch.autocast(self.job.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            logits = (
                self.network.forward_final(images)[None] if self.phase == "backbone" else self.network(images)
            )
            teacher_logits = None
            if self.teacher is not None and self.phase == "joint":
                with torch.inference_mode():
                    teacher_logits = self.teacher(images)
                # Autograd may save what it sees, but not tensors of inference mode.
                teacher_logits = teacher_logits.clone()
        parts = (
            cross_entropy_loss(logits, labels)
            if self.phase == "backbone"
            else self.criterion(logits, teacher_logits, labels)
        )
        self.optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        if config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self._trained_parameters(), config.gradient_clip)
        self.optimizer.step()
        self.meter.add(parts, logits, labels)

    @property
    def phase(self) -> str:
        return "backbone" if self.epoch < self.job.config.backbone_epochs else "joint"

    def _enter_epoch(self) -> None:
        self.network.train()
        if self.job.config.freeze_backbone and self.phase == "joint":
            # Frozen also means that batch norm keeps its running statistics.
            self.network.stages.eval()
            self.network.heads[-1].eval()
            for parameter in self.network.backbone_parameters():
                parameter.requires_grad_(False)

    def _learning_rate(self) -> float:
        config = self.job.config
        first = 0 if self.phase == "backbone" else config.backbone_epochs
        last = config.backbone_epochs if self.phase == "backbone" else config.epochs
        steps = self.batches.steps
        step = (self.epoch - first) * steps + self.step_in_epoch
        warmup = round(config.warmup_epochs * steps)
        return config.learning_rate * learning_rate_factor(step, (last - first) * steps, warmup, config)

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [*self.network.parameters(), *self.criterion.parameters()]

    def _clock(self, started: float, first: int) -> None:
        self.outcome.seconds += time.perf_counter() - started
        self.outcome.images += (self.step_in_epoch - first) * self.batches.batch_size

    def _describe(self, started: float, first: int) -> str:
        parts = self._finite_means()
        done = (self.step_in_epoch - first) * self.batches.batch_size
        speed = done / (time.perf_counter() - started)
        shown = []
        for name, value in parts.items():
            numbers = value if isinstance(value, list) else [value]
            shown.append(f"{name} " + "/".join(f"{number:.3f}" for number in numbers))
        return f"epoch {self.epoch + 1}/{self.job.config.epochs}  {speed:,.0f} images/s  " + "  ".join(shown)

    def _finite_means(self) -> dict[str, float | list[float]]:
        means = self.meter.means()
        loss = means["loss"]
        assert isinstance(loss, float)
        if not math.isfinite(loss):
            saved = self.folder / LAST if self.folder else None
            kept = f"; the last good checkpoint is {saved}" if saved and saved.exists() else ""
            raise UserError(
                f"the loss of '{self.job.name}' became {loss} in epoch {self.epoch + 1}: lower train.learning_rate "
                f"or set train.gradient_clip=1{kept}"
            )
        return means

    def _end_epoch(self) -> None:
        self.step_in_epoch = self.batches.steps - 1  # the learning rate of the last step
        entry = Epoch(
            epoch=self.epoch + 1,
            phase="backbone" if self.phase == "backbone" else "joint",
            learning_rate=self._learning_rate(),
            parts=self._finite_means(),
        )
        self.outcome.history.append(entry)
        self.meter = _Meter()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        speed = round(self.outcome.images_per_second, 1)
        self.log.write("epoch", arm=self.job.name, images_per_second=speed, **entry.model_dump())

    # ------------------------------------------------------------ checkpoints

    def _save_is_due(self) -> bool:
        if self.folder is None or time.monotonic() - self.saved_at < self.job.config.checkpoint_seconds:
            return False
        # The step after the last belongs to the next epoch: the epoch's end has its own bookkeeping.
        return self.step_in_epoch < self.batches.steps

    def _save(self) -> None:
        assert self.folder is not None
        if self.meter.steps:
            self._finite_means()
        tensors = {
            **checkpoint.with_prefix("network", self.network.state_dict()),
            **checkpoint.with_prefix("optimizer", checkpoint.optimizer_tensors(self.optimizer)),
            **checkpoint.with_prefix("criterion", self.criterion.state_dict()),
            "generator.cpu": torch.get_rng_state(),
            "meter": self.meter.sums if self.meter.sums is not None else torch.zeros(0),
        }
        if self.job.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(self.job.device)
        checkpoint.save(self.folder / LAST, tensors, self._state())
        self.saved_at = time.monotonic()
        self.log.write("checkpoint", arm=self.job.name, epoch=self.epoch, step=self.step_in_epoch)

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step_in_epoch,
            "meter": {"steps": self.meter.steps, "layout": self.meter.layout},
            "history": [entry.model_dump() for entry in self.outcome.history],
            "seconds": self.outcome.seconds,
            "images": self.outcome.images,
        }

    def _save_final(self) -> None:
        assert self.folder is not None
        tensors = {
            **checkpoint.with_prefix("network", self.network.state_dict()),
            **checkpoint.with_prefix("criterion", self.criterion.state_dict()),
        }
        checkpoint.save(self.folder / FINAL, tensors, self._state())
        (self.folder / LAST).unlink(missing_ok=True)
        self.log.write("trained", arm=self.job.name, seconds=round(self.outcome.seconds, 2))

    def _restore(self) -> bool:
        """Continue from the folder's checkpoint, if there is one; True where training had ended."""
        if self.folder is None:
            return False
        make_folder(self.folder)
        finished = (self.folder / FINAL).exists()
        path = self.folder / (FINAL if finished else LAST)
        if not path.exists():
            return False
        tensors, state = checkpoint.load(path)
        try:
            self.network.load_state_dict(checkpoint.under_prefix("network", tensors))
            self.criterion.load_state_dict(checkpoint.under_prefix("criterion", tensors))
            self.epoch, self.step_in_epoch = state["epoch"], state["step"]
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{path} is not a checkpoint of this network and loss: train in another folder, or remove it"
            ) from error
        self.outcome = Outcome([Epoch(**one) for one in state["history"]], state["seconds"], state["images"])
        if finished:
            return True
        checkpoint.restore_optimizer(self.optimizer, checkpoint.under_prefix("optimizer", tensors))
        sums = tensors["meter"].to(self.job.device) if state["meter"]["steps"] else None
        self.meter = _Meter(sums, state["meter"]["steps"], state["meter"]["layout"])
        torch.set_rng_state(tensors["generator.cpu"])
        if self.job.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["generator.cuda"], self.job.device)
        self.log.write("resumed", arm=self.job.name, epoch=self.epoch, step=self.step_in_epoch)
        return False


class _Meter:
    """Sums of the loss parts and of the exits' training accuracy, kept on the device until asked for."""

    def __init__(
        self, sums: Tensor | None = None, steps: int = 0, layout: list[list[Any]] | None = None
    ) -> None:
        self.sums, self.steps = sums, steps
        # [name, number of values, or 0 for a scalar], in the order of ``sums``.
        self.layout: list[list[Any]] = layout or []

    def add(self, parts: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        accuracy = (logits.detach().argmax(dim=-1) == labels).double().mean(dim=1)
        named = {**parts, "accuracy": accuracy}
        row = torch.cat([part.detach().reshape(-1).double() for part in named.values()])
        if self.sums is None:
            self.sums = torch.zeros_like(row)
            self.layout = [[name, part.numel() if part.ndim else 0] for name, part in named.items()]
        self.sums += row
        self.steps += 1

    def means(self) -> dict[str, float | list[float]]:
        """Means over the steps so far; the only place that waits for the device."""
        assert self.sums is not None
        values = (self.sums / self.steps).tolist()
        means: dict[str, float | list[float]] = {}
        for name, count in self.layout:
            means[name] = values[:count] if count else values[0]
            values = values[max(1, count) :]
        return means


def _build_optimizer(job: Job) -> torch.optim.Optimizer:
    config = job.config
    parameters = [*job.network.parameters(), *job.criterion.parameters()]
    fused = job.device.type == "cuda" or None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
        )
    return torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=fused,
    )


# ---------------------------------------------------------------- for use from Python


def train(
    network: EarlyExitNetwork,
    data: DataSplits,
    *,
    seed: int = 0,
    device: str = "auto",
    folder: str | Path | None = None,
    augmentation: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Epoch]:
    """Train all exits with joint cross-entropy on ``data.train``; ``settings`` are keys of ``train:``.

    Trains in place and returns one entry per epoch. With a ``folder``, a killed training continues there.
    """
    return _fit(network, None, data, "ce", {}, seed, device, folder, augmentation, settings)


def distill(
    network: EarlyExitNetwork,
    teacher: EarlyExitNetwork,
    data: DataSplits,
    *,
    loss: str | Mapping[str, Any] = "erde",
    distillation: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    folder: str | Path | None = None,
    augmentation: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Epoch]:
    """Train ``network`` from ``teacher``, exit by exit.

    ``loss`` is a name, or a mapping with ``name`` and the loss's knobs; ``distillation`` holds keys of
    ``distillation:`` (alpha, temperature, ...), ``settings`` keys of ``train:``.
    """
    return _fit(
        network, teacher, data, loss, distillation or {}, seed, device, folder, augmentation, settings
    )


def _fit(
    network: EarlyExitNetwork,
    teacher: EarlyExitNetwork | None,
    data: DataSplits,
    loss: str | Mapping[str, Any],
    distillation: Mapping[str, Any],
    seed: int,
    device: str,
    folder: str | Path | None,
    augmentation: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> list[Epoch]:
    from erde.config import resolve_loss

    config = validate(TrainConfig, settings, "train.")
    job = Job(
        name="network",
        network=network,
        criterion=build_criterion(
            resolve_loss(loss),
            validate(DistillationConfig, distillation, "distillation."),
            network,
            teacher,
            data,
            label_smoothing=config.label_smoothing,
        ),
        teacher=teacher,
        train=data.train,
        config=config,
        augmentation=validate(AugmentationConfig, augmentation or {}, "augmentation."),
        mean=data.mean,
        std=data.std,
        seed=seed,
        device=choose_device(device),
    )
    return train_network(job, Path(folder) if folder is not None else None).history


def build_criterion(
    loss: LossConfig,
    distillation: DistillationConfig,
    network: EarlyExitNetwork,
    teacher: EarlyExitNetwork | None,
    data: DataSplits,
    *,
    label_smoothing: float = 0.0,
    train_images: int | None = None,
) -> nn.Module:
    """The criterion of one arm, with the shared settings resolved for its network and its teacher.

    ``label_smoothing`` is that of ``train:``, for cross-entropy alone; ``train_images`` is how many the arm
    sees, all of train where it is None.
    """
    if LOSSES[loss.name].needs_teacher and teacher is None:
        raise UserError(f"the loss '{loss.name}' needs a teacher; without one use 'ce'")
    settings = ExitSettings.resolve(
        distillation,
        len(data.classes),
        network_cost(network, data.input_size).macs,
        network_cost(teacher, data.input_size).macs if teacher is not None else None,
        label_smoothing=label_smoothing if loss.name == "ce" else distillation.label_smoothing,
        student_shapes=network.feature_shapes(data.input_size),
        teacher_shapes=teacher.feature_shapes(data.input_size) if teacher is not None else (),
        train_images=len(data.train) if train_images is None else train_images,
    )
    return build_loss(loss, settings)
