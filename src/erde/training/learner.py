"""One network in training: its step, its optimiser and its checkpoints."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from erde.common import progress
from erde.common.errors import UserError
from erde.common.files import make_folder
from erde.common.history import Epoch, Health
from erde.data.batches import Batch, TrainBatches
from erde.losses import cross_entropy_loss
from erde.losses.base import Criterion, reach_weights
from erde.networks import checkpoint
from erde.networks.gradients import scale_gradient
from erde.networks.heads import reset_head
from erde.recipe.schema import TrainConfig
from erde.training import parallel
from erde.training.health import IMAGES, measure_health
from erde.training.job import FINAL, LAST, Job, Outcome
from erde.training.meter import Meter
from erde.training.scalars import Scalars
from erde.training.teacher import Answer


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


PhaseName = Literal["backbone", "joint", "refit"]


@dataclass(frozen=True)
class Phase:
    """The epochs from ``first`` up to ``end``, with a learning rate schedule of their own.

    ``backbone``: the final exit alone, by cross-entropy. ``joint``: all exits, by the criterion. ``refit``: new
    intermediate heads, by the criterion too, on the backbone that the phases before have left; the final exit's answers
    stay as they are.
    """

    name: PhaseName
    first: int
    end: int

    @classmethod
    def all_of(cls, config: TrainConfig, exits: int) -> tuple[Phase, ...]:
        """The phases of a network with so many exits, those without epochs left out."""
        bounds: tuple[tuple[PhaseName, int], ...] = (
            ("backbone", config.backbone_epochs),
            ("joint", config.epochs),
            ("refit", config.epochs + (config.refit_heads if exits > 1 else 0)),
        )
        starts = (0, *(end for _, end in bounds))
        return tuple(
            cls(name, first, end) for first, (name, end) in zip(starts, bounds, strict=False) if end > first
        )


class _Step(nn.Module):
    """Network and criterion as one module, images to loss parts: what is compiled, and shared by processes."""

    def __init__(self, job: Job, phase: PhaseName) -> None:
        super().__init__()
        self.network, self.criterion, self.phase = job.network, job.criterion, phase
        self.autocast, self.device_type = job.autocast, job.device.type
        self.with_features = "student_features" in job.extras
        self.equilibrium = job.config.gradient_equilibrium
        self.by_reach = job.config.image_weights == "reached"

    def forward(
        self, images: Tensor, labels: Tensor, teacher_logits: Tensor | None, extras: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The parts, and the logits (E, B, K)."""
        with torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.autocast):
            if self.phase == "backbone":
                logits = self.network.forward_final(images)[None]
            elif self.with_features or self.equilibrium:
                logits, features = self.network.forward_with_features(images, self.equilibrium)
                if self.with_features:
                    extras = {**extras, "student_features": features}
            else:
                logits = self.network(images)
        if self.phase == "backbone":
            # A method's loss needs its exits; the arm's label smoothing holds here too.
            smoothing = getattr(self.criterion, "label_smoothing", 0.0)
            return cross_entropy_loss(logits, labels, label_smoothing=smoothing), logits
        weighed = logits
        if self.by_reach:
            # Losses are means over images of terms of their own logits: a factor of the gradient is a weight of the image.
            weights = reach_weights(logits).unsqueeze(-1)
            weighed = scale_gradient(logits, weights.to(logits.dtype))
        return self.criterion(weighed, teacher_logits, labels, **extras), logits


