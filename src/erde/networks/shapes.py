"""Input sizes, and networks in training or evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

InputSize = tuple[int, int, int]
# The output of a stage, the input of the next.
Handed = Tensor | tuple[Tensor, ...]


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All of ``model`` in one mode; afterwards each module is in its own again."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def new_modules_in_mode_of(network: nn.Module, model: nn.Module) -> None:
    """Modules of ``network`` that are not ``model``'s follow its mode; its own stay in the mode that each of them is in."""
    own = {id(module) for module in model.modules()}
    for module in network.modules():
        if id(module) not in own:
            module.training = model.training


def example_input(module: nn.Module, input_size: InputSize) -> Tensor:
    """One image of zeros (1, C, H, W) where the module's parameters are."""
    # A network of another program has its weights elsewhere.
    parameter = next(module.parameters(), torch.zeros(()))
    return torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
