"""Be Your Own Teacher (Zhang et al. 2019, arXiv 1905.08094): the deepest exit teaches the shallow ones."""

from __future__ import annotations

import torch
from torch import Tensor

from erde.losses.base import Settings, hard_loss, silence_last, soft_cross_entropy, sum_exits
from erde.losses.features import FeatureCriterion, check_feature_shape
from erde.recipe.losses import BYOTConfig


def byot_loss(
    student_logits: Tensor,
    labels: Tensor,
    config: BYOTConfig,
    settings: Settings,
    features: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""``L = w_(E-1) CE_(E-1) + sum_(i<E-1) w_i mean_b [ (1-c) CE_ib + c S_ib + g |f_ib - f_(E-1)b|² ]``, in nats.

    S is the soft cross-entropy from the deepest exit at ``config.temperature``, without T²; the deepest exit's logits in S
    and its features in the distance are detached. c is ``config.soft_share``, g ``config.feature_weight``, of the squared
    distance summed over channels.

    Args:
        features: f, of one width for all exits, (E, B, C).

    Returns:
        ``loss``; parts (E,): ``ce``, ``soft``, and ``feature`` where there are features.

    >>> from erde.losses.base import ExitSettings
    >>> from erde.recipe.schema import DistillationConfig
    >>> settings = ExitSettings.resolve(DistillationConfig(), 4, [1, 2], None)
    >>> logits = torch.zeros(2, 5, 4)  # ln 4 from every exit
    >>> parts = byot_loss(logits, torch.zeros(5, dtype=torch.long), BYOTConfig(), settings)
    >>> round(float(parts["loss"]), 4)
    2.7726
    """
    student, ce = hard_loss(student_logits, labels, settings.label_smoothing)
    soft = soft_cross_entropy(student, student[-1:].detach(), config.temperature).mean(dim=1)
    soft = silence_last(soft)
    # The deepest exit learns from the labels alone.
    hard = torch.cat([(1 - config.soft_share) * ce[:-1], ce[-1:]])
    per_exit_loss = hard + config.soft_share * soft
    parts = {"ce": ce.detach(), "soft": soft.detach()}
    if features is not None:
        check_feature_shape(features, student)
        distance = silence_last((features - features[-1:].detach()).square().sum(dim=-1).mean(dim=1))
        per_exit_loss = per_exit_loss + config.feature_weight * distance
        parts["feature"] = distance.detach()
    return {"loss": sum_exits(per_exit_loss, settings.exit_weights), **parts}


class BYOTLoss(FeatureCriterion):
    """:func:`byot_loss` with its settings."""

    function = staticmethod(byot_loss)
