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


def scale_gradient(handed: Handed, factor: float | Tensor) -> Handed:
    """The same numbers, whose gradient is multiplied by ``factor``, which is no part of the graph.

    ``factor``: a number, or for a tensor anything that broadcasts to it.
    """
    if isinstance(handed, tuple):
        return tuple(_scale(tensor, factor) for tensor in handed)
    return _scale(handed, factor)


def _scale(x: Tensor, factor: float | Tensor) -> Tensor:
    scaled: Tensor = _Scale.apply(x, factor)  # type: ignore[no-untyped-call]
    return scaled
