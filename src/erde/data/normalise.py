"""Normalisation of pixels, as networks are trained with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normalise:
    """``(x / 255 - mean) / std`` per channel, of uint8 (..., C) to float32, as one product and one sum."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
    ) -> None:
        self.scale = torch.tensor([1 / (255 * s) for s in std], device=device)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """The normalised pixels."""
        return pixels.to(torch.float32) * self.scale + self.shift
