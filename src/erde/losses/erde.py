"""ERDE: entropy-regularised distillation for early exits (Guidez et al. 2025, arXiv 2510.04856).

The paper's weights, temperature and some readings are not public; docs/method.md lists what is known,
and each open reading is a switch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from erde.losses.base import (
    Criterion,
    ExitSettings,
    PerExit,
    at_least_float32,
    check_shapes,
    exit_cross_entropy,
    exit_entropy,
    exit_kl,
    one_per_exit,
    pair_teacher,
    per_exit,
    silence_last,
    sum_exits,
    teacher_wrong,
    weigh,
)
from erde.losses.dkd import decoupled_kl
from erde.losses.dynamickd import EntropyController
from erde.recipe.losses import (
    DistillationForm,
    EntropyExits,
    EntropyForm,
    ERDEConfig,
    WrongTest,
)


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


def wrong_images(
    teacher_logits: Tensor,
    paired: Tensor,
    labels: Tensor,
    test: WrongTest,
    uncertainty: float,
    held_out: Tensor | None,
) -> Tensor:
    """Where the teacher counts as wrong: bool (Es, B); arguments as in :func:`erde_loss`.

    Raises:
        ValueError: the test ``held_out`` without such logits.
    """
    if test == "final":
        return teacher_wrong(teacher_logits[-1:], labels).expand(len(paired), -1)
    if test == "held_out":
        if held_out is None:
            raise ValueError("expected held-out logits for wrong_test='held_out', got none")
        return teacher_wrong(held_out, labels)
    wrong = teacher_wrong(paired, labels)
    if test == "uncertain":
        wrong = wrong | (paired.softmax(dim=-1).amax(dim=-1) < uncertainty)
    return wrong


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
    distillation_form: DistillationForm = "kl",
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
    scale: Tensor | None = None,
    held_out_logits: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""KD where the teacher is right, and entropy at the intermediate exits where it is wrong.

    ``L = sum_i w_i mean_b [ (1-a_i) CE(s_ib, y_b) + a_i m_ib T² KL(t_ib || s_ib)
    + b_i [i < E-1] (1 - m_ib) (log K - H(s_ib)) ]`` with ``m_ib`` = 1 where teacher exit i is right.
    Every part is a mean over all B images. With a teacher that is always right it is ``kd_loss``.

    Args:
        student_logits: raw logits (Es, B, K).
        teacher_logits: raw logits (Et, B, K); no gradient goes there.
        labels: classes (B,).
        alpha: a, one number or one per exit.
        beta: b, weight of the entropy term, one number or one per exit.
        temperature: T, in the KL only.
        exit_weights: w, one number or one per exit.
        pairs: the teacher exit of each student exit; None pairs i with i.
        label_smoothing: of the cross-entropy's target.
        kl_on_wrong: keep the KL on teacher-wrong images too (the entropy term is then added to it).
        ce_on_wrong: keep the cross-entropy of intermediate exits on teacher-wrong images.
        wrong_test: the teacher counts as wrong by its paired ``exit``, by its ``final`` exit, by its
            paired exit being wrong or ``uncertain`` (max probability under ``uncertainty``), or by the paired
            exit of ``held_out`` logits.
        uncertainty: see ``wrong_test``.
        entropy_form: see :func:`entropy_penalty`.
        entropy_exits: ``intermediate``, or ``all``, the final one included.
        distillation_form: ``kl``, or ``dkd``: ``target_weight TCKD + non_target_weight NCKD`` in its place,
            see :func:`~erde.losses.dkd.decoupled_kl`.
        target_weight: see ``distillation_form``.
        non_target_weight: see ``distillation_form``.
        scale: what the student's logits are multiplied with in the distillation term alone, anything that
            broadcasts to (Es, B, K); see :mod:`erde.losses.dynamickd`.
        held_out_logits: raw logits (Et, B, K) of a teacher that was not trained on these images, for
            ``wrong_test``; they teach nothing.

    Returns:
        ``loss`` (scalar); unweighted parts (Es,): ``ce``, ``kl`` or ``dkd`` (with T²), ``entropy`` (all as
        masked), and the share ``teacher_wrong`` of images by ``wrong_test``.

    Raises:
        ValueError: on wrong shapes.

    >>> s, t = torch.randn(3, 8, 10), torch.randn(3, 8, 10)
    >>> sorted(erde_loss(s, t, torch.zeros(8, dtype=torch.long)))
    ['ce', 'entropy', 'kl', 'loss', 'teacher_wrong']
    """
    check_shapes(student_logits, teacher_logits, labels)
    student_logits = at_least_float32(student_logits)
    teacher = pair_teacher(student_logits, teacher_logits, pairs)
    held_out = None
    if held_out_logits is not None:
        check_shapes(student_logits, held_out_logits, labels)
        held_out = pair_teacher(student_logits, held_out_logits, pairs)
    wrong = wrong_images(teacher_logits, teacher, labels, wrong_test, uncertainty, held_out)
    wrong = wrong.to(student_logits.dtype)
    right = 1 - wrong

    ce = exit_cross_entropy(student_logits, labels, label_smoothing)
    if not ce_on_wrong:
        ce = torch.cat([ce[:-1] * right[:-1], ce[-1:]])
    softened = student_logits if scale is None else scale * student_logits
    if distillation_form == "dkd":
        target, others = decoupled_kl(softened, teacher, labels, temperature)
        distilled = temperature**2 * (target_weight * target + non_target_weight * others)
    else:
        distilled = temperature**2 * exit_kl(softened, teacher, temperature)
    if not kl_on_wrong:
        distilled = distilled * right
    entropy = wrong * entropy_penalty(student_logits, teacher, entropy_form)
    if entropy_exits == "intermediate":
        entropy = silence_last(entropy)

    ce, distilled, entropy = ce.mean(dim=1), distilled.mean(dim=1), entropy.mean(dim=1)
    per_exit_loss = weigh(ce, distilled, alpha) + per_exit(beta, ce) * entropy
    return {
        "loss": sum_exits(per_exit_loss, exit_weights),
        "ce": ce.detach(),
        distillation_form: distilled.detach(),
        "entropy": entropy.detach(),
        "teacher_wrong": wrong.mean(dim=1),
    }


class ERDELoss(Criterion):
    """:func:`erde_loss` with its settings, and an entropy controller where one is asked for."""

    beta: Tensor

    def __init__(self, config: ERDEConfig, settings: ExitSettings) -> None:
        super().__init__(settings)
        exits = len(settings.alpha)
        beta = config.beta if isinstance(config.beta, list) else [config.beta] * exits
        self.switches = config.model_dump(exclude={"name", "beta", "controller"})
        self.register_buffer("beta", torch.tensor(one_per_exit("loss.beta", beta, exits)), persistent=False)
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
        """The loss and its parts; shapes as in the function; ``controller`` too where there is one."""
        scale = None if self.controller is None else self.controller(student_logits, indices)
        parts = erde_loss(
            student_logits,
            teacher_logits,
            labels,
            beta=self.beta,
            scale=scale,
            held_out_logits=held_out_logits,
            **self.switches,
            **self.distilling,
        )
        if self.controller is not None and scale is not None:
            parts |= self.controller.parts(scale)
        return parts
