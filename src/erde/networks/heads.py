"""Exit heads, and the choice of a head for an exit's features: a map, a sequence of tokens, or a vector."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor, nn

from erde.common.errors import UserError, nearest

# ``auto`` takes ERDE's own head while its linear layer reads no more numbers than this.
_MOST_INPUTS = 4096
# And reduces larger maps of this many pixels a side by a convolution first.
_EARLY_SIDE = 8
# A linear layer's inputs are scaled down as if it had at most so many; see fix_scale.
_SCALED_INPUTS = 256
# After the reduction by a ConvHead or a TowerHead: pixels a side at most.
_REDUCED_SIDE = 4
# Channels of a ConvHead and of a TowerHead.
_NARROWEST, _WIDEST = 64, 256
_TOWER_NARROWEST, _TOWER_WIDEST = 32, 128
Norm = TypeVar("Norm", nn.BatchNorm2d, nn.LayerNorm)


def fix_scale(norm: Norm, inputs: int = 1) -> Norm:
    """Fix a norm's scale at ``min(1, sqrt(256 / inputs))`` and its shift at 0; they are not trained.

    ``inputs`` is the number of inputs of the linear layer behind it. The curvature of the loss in that layer's weights
    grows with the sum of their squares, thousands on an early map, and at a usual learning rate every step overshoots.
    A norm that is trained then flees to where its ReLU is never on: the head dies. With the fixed scale the step fits
    the layer, and without a shift about half of all places stay on. See LOG.md, 2026-11-24.
    """
    norm.fixed_scale = min(1.0, math.sqrt(_SCALED_INPUTS / inputs))  # type: ignore[assignment]
    # Parameters still, not buffers: weights from before they were fixed can be loaded.
    norm.requires_grad_(False)
    reset_head(norm)
    return norm


def reset_head(head: nn.Module) -> None:
    """Give a head new random weights, drawn as when it was made."""
    # A head's own way comes last.
    for module in [*list(head.modules())[1:], head]:
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        if "fixed_scale" in vars(module):
            nn.init.constant_(module.get_parameter("weight"), vars(module)["fixed_scale"])


class _Head(nn.Sequential):
    """Named layers, dropout, and a linear layer that reads ``inputs`` numbers."""

    def __init__(self, inputs: int, classes: int, dropout: float, **layers: nn.Module) -> None:
        linear = nn.Linear(inputs, classes)
        super().__init__(OrderedDict(layers, dropout=nn.Dropout(dropout), linear=linear))


class ERDEHead(_Head):
    """ERDE's exit head: batch norm, ReLU, 2x2 average pool, dropout, linear: (B, C, H, W) to (B, K).

    The norm is fixed, see :func:`fix_scale`. A map of a single pixel a side is not pooled.
    """

    def __init__(self, feature_shape: Sequence[int], classes: int, dropout: float = 0.1) -> None:
        channels, height, width = feature_shape
        pool = 2 if min(height, width) >= 2 else 1
        inputs = channels * (height // pool) * (width // pool)
        norm = fix_scale(nn.BatchNorm2d(channels), inputs)
        layers = {"norm": norm, "relu": nn.ReLU(), "pool": nn.AvgPool2d(pool), "flatten": nn.Flatten()}
        super().__init__(inputs, classes, dropout, **layers)


class LinearHead(_Head):
    """Batch norm, ReLU, global average pool, dropout, linear: (B, C, H, W) to (B, K)."""

    def __init__(self, feature_shape: Sequence[int], classes: int, dropout: float = 0.1) -> None:
        channels = feature_shape[0]
        norm = fix_scale(nn.BatchNorm2d(channels), channels)
        layers = {"norm": norm, "relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        super().__init__(channels, classes, dropout, **layers)


class ConvHead(_Head):
    """For early maps: a depthwise-separable convolution widens and reduces them before they are pooled.

    Batch norm, ReLU, a depthwise convolution with a stride that leaves at most 4 pixels a side, a 1x1 convolution to
    twice the channels (but 64 to 256), batch norm, ReLU, global average pool, dropout, linear: (B, C, H, W) to (B, K).
    """

    def __init__(self, feature_shape: Sequence[int], classes: int, dropout: float = 0.1) -> None:
        channels, height, width = feature_shape
        stride = max(1, math.ceil(min(height, width) / _REDUCED_SIDE))
        kernel = max(3, stride + 1 - stride % 2)  # odd, and no pixel is left out
        wide = min(max(2 * channels, _NARROWEST), _WIDEST)
        super().__init__(
            wide,
            classes,
            dropout,
            norm=fix_scale(nn.BatchNorm2d(channels)),
            relu=nn.ReLU(),
            depthwise=nn.Conv2d(
                channels, channels, kernel, stride, padding=kernel // 2, groups=channels, bias=False
            ),
            pointwise=nn.Conv2d(channels, wide, 1, bias=False),
            norm2=fix_scale(nn.BatchNorm2d(wide), wide),
            relu2=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )


class TowerHead(_Head):
    """For early maps: a small convolutional network of its own, (B, C, H, W) to (B, K).

    Batch norm, ReLU, then layers of a 3x3 convolution with stride 2, batch norm and ReLU until at most 4 pixels a side
    are left, then global average pool, dropout, linear. Each layer doubles the channels, to 32 at least and 128 at most.
    A map that is as small already has one layer, with stride 1. Layers of this kind before an early exit's classifier
    are those of Be Your Own Teacher (Zhang et al. 2019, arXiv 1905.08094) and of exit-ensemble distillation (Lee and Lee
    2021, arXiv 2104.00299); widths and number are ours.

    Only the first norm is fixed: behind the others the linear layer is small.
    """

    def __init__(self, feature_shape: Sequence[int], classes: int, dropout: float = 0.1) -> None:
        channels, height, width = feature_shape
        layers: dict[str, nn.Module] = {"norm": fix_scale(nn.BatchNorm2d(channels)), "relu": nn.ReLU()}
        side, number = max(height, width), 0
        while number == 0 or side > _REDUCED_SIDE:
            number += 1
            stride = 2 if side > _REDUCED_SIDE else 1
            wide = min(max(2 * channels, _TOWER_NARROWEST), _TOWER_WIDEST)
            layers[f"conv{number}"] = nn.Conv2d(channels, wide, 3, stride, padding=1, bias=False)
            layers[f"norm{number}"], layers[f"relu{number}"] = nn.BatchNorm2d(wide), nn.ReLU()
            channels, side = wide, math.ceil(side / stride)
        super().__init__(
            channels, classes, dropout, **layers, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()
        )


class TokenPool(nn.Module):
    """The mean of the tokens from ``first`` up to ``end``: (B, N, C) to (B, C)."""

    def __init__(self, first: int, end: int) -> None:
        super().__init__()
        self.first, self.end = first, end

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, C)."""
        if self.end - self.first == 1:
            return x[:, self.first]
        return x[:, self.first : self.end].mean(dim=1)


