"""ERDE: entropy-regularised distillation for early exits (Guidez et al. 2025, arXiv 2510.04856).

The paper's weights, temperature and some readings are not public; docs/method.md lists what is known,
and each open reading is a switch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from erde.config import LossConfig
from erde.losses.base import (
    ExitSettings,
    LossSpec,
    PerExit,
    at_least_float32,
    check_shapes,
    exit_cross_entropy,
    exit_entropy,
    exit_kl,
    one_per_exit,
    pair_teacher,
    per_exit,
    teacher_wrong,
)

WrongTest = Literal["exit", "final", "uncertain"]
EntropyForm = Literal["negentropy", "uniform_kl", "teacher"]
EntropyExits = Literal["intermediate", "all"]


def entropy_penalty(student_logits: Tensor, teacher_logits: Tensor, form: EntropyForm) -> Tensor:
    """What is least where the student is as unsure as it should be: (E, B, K) twice -> (E, B), nats.

    ``negentropy``: ``log K - H(s) = KL(s || u)``, in [0, log K]. ``uniform_kl``: ``KL(u || s)``,
    unbounded. ``teacher``: ``(H(t) - H(s))²``. All at temperature 1.
    """
    if form == "negentropy":
        return math.log(student_logits.shape[-1]) - exit_entropy(student_logits)
    if form == "uniform_kl":
        log_probabilities = F.log_softmax(student_logits, dim=-1)
        return -math.log(student_logits.shape[-1]) - log_probabilities.mean(dim=-1)
    return (exit_entropy(teacher_logits) - exit_entropy(student_logits)) ** 2


def erde_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: PerExit = 0.9,
    beta: PerExit = 0.2,
    temperature: float = 4.0,
    exit_weights: PerExit = 1.0,
    pairs: Sequence[int] | None = None,
    label_smoothing: float = 0.0,
    kl_on_wrong: bool = False,
    ce_on_wrong: bool = True,
    wrong_test: WrongTest = "exit",
    uncertainty: float = 0.5,
    entropy_form: EntropyForm = "negentropy",
    entropy_exits: EntropyExits = "intermediate",
) -> dict[str, Tensor]:
    r"""KD where the teacher is right, and entropy at the intermediate exits where it is wrong.

    ``L = sum_i w_i mean_b [ (1-a_i) CE(s_ib, y_b) + a_i m_ib T² KL(t_ib || s_ib)
    + b_i [i < E-1] (1 - m_ib) (log K - H(s_ib)) ]`` with ``m_ib`` = 1 where teacher exit i is right.
    Every part is a mean over all B images. With a teacher that is always right it is ``kd_loss``.

    Args:
        student_logits: raw logits (Es, B, K).
        teacher_logits: raw logits (Et, B, K), no gradient wanted.
        labels: classes (B,).
        alpha: a, one number or one per exit.
        beta: b, weight of the entropy term, one number or one per exit.
        temperature: T, in the KL only.
        exit_weights: w, one number or one per exit.
        pairs: the teacher exit of each student exit; None pairs i with i.
        label_smoothing: of the cross-entropy's target.
        kl_on_wrong: keep the KL on teacher-wrong images too (the entropy term is then added to it).
        ce_on_wrong: keep the cross-entropy of intermediate exits on teacher-wrong images.
        wrong_test: the teacher counts as wrong by its paired ``exit``, by its ``final`` exit, or by its
            paired exit being wrong or ``uncertain`` (max probability under ``uncertainty``).
        uncertainty: see ``wrong_test``.
        entropy_form: see :func:`entropy_penalty`.
        entropy_exits: ``intermediate``, or ``all``, the final one included.

    Returns:
        ``loss`` (scalar); unweighted parts (Es,): ``ce``, ``kl`` (with T²), ``entropy`` (all as masked),
        and the share ``teacher_wrong`` of images by ``wrong_test``.

    Raises:
        ValueError: on wrong shapes.

    >>> s, t = torch.randn(3, 8, 10), torch.randn(3, 8, 10)
    >>> sorted(erde_loss(s, t, torch.zeros(8, dtype=torch.long)))
    ['ce', 'entropy', 'kl', 'loss', 'teacher_wrong']
    """
    check_shapes(student_logits, teacher_logits, labels)
    student_logits = at_least_float32(student_logits)
    teacher = pair_teacher(student_logits, teacher_logits, pairs).to(student_logits.dtype)
    if wrong_test == "final":
        final = teacher_logits[-1:].to(student_logits.dtype)
        wrong = teacher_wrong(final, labels).expand(len(student_logits), -1)
    else:
        wrong = teacher_wrong(teacher, labels)
        if wrong_test == "uncertain":
            wrong = wrong | (teacher.softmax(dim=-1).amax(dim=-1) < uncertainty)
    wrong = wrong.to(student_logits.dtype)
    right = 1 - wrong

    ce = exit_cross_entropy(student_logits, labels, label_smoothing)
    if not ce_on_wrong:
        ce = torch.cat([ce[:-1] * right[:-1], ce[-1:]])
    kl = temperature**2 * exit_kl(student_logits, teacher, temperature)
    if not kl_on_wrong:
        kl = kl * right
    entropy = wrong * entropy_penalty(student_logits, teacher, entropy_form)
    if entropy_exits == "intermediate":
        entropy = torch.cat([entropy[:-1], torch.zeros_like(entropy[-1:])])

    ce, kl, entropy = ce.mean(dim=1), kl.mean(dim=1), entropy.mean(dim=1)
    share = per_exit(alpha, ce)
    per_exit_loss = (1 - share) * ce + share * kl + per_exit(beta, ce) * entropy
    return {
        "loss": (per_exit(exit_weights, ce) * per_exit_loss).sum(),
        "ce": ce.detach(),
        "kl": kl.detach(),
        "entropy": entropy.detach(),
        "teacher_wrong": wrong.mean(dim=1),
    }


class ERDEConfig(LossConfig):
    """ERDE's own knobs; alpha, temperature, exit weights and pairing are shared with KD."""

    name: Literal["erde"] = "erde"
    beta: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(ge=0)]] = 0.2
    kl_on_wrong: bool = False
    ce_on_wrong: bool = True
    wrong_test: WrongTest = "exit"
    uncertainty: Annotated[float, Field(ge=0, le=1)] = 0.5
    entropy_form: EntropyForm = "negentropy"
    entropy_exits: EntropyExits = "intermediate"


