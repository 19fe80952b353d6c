"""Exit heads, and putting them on a backbone: :func:`attach_exits` gives an :class:`EarlyExitNetwork`."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from erde.backbones import Backbone
from erde.cost import InputSize, count_macs, example_input
from erde.errors import UserError, nearest


class ERDEHead(nn.Sequential):
    """ERDE's exit head: batch norm, ReLU, 2x2 average pool, dropout, one linear layer.

    Takes a feature map (B, C, H, W) and gives logits (B, K). A map of a single pixel a side is not pooled.
    """

    def __init__(self, feature_shape: Sequence[int], classes: int, dropout: float = 0.5) -> None:
        channels, height, width = feature_shape
        pool = 2 if min(height, width) >= 2 else 1
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(),
                pool=nn.AvgPool2d(pool),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                linear=nn.Linear(channels * (height // pool) * (width // pool), classes),
            )
        )


class LinearHead(nn.Sequential):
    """Batch norm, ReLU, global average pool, dropout, one linear layer: (B, C, H, W) to (B, K)."""

    def __init__(self, feature_shape: Sequence[int], classes: int, dropout: float = 0.5) -> None:
        channels = feature_shape[0]
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                linear=nn.Linear(channels, classes),
            )
        )


HEADS: dict[str, Callable[[Sequence[int], int, float], nn.Module]] = {"erde": ERDEHead, "linear": LinearHead}


class EarlyExitNetwork(nn.Module):
    """Stages with a head each; called with images (B, C, H, W) it gives logits (E, B, K) of all exits."""

    def __init__(
        self, stages: Sequence[nn.Module], heads: Sequence[nn.Module], exit_names: Sequence[str]
    ) -> None:
        super().__init__()
        assert len(stages) == len(heads) == len(exit_names)
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        self.exit_names = list(exit_names)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (E, B, K)."""
        return self.forward_until(x, len(self.stages) - 1)

    def forward_until(self, x: Tensor, exit: int) -> Tensor:
        """Logits (exit+1, B, K) of the exits up to ``exit``; no later stage runs."""
        logits = []
        for stage, head in zip(self.stages[: exit + 1], self.heads[: exit + 1], strict=True):
            x = stage(x)
            logits.append(head(x))
        return torch.stack(logits)

    def forward_with_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (E, B, K), and what each stage gave, in one pass."""
        features = self.forward_features(x)
        return torch.stack([head(one) for head, one in zip(self.heads, features, strict=True)]), features

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The stages' outputs, the last one included."""
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def feature_shapes(self, input_size: InputSize) -> tuple[tuple[int, ...], ...]:
        """Shapes of what the stages give for one image (C, H, W), without the batch."""
        was_training = self.training
        self.eval()  # batch norm must not learn from zeros
        with torch.no_grad():
            features = self.forward_features(example_input(self, input_size))
        self.train(was_training)
        return tuple(tuple(one.shape[1:]) for one in features)

    def forward_final(self, x: Tensor) -> Tensor:
        """Logits (B, K) of the final exit alone: the network without exits."""
        for stage in self.stages:
            x = stage(x)
        output: Tensor = self.heads[-1](x)
        return output

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the network without exits: all stages and the final head."""
        yield from self.stages.parameters()
        yield from self.heads[-1].parameters()


def attach_exits(
    backbone: Backbone,
    exits: int | Sequence[str] = 3,
    *,
    input_size: InputSize,
    head: str = "erde",
    dropout: float = 0.5,
) -> EarlyExitNetwork:
    """Put exits on ``backbone``, sharing its weights; its own classifier is the final exit.

    Args:
        backbone: what ``erde.build_backbone`` gives, or a ``Backbone`` of one's own.
        exits: how many in all, the final one included, placed at equal shares of the backbone's MACs;
            or the names of blocks (``group1``: after its last block) for the intermediate ones.
        input_size: (C, H, W) of the images.
        head: ``erde`` or ``linear``, for the intermediate exits.
        dropout: of those heads, during training.

    Raises:
        UserError: an exit that does not exist, too many exits, an unknown head, an input that does not fit.
    """
    if head not in HEADS:
        raise UserError(f"unknown exit head '{head}'{nearest(head, HEADS)}")
    names, macs, shapes, classes = _trace_blocks(backbone, input_size)
    if isinstance(exits, int):
        cuts = _place_by_macs(macs, exits, backbone)
    else:
        cuts = sorted({_find_block(names, name) for name in exits})
        if cuts and cuts[-1] == len(names) - 1:
            last = next(name for name in exits if _find_block(names, name) == cuts[-1])
            raise UserError(
                f"exit '{last}' stands at the end of the backbone, where the final exit already is: leave it out"
            )
    blocks = list(backbone.blocks.named_children())
    bounds = [0, *(cut + 1 for cut in cuts), len(blocks)]
    stages = [nn.Sequential(OrderedDict(blocks[start:end])) for start, end in itertools.pairwise(bounds)]
    heads = [HEADS[head](shapes[cut], classes, dropout) for cut in cuts]
    network = EarlyExitNetwork(
        stages, [*heads, backbone.classifier], [*(names[cut] for cut in cuts), "final"]
    )
    # New modules start in training mode: without this a backbone in eval mode would give a mixture.
    return network.train(backbone.training)


def _trace_blocks(
    backbone: Backbone, input_size: InputSize
) -> tuple[list[str], list[int], list[tuple[int, ...]], int]:
    """Names, MACs and output shapes (without the batch) of the blocks, and the number of classes."""
    was_training = backbone.training
    backbone.eval()
    x = example_input(backbone, input_size)
    names, macs, shapes = [], [], []
    try:
        for name, block in backbone.blocks.named_children():
            block_macs, x = count_macs(block, x)
            names.append(name)
            macs.append(block_macs)
            shapes.append(tuple(x.shape[1:]))
        _, logits = count_macs(backbone.classifier, x)
    except RuntimeError as error:
        raise UserError(
            f"the backbone does not take images of (C, H, W) = {tuple(input_size)}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        backbone.train(was_training)
    return names, macs, shapes, logits.shape[-1]


def _place_by_macs(macs: Sequence[int], exits: int, backbone: Backbone) -> list[int]:
    """Blocks after which the intermediate exits stand: nearest to equal shares of the MACs, all different."""
    # Nothing is learnt before the stem's first block, and the last block's end is the final exit's.
    candidates = list(range(backbone.first_exit_block, len(macs) - 1))
    if not 1 <= exits <= len(candidates) + 1:
        raise UserError(
            f"exits={exits} is not possible on this backbone: expected 1 to {len(candidates) + 1}, the final one included"
        )
    total = sum(macs)
    ends = [sum(macs[: index + 1]) / total for index in range(len(macs))]
    cuts: list[int] = []
    for number in range(1, exits):
        # Leave enough candidates for the exits that are still to be placed.
        free = [cut for cut in candidates if not cuts or cut > cuts[-1]]
        free = free[: len(free) - (exits - 1 - number)]
        cuts.append(min(free, key=lambda cut: abs(ends[cut] - number / exits)))
    return cuts


def _find_block(names: Sequence[str], wanted: str) -> int:
    """The last block with that name, or of the group with that name."""
    matches = [index for index, name in enumerate(names) if name == wanted or name.startswith(f"{wanted}_")]
    if not matches:
        groups = {name.split("_")[0] for name in names}
        raise UserError(f"no place '{wanted}' for an exit{nearest(wanted, {*names, *groups})}")
    return matches[-1]