class TokenHead(_Head):
    """Layer norm, the mean of some tokens (or the class token), dropout, linear: (B, N, C) to (B, K)."""

    def __init__(self, channels: int, tokens: range, classes: int, dropout: float = 0.1) -> None:
        norm = fix_scale(nn.LayerNorm(channels), channels)
        super().__init__(channels, classes, dropout, norm=norm, pool=TokenPool(tokens.start, tokens.stop))


class VectorHead(_Head):
    """Layer norm, ReLU, dropout, linear: (B, C) to (B, K)."""

    def __init__(self, channels: int, classes: int, dropout: float = 0.1) -> None:
        norm = fix_scale(nn.LayerNorm(channels), channels)
        super().__init__(channels, classes, dropout, norm=norm, relu=nn.ReLU())


class ChannelsFirst(nn.Module):
    """(B, H, W, C) to (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, C, H, W)."""
        return x.permute(0, 3, 1, 2)


HEADS: dict[str, Callable[[Sequence[int], int, float], nn.Module]] = {
    "erde": ERDEHead,
    "linear": LinearHead,
    "conv": ConvHead,
    "tower": TowerHead,
}
# NATIVE: the heads that a backbone brings along; AUTO: those, or a head that fits the shape.
AUTO, NATIVE = "auto", "native"
HEAD_NAMES = (AUTO, *HEADS, NATIVE)


