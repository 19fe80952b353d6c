"""The views of an image: its flips and shifts, numbered, so that a teacher's answers to each can be cached."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from erde.recipe.schema import AugmentationConfig

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Views:
    """All ``(2 padding + 1)² (1 + flip)`` flips and shifts of an image, or ``limit`` of them, fixed for each image.

    With a limit, view v of image i is number ``(a_i + v b_i) mod all``, with ``a_i`` and ``b_i`` hashed from i and
    ``b_i`` coprime to ``all``: different views, spread over all, the same in every run, and nothing to store.
    """

    padding: int
    flip: bool
    limit: int | None = None

    @classmethod
    def of(cls, config: AugmentationConfig) -> Views | None:
        """The views of an augmentation; None where there are too many to number them."""
        endless = config.cutout or config.resized_crop is not None
        return None if endless else cls(config.crop_padding, config.flip, config.views)

    @property
    def all(self) -> int:
        """The number of views without a limit."""
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)

    @property
    def count(self) -> int:
        """The number of views of each image."""
        return self.all if self.limit is None else min(self.limit, self.all)

    def number(self, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """The number of a flip (0 or 1) and a shift (0 to 2 padding, down and right)."""
        position = top * (2 * self.padding + 1) + left
        return position * 2 + flip if self.flip else position

    def unpack(self, number: Tensor) -> dict[str, Tensor]:
        """``top``, ``left`` and ``flip`` of a number."""
        flip = number % 2 if self.flip else torch.zeros_like(number)
        position = number // 2 if self.flip else number
        side = 2 * self.padding + 1
        return {"top": position // side, "left": position % side, "flip": flip}

    def numbers(self, images: Numbers, views: Numbers) -> Numbers:
        """The numbers of ``views``, each below :attr:`count`, of the images at ``images``."""
        if self.count == self.all:
            return np.broadcast_to(views, images.shape).astype(np.int64)
        coprime = np.array([stride for stride in range(1, self.all) if math.gcd(stride, self.all) == 1])
        mixed = _mix(images)
        start = mixed % np.uint64(self.all)
        stride = coprime[(mixed >> np.uint64(32)) % np.uint64(len(coprime))]
        numbers: Numbers = (start.astype(np.int64) + views * stride) % self.all
        return numbers


def _mix(numbers: Numbers) -> NDArray[np.uint64]:
    """Splitmix64 (Steele, Lea and Flood 2014): neighbouring numbers become unrelated ones."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
