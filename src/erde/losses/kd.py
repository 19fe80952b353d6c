"""Knowledge distillation, exit by exit (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from erde.config import LossConfig
from erde.losses.base import (
    ExitSettings,
    LossSpec,
    PerExit,
    at_least_float32,
    check_shapes,
    exit_cross_entropy,
    exit_kl,
    pair_teacher,
    per_exit,
    teacher_wrong,
)


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
) -> dict[str, Tensor]:
    r"""``L = sum_i w_i mean_b [ (1-a_i) CE(s_ib, y_b) + a_i T² KL(t_ib || s_ib) ]``, in nats.

    In the KL both sides are softmaxes at temperature T; T² keeps its gradient's size (Hinton, section 2).

    Args:
        student_logits: raw logits (Es, B, K).
        teacher_logits: raw logits (Et, B, K), no gradient wanted.
        labels: classes (B,).
        alpha: a, one number or one per exit.
        temperature: T.
        exit_weights: w, one number or one per exit.
        pairs: the teacher exit of each student exit; None pairs i with i.
        label_smoothing: of the cross-entropy's target.

    Returns:
        ``loss`` (scalar); unweighted parts (Es,): ``ce``, ``kl`` (with T²), and the share
        ``teacher_wrong`` of images that the paired teacher exit gets wrong.

    Raises:
        ValueError: on wrong shapes.

    >>> s = torch.randn(3, 8, 10)
    >>> parts = kd_loss(s, s, torch.zeros(8, dtype=torch.long))
    >>> bool(parts["kl"].abs().max() < 1e-5)
    True
    """
    check_shapes(student_logits, teacher_logits, labels)
    student_logits = at_least_float32(student_logits)
    teacher = pair_teacher(student_logits, teacher_logits, pairs).to(student_logits.dtype)
    ce = exit_cross_entropy(student_logits, labels, label_smoothing).mean(dim=1)
    kl = temperature**2 * exit_kl(student_logits, teacher, temperature).mean(dim=1)
    share = per_exit(alpha, ce)
    loss = (per_exit(exit_weights, ce) * ((1 - share) * ce + share * kl)).sum()
    wrong = teacher_wrong(teacher, labels).to(ce.dtype).mean(dim=1)
    return {"loss": loss, "ce": ce.detach(), "kl": kl.detach(), "teacher_wrong": wrong}


class KDConfig(LossConfig):
    """No knobs but the shared ones: alpha, temperature, exit weights, pairing."""

    name: Literal["kd"] = "kd"


class KDLoss(nn.Module):
    """:func:`kd_loss` with its settings."""

    alpha: Tensor
    exit_weights: Tensor

    def __init__(self, config: KDConfig, settings: ExitSettings) -> None:
        super().__init__()
        self.temperature = settings.temperature
        self.pairs = settings.pairs
        self.label_smoothing = settings.label_smoothing
        self.register_buffer("alpha", torch.tensor(settings.alpha), persistent=False)
        self.register_buffer("exit_weights", torch.tensor(settings.exit_weights), persistent=False)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and its parts; shapes as in the function."""
        return kd_loss(
            student_logits,
            teacher_logits,
            labels,
            alpha=self.alpha,
            temperature=self.temperature,
            exit_weights=self.exit_weights,
            pairs=self.pairs,
            label_smoothing=self.label_smoothing,
        )


KD = LossSpec(
    KDConfig, KDLoss, needs_teacher=True, summary="cross-entropy and T² KL(teacher || student), exit by exit"
)