@dataclass(frozen=True)
class Features:
    """The features that an exit's head reads, of a single image.

    ``kind``: a map (C, H, W) in either layout, tokens (N, C), or a vector (C,). ``shape`` is the tensor's own, without
    the batch; ``flattened`` says that several of its axes number the tokens.
    """

    kind: Literal["map", "tokens", "vector"]
    shape: tuple[int, ...]
    channels_last: bool = False
    flattened: bool = False

    @classmethod
    def of(cls, shape: Sequence[int], input_size: Sequence[int], channels_last: bool = False) -> Features:
        """The kind by the shape: a map has the image's proportions, and its channels before or behind them.

        ``channels_last`` decides where the shape does not: with as many channels as pixels a side.
        """
        shape = tuple(shape)
        if len(shape) == 1:
            return cls("vector", shape)
        if len(shape) == 2:
            return cls("tokens", shape, channels_last=True)
        if len(shape) == 3:
            _, height, width = input_size
            first = _alike(shape[1], shape[2], height, width)
            last = _alike(shape[0], shape[1], height, width)
            if first or last:
                return cls("map", shape, channels_last=channels_last if first and last else last)
        return cls("tokens", shape, channels_last=True, flattened=True)

    @property
    def channels(self) -> int:
        """Numbers per pixel or token."""
        return self.shape[-1] if self.channels_last else self.shape[0]

    @property
    def places(self) -> int:
        """Pixels or tokens."""
        return math.prod(self.shape) // self.channels

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a map."""
        first, second, third = self.shape
        return (third, first, second) if self.channels_last else (first, second, third)


def _alike(height: int, width: int, image_height: int, image_width: int) -> bool:
    if image_height == image_width:
        return height == width
    # Rounded up or down at each halving.
    return abs(height * image_width - width * image_height) <= max(image_height, image_width)


def check_head(name: str) -> None:
    """Raise if the head's name is unknown."""
    if name not in HEAD_NAMES:
        raise UserError(f"unknown exit head '{name}'{nearest(name, HEAD_NAMES)}")


def make_head(
    name: str, features: Features, tokens: range, classes: int, dropout: float, exit_name: str
) -> nn.Module:
    """A head for ``features`` at the exit ``exit_name``; of a sequence it reads ``tokens``."""
    if features.kind == "map":
        head = HEADS[choose_map_head(features) if name == AUTO else name](
            features.map_shape, classes, dropout
        )
        return _in_front("channels_first", ChannelsFirst(), head) if features.channels_last else head
    if name in ("conv", "tower"):
        raise UserError(
            f"the head '{name}' needs maps, and exit '{exit_name}' gives a {features.kind.removesuffix('s')} "
            f"of shape {features.shape}: choose auto or linear"
        )
    if features.kind == "vector":
        return VectorHead(features.channels, classes, dropout)
    head = TokenHead(features.channels, tokens, classes, dropout)
    if features.flattened:
        return _in_front("flatten_tokens", nn.Flatten(1, len(features.shape) - 1), head)
    return head


def choose_map_head(features: Features) -> str:
    """``erde`` where its linear layer is small, ``conv`` on larger early maps, else ``linear``."""
    channels, height, width = features.map_shape
    pool = 2 if min(height, width) >= 2 else 1
    if channels * (height // pool) * (width // pool) <= _MOST_INPUTS:
        return "erde"
    return "conv" if min(height, width) >= _EARLY_SIDE else "linear"


def _in_front(name: str, module: nn.Module, head: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict([(name, module), *head.named_children()]))


def tokens_for(features: Features, final: Features, looked_at: range) -> range:
    """The tokens that an early head reads, from those that the model's own classifier reads (``looked_at``).

    The same tokens where the sequence is as long as the last; a class token in front also where a square of patches
    follows it; else all of them.
    """
    count = features.places
    if final.kind == "tokens" and count == final.places:
        return looked_at
    alone = len(looked_at) == 1 and looked_at.start == 0 and final.kind == "tokens" and final.places > 1
    if alone and math.isqrt(count - 1) ** 2 == count - 1 and count > 1:
        return looked_at
    return range(count)
