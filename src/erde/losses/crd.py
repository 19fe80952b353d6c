"""Contrastive representation distillation (Tian et al. 2020, ICLR, arXiv 1910.10699).

Student and teacher features are projected to one space, in which the two views of an image should agree and
those of different images should not. Equation numbers are the paper's, constants those of its authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erde.losses.base import Criterion, ExitSettings, count_train_images, gather_ranks
from erde.losses.cross_entropy import cross_entropy_loss
from erde.losses.features import check_number, feature_channels, pool_features
from erde.losses.kd import kd_loss
from erde.recipe.losses import CRDConfig, KDConfig


def contrastive_loss(positive: Tensor, negative: Tensor, valid: Tensor, images: int) -> Tensor:
    r"""``-log( P⁺ / (P⁺ + M/N) ) - sum_j log( (M/N) / (P_j + M/N) )``, equation 18 with noise 1/N.

    M is the number of an image's negatives, N the number of train images.

    Args:
        positive: P⁺, ``exp(agreement / temperature) / Z`` with the image's own entry of the memory (B,).
        negative: P_j, the same for other entries (B, M).
        valid: where an entry of ``negative`` counts, bool (B, M).
        images: N.

    Returns:
        The loss of each image (B,), in nats.

    >>> valid = torch.ones(1, 3, dtype=torch.bool)
    >>> round(float(contrastive_loss(torch.ones(1), torch.ones(1, 3), valid, 3)), 4)  # 4 ln 2
    2.7726
    """
    epsilon = 1e-7
    noise = valid.sum(dim=1).to(positive.dtype) / images
    own = (positive / (positive + noise + epsilon)).log()
    noise = noise.unsqueeze(1)
    # As a difference: without any negative the noise is 0, and a quotient's gradient would not be a number.
    others = (noise.log() - (negative + noise + epsilon).log()).masked_fill(~valid, 0.0)
    return -own - others.sum(dim=1)


def draw_negatives(known: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Other images for each of a batch, without repetition, none of them known to be of its class.

    Args:
        known: the class of each train image, -1 where it is not known yet (N,).
        labels: classes of the batch (B,).
        number: the most for each image.

    Returns:
        Positions in the train split (B, M), and where they count, bool (B, M): an image with fewer than
        ``number`` others has all of them. Drawn from torch's global generator.
    """
    number = min(number, len(known) - 1)
    order = torch.rand(len(labels), len(known), device=known.device)
    order = order.masked_fill(known == labels.unsqueeze(1), 2.0)
    drawn = order.topk(number, dim=1, largest=False)
    return drawn.indices, drawn.values < 1.5


class ContrastivePair(nn.Module):
    """The CRD term of one student exit and its teacher exit: two projections and two memories.

    The memories hold a unit vector for each train image, student's and teacher's. Each side's embedding is
    contrasted with the other side's memory. The constants Z of equation 18 are measured in the first step.
    """

    memories: Tensor
    normalisers: Tensor

    def __init__(self, student: int, teacher: int, images: int, config: CRDConfig) -> None:
        super().__init__()
        self.channels = (student, teacher)
        self.config = config
        self.project_student = nn.Linear(student, config.dimensions)
        self.project_teacher = nn.Linear(teacher, config.dimensions)
        bound = 1 / math.sqrt(config.dimensions / 3)
        memories = torch.empty(2, images, config.dimensions).uniform_(-bound, bound)
        self.register_buffer("memories", memories)
        self.register_buffer("normalisers", torch.full((2,), -1.0))

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        indices: Tensor,
        negatives: Tensor,
        valid: Tensor,
    ) -> Tensor:
        """The loss of each image (B,); in training the memories learn the batch.

        Args:
            student_features: (B, C, H, W), (B, N, C) or (B, C).
            teacher_features: likewise, with the teacher's channels.
            indices: positions in the train split (B,).
            negatives: positions of the negatives (B, M).
            valid: where they count, bool (B, M).

        Raises:
            ValueError: features of other shapes.
        """
        student = pool_features(student_features, self.channels[0])
        teacher = pool_features(teacher_features.detach(), self.channels[1])
        embeddings = (
            F.normalize(self.project_student(student), dim=1),
            F.normalize(self.project_teacher(teacher), dim=1),
        )
        agreements = []
        # A copy: autograd keeps what it multiplies with, and the memories change below.
        student_memory, teacher_memory = self.memories.clone()
        for embedding, memory in zip(embeddings, (teacher_memory, student_memory), strict=True):
            # All entries first: takes less room than a copy of the chosen ones for every image.
            scores = embedding @ memory.to(embedding.dtype).T / self.config.temperature
            own = scores.gather(1, indices.unsqueeze(1)).squeeze(1)
            agreements.append((own.exp(), scores.gather(1, negatives).exp()))
        normalisers = self._normalise(agreements, valid)
        if self.training:
            self._remember(embeddings, indices)
        images = self.memories.shape[1]
        losses = [
            contrastive_loss(positive / constant, negative / constant, valid, images)
            for (positive, negative), constant in zip(agreements, normalisers, strict=True)
        ]
        return losses[0] + losses[1]

    @torch.no_grad()
    def _normalise(self, agreements: Sequence[tuple[Tensor, Tensor]], valid: Tensor) -> Tensor:
        """Z of both sides (2,): N times the mean agreement in the first step, on all ranks, and then the same."""
        counted = valid.sum() + len(valid)
        means = torch.stack(
            [
                (positive.sum() + negative.masked_fill(~valid, 0.0).sum()) / counted
                for positive, negative in agreements
            ]
        )
        measured = gather_ranks(means[None]).mean(dim=0) * self.memories.shape[1]
        constants = torch.where(self.normalisers < 0, measured.to(self.normalisers.dtype), self.normalisers)
        if self.training:
            self.normalisers.copy_(constants)
        return constants

    @torch.no_grad()
    def _remember(self, embeddings: Sequence[Tensor], indices: Tensor) -> None:
        """Move the memories of the batch's images, of all ranks, towards the embeddings."""
        all_indices = gather_ranks(indices)
        for memory, embedding in zip(self.memories, embeddings, strict=True):
            new = gather_ranks(embedding).to(memory.dtype)
            momentum = self.config.momentum
            mixed = momentum * memory[all_indices] + (1 - momentum) * new
            memory.index_copy_(0, all_indices, F.normalize(mixed, dim=1))


