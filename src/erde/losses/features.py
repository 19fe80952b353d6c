"""Features in losses: checks, pooling, adapters between widths, and the criterion of losses that compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from erde.common.errors import UserError
from erde.losses.base import Criterion, ExitSettings, at_least_float32
from erde.recipe.losses import BYOTConfig, ExitEnsembleConfig


def feature_channels(
    shapes: Sequence[tuple[int, ...]], exits: Sequence[int], owner: str, loss: str
) -> list[int]:
    """Channels of the features at ``exits``, from the shapes for one image.

    Maps are (C, H, W), tokens (N, C), vectors (C,).

    Raises:
        UserError: no features of such a shape at one of the exits; names the loss and the features' owner.
    """
    channels = []
    for index in exits:
        shape = shapes[index] if index < len(shapes) else ()
        if not 1 <= len(shape) <= 3:
            offered = f"of shape {shape}" if shape else "none"
            raise UserError(
                f"the loss '{loss}' compares features, and the {owner}'s backbone offers {offered} at exit {index}: "
                "expected (C, H, W), (N, C) or (C,); use another backbone or a loss without features"
            )
        channels.append(shape[-1] if len(shape) == 2 else shape[0])
    return channels


def pool_features(features: Tensor, channels: int) -> Tensor:
    """Mean over places, in float32 or better: (B, C, H, W), (B, N, C) or (B, C) -> (B, C).

    Raises:
        ValueError: other than ``channels`` channels, or another number of dimensions.
    """
    if features.ndim == 4:
        pooled = at_least_float32(features).mean(dim=(2, 3))
    elif features.ndim == 3:
        pooled = at_least_float32(features).mean(dim=1)
    else:
        pooled = at_least_float32(features)
    if pooled.ndim != 2 or pooled.shape[1] != channels:
        raise ValueError(f"expected features with {channels} channels, got {tuple(features.shape)}")
    return pooled


def check_feature_shape(features: Tensor, logits: Tensor) -> None:
    """Raise ``ValueError`` unless features are (E, B, C) with the E and B of the logits."""
    if features.ndim != 3 or features.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"expected features (E, B, C) beside logits {tuple(logits.shape)}, got {tuple(features.shape)}"
        )


def check_number(features: Sequence[Tensor] | None, exits: int) -> Sequence[Tensor]:
    """The features; ``ValueError`` unless there are some, of so many exits."""
    if features is None or len(features) != exits:
        number = "none" if features is None else len(features)
        raise ValueError(f"expected features of {exits} exits, got {number}")
    return features


class Adapters(nn.Module):
    """Brings the pooled features of all exits to the width of the last stage's.

    A small bottleneck per earlier exit, C -> C_last/4 -> C_last with a ReLU between; the last stage's
    features stay as they are. Adapters are for training only and never part of the exported network.

    Raises:
        UserError: a stage without features.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], exits: int, loss: str) -> None:
        super().__init__()
        self.channels = feature_channels(shapes, range(exits), "student", loss)
        width = self.channels[-1]
        inner = max(1, width // 4)
        self.bottlenecks = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, width))
            for channels in self.channels[:-1]
        )

    def forward(self, features: Sequence[Tensor] | None) -> Tensor:
        """Features of the E stages -> (E, B, C_last).

        Raises:
            ValueError: features of another number of exits, or of other shapes.
        """
        features = check_number(features, len(self.channels))
        pooled = [
            pool_features(stage_features, channels)
            for stage_features, channels in zip(features, self.channels, strict=True)
        ]
        adapted = [layer(vector) for layer, vector in zip(self.bottlenecks, pooled[:-1], strict=True)]
        return torch.stack([*adapted, pooled[-1]])


class FeatureCriterion(Criterion):
    """The criterion of a loss that compares the student's own features, through adapters, where they have a weight."""

    function: ClassVar[Callable[..., dict[str, Tensor]]]
    config: BYOTConfig | ExitEnsembleConfig

    def __init__(self, config: BYOTConfig | ExitEnsembleConfig, settings: ExitSettings) -> None:
        super().__init__(config, settings)
        self.adapters = None
        if config.feature_weight:
            self.adapters = Adapters(settings.student_shapes, len(settings.alpha), config.name)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        student_features: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its parts; ignores a teacher."""
        features = None if self.adapters is None else self.adapters(student_features)
        return self.function(student_logits, labels, self.config, self, features)
