"""Networks for tests that need arithmetic without batch norm and without noise."""

from __future__ import annotations

import torch
from torch import nn

from erde.networks.network import EarlyExitNetwork


def plain_network(seed: int = 0, width: int = 12, exits: int = 2) -> EarlyExitNetwork:
    """Linear layers on 8x8 gray images, no batch norm, no dropout: a mean over parts is the mean over all."""
    torch.manual_seed(seed)
    stages: list[nn.Module] = [nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh())]
    stages += [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(exits - 1)]
    heads = [nn.Linear(width, 10) for _ in range(exits)]
    return EarlyExitNetwork(stages, heads, [*(f"layer{index}" for index in range(exits - 1)), "final"])