class CRDLoss(Criterion):
    """``L = sum_i w_i [ mean_b CE(s_ib, y_b) + v mean_b CRD_ib ]``, the second term at the exits that are compared.

    ``with_kd`` the first term is that of :func:`~erde.losses.kd.kd_loss`. CRD is that of
    :class:`ContrastivePair`, in both directions, on features pooled over places, of the student's stage i
    and of the teacher's stage that is paired with it.
    """

    config: CRDConfig
    classes_seen: Tensor

    def __init__(self, config: CRDConfig, settings: ExitSettings) -> None:
        super().__init__(config, settings)
        images = count_train_images(settings, "the loss 'crd'", least=settings.classes + 1)
        last = len(settings.alpha) - 1
        self.plain_kd = KDConfig()
        self.teacher_exits = len(settings.teacher_shapes)
        self.exits = range(last + 1) if config.exits == "all" else range(last, last + 1)
        paired = [settings.pairs[index] for index in self.exits]
        student = feature_channels(settings.student_shapes, self.exits, "student", config.name)
        teacher = feature_channels(settings.teacher_shapes, paired, "teacher", config.name)
        self.contrasts = nn.ModuleList(
            ContrastivePair(*channels, images, config) for channels in zip(student, teacher, strict=True)
        )
        # Classes become known as images are seen; a memory of an image not yet seen is noise anyway.
        self.register_buffer("classes_seen", torch.full((images,), -1))

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        *,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        indices: Tensor,
    ) -> dict[str, Tensor]:
        """The parts of ``ce`` or ``kd``, and ``crd`` (unweighted): a scalar, with ``exits: all`` (E,).

        Raises:
            ValueError: on wrong shapes.
        """
        if self.config.with_kd:
            parts = kd_loss(student_logits, teacher_logits, labels, self.plain_kd, self)
        else:
            parts = cross_entropy_loss(
                student_logits,
                labels,
                exit_weights=self.exit_weights,
                label_smoothing=self.label_smoothing,
            )
        student_features = check_number(student_features, len(self.alpha))
        teacher_features = check_number(teacher_features, self.teacher_exits)
        if indices.shape != labels.shape:
            raise ValueError(f"expected indices {tuple(labels.shape)}, got {tuple(indices.shape)}")
        if self.training:
            self.classes_seen.index_copy_(0, gather_ranks(indices), gather_ranks(labels))
        negatives, valid = draw_negatives(self.classes_seen, labels, self.config.negatives)
        contrasts = [
            contrast(
                student_features[index], teacher_features[self.pairs[index]], indices, negatives, valid
            ).mean()
            for index, contrast in zip(self.exits, self.contrasts, strict=True)
        ]
        crd = torch.stack(contrasts)
        weights = self.exit_weights[self.exits.start :]
        loss = parts["loss"] + self.config.weight * (weights * crd).sum()
        return {**parts, "loss": loss, "crd": crd.detach() if self.config.exits == "all" else crd[0].detach()}