class Learner:
    """The state of one network in training; several learners may share batches and teacher.

    ``position`` is the (epoch, step) that comes next.
    """

    def __init__(self, job: Job, folder: Path | None, log: progress.RunLog, steps: int) -> None:
        self.job, self.folder, self.log, self._steps = job, folder, log, steps
        self.network = job.network.to(job.device)
        if job.config.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parallel.synchronise_batch_norm(self.network, job.device)
        self.criterion = job.criterion.to(job.device)
        self.held_out = None if job.held_out_logits is None else job.held_out_logits.to(job.device)
        self.optimizer = _build_optimizer(job)
        self.average: dict[str, Tensor] | None = None
        if job.config.ema is not None:
            self.average = self._copy()
        self.outcome = Outcome()
        self.meter = Meter()
        self.position = (0, 0)
        self.scalars = Scalars(job.scalars if parallel.is_first() else None)
        self.phases = Phase.all_of(job.config, len(job.network.stages))
        self._model: tuple[PhaseName, nn.Module] | None = None

    # ------------------------------------------------------------ one epoch, one step

    @property
    def phase(self) -> Phase:
        """The phase of the epoch that is next, or of the last one."""
        return next((phase for phase in self.phases if self.position[0] < phase.end), self.phases[-1])

    @property
    def epochs(self) -> int:
        """The number of epochs of all phases."""
        return self.phases[-1].end

    @property
    def asks_teacher(self) -> bool:
        """Whether this epoch needs the teacher's answers."""
        return self.job.teacher is not None and self.phase.name != "backbone"

    def enter_epoch(self) -> None:
        """Set network and criterion to the mode of the phase."""
        phase = self.phase
        if phase.name == "refit" and self.position == (phase.first, 0):
            self._start_refit()
        self.network.train()
        self.criterion.train()
        if phase.name == "refit" or (self.job.config.freeze_backbone and phase.name == "joint"):
            # Frozen also means that batch norm keeps its running statistics.
            self.network.stages.eval()
            self.network.heads[-1].eval()
            for parameter in self.network.backbone_parameters():
                parameter.requires_grad_(False)
        if self._model is None or self._model[0] != phase.name:
            # The first phase trains neither heads nor the criterion's own parameters.
            unused = phase.name == "backbone"
            model = parallel.wrap(_Step(self.job, phase.name), self.job.device, unused)
            if self.job.config.compile:
                model.compile(dynamic=False)
            self._model = phase.name, model

    def _start_refit(self) -> None:
        """Reset the intermediate heads, to the same start for every arm, and the optimiser with them."""
        devices = [self.job.device] if self.job.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.job.seed)
            for head in self.network.heads[:-1]:
                reset_head(head)
        self.optimizer = _build_optimizer(self.job)

    def _use_average(self) -> None:
        """Give the network its averaged weights, if there are any: the backbone's phase, or the joint one, is done.

        The joint phase starts an average of its own: that of before has the heads as they were drawn.
        """
        if self.average is not None:
            self.network.load_state_dict(self.average)
            self.average = self._copy() if self.phase.name == "backbone" else None

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.network.state_dict().items()}

    def step(self, batch: Batch, answer: Answer | None) -> None:
        """One step of the optimiser on a whole batch."""
        config = self.job.config
        assert self._model is not None
        model = self._model[1]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        # Dropout is a function of seed, epoch and step: checkpoints need no random state, and networks draw the
        # same numbers together as alone.
        (torch.cuda if self.job.device.type == "cuda" else torch.default_generator).manual_seed(batch.seed)
        self.optimizer.zero_grad(set_to_none=True)
        measured = []
        for number, arguments in enumerate(self._split(batch, answer), start=1):
            with (
                parallel.without_averaging(model) if number < config.accumulate else contextlib.nullcontext()
            ):
                parts, logits = model(*arguments)
                (parts["loss"] / config.accumulate).backward()
            accuracy = (logits.detach().argmax(dim=-1) == arguments[1]).double().mean(dim=1)
            measured.append({**parts, "accuracy": accuracy})
        means = {
            name: torch.stack([parts[name].detach() for parts in measured]).mean(dim=0)
            for name in measured[0]
        }
        self.meter.add({**means, **self._gradient_norms()})
        if config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(
                [*self.network.parameters(), *self.criterion.parameters()], config.gradient_clip
            )
        self.optimizer.step()
        if isinstance(self.criterion, Criterion) and self.phase.name != "backbone":
            self.criterion.end_step(config.accumulate)
        if self.average is not None:
            self._update_average()
        self.position = (self.position[0], self.position[1] + 1)

    def _gradient_norms(self) -> dict[str, Tensor]:
        """Norms before clipping: of each intermediate head (E-1,), and of the rest of the network unless it is frozen."""
        heads, trunk = self.network.heads[:-1], list(self.network.backbone_parameters())
        norms = {}
        if len(heads) and self.phase.name != "backbone":
            norms["gradient_norm_heads"] = torch.stack([_gradient_norm(head.parameters()) for head in heads])
        if trunk[0].requires_grad:
            norms["gradient_norm_trunk"] = _gradient_norm(trunk)
        return norms

    def _split(self, batch: Batch, answer: Answer | None) -> list[tuple[Any, ...]]:
        """The arguments of the step: one set per part of the batch, of which there are ``accumulate``."""
        calls = []
        size = len(batch.labels) // self.job.config.accumulate
        for first in range(0, len(batch.labels), size):
            rows = slice(first, first + size)
            extras: dict[str, Any] = {}
            if self.phase.name != "backbone":
                if "indices" in self.job.extras:
                    extras["indices"] = batch.indices[rows].to(self.job.device, non_blocking=True)
                if "held_out_logits" in self.job.extras:
                    assert self.held_out is not None
                    indices = batch.indices[rows].to(self.job.device, non_blocking=True)
                    extras["held_out_logits"] = self.held_out[indices].transpose(0, 1)
                if "teacher_features" in self.job.extras:
                    assert answer is not None
                    extras["teacher_features"] = [features[rows] for features in answer.features]
            teacher_logits = None if answer is None else answer.logits[:, rows]
            images = batch.images[rows]
            if not self.job.config.channels_last:
                images = images.contiguous()
            calls.append((images, batch.labels[rows], teacher_logits, extras))
        return calls

    def _update_average(self) -> None:
        """``average += (1 - decay) (weights - average)``; early in a phase the decay is ``(1 + t) / (10 + t)``."""
        assert self.average is not None
        assert self.job.config.ema is not None
        done = (self.position[0] - self.phase.first) * self._steps + self.position[1]
        decay = min(self.job.config.ema, (1 + done) / (10 + done))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)
                else:
                    self.average[name].copy_(value)

    def learning_rate(self) -> float:
        """The learning rate of the step at ``position``."""
        config = self.job.config
        epoch, step = self.position
        phase = self.phase
        warmup = round(config.warmup_epochs * self._steps)
        done, steps = (epoch - phase.first) * self._steps + step, (phase.end - phase.first) * self._steps
        return config.learning_rate * learning_rate_factor(done, steps, warmup, config)

    def end_epoch(self, batches: TrainBatches) -> None:
        """Record the epoch's means, at the end of a phase also the heads' health, and move on to the next epoch."""
        epoch, phase = self.position[0], self.phase
        ends = epoch + 1 == phase.end and phase.name != "backbone"
        if epoch + 1 == phase.end:
            self._use_average()
        self.position = (epoch, self._steps - 1)  # the learning rate of the last step
        entry = Epoch(
            epoch=epoch + 1,
            phase=phase.name,
            learning_rate=self.learning_rate(),
            parts=self.means(),
            health=self._health(batches) if ends and len(self.network.stages) > 1 else None,
        )
        self.outcome.history.append(entry)
        if entry.health is not None:
            when = "refitted heads" if phase.name == "refit" else "heads"
            progress.say(f"{self.job.name}: {when}: {entry.health.line()}")
        self.meter, self.position = Meter(), (epoch + 1, 0)
        speed = round(self.outcome.images_per_second, 1)
        self.log.write("epoch", arm=self.job.name, images_per_second=speed, **entry.model_dump())
        self.scalars.write(entry, speed)

    def _health(self, batches: TrainBatches) -> Health:
        images = np.random.default_rng(self.job.seed).permutation(len(self.job.train))[:IMAGES]
        size = min(batches.batch_size, len(images))
        chunks = images[: len(images) // size * size].reshape(-1, size)
        return measure_health(self.network, batches.plain(chunks))

    def means(self) -> dict[str, float | list[float]]:
        """The means of the epoch so far.

        Raises:
            UserError: the loss is not finite.
        """
        means = self.meter.means()
        loss = means["loss"]
        assert isinstance(loss, float)
        if not math.isfinite(loss):
            saved = self.folder / LAST if self.folder else None
            checkpoint_hint = f"; the last good checkpoint is {saved}" if saved and saved.exists() else ""
            raise UserError(
                f"the loss of '{self.job.name}' became {loss} in epoch {self.position[0] + 1}: lower train.learning_rate "
                f"or set train.gradient_clip=1{checkpoint_hint}"
            )
        return means

    # ------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write a checkpoint from which training continues bit for bit; only the first process writes."""
        assert self.folder is not None
        if self.meter.steps:
            self.means()
        tensors = {
            **checkpoint.with_prefix("network", self.network.state_dict()),
            **checkpoint.with_prefix("optimizer", checkpoint.optimizer_tensors(self.optimizer)),
            **checkpoint.with_prefix("criterion", self.criterion.state_dict()),
            **checkpoint.with_prefix("average", self.average or {}),
            "meter": self.meter.sums if self.meter.sums is not None else torch.zeros(0),
        }
        checkpoint.save(self.folder / LAST, tensors, self._state())
        self.log.write("checkpoint", arm=self.job.name, epoch=self.position[0], step=self.position[1])

    def finish(self) -> None:
        """Write the final file."""
        self.scalars.close()
        if self.folder is not None and parallel.is_first():
            tensors = {
                **checkpoint.with_prefix("network", self.network.state_dict()),
                **checkpoint.with_prefix("criterion", self.criterion.state_dict()),
            }
            checkpoint.save(self.folder / FINAL, tensors, self._state())
            (self.folder / LAST).unlink(missing_ok=True)
        self.log.write("trained", arm=self.job.name, seconds=round(self.outcome.seconds, 2))

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.position[0],
            "step": self.position[1],
            "meter": {"steps": self.meter.steps, "layout": self.meter.layout},
            "history": [entry.model_dump() for entry in self.outcome.history],
            "seconds": self.outcome.seconds,
            "images": self.outcome.images,
            "boosted": checkpoint.is_boosted(self.network),
        }

    def restore(self) -> bool:
        """Continue from the folder's checkpoint, if there is one; True where training had ended."""
        if self.folder is None:
            return False
        finished = (self.folder / FINAL).exists()
        if parallel.is_first():
            make_folder(self.folder)
            if finished:
                # A kill just after the final file was written left it.
                (self.folder / LAST).unlink(missing_ok=True)
        path = self.folder / (FINAL if finished else LAST)
        if not path.exists():
            return False
        tensors, state = checkpoint.load(path)
        checkpoint.check_boosted(path, self.network, state)
        try:
            self.network.load_state_dict(checkpoint.under_prefix("network", tensors))
            self.criterion.load_state_dict(checkpoint.under_prefix("criterion", tensors))
            self.position = state["epoch"], state["step"]
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{path} is not a checkpoint of this network and loss: train in another folder, or remove it"
            ) from error
        self.outcome = Outcome(
            [Epoch(**entry) for entry in state["history"]], state["seconds"], state["images"]
        )
        if finished:
            return True
        checkpoint.restore_optimizer(self.optimizer, checkpoint.under_prefix("optimizer", tensors))
        # None without ema, and once the joint phase is done.
        average = checkpoint.under_prefix("average", tensors)
        self.average = {name: value.to(self.job.device) for name, value in average.items()} or None
        sums = tensors["meter"].to(self.job.device) if state["meter"]["steps"] else None
        self.meter = Meter(sums, state["meter"]["steps"], state["meter"]["layout"])
        self.log.write("resumed", arm=self.job.name, epoch=self.position[0], step=self.position[1])
        return False


def _gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)


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
