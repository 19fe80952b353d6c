"""Gradients that are scaled on their way back; the way forward stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erde.networks.shapes import Handed


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, factor: float | Tensor) -> Tensor:
        context.factor = factor
        # A copy: what reads it next may write in place, which a view from here would not survive.
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * context.factor, None


def scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """The same numbers, whose gradient is multiplied by ``factor``: a number, or anything that broadcasts to ``x``."""
    scaled: Tensor = _Scale.apply(x, factor)  # type: ignore[no-untyped-call]
    return scaled


def scale_handed(handed: Handed, factor: float) -> Handed:
    """:func:`scale_gradient` of all that a stage hands on."""
    if isinstance(handed, tuple):
        return tuple(scale_gradient(tensor, factor) for tensor in handed)
    return scale_gradient(handed, factor)
