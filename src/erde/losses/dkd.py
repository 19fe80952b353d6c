"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679), exit by exit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from erde.losses.base import (
    Criterion,
    ExitSettings,
    Settings,
    count_train_images,
    exit_cross_entropy,
    pair_teacher,
    ranks,
    sum_exits,
    weigh,
    wrong_answers,
)
from erde.losses.kd import standardise_logits
from erde.recipe.losses import DKDConfig


def decoupled_kl(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The two halves of the KL, in nats and without T²: (E, B, K) twice, (B,) -> two of (E, B).

    The first is the KL of "target class or another", the second that among the other classes. With p the
    teacher's tempered probability of the target, ``KL = first + (1 - p) second`` (the paper's equation 5).
    """
    index = labels.expand(len(student_logits), -1).unsqueeze(-1)
    is_target = torch.zeros_like(student_logits, dtype=torch.bool).scatter(-1, index, True)
    # Finite, so that 0 times it is 0; half of it leaves room for the subtraction in the softmax.
    masked = torch.finfo(student_logits.dtype).min / 2
    student, teacher = student_logits / temperature, teacher_logits / temperature
    sides = []
    for logits in (student, teacher):
        others = logits.masked_fill(is_target, masked)
        total = logits.logsumexp(dim=-1)
        target = logits.gather(-1, index).squeeze(-1) - total
        rest = others.logsumexp(dim=-1) - total
        sides.append((target, rest, F.log_softmax(others, dim=-1)))
    (s_target, s_rest, s_others), (t_target, t_rest, t_others) = sides
    first = t_target.exp() * (t_target - s_target) + t_rest.exp() * (t_rest - s_rest)
    second = (t_others.exp() * (t_others - s_others)).sum(dim=-1)
    return first, second


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    config: DKDConfig,
    settings: Settings,
    strength: float | Tensor = 1.0,
) -> dict[str, Tensor]:
    r"""``L = sum_i w_i mean_b [ (1-a_i) CE + a_i r T² (v TCKD_ib + u NCKD_ib) ]``, in nats.

    Equation 7 of the paper: its alpha is v, ``config.target_weight``; its beta is u, ``config.non_target_weight``. TCKD and
    NCKD are those of :func:`decoupled_kl`, of z-scored logits with ``config.standardise``. With v = 1 and u = 1 - p, per
    image, it is ``kd_loss``.

    Args:
        strength: r, a factor of the distillation, for warming it up.

    Returns:
        ``loss``; parts (Es,): ``ce``, ``tckd`` and ``nckd`` (with T²), and ``teacher_wrong``, the share of images that the
        paired teacher exit gets wrong.

    >>> from erde.recipe.schema import DistillationConfig
    >>> settings = ExitSettings.resolve(DistillationConfig(), 10, [1, 2, 3], [1, 2, 3])
    >>> s = torch.randn(3, 8, 10)
    >>> parts = dkd_loss(s, s, torch.zeros(8, dtype=torch.long), DKDConfig(), settings)
    >>> bool(parts["nckd"].abs().max() < 1e-5)
    True
    """
    student, teacher = pair_teacher(student_logits, teacher_logits, labels, settings.pairs)
    softened, target = student, teacher
    if config.standardise:
        softened, target = standardise_logits(softened), standardise_logits(target)
    first, second = decoupled_kl(softened, target, labels, settings.temperature)
    tckd, nckd = settings.temperature**2 * first, settings.temperature**2 * second
    distilled = (config.target_weight * tckd + config.non_target_weight * nckd).mean(dim=1)
    ce = exit_cross_entropy(student, labels, settings.label_smoothing).mean(dim=1)
    return {
        "loss": sum_exits(weigh(ce, strength * distilled, settings.alpha), settings.exit_weights),
        "ce": ce.detach(),
        "tckd": tckd.detach().mean(dim=1),
        "nckd": nckd.detach().mean(dim=1),
        "teacher_wrong": wrong_answers(teacher, labels).to(ce.dtype).mean(dim=1),
    }


class DKDLoss(Criterion):
    """:func:`dkd_loss` with its settings, warmed up by the number of images seen."""

    config: DKDConfig
    images_seen: Tensor

    def __init__(self, config: DKDConfig, settings: ExitSettings) -> None:
        super().__init__(config, settings)
        self.warmup_images = 0.0
        if config.warmup_epochs:
            self.warmup_images = config.warmup_epochs * count_train_images(
                settings, "loss.warmup_epochs of 'dkd'"
            )
            self.register_buffer("images_seen", torch.zeros((), dtype=torch.long))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and its parts; ``strength`` too where there is a warm-up."""
        warmup: dict[str, Any] = {}
        if self.warmup_images:
            if self.training:
                self.images_seen += labels.numel() * ranks()
            warmup["strength"] = (self.images_seen / self.warmup_images).clamp(max=1.0)
        return {
            **dkd_loss(student_logits, teacher_logits, labels, self.config, self, **warmup),
            **warmup,
        }
