"""Losses by name. A new method is one new file here and one line in ``LOSSES``."""

from __future__ import annotations

from torch import nn

from erde.config import LossConfig
from erde.losses.base import ExitSettings, Extra, LossSpec
from erde.losses.cross_entropy import CROSS_ENTROPY, cross_entropy_loss
from erde.losses.erde import ERDE, erde_loss
from erde.losses.kd import KD, kd_loss

LOSSES: dict[str, LossSpec] = {
    "ce": CROSS_ENTROPY,
    "kd": KD,
    "erde": ERDE,
}


def build_loss(config: LossConfig, settings: ExitSettings) -> nn.Module:
    """The criterion of an arm: ``criterion(student_logits, teacher_logits, labels) -> dict``."""
    return LOSSES[config.name].build(config, settings)


__all__ = [
    "LOSSES",
    "ExitSettings",
    "Extra",
    "LossSpec",
    "build_loss",
    "cross_entropy_loss",
    "erde_loss",
    "kd_loss",
]
