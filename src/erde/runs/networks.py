"""The networks of a run: fresh ones, and those that were trained."""

from __future__ import annotations

from pathlib import Path

import torch

from erde.common.errors import UserError
from erde.networks import checkpoint
from erde.networks.attach import attach_exits
from erde.networks.backbones import build_backbone
from erde.networks.foreign_weights import WeightsReport, adapt_teacher, load_teacher_weights
from erde.networks.network import EarlyExitNetwork, keep_exits
from erde.recipe.schema import TEACHER, TeacherConfig
from erde.runs.folder import Run
from erde.training.job import FINAL


def new_network(run: Run, arm: str, *, load: bool = True) -> EarlyExitNetwork:
    """A fresh network: arms with the same architecture start from the same weights.

    Without ``load`` neither the file of ``weights`` nor timm's own are read: saved weights replace them.
    """
    return _build(run, arm, load)[0]


def foreign_teacher(run: Run) -> tuple[EarlyExitNetwork, WeightsReport]:
    """A teacher that was trained elsewhere, and how its tensors fit."""
    network, report = _build(run, TEACHER, load=True)
    assert report is not None
    return network, report


def is_trained(run: Run, arm: str) -> bool:
    """Whether the training of an arm has ended, or its teacher was taken as it is."""
    return (run.checkpoints(arm) / FINAL).exists()


def trained_network(run: Run, arm: str) -> EarlyExitNetwork:
    """The network of an arm that was trained, with the exits that it keeps; :class:`UserError` if it is not trained yet."""
    network, choice = network_as_trained(run, arm), run.exit_choice(arm)
    return network if choice is None else keep_exits(network, choice.chosen.exits)


def network_as_trained(run: Run, arm: str) -> EarlyExitNetwork:
    """The same with every exit that was trained."""
    if not is_trained(run, arm):
        command = "erde train" if arm == TEACHER else "erde distill"
        raise UserError(f"arm '{arm}' of {run.folder} is not trained yet: run {command} first")
    network = new_network(run, arm, load=False)
    checkpoint.load_weights(network, run.checkpoints(arm) / FINAL)
    return network


def _build(run: Run, arm: str, load: bool) -> tuple[EarlyExitNetwork, WeightsReport | None]:
    config, data, report = run.config.network_of(arm), run.data, None
    torch.manual_seed(run.config.seed)
    backbone = build_backbone(
        config.backbone,
        classes=len(data.classes),
        channels=data.image_shape[2],
        image_size=data.input_size[1:],
        pretrained=load and config.pretrained and config.weights is None,
    )
    network = attach_exits(
        backbone,
        config.exits,
        input_size=data.input_size,
        head=config.head,
        dropout=config.dropout,
        boosted=config.boosted,
    )
    if load and config.weights is not None:
        path = Path(config.weights)
        if isinstance(config, TeacherConfig) and config.trained:
            report = load_teacher_weights(network, path, config.match)
        else:
            checkpoint.load_weights(network, path)
    if isinstance(config, TeacherConfig):
        adapt_teacher(
            network,
            mean=data.mean,
            std=data.std,
            classes=data.classes,
            teacher_mean=config.mean,
            teacher_std=config.std,
            teacher_classes=config.classes,
        )
    return network, report
