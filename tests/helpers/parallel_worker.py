"""The work of each process of tests/training/test_parallel.py.

``torchrun --nproc-per-node=2 -m tests.helpers.parallel_worker OUT``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import erde
from erde.data.load import DataSplits
from erde.networks.network import EarlyExitNetwork
from erde.recipe.losses import resolve_loss
from erde.recipe.schema import AugmentationConfig, DistillationConfig, TrainConfig
from erde.training import parallel
from erde.training.api import build_criterion
from erde.training.job import Job
from erde.training.learner import Learner
from erde.training.loop import train_network

LOSSES = ("ce", "kd", "erde")


def load() -> DataSplits:
    return erde.load_data("digits", channels=1, tune_size=300, certify_size=500, test_size=200)


def make_network(data: DataSplits, seed: int) -> EarlyExitNetwork:
    torch.manual_seed(seed)
    backbone = erde.build_backbone("resnet8x0.5", classes=10, channels=1)
    return erde.attach_exits(backbone, 3, input_size=data.input_size, dropout=0.0)


def gradients(loss: str, **settings: Any) -> dict[str, torch.Tensor]:
    """Of one step on one batch, with batch norm in eval mode: at learning rate 1 it is what the weights lose."""
    data = load()
    network, teacher = make_network(data, 0), make_network(data, 1)
    if loss == "ce":
        teacher = None  # type: ignore[assignment]
    enter = Learner.enter_epoch

    def with_batch_norm_fixed(self: Learner) -> None:
        enter(self)
        self.network.eval()

    Learner.enter_epoch = with_batch_norm_fixed  # type: ignore[method-assign]
    plain = {"epochs": 1, "momentum": 0.0, "weight_decay": 0.0, "warmup_epochs": 0, "learning_rate": 1.0}
    job = Job(
        name="arm",
        network=network,
        criterion=build_criterion(resolve_loss(loss), DistillationConfig(), network, teacher, data),
        teacher=teacher,
        train=data.train_share(64),
        config=TrainConfig(batch_size=64, **plain, **settings),
        augmentation=AugmentationConfig(crop_padding=1),
        mean=data.mean,
        std=data.std,
        seed=0,
        device=torch.device("cpu"),
    )
    start = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    try:
        train_network(job)
    finally:
        Learner.enter_epoch = enter  # type: ignore[method-assign]
    return {name: start[name] - parameter.detach() for name, parameter in network.named_parameters()}


def main() -> None:
    out = Path(sys.argv[1])
    written: list[str] = []

    def watch(event: str, arguments: Any) -> None:
        if event == "open" and isinstance(arguments[1], str) and arguments[1].strip("rbt"):
            written.append(str(arguments[0]))

    parallel.start("cpu")
    if not parallel.is_first():
        sys.addaudithook(watch)
    computed = {loss: gradients(loss) for loss in LOSSES}
    computed["in parts"] = gradients("erde", accumulate=4)
    data = load()
    erde.train(
        make_network(data, 0),
        data,
        folder=out / "folder",
        epochs=2,
        backbone_epochs=1,
        batch_size=64,
        device="cpu",
        checkpoint_seconds=0,
        tensorboard=True,
    )
    if parallel.is_first():
        flat = {
            f"{loss}/{name}": gradient for loss, all_ in computed.items() for name, gradient in all_.items()
        }
        from safetensors.torch import save_file

        save_file(flat, out / "gradients.safetensors")
        parallel.wait()
    else:
        parallel.wait()
        (out / "second.json").write_text(json.dumps([path for path in written if str(out) in path]))
    parallel.finish()


if __name__ == "__main__":
    main()
