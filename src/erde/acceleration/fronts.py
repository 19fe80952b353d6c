"""Small early-exit networks that may stand in front: candidates, their training, and a short trial that chooses."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from erde.calibration.choice import choose_score
from erde.calibration.settings import Settings
from erde.common import progress
from erde.common.errors import UserError
from erde.common.splits import Labels, TuneLogits
from erde.data.load import DataSplits
from erde.exporting.exit_times import ROUNDS, WARM_UP, measure_exits, undisturbed
from erde.networks.attach import attach_exits
from erde.networks.backbones import build_backbone
from erde.networks.cost import network_cost
from erde.networks.network import EarlyExitNetwork
from erde.recipe.losses import LossConfig
from erde.recipe.schema import AugmentationConfig, DistillationConfig, TrainConfig
from erde.runtime.stages import StageRunner
from erde.training.api import build_criterion
from erde.training.job import Job, Outcome
from erde.training.loop import choose_device, train_network

# (backbone, factor by which its images are reduced), the costliest first; by the longest side of the images.
SMALL_IMAGES = [("resnet8", 1), ("resnet8x2-s2", 1), ("resnet8-s2", 1), ("resnet8x0.25", 1)]
LARGE_IMAGES = [("timm/mobilenetv3_small_100", 2), ("timm/mobilenetv3_small_050", 2)]
SMALL_SIDE = 64
# A front's exits. One is better than three: heads on the way cost the final one more than they save of a front's small
# share of the chain (LOG.md, 2026-11-30).
EXITS = 1
# A front may take this share of the network's MACs.
MOST_MACS = 0.1
# Flips and shifts of each image that the network is asked about, at most and at least, and the share of the time for it.
VIEWS, FEWEST_VIEWS, VIEWS_SHARE = 4, 2, 0.25
# Images are mirrored in training if the network answers a mirrored image as it answers the image, at least so often:
# letters and digits it does not.
LEAST_MIRRORED_AGREEMENT = 0.8
# Of a trial; its epochs grow with the time that there is, one for every five minutes.
TRIAL_IMAGES, TRIAL_EPOCHS = 8000, (2, 15)
# The same at least, and the share of the time that the network's answers to them may take.
FEWEST_TRIAL_IMAGES, TRIAL_SHARE = 1000, 0.1
# Fronts are compared at a risk at which even a short training saves something.
TRIAL_RISK = 0.05
BATCH = 128


@dataclass(frozen=True)
class Front:
    """A candidate: a backbone, its images reduced by averaging ``reduction`` x ``reduction`` pixels."""

    backbone: str
    reduction: int

    @property
    def name(self) -> str:
        """For files and pages."""
        return self.backbone.replace("/", "-")

    def build(self, data: DataSplits, seed: int) -> EarlyExitNetwork:
        """The network with fresh weights."""
        torch.manual_seed(seed)
        channels, height, width = data.input_size
        size = (height // self.reduction, width // self.reduction)
        model = build_backbone(self.backbone, classes=len(data.classes), channels=channels, image_size=size)
        if self.reduction > 1:
            model = nn.Sequential(nn.AvgPool2d(self.reduction), model)
        return attach_exits(model, EXITS, input_size=data.input_size)


@dataclass(frozen=True)
class Training:
    """All that the training of a front needs beside the front: images, the teacher, and where its answers are kept."""

    data: DataSplits
    teacher: EarlyExitNetwork
    cache: Path
    loss: LossConfig
    mirrored: bool
    views: int
    seed: int

    def train(
        self, network: EarlyExitNetwork, name: str, folder: Path, epochs: int, images: int | None
    ) -> Outcome:
        """Train ``network`` by distillation; in ``folder`` it goes on where it was killed."""
        data = self.data
        train = data.train_share(images)
        criterion = build_criterion(
            self.loss,
            # One exit of the teacher for all of the front's.
            DistillationConfig(pairing="final"),
            network,
            self.teacher,
            data,
            train_images=len(train),
            seed=self.seed,
        )
        device = choose_device("auto")
        job = Job(
            name=name,
            network=network,
            criterion=criterion,
            teacher=self.teacher,
            train=train,
            config=TrainConfig(
                epochs=epochs, batch_size=min(BATCH, len(train)), precision=quick_precision(device)
            ),
            augmentation=AugmentationConfig(
                crop_padding=max(1, data.image_shape[0] // 8), flip=self.mirrored, views=self.views
            ),
            mean=data.mean,
            std=data.std,
            seed=self.seed,
            device=device,
            extras=self.loss.extras,
            teacher_cache=self.cache,
        )
        return train_network(job, folder)


def quick_precision(device: torch.device) -> Literal["auto", "bf16"]:
    """bfloat16 also on a CPU with matrix units for it, where a front trains in half to two thirds of the time."""
    return "bf16" if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16") else "auto"


def candidates(data: DataSplits, macs: int, seed: int) -> list[Front]:
    """The fronts that cost at most a tenth of the network's MACs; all of them where those are not known (0).

    Raises:
        UserError: even the smallest costs more: the network is too quick to be worth a front.
    """
    family = SMALL_IMAGES if max(data.image_shape[:2]) <= SMALL_SIDE else LARGE_IMAGES
    fronts = [Front(*entry) for entry in family]
    costs = {front: network_cost(front.build(data, seed), data.input_size).macs[-1] for front in fronts}
    # Three significant digits: a tenth of a network that was counted with its bias or without is a tenth.
    fitting = [front for front in fronts if not macs or costs[front] <= MOST_MACS * macs * 1.01]
    if not fitting:
        raise UserError(
            f"this network takes {macs:,} MACs, and the smallest front {min(costs.values()):,}: it is too quick to be made "
            "quicker by a network in front of it"
        )
    return fitting


def affordable_views(images: int, seconds_per_answer: float, seconds: float) -> int:
    """How many views of each train image the network can be asked about in its share of the ``seconds`` that are left."""
    affordable = int(VIEWS_SHARE * seconds / max(1e-9, images * seconds_per_answer))
    return min(max(affordable, FEWEST_VIEWS), VIEWS)


def affordable_trial(images: int, views: int, seconds_per_answer: float, seconds: float) -> int:
    """How many of the train images the trial uses, whose ``views`` the network is asked about first."""
    affordable = int(TRIAL_SHARE * seconds / max(1e-9, views * seconds_per_answer))
    return min(max(affordable, FEWEST_TRIAL_IMAGES), TRIAL_IMAGES, images)


def trial_epochs(minutes: float) -> int:
    """The epochs of the trial; ``minutes`` are those of the whole work."""
    return min(max(round(minutes / 5), TRIAL_EPOCHS[0]), TRIAL_EPOCHS[1])


def answers_alike_mirrored(stage: Path, images: NDArray[np.uint8], logits: NDArray[np.float32]) -> bool:
    """Whether the network, with these ``logits`` (N, K) for ``images`` (N, H, W, C), sees the same in their mirror images."""
    mirrored = answers(stage, np.ascontiguousarray(images[:, :, ::-1]), "answers to mirrored images")
    same = float((mirrored.argmax(axis=-1) == logits.argmax(axis=-1)).mean())
    kept = same >= LEAST_MIRRORED_AGREEMENT
    progress.say(
        f"the model answers {100 * same:.0f} % of images alike when they are mirrored: training mirrors "
        f"{'half of the images' if kept else 'none'}"
    )
    return kept


def trial(
    fronts: list[Front],
    training: Training,
    folder: Path,
    final_logits: NDArray[np.float32],
    milliseconds: float,
    epochs: int,
    images: int,
) -> tuple[Front, float]:
    """Train every candidate for ``epochs`` on so many of the ``images``, and take the one that saves most time on tune.

    ``final_logits`` (N, K) are the network's on tune, where an image takes it so many ``milliseconds``. Returned besides
    are the seconds that the winner takes per image and epoch.
    """
    best: tuple[float, Front, float] | None = None
    for front in fronts:
        network = front.build(training.data, training.seed)
        outcome = training.train(network, f"trial of {front.name}", folder / front.name, epochs, images)
        saved = saving(network, training.data, final_logits, milliseconds)
        progress.say(
            f"trial: {front.name} would save {100 * saved:.0f} % of the time at a risk of {100 * TRIAL_RISK:g} %, after "
            f"{epochs} epochs of {images:,} images"
        )
        if best is None or saved > best[0]:
            best = saved, front, outcome.seconds / max(1, outcome.images)
    assert best is not None
    return best[1], best[2]


def saving(
    network: EarlyExitNetwork, data: DataSplits, final_logits: NDArray[np.float32], milliseconds: float
) -> float:
    """The share of the network's time (``milliseconds`` an image) that the chain saves on tune within ``TRIAL_RISK``.

    By time and not by MACs: those of a network with few channels take longer.
    """
    times, front = measure_exits(network, data.mean, data.std, data.tune, threads=1)
    logits = np.concatenate([front.logits, final_logits[None]])
    labels: Labels = data.tune.labels if (data.tune.labels >= 0).all() else final_logits.argmax(axis=-1)
    cost = times.cost_in_front(tuple(range(len(times) - 1)), milliseconds)
    return choose_score(TuneLogits(logits, labels), cost, Settings(max_risks=(TRIAL_RISK,)))[0].macs_saved


def milliseconds_of(stage: Path, images: NDArray[np.uint8]) -> float:
    """Of the network in ONNX Runtime on single images, one thread."""
    runner = StageRunner([stage], threads=1)
    seconds = []
    for turn in range(ROUNDS + WARM_UP):
        number = turn % len(images)
        started = time.perf_counter()
        runner.run(0, images[number : number + 1])
        seconds.append(time.perf_counter() - started)
    return undisturbed(seconds)


def answers(stage: Path, images: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    """The network's logits (N, K) for ``images``."""
    runner = StageRunner([stage])
    parts, size = [], 64
    with progress.task(name, len(images)) as task:
        for start in range(0, len(images), size):
            parts.append(runner.run(0, images[start : start + size])[1])
            if task.due():
                task.update(min(len(images), start + size))
    return np.concatenate(parts)
