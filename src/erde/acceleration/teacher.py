"""Somebody's network as a teacher: its ONNX stage, asked from the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from erde.bundle.sealing import file_hash
from erde.networks.network import EarlyExitNetwork
from erde.runtime.stages import StageRunner


class OnnxStage(nn.Module):
    """A stage that takes uint8 images, called with normalised ones (B, C, H, W): logits (B, K), without gradients."""

    def __init__(self, path: Path, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.sha256 = file_hash(path)
        self._runner = StageRunner([path])
        self._mean, self._std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ONNX file."""
        pixels = ((x.cpu() * self._std + self._mean) * 255).round().clamp(0, 255).to(torch.uint8)
        images = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
        _, logits = self._runner.run(0, images)
        return torch.from_numpy(logits).to(x.device)


def onnx_teacher(path: Path, mean: Sequence[float], std: Sequence[float]) -> EarlyExitNetwork:
    """The ONNX stage at ``path`` as a teacher with a single exit; ``mean`` and ``std`` are those of the training images."""
    return EarlyExitNetwork([OnnxStage(path, mean, std)], [nn.Identity()], ["final"])
