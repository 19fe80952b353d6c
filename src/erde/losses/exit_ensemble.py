"""Exit-ensemble distillation (Lee and Lee 2021, arXiv 2104.00299): the mean of all exits teaches each of them."""

from __future__ import annotations

from torch import Tensor

from erde.losses.base import Settings, hard_loss, sum_exits
from erde.losses.features import FeatureCriterion, check_feature_shape
from erde.recipe.losses import ExitEnsembleConfig


def exit_ensemble_loss(
    student_logits: Tensor,
    labels: Tensor,
    config: ExitEnsembleConfig,
    settings: Settings,
    features: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""``L = sum_i w_i mean_b [ CE(s_ib, y_b) + v mean_k (s_ibk - s̄_bk)² + g mean_c (f_ibc - f̄_bc)² ]``.

    s̄ and f̄ are means over the exits, detached; v is ``config.weight``, g ``config.feature_weight``.

    Args:
        features: f, of one width for all exits, (E, B, C).

    Returns:
        ``loss``; parts (E,): ``ce`` (nats), ``ensemble`` (squared logits), and ``feature`` where there are features.

    >>> import torch
    >>> from erde.losses.base import ExitSettings
    >>> from erde.recipe.schema import DistillationConfig
    >>> settings = ExitSettings.resolve(DistillationConfig(), 4, [1, 2], None)
    >>> logits = torch.stack([torch.zeros(5, 4), torch.ones(5, 4)])  # 1/2 from their mean: 2 ln 4 + 1/4 + 1/4
    >>> parts = exit_ensemble_loss(logits, torch.zeros(5, dtype=torch.long), ExitEnsembleConfig(), settings)
    >>> round(float(parts["loss"]), 4)
    3.2726
    """
    student, ce = hard_loss(student_logits, labels, settings.label_smoothing)
    ensemble = _distance_from_mean(student)
    per_exit_loss = ce + config.weight * ensemble
    parts = {"ce": ce.detach(), "ensemble": ensemble.detach()}
    if features is not None:
        check_feature_shape(features, student)
        distance = _distance_from_mean(features)
        per_exit_loss = per_exit_loss + config.feature_weight * distance
        parts["feature"] = distance.detach()
    return {"loss": sum_exits(per_exit_loss, settings.exit_weights), **parts}


def _distance_from_mean(values: Tensor) -> Tensor:
    """Mean squared distance of each exit's values from their detached mean: (E, B, ...) -> (E,)."""
    return (values - values.mean(dim=0).detach()).square().mean(dim=(1, 2))


class ExitEnsembleLoss(FeatureCriterion):
    """:func:`exit_ensemble_loss` with its settings."""

    function = staticmethod(exit_ensemble_loss)
