"""DynamicKD (Zhu et al. 2023, arXiv 2305.05233): a learnt factor corrects the entropy of the student's soft output.

The paper's controller is known in outline only; docs/methods/dynamickd.md says which parts are our own reading.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from erde.losses.base import Criterion, ExitSettings, count_train_images
from erde.losses.kd import kd_loss
from erde.recipe.losses import ControllerConfig, DynamicKDConfig, KDConfig


class EntropyController(nn.Module):
    """``exp(b)``, which multiplies the student's logits inside the distillation term: positive by construction.

    b, the parameter, starts at 0, where distillation is the plain one; above 0 it sharpens the student's
    soft output, below 0 it softens it. b is (exits, images, classes), each 1 where the numbers are shared.
    The optimiser's weight decay, if any, pulls it towards 0.

    Raises:
        UserError: a number for each train image, without train images.
    """

    def __init__(self, config: ControllerConfig, settings: ExitSettings) -> None:
        super().__init__()
        images = count_train_images(settings, "a controller with per_sample") if config.per_sample else 1
        self.config = config
        self.log_scale = nn.Parameter(
            torch.zeros(
                len(settings.alpha) if config.per_exit else 1,
                images,
                settings.classes if config.per_class else 1,
            )
        )

    def forward(self, logits: Tensor, indices: Tensor | None = None) -> Tensor:
        """The factors for logits (E, B, K): (E or 1, B or 1, K or 1); ``indices`` (B,) with ``per_sample``.

        Raises:
            ValueError: logits of another number of exits or classes, or no indices.
        """
        exits, _, classes = self.log_scale.shape
        if (exits > 1 and exits != len(logits)) or (classes > 1 and classes != logits.shape[-1]):
            raise ValueError(
                f"expected logits of {exits} exits and {classes} classes for this controller (1: any number), "
                f"got {tuple(logits.shape)}"
            )
        value: Tensor = self.log_scale
        if self.config.per_sample:
            if indices is None or indices.shape != logits.shape[1:2]:
                raise ValueError("expected indices (B,) for a controller per sample")
            value = value[:, indices]
        # The value of b and a multiple of its gradient.
        return (value.detach() + self.config.gradient_factor * (value - value.detach())).exp()

    def parts(self, scale: Tensor) -> dict[str, Tensor]:
        """``controller`` for the log: the mean factor, (E,) with ``per_exit``, else a scalar."""
        scale = scale.detach()
        return {"controller": scale.mean(dim=(1, 2)) if self.config.per_exit else scale.mean()}


class DynamicKDLoss(Criterion):
    """:func:`~erde.losses.kd.kd_loss` whose KL sees ``exp(b) s`` for the student's logits s.

    ``L = sum_i w_i mean_b [ (1-a_i) CE(s_ib, y_b) + a_i T² KL(t_ib || exp(b) s_ib) ]``. The cross-entropy is
    on the unscaled logits, so only the KL teaches the controller.
    """

    def __init__(self, config: DynamicKDConfig, settings: ExitSettings) -> None:
        super().__init__(config, settings)
        self.plain_kd = KDConfig()
        self.controller = EntropyController(config, settings)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        *,
        indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The parts of ``kd_loss`` and ``controller``, the mean factor: a scalar, or (E,) with ``per_exit``."""
        scale = self.controller(student_logits, indices)
        parts = kd_loss(student_logits, teacher_logits, labels, self.plain_kd, self, scale)
        return {**parts, **self.controller.parts(scale)}
