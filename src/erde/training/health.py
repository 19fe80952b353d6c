"""Health of exit heads after training: units that are never on, and the first exit beside a linear probe.

A head whose units die answers worse than its stage would allow, and the loss does not show it. Its ReLU gives 0 for
every image, so no gradient reaches the unit any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erde.common.history import Health
from erde.networks.network import EarlyExitNetwork
from erde.networks.shapes import Handed, mode

# Images that are looked at; the probe is fitted on one half and held against the exit on the other.
IMAGES = 2000
# A unit is dead if it is on in a smaller share of places, or spreads less than this share of the mean spread.
ON_SHARE = 1e-3
# The probe sees maps of at most so many pixels a side.
PROBE_SIDE = 4
# Of the ridge regression, for features of unit variance, in shares of the images.
RIDGE = 0.3
# Too few images per class make no probe.
IMAGES_PER_CLASS = 20

_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Threshold)


@torch.no_grad()
def measure_health(network: EarlyExitNetwork, batches: Iterable[tuple[Tensor, Tensor]]) -> Health:
    """The health of the intermediate heads on labelled images, as they were normalised for ``network``.

    ``batches`` gives (B, C, H, W) and (B,). Units are channels: of each ReLU of a head, or of what its linear layer
    reads where it has no ReLU.
    """
    intermediate = len(network.stages) - 1
    counters = [_Units(network.heads[index]) for index in range(intermediate)]
    right, features, all_labels = [], [], []
    with mode(network, False):
        for images, labels in batches:
            handed: Handed = images
            for index, units in enumerate(counters):
                handed = network.stages[index](handed)
                with units:
                    logits = network.logits_of(index, handed)
                if index == 0:
                    right.append(logits.argmax(dim=1) == labels)
                    features.append(_pool(network.features_of(0, handed)))
                    all_labels.append(labels)
    labels, is_right = torch.cat(all_labels), torch.cat(right)
    probe = _probe_right(torch.cat(features), labels, logits.shape[-1])
    # Both on the same images: the second half, or all of them where there is no probe.
    half = len(labels) // 2 if probe is not None else 0
    return Health(
        dead_units=[units.dead for units in counters],
        units=[units.count for units in counters],
        first_exit_accuracy=is_right[half:].double().mean().item(),
        probe_accuracy=None if probe is None else probe.double().mean().item(),
        images=len(labels) - half,
    )


class _Units:
    """Counts the units of a head while it computes: ``with units: head(x)``."""

    def __init__(self, head: nn.Module) -> None:
        self._rectifiers = [module for module in head.modules() if isinstance(module, _RECTIFIERS)]
        linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
        self._linear = linear[-1:] if not self._rectifiers else []
        # Per watched module: sums over places of (on), or of (x, x²); and how many places.
        self._sums: dict[nn.Module, Tensor] = {}
        self._places: dict[nn.Module, int] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Units:
        self._hooks = [module.register_forward_hook(self._see_output) for module in self._rectifiers]
        self._hooks += [module.register_forward_pre_hook(self._see_input) for module in self._linear]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see_output(self, module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        places = _by_place(output)
        self._add(module, (places > 0).double().sum(dim=0), len(places))

    def _see_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        places = _by_place(inputs[0]).double()
        self._add(module, torch.stack([places.sum(dim=0), places.square().sum(dim=0)]), len(places))

    def _add(self, module: nn.Module, sums: Tensor, places: int) -> None:
        self._sums[module] = self._sums[module] + sums if module in self._sums else sums
        self._places[module] = self._places.get(module, 0) + places

    @property
    def count(self) -> int:
        """Units that were watched."""
        return sum(sums.shape[-1] for sums in self._sums.values())

    @property
    def dead(self) -> int:
        """Units that are as good as constant."""
        total = 0
        for module, sums in self._sums.items():
            means = sums / self._places[module]
            if module in self._rectifiers:
                total += int((means < ON_SHARE).sum())
            else:
                spread = (means[1] - means[0].square()).clamp(min=0).sqrt()
                total += int((spread <= ON_SHARE * spread.mean()).sum())
        return total


def _by_place(x: Tensor) -> Tensor:
    """(B, C, H, W), (B, N, C) or (B, C) as (places, C)."""
    return x.movedim(1, -1).flatten(0, -2) if x.ndim == 4 else x.flatten(0, -2)


def _pool(features: Tensor) -> Tensor:
    """The probe's input, (B, D)."""
    if features.ndim == 4:
        # A map whose channels come last is pooled over other axes: still a linear view of the features.
        height, width = (min(side, PROBE_SIDE) for side in features.shape[2:])
        return F.adaptive_avg_pool2d(features, (height, width)).flatten(1).float()
    return features.flatten(1, -2).mean(dim=1).float() if features.ndim == 3 else features.float()


def _probe_right(features: Tensor, labels: Tensor, classes: int) -> Tensor | None:
    """Right answers, on the second half, of a ridge regression fitted on the first; None with too few images.

    ``W = (X'X + lambda n I)^-1 X'Y`` with standardised features X (n, D) and centred one-hot labels Y (n, K).
    """
    half = len(features) // 2
    if half < IMAGES_PER_CLASS * classes:
        return None
    fitted = features[:half].double()
    mean, spread = fitted.mean(dim=0), fitted.std(dim=0)
    scale = torch.where(spread > 1e-8, 1 / spread.clamp(min=1e-8), 0)
    x = (fitted - mean) * scale
    shares = F.one_hot(labels[:half], classes).double()
    prior = shares.mean(dim=0)
    gram = x.T @ x + RIDGE * half * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, x.T @ (shares - prior))
    scores = ((features[half:].double() - mean) * scale) @ weights + prior
    right: Tensor = scores.argmax(dim=1) == labels[half:]
    return right
