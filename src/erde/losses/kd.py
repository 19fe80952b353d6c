"""Knowledge distillation, exit by exit (Hinton et al. 2015, arXiv 1503.02531).

With logit standardisation as a switch (Sun et al. 2024, arXiv 2403.01427).
"""

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
    exit_kl,
    pair_teacher,
    sum_exits,
    teacher_wrong,
    weigh,
)
from erde.recipe.losses import KDConfig


def standardise_logits(logits: Tensor) -> Tensor:
    """``(z - mean(z)) / (std(z) + 1e-7)`` over the classes, std with K-1 below it: (..., K) -> (..., K).

    arXiv 2403.01427, algorithm 1, with the constant of its authors' code.
    """
    return (logits - logits.mean(dim=-1, keepdim=True)) / (logits.std(dim=-1, keepdim=True) + 1e-7)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: PerExit = 0.9,
    temperature: float = 4.0,
    exit_weights: PerExit = 1.0,
    pairs: Sequence[int] | None = None,
    label_smoothing: float = 0.0,
    standardise: bool = False,
    weight: float = 1.0,
    scale: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""``L = sum_i w_i mean_b [ (1-a_i) CE(s_ib, y_b) + a_i v T² KL(t_ib || s_ib) ]``, in nats.

    In the KL both sides are softmaxes at temperature T; T² keeps its gradient's size (Hinton, section 2).

    Args:
        student_logits: raw logits (Es, B, K).
        teacher_logits: raw logits (Et, B, K); no gradient goes there.
        labels: classes (B,).
        alpha: a, one number or one per exit.
        temperature: T.
        exit_weights: w, one number or one per exit.
        pairs: the teacher exit of each student exit; None pairs i with i.
        label_smoothing: of the cross-entropy's target.
        standardise: z-score both sides' logits before the KL, see :func:`standardise_logits`; T is then the
            paper's base temperature.
        weight: v, a factor of the KL.
        scale: what the student's logits are multiplied with in the KL alone, anything that broadcasts to
            (Es, B, K); see :mod:`erde.losses.dynamickd`.

    Returns:
        ``loss`` (scalar); unweighted parts (Es,): ``ce``, ``kl`` (with T²), and the share
        ``teacher_wrong`` of images that the paired teacher exit gets wrong.

    Raises:
        ValueError: on wrong shapes.

    >>> import torch
    >>> s = torch.randn(3, 8, 10)
    >>> parts = kd_loss(s, s, torch.zeros(8, dtype=torch.long))
    >>> bool(parts["kl"].abs().max() < 1e-5)
    True
    """
    check_shapes(student_logits, teacher_logits, labels)
    student_logits = at_least_float32(student_logits)
    teacher = pair_teacher(student_logits, teacher_logits, pairs)
    softened = student_logits if scale is None else scale * student_logits
    target = teacher
    if standardise:
        softened, target = standardise_logits(softened), standardise_logits(target)
    ce = exit_cross_entropy(student_logits, labels, label_smoothing).mean(dim=1)
    kl = temperature**2 * exit_kl(softened, target, temperature).mean(dim=1)
    wrong = teacher_wrong(teacher, labels).to(ce.dtype).mean(dim=1)
    loss = sum_exits(weigh(ce, weight * kl, alpha), exit_weights)
    return {"loss": loss, "ce": ce.detach(), "kl": kl.detach(), "teacher_wrong": wrong}


class KDLoss(Criterion):
    """:func:`kd_loss` with its settings."""

    def __init__(self, config: KDConfig, settings: ExitSettings) -> None:
        super().__init__(settings)
        self.config = config

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and its parts; shapes as in the function."""
        return kd_loss(
            student_logits,
            teacher_logits,
            labels,
            standardise=self.config.standardise,
            weight=self.config.weight,
            **self.distilling,
        )
