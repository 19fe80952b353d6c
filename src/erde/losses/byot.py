"""Be Your Own Teacher (Zhang et al. 2019, arXiv 1905.08094): the deepest exit teaches the shallow ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erde.losses.base import (
    Criterion,
    ExitSettings,
    PerExit,
    at_least_float32,
    check_shapes,
    exit_cross_entropy,
    silence_last,
    soft_cross_entropy,
    sum_exits,
)
from erde.losses.features import Adapters, check_feature_shape
from erde.recipe.losses import BYOTConfig


def byot_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    soft_share: float = 0.3,
    temperature: float = 3.0,
    exit_weights: PerExit = 1.0,
    label_smoothing: float = 0.0,
    features: Tensor | None = None,
    feature_weight: float = 0.0,
) -> dict[str, Tensor]:
    r"""``L = w_(E-1) CE_(E-1) + sum_(i<E-1) w_i mean_b [ (1-c) CE_ib + c S_ib + g |f_ib - f_(E-1)b|² ]``, in nats.

    S is the soft cross-entropy at temperature T from the deepest exit, without T²; what comes from the
    deepest exit inside S and the distance is detached.

    Args:
        student_logits: raw logits (E, B, K).
        labels: classes (B,).
        soft_share: c.
        temperature: T.
        exit_weights: w, one number or one per exit.
        label_smoothing: of the cross-entropy's target.
        features: f, of one width for all exits, (E, B, C).
        feature_weight: g, of the squared distance, summed over channels.

    Returns:
        ``loss`` (scalar); unweighted parts (E,): ``ce``, ``soft``, and ``feature`` where there are features.

    Raises:
        ValueError: on wrong shapes.

    >>> logits = torch.zeros(2, 5, 4)  # ln 4 from every exit
    >>> round(float(byot_loss(logits, torch.zeros(5, dtype=torch.long))["loss"]), 4)
    2.7726
    """
    check_shapes(student_logits, None, labels)
    student_logits = at_least_float32(student_logits)
    ce = exit_cross_entropy(student_logits, labels, label_smoothing).mean(dim=1)
    soft = soft_cross_entropy(student_logits, student_logits[-1:].detach(), temperature).mean(dim=1)
    soft = silence_last(soft)
    # The deepest exit learns from the labels alone.
    hard = torch.cat([(1 - soft_share) * ce[:-1], ce[-1:]])
    per_exit_loss = hard + soft_share * soft
    parts = {"ce": ce.detach(), "soft": soft.detach()}
    if features is not None:
        check_feature_shape(features, student_logits)
        distance = (features - features[-1:].detach()).square().sum(dim=-1).mean(dim=1)
        per_exit_loss = per_exit_loss + feature_weight * silence_last(distance)
        parts["feature"] = silence_last(distance).detach()
    return {"loss": sum_exits(per_exit_loss, exit_weights), **parts}


class BYOTLoss(Criterion):
    """:func:`byot_loss` with its settings, and adapters for the features where they have a weight."""

    def __init__(self, config: BYOTConfig, settings: ExitSettings) -> None:
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
        return byot_loss(
            student_logits,
            labels,
            soft_share=self.config.soft_share,
            temperature=self.config.temperature,
            features=None if self.adapters is None else self.adapters(student_features),
            feature_weight=self.config.feature_weight,
            **self.own,
        )
