"""What training, export and evaluation know of a network with exits: :class:`EarlyExitNetwork`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from erde.common.errors import UserError
from erde.networks.shapes import Handed, InputSize, example_input, mode


class EarlyExitNetwork(nn.Module):
    """Stages with a head each; called with images (B, C, H, W) it gives logits (E, B, K) of all exits.

    A stage hands one tensor to the next, or a tuple of them. A head looks at one: at what ``looks_at`` says of its exit,
    an index into the tuple; None stands for all that is handed over (native heads take the tuple).

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
        """Logits (B, K) of exit ``index`` from what its stage hands over."""
        which = self.looks_at[index]
        logits: Tensor = self.heads[index](handed if which is None else handed[which])
        return logits

    def features_of(self, index: int, handed: Handed) -> Tensor:
        """The one tensor that stands for exit ``index``: what its head looks at, of a tuple for a native head the last."""
        if not isinstance(handed, tuple):
            return handed
        which = self.looks_at[index]
        return handed[-1 if which is None else which]

    def forward_with_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (E, B, K), and each exit's features as in :meth:`forward_features`, in one pass."""
        everything = self._handed_over(x)
        logits = torch.stack([self.logits_of(index, one) for index, one in enumerate(everything)])
        return logits, [self.features_of(index, one) for index, one in enumerate(everything)]

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """What the heads look at, one tensor per exit, the final one's included."""
        return [self.features_of(index, one) for index, one in enumerate(self._handed_over(x))]

    def _handed_over(self, x: Tensor) -> list[Handed]:
        everything: list[Handed] = []
        handed: Handed = x
        for stage in self.stages:
            handed = stage(handed)
            everything.append(handed)
        return everything

    def feature_shapes(self, input_size: InputSize) -> tuple[tuple[int, ...], ...]:
        """Shapes of :meth:`forward_features` for one image (C, H, W), without the batch."""
        with mode(self, False), torch.no_grad():  # batch norm must not learn from zeros
            features = self.forward_features(example_input(self, input_size))
        return tuple(tuple(one.shape[1:]) for one in features)

    def forward_final(self, x: Tensor) -> Tensor:
        """Logits (B, K) of the final exit alone: the network without exits."""
        handed: Handed = x
        for stage in self.stages:
            handed = stage(handed)
        return self.logits_of(len(self.stages) - 1, handed)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the network without exits: all stages and the final head."""
        yield from self.stages.parameters()
        yield from self.heads[-1].parameters()

    def load_original_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict of the model that the exits were put on, under its own names; heads stay as they are.

        Raises:
            UserError: a tensor that is missing or has another shape. What the model does not use is passed over.
        """
        own = self.state_dict()
        found = {}
        for key, tensor in own.items():
            original = self._original_key(key)
            if original is None:
                continue
            if original not in state or state[original].shape != tensor.shape:
                given = (
                    "it is missing"
                    if original not in state
                    else f"its shape is {tuple(state[original].shape)}"
                )
                raise UserError(
                    f"the state dict does not fit: '{original}' should have shape {tuple(tensor.shape)}, and {given}"
                )
            found[key] = state[original]
        self.load_state_dict({**own, **found})

    def _original_key(self, key: str) -> str | None:
        part, index, name = key.split(".", 2)
        is_final = part == "heads" and int(index) == len(self.heads) - 1
        if isinstance(self.stages[0], fx.GraphModule):
            return name if part == "stages" or is_final else None
        if part == "stages":
            return f"blocks.{name}"
        return f"classifier.{name}" if is_final else None
