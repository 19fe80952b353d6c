"""A network with exits, as training, export and evaluation know it: :class:`EarlyExitNetwork`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from erde.common.errors import UserError, nearest
from erde.common.splits import Split
from erde.networks.gradients import scale_handed
from erde.networks.shapes import Handed, InputSize, example_input, mode, new_modules_in_mode_of

# The share of the logits so far that a boosted exit starts from.
BOOST = 0.5


def boost(logits: Tensor, before: Tensor | None) -> Tensor:
    """``f_i + F_(i-1) / 2``, the logits (B, K) of a boosted exit from its head's and those of the exit before, if any.

    No gradient flows into the exit before: each exit learns what those before it left over. See docs/method.md.
    """
    return logits if before is None else logits + BOOST * before.detach()


class EarlyExitNetwork(nn.Module):
    """Stages with a head each; called with images (B, C, H, W) it gives logits (E, B, K) of all exits.

    A stage hands one tensor to the next, or a tuple of them. ``looks_at`` has for each exit the index of its head's input
    in the tuple; None stands for all that is handed over (native heads take the tuple). With ``boosted`` each exit adds
    its head's logits to those of the exit before, see :func:`boost`.

    Attributes:
        exit_names: where each exit stands; the last is ``final``.
        notes: one line for each exit that stands elsewhere than was asked for.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        exit_names: Sequence[str],
        looks_at: Sequence[int | None] | None = None,
        notes: Sequence[str] = (),
        boosted: bool = False,
    ) -> None:
        super().__init__()
        assert len(stages) == len(heads) == len(exit_names)
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        self.exit_names = list(exit_names)
        self.looks_at = list(looks_at or [None] * len(stages))
        self.notes = tuple(notes)
        self.boosted = boosted

    def forward(self, x: Tensor) -> Tensor:
        """Logits (E, B, K)."""
        return self.forward_until(x, len(self.stages) - 1)

    def forward_until(self, x: Tensor, exit: int) -> Tensor:
        """Logits (exit+1, B, K) of the exits up to ``exit``; no later stage runs."""
        logits: list[Tensor] = []
        handed: Handed = x
        for index in range(exit + 1):
            handed = self.stages[index](handed)
            logits.append(self.logits_of(index, handed, logits[-1] if logits else None))
        return torch.stack(logits)

    def logits_of(self, index: int, handed: Handed, before: Tensor | None = None) -> Tensor:
        """Logits (B, K) of exit ``index`` from the output of its stage; ``before``: those of the exit before, if any."""
        position = self.looks_at[index]
        logits: Tensor = self.heads[index](handed if position is None else handed[position])
        return boost(logits, before) if self.boosted else logits

    def features_of(self, index: int, handed: Handed) -> Tensor:
        """The tensor that stands for exit ``index``: its head's input; of a native head's tuple the last."""
        if not isinstance(handed, tuple):
            return handed
        position = self.looks_at[index]
        return handed[-1 if position is None else position]

    def forward_with_features(self, x: Tensor, equilibrium: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Logits (E, B, K), and each exit's features as in :meth:`forward_features`, in one pass.

        With ``equilibrium`` gradients are scaled so that each stage is trained by the mean of the losses of the exits
        behind it, not by their sum: those that reach the output of stage i (0-based) by ``1 / (E - i)``, those that come
        from the next stage before that by ``E - i - 1`` (Li et al. 2019, arXiv 1908.06294; factors of the authors' code,
        which has them at the tensor alone that a classifier reads). Heads are trained as without.
        """
        outputs = self._stage_outputs(x, equilibrium)
        logits: list[Tensor] = []
        for index, handed in enumerate(outputs):
            logits.append(self.logits_of(index, handed, logits[-1] if logits else None))
        return torch.stack(logits), [self.features_of(index, handed) for index, handed in enumerate(outputs)]

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The heads' inputs, a tensor per exit, the final exit's included."""
        return [self.features_of(index, handed) for index, handed in enumerate(self._stage_outputs(x))]

    def _stage_outputs(self, x: Tensor, equilibrium: bool = False) -> list[Handed]:
        outputs: list[Handed] = []
        handed: Handed = x
        for behind, stage in zip(reversed(range(len(self.stages))), self.stages, strict=True):
            handed = stage(handed)
            scaled = equilibrium and behind > 0
            outputs.append(scale_handed(handed, 1 / (behind + 1)) if scaled else handed)
            if scaled:
                handed = scale_handed(outputs[-1], behind)
        return outputs

    def feature_shapes(self, input_size: InputSize) -> tuple[tuple[int, ...], ...]:
        """Shapes of :meth:`forward_features` for one image (C, H, W), without the batch."""
        with mode(self, False), torch.no_grad():  # batch norm must not learn from zeros
            features = self.forward_features(example_input(self, input_size))
        return tuple(tuple(tensor.shape[1:]) for tensor in features)

    def forward_final(self, x: Tensor) -> Tensor:
        """Logits (B, K) of the final exit alone: the network without exits. Boosted ones need all heads for it."""
        if self.boosted:
            logits: Tensor = self(x)[-1]
            return logits
        return self.logits_of(len(self.stages) - 1, self._stage_outputs(x)[-1])

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the network without exits: all stages and the final head."""
        yield from self.stages.parameters()
        yield from self.heads[-1].parameters()


def keep_exits(network: EarlyExitNetwork, names: Iterable[str]) -> EarlyExitNetwork:
    """The network with some of its exits, sharing its weights; what stands between two of them becomes one stage.

    The final exit always stays. The exits that are kept and the final one give the very logits they gave before, and
    heads that are dropped cost nothing any more.

    Args:
        names: of the intermediate exits to keep (``network.exit_names``), in any order; none for a plain network.

    Raises:
        UserError: a name that is no exit of the network, or boosted exits, each of which needs all before it.
    """
    if isinstance(names, str):
        raise UserError(f"names='{names}' is a single name: write ['{names}']")
    wanted = {*names, network.exit_names[-1]}
    for name in sorted(wanted - set(network.exit_names)):
        raise UserError(f"the network has no exit '{name}'{nearest(name, network.exit_names)}")
    if network.boosted and len(wanted) < len(network.exit_names):
        raise UserError("boosted exits add to the answers of those before them: none can be dropped")
    kept = [index for index, name in enumerate(network.exit_names) if name in wanted]
    stages = []
    start = 0
    for index in kept:
        own = network.stages[start : index + 1]
        stages.append(own[0] if len(own) == 1 else nn.Sequential(*own))
        start = index + 1
    reduced = EarlyExitNetwork(
        stages,
        [network.heads[index] for index in kept],
        [network.exit_names[index] for index in kept],
        [network.looks_at[index] for index in kept],
        network.notes,
        network.boosted,
    )
    new_modules_in_mode_of(reduced, network)
    return reduced


def split_logits(
    network: EarlyExitNetwork,
    split: Split,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Raw logits (E, N, K) of the images of ``split``, normalised by ``mean`` and ``std`` of pixels between 0 and 1.

    The network stays on ``device``, in evaluation mode.
    """
    network.to(device).eval()
    shift, scale = (torch.tensor(list(values), device=device) for values in (mean, std))
    parts = []
    with torch.no_grad():
        for images in split.batches(256):
            x = (torch.from_numpy(np.ascontiguousarray(images)).to(device).float() / 255 - shift) / scale
            parts.append(network(x.permute(0, 3, 1, 2)).cpu().numpy())
    return np.concatenate(parts, axis=1)
