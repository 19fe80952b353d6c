"""Weights by a formula, so that two definitions of a network can be compared by their logits alone.

What a tensor holds depends on its shape and on the last part of its key, not on its name or place: it is the
same in any definition that has the same layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def sequence(shape: Sequence[int]) -> Tensor:
    """Numbers from -1 to 1, evenly spread (multiples of the golden ratio modulo 1), float64."""
    count = math.prod(shape)
    steps = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(sum(shape))) * np.uint64(2654435769)
    values = (steps % np.uint64(2**32)).astype(np.float64) / 2**31 - 1
    return torch.from_numpy(values).reshape(tuple(shape))


def fill(module: ModuleType) -> ModuleType:
    """All weights and running statistics by :func:`sequence`, float64, in evaluation mode."""
    module.double().eval()
    state = module.state_dict()
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        values = sequence(tensor.shape)
        if tensor.ndim > 1:
            values *= math.sqrt(6 / math.prod(tensor.shape[1:]))
        elif key.endswith(("running_var", "weight")):
            values = 1 + values / 2
        else:
            values = values / 4
        tensor.copy_(values)
    return module


def scramble_norms(module: nn.Module) -> None:
    """Running statistics as if the batch norms had seen something, so that a wrong fold would show."""
    for child in module.modules():
        if (
            isinstance(child, nn.BatchNorm2d)
            and child.running_mean is not None
            and child.running_var is not None
        ):
            child.running_mean.normal_(0, 0.1)
            child.running_var.uniform_(0.5, 2)
