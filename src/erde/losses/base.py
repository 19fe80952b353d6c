"""The parts that losses are made of, and the settings that are the same for every arm.

A loss is a function of raw logits of the student (Es, B, K) and of its teacher (Et, B, K), labels (B,), the loss's own
keys (``config``), and the shared settings: the share a of the distillation (``alpha``), the temperature T, the weight w
of each exit, the teacher's exit of each student exit (``pairs``), and ``label_smoothing`` in the cross-entropy's target.
It gives ``loss``, a scalar with a graph, and its parts without one, unweighted: scalars or (Es,). Nothing the teacher gives
carries a gradient. Wrong shapes raise ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from erde.common.errors import UserError
from erde.recipe.losses import LossConfig
from erde.recipe.schema import DistillationConfig

PerExit = float | Sequence[float] | Tensor


@dataclass(frozen=True)
class ExitSettings:
    """The shared settings, resolved for one student and its teacher: one number per student exit.

    ``pairs[i]`` is the teacher's exit that teaches student exit i; empty where there is no teacher. Shapes are those of
    the stages' outputs for one image, without the batch.
    """

    classes: int
    alpha: tuple[float, ...]
    temperature: float
    exit_weights: tuple[float, ...]
    pairs: tuple[int, ...]
    label_smoothing: float = 0.0
    student_shapes: tuple[tuple[int, ...], ...] = ()
    teacher_shapes: tuple[tuple[int, ...], ...] = ()
    train_images: int = 0

    @classmethod
    def resolve(
        cls,
        config: DistillationConfig,
        classes: int,
        student_macs: Sequence[int],
        teacher_macs: Sequence[int] | None,
        **others: Any,
    ) -> ExitSettings:
        """From cumulative MACs per exit, of the student (Es,) and of the teacher (Et,) if there is one.

        ``others`` are fields that need no resolving.
        """
        shares = [macs / student_macs[-1] for macs in student_macs]
        return cls(
            classes=classes,
            alpha=_resolve_alpha(config.alpha, shares),
            temperature=config.temperature,
            exit_weights=_resolve_weights(config.exit_weights, shares),
            pairs=() if teacher_macs is None else pair_exits(student_macs, teacher_macs, config.pairing),
            **others,
        )


class Criterion(nn.Module):
    """A loss with its keys and the shared settings, which every loss function reads from it; each registered once.

    Called with (student logits, teacher logits or None, labels) and its extras by name, it gives what its function gives.
    It never waits for the device. Parameters are trained with the network's; persistent buffers belong to the checkpoint
    and are the same on all ranks.
    """

    alpha: Tensor
    exit_weights: Tensor

    def __init__(self, config: LossConfig, settings: ExitSettings) -> None:
        super().__init__()
        self.config = config
        self.temperature = settings.temperature
        self.pairs = settings.pairs
        self.label_smoothing = settings.label_smoothing
        self.register_buffer("alpha", torch.tensor(settings.alpha), persistent=False)
        self.register_buffer("exit_weights", torch.tensor(settings.exit_weights), persistent=False)

    def end_step(self, parts: int) -> None:
        """Called after each step of the optimiser in training; its batch came in so many ``parts``, each by a call."""


# A criterion has the settings on the network's device, where a step need not bring them first.
Settings = ExitSettings | Criterion


def count_train_images(settings: ExitSettings, user: str, least: int = 1) -> int:
    """Number of images the arm trains on; :class:`UserError` naming ``user``, which needs them, if under ``least``."""
    if settings.train_images < least:
        raise UserError(
            f"{user} needs at least {least:,} train images, got {settings.train_images:,}: "
            "train on more images, or use another loss"
        )
    return settings.train_images


def ranks() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def gather_ranks(tensor: Tensor) -> Tensor:
    """The rows of all ranks, in rank order and without gradient: (B, ...) -> (ranks * B, ...).

    A criterion updates its state with these, so that it stays the same on all ranks. Every rank must have as many rows.
    """
    number = ranks()
    if number == 1:
        return tensor.detach()
    rows = [torch.empty_like(tensor) for _ in range(number)]
    torch.distributed.all_gather(rows, tensor.detach().contiguous())
    return torch.cat(rows)


def _resolve_alpha(alpha: float | Sequence[float] | str, shares: Sequence[float]) -> tuple[float, ...]:
    if alpha == "rising":
        if len(shares) == 1:
            return (0.9,)
        return tuple(0.2 + 0.7 * (share - shares[0]) / (1 - shares[0]) for share in shares)
    if isinstance(alpha, int | float):
        return (float(alpha),) * len(shares)
    return per_exit_values("distillation.alpha", alpha, len(shares))


def _resolve_weights(weights: str | Sequence[float], shares: Sequence[float]) -> tuple[float, ...]:
    """Weights with mean 1, so that they do not change the step size: uniform, or growing with depth."""
    raw: Sequence[float]
    if weights == "uniform":
        raw = [1.0] * len(shares)
    elif weights == "linear":
        raw = [index + 1.0 for index in range(len(shares))]
    elif weights == "macs":
        raw = shares
    else:
        assert not isinstance(weights, str)
        return per_exit_values("distillation.exit_weights", weights, len(shares))
    mean = sum(raw) / len(raw)
    return tuple(value / mean for value in raw)


def per_exit_values(key: str, values: Sequence[Any], exits: int) -> tuple[float, ...]:
    """``values`` as floats; :class:`UserError` unless there is one for each exit."""
    if len(values) != exits:
        raise UserError(f"{key} has {len(values)} values for {exits} exits: give one number, or one per exit")
    return tuple(float(value) for value in values)


def pair_exits(student_macs: Sequence[int], teacher_macs: Sequence[int], pairing: str) -> tuple[int, ...]:
    """The teacher exit of each student exit.

    ``final``: the last for all. ``exit``: exit i for exit i where both have as many, else the nearest
    relative depth (share of the network's MACs); the final exits are always each other's.
    """
    last = len(teacher_macs) - 1
    if pairing == "final":
        return (last,) * len(student_macs)
    if len(student_macs) == len(teacher_macs):
        return tuple(range(len(student_macs)))
    depths = [macs / teacher_macs[-1] for macs in teacher_macs]
    nearest = [
        min(range(len(depths)), key=lambda index: abs(depths[index] - macs / student_macs[-1]))
        for macs in student_macs[:-1]
    ]
    return (*nearest, last)


def check_shapes(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> None:
    """Raise ``ValueError`` unless shapes are (Es, B, K), (Et, B, K) and (B,)."""
    if student_logits.ndim != 3 or labels.shape != student_logits.shape[1:2]:
        raise ValueError(
            f"expected student logits (E, B, K) and labels (B,), got {tuple(student_logits.shape)} "
            f"and {tuple(labels.shape)}"
        )
    if teacher_logits is not None and (
        teacher_logits.ndim != 3 or teacher_logits.shape[1:] != student_logits.shape[1:]
    ):
        raise ValueError(
            f"expected teacher logits (Et, B, K) with the student's B and K, got {tuple(teacher_logits.shape)} "
            f"beside {tuple(student_logits.shape)}"
        )


def pair_teacher(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, pairs: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Checked logits in float32 or better: the student's, and the teacher's in the student's order, detached.

    (Es, B, K), (Et, B, K), (B,) -> (Es, B, K) twice.
    """
    check_shapes(student_logits, teacher_logits, labels)
    if len(pairs) != len(student_logits):
        raise ValueError(
            f"expected a teacher exit for each of {len(student_logits)} student exits, got {tuple(pairs)}"
        )
    student = at_least_float32(student_logits)
    teacher = torch.stack([teacher_logits[index] for index in pairs])
    return student, teacher.detach().to(student.dtype)


def per_exit(value: PerExit, logits: Tensor) -> Tensor:
    """One number, or one per exit, as a tensor (E,)."""
    tensor = torch.as_tensor(value, dtype=logits.dtype, device=logits.device)
    if tensor.ndim == 0:
        return tensor.expand(len(logits))
    if tensor.shape != (len(logits),):
        raise ValueError(
            f"expected one value or one for each of {len(logits)} exits, got {tuple(tensor.shape)}"
        )
    return tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """Losses are computed in float32 or better, whatever autocast gave."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def exit_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every exit and image, in nats: (E, B, K), (B,) -> (E, B).

    With smoothing s the target is ``(1-s)`` times the label and ``s/K`` everywhere (Szegedy et al. 2015,
    arXiv 1512.00567, section 7).
    """
    log_probabilities = F.log_softmax(logits, dim=-1)
    index = labels.expand(len(logits), -1).unsqueeze(-1)
    cross_entropy = -log_probabilities.gather(-1, index).squeeze(-1)
    if label_smoothing == 0:
        return cross_entropy
    return (1 - label_smoothing) * cross_entropy - label_smoothing * log_probabilities.mean(dim=-1)


def hard_loss(student_logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """For losses without a teacher: checked logits in float32 or better (E, B, K), and their mean cross-entropy (E,)."""
    check_shapes(student_logits, None, labels)
    student = at_least_float32(student_logits)
    return student, exit_cross_entropy(student, labels, label_smoothing).mean(dim=1)


def exit_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(t/T) || softmax(s/T))`` in nats, without T²: (E, B, K) twice -> (E, B)."""
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """``-sum_k softmax(t/T)_k log softmax(s/T)_k`` in nats, without T²: (E, B, K) twice -> (E, B).

    The KL plus the teacher's entropy: the same gradient, and not 0 at equality.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    return -((teacher_logits / temperature).softmax(dim=-1) * student).sum(dim=-1)


def exit_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits), in nats: (..., K) -> (...)."""
    log_probabilities = F.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def wrong_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """True where an exit is wrong: (E, B, K), (B,) -> bool (E, B)."""
    return logits.argmax(dim=-1) != labels


@torch.no_grad()
def reach_weights(logits: Tensor) -> Tensor:
    """Weights of images by whether they would reach an exit, of mean 1 at each exit: (E, B, K) -> (E, B).

    ``w_ib`` is proportional to ``1 + r_ib``. r is 1 where image b is answered by no exit before i, if each exit answers
    a share 1/E of the batch: of those that come to it, the ones of least entropy. A guess, for training: what answers in
    use is decided by ``erde.policy``. No label is looked at.
    """
    exits, images = logits.shape[:2]
    entropy = exit_entropy(at_least_float32(logits))
    reached = torch.ones_like(entropy[0])
    weights = []
    for index in range(exits):
        weights.append((1 + reached) / (1 + reached).mean())
        waiting = entropy[index].masked_fill(reached == 0, torch.inf)
        surest = waiting.argsort(stable=True)[: images // exits]
        reached = reached.index_fill(0, surest, 0)
    return torch.stack(weights)


def silence_last(per_exit_values: Tensor) -> Tensor:
    """The values (E, ...) with 0 at the final exit."""
    return torch.cat([per_exit_values[:-1], torch.zeros_like(per_exit_values[-1:])])


def weigh(ce: Tensor, distilled: Tensor, alpha: PerExit) -> Tensor:
    """``(1-a_i) ce_i + a_i distilled_i``: (E,) twice -> (E,)."""
    share = per_exit(alpha, ce)
    return (1 - share) * ce + share * distilled


def sum_exits(per_exit_loss: Tensor, exit_weights: PerExit) -> Tensor:
    """``sum_i w_i L_i``: (E,) -> scalar."""
    return (per_exit(exit_weights, per_exit_loss) * per_exit_loss).sum()
