"""A training job: a network, its images and settings; and its outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from erde.common.errors import UserError
from erde.common.history import Epoch
from erde.common.splits import TrainSplit
from erde.networks.network import EarlyExitNetwork
from erde.recipe.losses import Extra
from erde.recipe.schema import AugmentationConfig, TrainConfig
from erde.training import parallel

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
    extras: tuple[Extra, ...] = ()  # what the criterion asks for beyond logits and labels
    teacher_cache: Path | None = None
    scalars: Path | None = None  # the folder of TensorBoard's files
    held_out_logits: Tensor | None = None  # (N, Et, K), of teachers that were not trained on the image

    def check(self) -> None:
        """Raise if settings, images and network do not fit each other."""
        config = self.config
        if config.batch_size > len(self.train):
            raise UserError(
                f"train.batch_size is {config.batch_size}, '{self.name}' trains on {len(self.train):,} images: "
                "lower the batch size"
            )
        parallel.check_batch(config.batch_size)
        if config.batch_size // parallel.processes() % config.accumulate:
            raise UserError(
                f"train.accumulate is {config.accumulate}, which does not divide a batch of "
                f"{config.batch_size // parallel.processes()} images a process: train.batch_size is the whole batch"
            )
        if config.freeze_backbone and len(self.network.stages) == 1:
            raise UserError(
                f"train.freeze_backbone leaves nothing to train in '{self.name}', which has one exit: "
                "give it more exits, or set train.freeze_backbone=false"
            )

        if config.image_weights != "equal" and "student_features" in self.extras:
            raise UserError(
                f"train.image_weights={config.image_weights} weighs images by their logits, and the loss of '{self.name}' "
                "compares features too: leave one of the two out"
            )
        if self.network.boosted and len(self.network.stages) > 1:
            for key in ("backbone_epochs", "freeze_backbone", "refit_heads"):
                if getattr(config, key):
                    raise UserError(
                        f"train.{key} and boosted exits do not go together in '{self.name}': boosted exits learn from each "
                        "other's answers, so all are trained at once; leave one of the two out"
                    )

    @property
    def autocast(self) -> bool:
        """Whether networks compute in bf16 where that is safe."""
        precision = self.config.precision
        if precision == "auto":
            # Older GPUs emulate bf16, several times slower than fp32.
            return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return precision == "bf16"


@dataclass
class Outcome:
    """The loop's result: one entry per epoch, and the time, which holds for this machine only."""

    history: list[Epoch] = field(default_factory=list)
    seconds: float = 0.0
    images: int = 0

    @property
    def images_per_second(self) -> float:
        """Training throughput, teacher included, checkpoints excluded."""
        return self.images / self.seconds if self.seconds else 0.0
