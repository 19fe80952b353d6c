"""Joint cross-entropy of all exits (BranchyNet, Teerapittayanon et al. 2016, arXiv 1709.01686)."""

from __future__ import annotations

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
from erde.recipe.losses import CrossEntropyConfig


def cross_entropy_loss(
    student_logits: Tensor, labels: Tensor, *, exit_weights: PerExit = 1.0, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    r"""``L = sum_i w_i mean_b CE(s_ib, y_b)``, in nats.

    Args:
        student_logits: raw logits (E, B, K).
        labels: classes (B,).
        exit_weights: w, one number or one per exit.
        label_smoothing: see :func:`~erde.losses.base.exit_cross_entropy`.

    Returns:
        ``loss`` (scalar) and its part ``ce`` (E,), unweighted.

    Raises:
        ValueError: on wrong shapes.

    >>> import torch
    >>> logits = torch.zeros(2, 5, 4)
    >>> round(float(cross_entropy_loss(logits, torch.zeros(5, dtype=torch.long))["loss"]), 4)  # 2 ln 4
    2.7726
    """
    check_shapes(student_logits, None, labels)
    student_logits = at_least_float32(student_logits)
    ce = exit_cross_entropy(student_logits, labels, label_smoothing).mean(dim=1)
    return {"loss": sum_exits(ce, exit_weights), "ce": ce.detach()}


class CrossEntropyLoss(Criterion):
    """:func:`cross_entropy_loss` with its settings; a teacher is not looked at."""

    def __init__(self, config: CrossEntropyConfig, settings: ExitSettings) -> None:
        super().__init__(settings)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor
    ) -> dict[str, Tensor]:
        """The loss and its parts; shapes as in the function."""
        return cross_entropy_loss(student_logits, labels, **self.own)
