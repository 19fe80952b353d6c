"""The teacher's answers to a batch, computed on the spot; see ``teacher_cache`` for answers kept on disk."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from erde.data.batches import Batch
from erde.networks.network import EarlyExitNetwork


class Answer(NamedTuple):
    """The teacher's answer to one batch."""

    logits: Tensor  # raw, (Et, B, K)
    features: list[Tensor]  # each stage's output, (B, ...), if a loss needs it; else empty


class Teacher:
    """The teacher in eval mode, without gradients."""

    def __init__(
        self,
        network: EarlyExitNetwork,
        device: torch.device,
        *,
        features: bool = False,
        autocast: bool = False,
        channels_last: bool = True,
        compiled: bool = False,
    ) -> None:
        self.network = network.to(device).eval()
        self.device, self.features, self.autocast = device, features, autocast
        self._channels_last, self.compiled = channels_last, compiled
        self._call: Any = None

    def ask(self, images: Tensor) -> Answer:
        """The answer to normalised images (B, C, H, W)."""
        if not self._channels_last:
            images = images.contiguous()
        if self._call is None:
            self._call = self._prepare(images[:2])
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast),
        ):
            if self.features:
                return Answer(*self._call(images))
            return Answer(self._call(images), [])

    def __call__(self, batch: Batch) -> Answer:
        """The answer to a training batch."""
        return self.ask(batch.images)

    def _prepare(self, images: Tensor) -> Any:
        plain = _WithFeatures(self.network) if self.features else self.network
        call = _fold_batch_norm(plain, images)
        if self._channels_last:
            call = call.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return torch.compile(call, dynamic=False) if self.compiled else call


class _WithFeatures(nn.Module):
    def __init__(self, network: EarlyExitNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.network.forward_with_features(x)


def _fold_batch_norm(network: nn.Module, images: Tensor) -> nn.Module:
    """A faster copy with batch norm folded into convolutions: the same answers within rounding.

    The network itself if it cannot be traced, or if the copy answers differently on ``images``.
    """
    try:
        folded = fuse(network).eval()
        with torch.no_grad():
            torch.testing.assert_close(folded(images), network(images), rtol=1e-3, atol=1e-3)
    except Exception:  # tracing fails in as many ways as there are networks
        return network
    assert isinstance(folded, nn.Module)
    return folded
