"""Losses by name. A new method is one new file here, its line in ``CRITERIA``, and its keys in ``erde.recipe.losses``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from erde.losses.base import Criterion, ExitSettings
from erde.losses.byot import BYOTLoss, byot_loss
from erde.losses.crd import CRDLoss
from erde.losses.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from erde.losses.dkd import DKDLoss, dkd_loss
from erde.losses.dynamickd import DynamicKDLoss
from erde.losses.erde import ERDELoss, erde_loss
from erde.losses.exit_ensemble import ExitEnsembleLoss, exit_ensemble_loss
from erde.losses.kd import KDLoss, kd_loss
from erde.losses.phuong import PhuongLoss, phuong_loss
from erde.recipe.losses import LossConfig

# The criterion of each loss of ``erde.recipe.losses.LOSSES``, from its keys and the settings that all arms share.
CRITERIA: dict[str, Callable[[Any, ExitSettings], Criterion]] = {
    "ce": CrossEntropyLoss,
    "kd": KDLoss,
    "erde": ERDELoss,
    "dynamickd": DynamicKDLoss,
    "dkd": DKDLoss,
    "crd": CRDLoss,
    "phuong": PhuongLoss,
    "byot": BYOTLoss,
    "exit_ensemble": ExitEnsembleLoss,
}


def build_loss(config: LossConfig, settings: ExitSettings) -> Criterion:
    """The criterion of an arm: ``criterion(student_logits, teacher_logits, labels, **extras) -> dict``."""
    return CRITERIA[config.name](config, settings)


__all__ = [
    "CRITERIA",
    "ExitSettings",
    "build_loss",
    "byot_loss",
    "cross_entropy_loss",
    "dkd_loss",
    "erde_loss",
    "exit_ensemble_loss",
    "kd_loss",
    "phuong_loss",
]
