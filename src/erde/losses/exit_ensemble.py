"""Exit-ensemble distillation (Lee and Lee 2021, arXiv 2104.00299): the mean of all exits teaches each of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from erde.losses.base import (
    Criterion,
    ExitSettings,
    PerExit,
    at_least_float32,
    check_shapes,
    exit_cross_entropy,
    sum_exits,
)
from erde.losses.features import Adapters, check_feature_shape
from erde.recipe.losses import ExitEnsembleConfig


def exit_ensemble_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    weight: float = 1.0,
    exit_weights: PerExit = 1.0,
    label_smoothing: float = 0.0,
    features: Tensor | None = None,
    feature_weight: float = 0.0,
) -> dict[str, Tensor]:
    r"""``L = sum_i w_i mean_b [ CE(s_ib, y_b) + v mean_k (s_ibk - s̄_bk)² + g mean_c (f_ibc - f̄_bc)² ]``.

    s̄ and f̄ are means over the exits, detached.

    Args:
        student_logits: raw logits (E, B, K).
        labels: classes (B,).
        weight: v.
        exit_weights: w, one number or one per exit.
        label_smoothing: of the cross-entropy's target.
        features: f, of one width for all exits, (E, B, C).
        feature_weight: g.

    Returns:
        ``loss`` (scalar); unweighted parts (E,): ``ce`` (nats), ``ensemble`` (squared logits), and ``feature``
        where there are features.

    Raises:
        ValueError: on wrong shapes.

    >>> import torch
    >>> logits = torch.stack([torch.zeros(5, 4), torch.ones(5, 4)])  # 1/2 from their mean: 2 ln 4 + 1/4 + 1/4
    >>> round(float(exit_ensemble_loss(logits, torch.zeros(5, dtype=torch.long))["loss"]), 4)
    3.2726
    """
    check_shapes(student_logits, None, labels)
    student_logits = at_least_float32(student_logits)
    ce = exit_cross_entropy(student_logits, labels, label_smoothing).mean(dim=1)
    ensemble = _distance_from_mean(student_logits)
    per_exit_loss = ce + weight * ensemble
    parts = {"ce": ce.detach(), "ensemble": ensemble.detach()}
    if features is not None:
        check_feature_shape(features, student_logits)
        distance = _distance_from_mean(features)
        per_exit_loss = per_exit_loss + feature_weight * distance
        parts["feature"] = distance.detach()
    return {"loss": sum_exits(per_exit_loss, exit_weights), **parts}


def _distance_from_mean(values: Tensor) -> Tensor:
    """Mean squared distance of each exit's values from their detached mean: (E, B, ...) -> (E,)."""
    return (values - values.mean(dim=0).detach()).square().mean(dim=(1, 2))


class ExitEnsembleLoss(Criterion):
    """:func:`exit_ensemble_loss` with its settings, and adapters for the features where they have a weight."""

    def __init__(self, config: ExitEnsembleConfig, settings: ExitSettings) -> None:
        super().__init__(settings)
        self.config = config
        self.adapters = None
        if config.feature_weight:
            self.adapters = Adapters(settings.student_shapes, len(settings.alpha), config.name)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        student_features: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its parts; a teacher is not looked at."""
        return exit_ensemble_loss(
            student_logits,
            labels,
            weight=self.config.weight,
            features=None if self.adapters is None else self.adapters(student_features),
            feature_weight=self.config.feature_weight,
            **self.own,
        )
