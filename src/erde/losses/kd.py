"""Knowledge distillation, exit by exit (Hinton et al. 2015, arXiv 1503.02531).

With logit standardisation as a switch (Sun et al. 2024, arXiv 2403.01427).
"""

from __future__ import annotations

from torch import Tensor

from erde.losses.base import (
    Criterion,
    Settings,
    exit_cross_entropy,
    exit_kl,
    pair_teacher,
    sum_exits,
    weigh,
    wrong_answers,
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
    config: KDConfig,
    settings: Settings,
    scale: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""``L = sum_i w_i mean_b [ (1-a_i) CE(s_ib, y_b) + a_i v T² KL(t_ib || s_ib) ]``, in nats; v is ``config.weight``.

    In the KL both sides are softmaxes at temperature T; T² keeps its gradient's size (Hinton, section 2). With
    ``config.standardise`` their logits are z-scored before, and T is the paper's base temperature.

    Args:
        scale: a factor of the student's logits in the KL alone, anything that broadcasts to (Es, B, K); see
            :mod:`erde.losses.dynamickd`.

    Returns:
        ``loss``; parts (Es,): ``ce``, ``kl`` (with T²), and ``teacher_wrong``, the share of images that the paired
        teacher exit gets wrong.

    >>> import torch
    >>> from erde.losses.base import ExitSettings
    >>> from erde.recipe.schema import DistillationConfig
    >>> settings = ExitSettings.resolve(DistillationConfig(), 10, [1, 2, 3], [1, 2, 3])
    >>> s = torch.randn(3, 8, 10)
    >>> parts = kd_loss(s, s, torch.zeros(8, dtype=torch.long), KDConfig(), settings)
    >>> bool(parts["kl"].abs().max() < 1e-5)
    True
    """
    student, teacher = pair_teacher(student_logits, teacher_logits, labels, settings.pairs)
    softened, target = student if scale is None else scale * student, teacher
    if config.standardise:
        softened, target = standardise_logits(softened), standardise_logits(target)
    ce = exit_cross_entropy(student, labels, settings.label_smoothing).mean(dim=1)
    kl = settings.temperature**2 * exit_kl(softened, target, settings.temperature).mean(dim=1)
    wrong = wrong_answers(teacher, labels).to(ce.dtype).mean(dim=1)
    loss = sum_exits(weigh(ce, config.weight * kl, settings.alpha), settings.exit_weights)
    return {"loss": loss, "ce": ce.detach(), "kl": kl.detach(), "teacher_wrong": wrong}


class KDLoss(Criterion):
    """:func:`kd_loss` with its settings."""

    config: KDConfig

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and its parts."""
        return kd_loss(student_logits, teacher_logits, labels, self.config, self)
