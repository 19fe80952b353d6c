"""Joint cross-entropy of all exits (BranchyNet, Teerapittayanon et al. 2016, arXiv 1709.01686)."""

from __future__ import annotations

from torch import Tensor

from erde.losses.base import Criterion, PerExit, hard_loss, sum_exits


def cross_entropy_loss(
    student_logits: Tensor, labels: Tensor, *, exit_weights: PerExit = 1.0, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    r"""``L = sum_i w_i mean_b CE(s_ib, y_b)``, in nats.

    Returns:
        ``loss`` and its part ``ce`` (E,).

    >>> import torch
    >>> logits = torch.zeros(2, 5, 4)
    >>> round(float(cross_entropy_loss(logits, torch.zeros(5, dtype=torch.long))["loss"]), 4)  # 2 ln 4
    2.7726
    """
    _, ce = hard_loss(student_logits, labels, label_smoothing)
    return {"loss": sum_exits(ce, exit_weights), "ce": ce.detach()}


class CrossEntropyLoss(Criterion):
    """:func:`cross_entropy_loss` with its settings."""

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor
    ) -> dict[str, Tensor]:
        """The loss and its parts; ignores a teacher."""
        return cross_entropy_loss(
            student_logits,
            labels,
            exit_weights=self.exit_weights,
            label_smoothing=self.label_smoothing,
        )
