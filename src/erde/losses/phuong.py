"""Distillation-based training of multi-exit networks (Phuong and Lampert, ICCV 2019): the last exit teaches."""

from __future__ import annotations

import torch
from torch import Tensor

from erde.losses.base import (
    Criterion,
    ExitSettings,
    Settings,
    at_least_float32,
    gather_ranks,
    hard_loss,
    silence_last,
    soft_cross_entropy,
    sum_exits,
)
from erde.recipe.losses import PhuongConfig


def phuong_loss(
    student_logits: Tensor,
    labels: Tensor,
    config: PhuongConfig,
    settings: Settings,
    temperature: float | Tensor,
) -> dict[str, Tensor]:
    r"""``L = sum_i w_i mean_b [ (1-c) CE(s_ib, y_b) + c [i < E-1] T² S(s_(E-1)b, s_ib) ]``, in nats.

    S is the soft cross-entropy at ``temperature`` T, and the last exit's logits inside it are detached. c, the paper's C,
    is ``config.soft_share``.

    Returns:
        ``loss``; parts (E,): ``ce`` and ``soft`` (with T²).

    >>> from erde.recipe.schema import DistillationConfig
    >>> settings = ExitSettings.resolve(DistillationConfig(), 4, [1, 2], None)
    >>> logits = torch.zeros(2, 5, 4)  # ln 4 from every term: twice 1/2 for the cross-entropies, 1/2 for S
    >>> parts = phuong_loss(logits, torch.zeros(5, dtype=torch.long), PhuongConfig(), settings, 1.0)
    >>> round(float(parts["loss"]), 4)
    2.0794
    """
    student, ce = hard_loss(student_logits, labels, settings.label_smoothing)
    soft = temperature**2 * soft_cross_entropy(student, student[-1:].detach(), temperature).mean(dim=1)
    soft = silence_last(soft)
    loss = sum_exits((1 - config.soft_share) * ce + config.soft_share * soft, settings.exit_weights)
    return {"loss": loss, "ce": ce.detach(), "soft": soft.detach()}


class PhuongLoss(Criterion):
    """:func:`phuong_loss` with its settings; the temperature, a buffer, grows while the last exit is too sure.

    After a step in which the last exit's largest probability at temperature T is above ``confidence`` in
    the mean (of all ranks), T is multiplied by ``growth``.
    """

    config: PhuongConfig
    annealed_temperature: Tensor
    sureness: Tensor

    def __init__(self, config: PhuongConfig, settings: ExitSettings) -> None:
        super().__init__(config, settings)
        self.register_buffer("annealed_temperature", torch.tensor(config.start_temperature))
        # The sum over the parts of a step; 0 between two steps, so no checkpoint needs it.
        self.register_buffer("sureness", torch.tensor(0.0), persistent=False)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor
    ) -> dict[str, Tensor]:
        """The loss and its parts; ``temperature`` (scalar) is the one of this step. Ignores a teacher."""
        # A copy: it is given away, and the buffer changes at the step's end.
        temperature = self.annealed_temperature.clone()
        parts = phuong_loss(student_logits, labels, self.config, self, temperature)
        if self.training:
            with torch.no_grad():
                surest = (at_least_float32(student_logits[-1]) / temperature).softmax(dim=-1).amax(dim=-1)
                self.sureness += surest.mean()
        return {**parts, "temperature": temperature}

    @torch.no_grad()
    def end_step(self, parts: int) -> None:
        """Raise the temperature if the last exit was too sure of the batch."""
        too_sure = gather_ranks(self.sureness[None]).mean() / parts > self.config.confidence
        temperature = self.annealed_temperature
        temperature.copy_(torch.where(too_sure, temperature * self.config.growth, temperature))
        self.sureness.zero_()
