"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679), exit by exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from erde.losses.base import (
    Criterion,
    ExitSettings,
    PerExit,
    at_least_float32,
    check_shapes,
    count_train_images,
    exit_cross_entropy,
    pair_teacher,
    ranks,
    sum_exits,
    teacher_wrong,
    weigh,
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
    nothing = torch.finfo(student_logits.dtype).min / 2
    student, teacher = student_logits / temperature, teacher_logits / temperature
    sides = []
    for logits in (student, teacher):
        others = logits.masked_fill(is_target, nothing)
        whole = logits.logsumexp(dim=-1)
        target = logits.gather(-1, index).squeeze(-1) - whole
        rest = others.logsumexp(dim=-1) - whole
        sides.append((target, rest, F.log_softmax(others, dim=-1)))
    (s_target, s_rest, s_others), (t_target, t_rest, t_others) = sides
    first = t_target.exp() * (t_target - s_target) + t_rest.exp() * (t_rest - s_rest)
    second = (t_others.exp() * (t_others - s_others)).sum(dim=-1)
    return first, second


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: PerExit = 0.9,
    temperature: float = 4.0,
    exit_weights: PerExit = 1.0,
    pairs: Sequence[int] | None = None,
    label_smoothing: float = 0.0,
    target_weight: float | Tensor = 1.0,
    non_target_weight: float | Tensor = 8.0,
    standardise: bool = False,
    strength: float | Tensor = 1.0,
) -> dict[str, Tensor]:
    r"""``L = sum_i w_i mean_b [ (1-a_i) CE + a_i r T² (v TCKD_ib + u NCKD_ib) ]``, in nats.

    Equation 7 of the paper, whose alpha is v here and whose beta is u; TCKD and NCKD are those of
    :func:`decoupled_kl`. With v = 1 and u = 1 - p, per image, it is ``kd_loss``.

    Args:
        student_logits: raw logits (Es, B, K).
        teacher_logits: raw logits (Et, B, K); no gradient goes there.
        labels: classes (B,).
        alpha: a, one number or one per exit; shared with the other methods and not the paper's alpha.
        temperature: T.
        exit_weights: w, one number or one per exit.
        pairs: the teacher exit of each student exit; None pairs i with i.
        label_smoothing: of the cross-entropy's target.
        target_weight: v, anything that broadcasts to (Es, B).
        non_target_weight: u, anything that broadcasts to (Es, B).
        standardise: z-score both sides' logits first, see :func:`~erde.losses.kd.standardise_logits`.
        strength: r, a factor of the distillation, for warming it up.

    Returns:
        ``loss`` (scalar); unweighted parts (Es,): ``ce``, ``tckd`` and ``nckd`` (with T²), and the share
        ``teacher_wrong`` of images that the paired teacher exit gets wrong.

    Raises:
        ValueError: on wrong shapes.

    >>> s = torch.randn(3, 8, 10)
    >>> parts = dkd_loss(s, s, torch.zeros(8, dtype=torch.long))
    >>> bool(parts["nckd"].abs().max() < 1e-5)
    True
    """
    check_shapes(student_logits, teacher_logits, labels)
    student_logits = at_least_float32(student_logits)
    teacher = pair_teacher(student_logits, teacher_logits, pairs)
    softened, target = student_logits, teacher
    if standardise:
        softened, target = standardise_logits(softened), standardise_logits(target)
    first, second = decoupled_kl(softened, target, labels, temperature)
    tckd, nckd = temperature**2 * first, temperature**2 * second
    distilled = (target_weight * tckd + non_target_weight * nckd).mean(dim=1)
    ce = exit_cross_entropy(student_logits, labels, label_smoothing).mean(dim=1)
    return {
        "loss": sum_exits(weigh(ce, strength * distilled, alpha), exit_weights),
        "ce": ce.detach(),
        "tckd": tckd.detach().mean(dim=1),
        "nckd": nckd.detach().mean(dim=1),
        "teacher_wrong": teacher_wrong(teacher, labels).to(ce.dtype).mean(dim=1),
    }


class DKDLoss(Criterion):
    """:func:`dkd_loss` with its settings, warmed up by the number of images seen."""

    images_seen: Tensor

    def __init__(self, config: DKDConfig, settings: ExitSettings) -> None:
        super().__init__(settings)
        self.config = config
        self.warmup_images = 0.0
        if config.warmup_epochs:
            self.warmup_images = config.warmup_epochs * count_train_images(
                settings, "loss.warmup_epochs of 'dkd'"
            )
            self.register_buffer("images_seen", torch.zeros((), dtype=torch.long))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and its parts; shapes as in the function; ``strength`` too where there is a warm-up."""
        warmup: dict[str, Any] = {}
        if self.warmup_images:
            if self.training:
                self.images_seen += labels.numel() * ranks()
            warmup["strength"] = (self.images_seen / self.warmup_images).clamp(max=1.0)
        parts = dkd_loss(
            student_logits,
            teacher_logits,
            labels,
            target_weight=self.config.target_weight,
            non_target_weight=self.config.non_target_weight,
            standardise=self.config.standardise,
            **warmup,
            **self.distilling,
        )
        return {**parts, **warmup}
