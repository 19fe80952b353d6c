"""Losses by name. A new method is one new file here and one line in ``LOSSES``."""

from __future__ import annotations

from torch import nn

from erde.config import LossConfig
from erde.losses.base import ExitSettings, Extra, LossSpec
from erde.losses.byot import BYOT, byot_loss
from erde.losses.crd import CRD
from erde.losses.cross_entropy import CROSS_ENTROPY, cross_entropy_loss
from erde.losses.dkd import DKD, dkd_loss
from erde.losses.dynamickd import DYNAMICKD
from erde.losses.erde import ERDE, erde_loss
from erde.losses.exit_ensemble import EXIT_ENSEMBLE, exit_ensemble_loss
from erde.losses.kd import KD, kd_loss
from erde.losses.phuong import PHUONG, phuong_loss

LOSSES: dict[str, LossSpec] = {
    "ce": CROSS_ENTROPY,
    "kd": KD,
    "erde": ERDE,
    "dynamickd": DYNAMICKD,
    "dkd": DKD,
    "crd": CRD,
    "phuong": PHUONG,
    "byot": BYOT,
    "exit_ensemble": EXIT_ENSEMBLE,
}


def build_loss(config: LossConfig, settings: ExitSettings) -> nn.Module:
    """The criterion of an arm: ``criterion(student_logits, teacher_logits, labels, **extras) -> dict``."""
    return LOSSES[config.name].build(config, settings)


__all__ = [
    "LOSSES",
    "ExitSettings",
    "Extra",
    "LossSpec",
    "build_loss",
    "byot_loss",
    "cross_entropy_loss",
    "dkd_loss",
    "erde_loss",
    "exit_ensemble_loss",
    "kd_loss",
    "phuong_loss",
]
