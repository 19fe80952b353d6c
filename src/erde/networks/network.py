"""A network with exits, as training, export and evaluation know it: :class:`EarlyExitNetwork`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from erde.common.errors import UserError, nearest
from erde.networks.shapes import Handed, InputSize, example_input, mode, new_modules_in_mode_of


class EarlyExitNetwork(nn.Module):
    """Stages with a head each; called with images (B, C, H, W) it gives logits (E, B, K) of all exits.

    A stage hands one tensor to the next, or a tuple of them. ``looks_at`` has for each exit the index of its head's input
    in the tuple; None stands for all that is handed over (native heads take the tuple).

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
    ) -> None:
        super().__init__()
        assert len(stages) == len(heads) == len(exit_names)
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        self.exit_names = list(exit_names)
        self.looks_at = list(looks_at or [None] * len(stages))
        self.notes = tuple(notes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (E, B, K)."""
        return self.forward_until(x, len(self.stages) - 1)

    def forward_until(self, x: Tensor, exit: int) -> Tensor:
        """Logits (exit+1, B, K) of the exits up to ``exit``; no later stage runs."""
        logits = []
        handed: Handed = x
        for index in range(exit + 1):
            handed = self.stages[index](handed)
            logits.append(self.logits_of(index, handed))
        return torch.stack(logits)

    def logits_of(self, index: int, handed: Handed) -> Tensor:
        """Logits (B, K) of exit ``index`` from the output of its stage."""
        position = self.looks_at[index]
        logits: Tensor = self.heads[index](handed if position is None else handed[position])
        return logits

    def features_of(self, index: int, handed: Handed) -> Tensor:
        """The tensor that stands for exit ``index``: its head's input; of a native head's tuple the last."""
        if not isinstance(handed, tuple):
            return handed
        position = self.looks_at[index]
        return handed[-1 if position is None else position]

    def forward_with_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (E, B, K), and each exit's features as in :meth:`forward_features`, in one pass."""
        outputs = self._stage_outputs(x)
        logits = torch.stack([self.logits_of(index, handed) for index, handed in enumerate(outputs)])
        return logits, [self.features_of(index, handed) for index, handed in enumerate(outputs)]

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The heads' inputs, a tensor per exit, the final exit's included."""
        return [self.features_of(index, handed) for index, handed in enumerate(self._stage_outputs(x))]

    def _stage_outputs(self, x: Tensor) -> list[Handed]:
        outputs: list[Handed] = []
        handed: Handed = x
        for stage in self.stages:
            handed = stage(handed)
            outputs.append(handed)
        return outputs

    def feature_shapes(self, input_size: InputSize) -> tuple[tuple[int, ...], ...]:
        """Shapes of :meth:`forward_features` for one image (C, H, W), without the batch."""
        with mode(self, False), torch.no_grad():  # batch norm must not learn from zeros
            features = self.forward_features(example_input(self, input_size))
        return tuple(tuple(tensor.shape[1:]) for tensor in features)

    def forward_final(self, x: Tensor) -> Tensor:
        """Logits (B, K) of the final exit alone: the network without exits."""
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
        UserError: a name that is no exit of the network.
    """
    if isinstance(names, str):
        raise UserError(f"names='{names}' is a single name: write ['{names}']")
    wanted = {*names, network.exit_names[-1]}
    for name in sorted(wanted - set(network.exit_names)):
        raise UserError(f"the network has no exit '{name}'{nearest(name, network.exit_names)}")
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
    )
    new_modules_in_mode_of(reduced, network)
    return reduced
