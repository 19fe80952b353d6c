"""ERDE: entropy-regularised distillation for early exits (Guidez et al. 2025, arXiv 2510.04856).

The paper's weights, temperature and some readings are not public; docs/method.md lists what is known,
and each open reading is a switch here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from erde.losses.base import (
    Criterion,
    ExitSettings,
    PerExit,
    Settings,
    exit_cross_entropy,
    exit_entropy,
    exit_kl,
    pair_teacher,
    per_exit,
    per_exit_values,
    silence_last,
    sum_exits,
    weigh,
    wrong_answers,
)
from erde.losses.dkd import decoupled_kl
from erde.losses.dynamickd import EntropyController
from erde.recipe.losses import EntropyForm, ERDEConfig


def entropy_penalty(student_logits: Tensor, teacher_logits: Tensor, form: EntropyForm) -> Tensor:
    """Distance of the student's entropy from the wanted one: (E, B, K) twice -> (E, B), nats.

    ``negentropy``: ``log K - H(s) = KL(s || u)``, in [0, log K]. ``uniform_kl``: ``KL(u || s)``,
    unbounded. ``teacher``: ``(H(t) - H(s))²``. All at temperature 1.
    """
    if form == "negentropy":
        return math.log(student_logits.shape[-1]) - exit_entropy(student_logits)
    if form == "uniform_kl":
        log_probabilities = F.log_softmax(student_logits, dim=-1)
        return -math.log(student_logits.shape[-1]) - log_probabilities.mean(dim=-1)
    return (exit_entropy(teacher_logits) - exit_entropy(student_logits)) ** 2


def wrong_images(
    student: Tensor,
    teacher_logits: Tensor,
    paired: Tensor,
    labels: Tensor,
    config: ERDEConfig,
    held_out: Tensor | None,
) -> Tensor:
    """True where an image counts as wrong by ``config.wrong_test``: bool (Es, B).

    ``paired`` and ``held_out`` are the teacher's logits in the student's order (Es, B, K).

    Raises:
        ValueError: the test ``held_out`` without such logits.
    """
    if config.wrong_test == "final":
        return wrong_answers(teacher_logits[-1:], labels).expand(len(paired), -1)
    if config.wrong_test == "harm":
        # What a certificate counts: the full network would have been right.
        wrong = wrong_answers(student, labels)
        return wrong & ~wrong[-1]
    if config.wrong_test == "held_out":
        if held_out is None:
            raise ValueError("expected held-out logits for wrong_test='held_out', got none")
        return wrong_answers(held_out, labels)
    wrong = wrong_answers(paired, labels)
    if config.wrong_test == "uncertain":
        wrong = wrong | (paired.softmax(dim=-1).amax(dim=-1) < config.uncertainty)
    return wrong


def erde_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    config: ERDEConfig,
    settings: Settings,
    beta: PerExit | None = None,
    scale: Tensor | None = None,
    held_out_logits: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""KD where the teacher is right, and entropy at the intermediate exits where it is wrong.

    ``L = sum_i w_i mean_b [ (1-a_i) CE(s_ib, y_b) + a_i m_ib T² KL(t_ib || s_ib)
    + b_i [i < E-1] (1 - m_ib) (log K - H(s_ib)) ]`` with ``m_ib`` = 1 where teacher exit i is right.
    Every part is a mean over all B images. With a teacher that is always right it is ``kd_loss``.
    The config's switches change single terms: see :class:`~erde.recipe.losses.ERDEConfig`.

    Args:
        beta: b, if not ``config.beta``: a tensor on the device of the logits.
        scale: a factor of the student's logits in the distillation term alone, anything that broadcasts to (Es, B, K);
            see :mod:`erde.losses.dynamickd`.
        held_out_logits: raw logits (Et, B, K) of a teacher that was not trained on these images, for
            ``wrong_test``; they teach nothing.

    Returns:
        ``loss``; parts (Es,): ``ce``, ``kl`` or ``dkd`` (with T²), ``entropy`` (all as masked); ``teacher_wrong``, the share
        of images that the paired teacher exit gets wrong, and ``doubted``, that by another ``wrong_test``.

    >>> from erde.recipe.schema import DistillationConfig
    >>> settings = ExitSettings.resolve(DistillationConfig(), 10, [1, 2, 3], [1, 2, 3])
    >>> s, t = torch.randn(3, 8, 10), torch.randn(3, 8, 10)
    >>> sorted(erde_loss(s, t, torch.zeros(8, dtype=torch.long), ERDEConfig(), settings))
    ['ce', 'entropy', 'kl', 'loss', 'teacher_wrong']
    """
    student, teacher = pair_teacher(student_logits, teacher_logits, labels, settings.pairs)
    held_out = None
    if held_out_logits is not None:
        _, held_out = pair_teacher(student, held_out_logits, labels, settings.pairs)
    wrong = wrong_images(student, teacher_logits, teacher, labels, config, held_out).to(student.dtype)
    right = 1 - wrong

    ce = exit_cross_entropy(student, labels, settings.label_smoothing)
    if not config.ce_on_wrong:
        ce = torch.cat([ce[:-1] * right[:-1], ce[-1:]])
    softened = student if scale is None else scale * student
    if config.distillation_form == "dkd":
        target, others = decoupled_kl(softened, teacher, labels, settings.temperature)
        distilled = config.target_weight * target + config.non_target_weight * others
    else:
        distilled = exit_kl(softened, teacher, settings.temperature)
    distilled = settings.temperature**2 * distilled
    if not config.kl_on_wrong:
        distilled = distilled * right
    entropy = wrong * entropy_penalty(student, teacher, config.entropy_form)
    if config.entropy_exits == "intermediate":
        entropy = silence_last(entropy)

    ce, distilled, entropy = ce.mean(dim=1), distilled.mean(dim=1), entropy.mean(dim=1)
    beta = per_exit(config.beta if beta is None else beta, ce)
    per_exit_loss = weigh(ce, distilled, settings.alpha) + beta * entropy
    return {
        "loss": sum_exits(per_exit_loss, settings.exit_weights),
        "ce": ce.detach(),
        config.distillation_form: distilled.detach(),
        "entropy": entropy.detach(),
        "teacher_wrong": wrong_answers(teacher, labels).to(student.dtype).mean(dim=1),
        **({} if config.wrong_test == "exit" else {"doubted": wrong.mean(dim=1)}),
    }


class ERDELoss(Criterion):
    """:func:`erde_loss` with its settings, and an entropy controller where one is asked for."""

    config: ERDEConfig
    beta: Tensor

    def __init__(self, config: ERDEConfig, settings: ExitSettings) -> None:
        super().__init__(config, settings)
        exits = len(settings.alpha)
        beta = config.beta if isinstance(config.beta, list) else [config.beta] * exits
        values = per_exit_values("loss.beta", beta, exits)
        self.register_buffer("beta", torch.tensor(values), persistent=False)
        self.controller = None
        if config.controller is not None:
            self.controller = EntropyController(config.controller, settings)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        *,
        indices: Tensor | None = None,
        held_out_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its parts; ``controller`` too where there is one."""
        scale = None if self.controller is None else self.controller(student_logits, indices)
        parts = erde_loss(
            student_logits,
            teacher_logits,
            labels,
            self.config,
            self,
            self.beta,
            scale,
            held_out_logits,
        )
        if self.controller is not None and scale is not None:
            parts |= self.controller.parts(scale)
        return parts