class ERDELoss(nn.Module):
    """:func:`erde_loss` with its settings."""

    alpha: Tensor
    beta: Tensor
    exit_weights: Tensor

    def __init__(self, config: ERDEConfig, settings: ExitSettings) -> None:
        super().__init__()
        exits = len(settings.alpha)
        beta = config.beta if isinstance(config.beta, list) else [config.beta] * exits
        self.config = config
        self.temperature = settings.temperature
        self.pairs = settings.pairs
        self.label_smoothing = settings.label_smoothing
        self.register_buffer("alpha", torch.tensor(settings.alpha), persistent=False)
        self.register_buffer("beta", torch.tensor(one_per_exit("loss.beta", beta, exits)), persistent=False)
        self.register_buffer("exit_weights", torch.tensor(settings.exit_weights), persistent=False)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and its parts; shapes as in the function."""
        return erde_loss(
            student_logits,
            teacher_logits,
            labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            exit_weights=self.exit_weights,
            pairs=self.pairs,
            label_smoothing=self.label_smoothing,
            kl_on_wrong=self.config.kl_on_wrong,
            ce_on_wrong=self.config.ce_on_wrong,
            wrong_test=self.config.wrong_test,
            uncertainty=self.config.uncertainty,
            entropy_form=self.config.entropy_form,
            entropy_exits=self.config.entropy_exits,
        )


ERDE = LossSpec(
    ERDEConfig,
    ERDELoss,
    needs_teacher=True,
    summary="KD, with entropy at intermediate exits where the teacher is wrong",
)
