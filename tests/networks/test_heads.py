"""Heads by the shape of what an exit looks at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from erde.common.errors import UserError
from erde.networks.backbones import build_backbone
from erde.networks.cost import count_macs, count_parameters
from erde.networks.heads import (
    ChannelsFirst,
    ConvHead,
    ERDEHead,
    Features,
    LinearHead,
    TokenHead,
    TokenPool,
    TowerHead,
    VectorHead,
    make_head,
    reset_head,
    tokens_for,
)
from erde.training.parallel import convert_batch_norm

SIZE = (3, 64, 64)


@pytest.mark.parametrize(
    ("shape", "size", "kind", "channels", "last"),
    [
        ((64, 8, 8), SIZE, "map", 64, False),
        ((8, 8, 64), SIZE, "map", 64, True),
        ((8, 8, 8), SIZE, "map", 8, False),
        ((512, 1, 1), SIZE, "map", 512, False),
        ((1, 1, 512), SIZE, "map", 512, True),
        ((64, 4, 8), (3, 32, 64), "map", 64, False),
        ((4, 8, 64), (3, 32, 64), "map", 64, True),
        ((17, 192), SIZE, "tokens", 192, True),
        ((16, 49, 96), SIZE, "tokens", 96, True),
        ((128,), SIZE, "vector", 128, False),
    ],
)
def test_kind_by_shape(shape: Any, size: Any, kind: str, channels: int, last: bool) -> None:
    result = Features.of(shape, size)
    assert (result.kind, result.channels) == (kind, channels)
    if kind == "map":
        assert result.channels_last == last


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("auto", (64, 16, 16), [ERDEHead]),  # 64 * 8 * 8 inputs
        ("auto", (65, 16, 16), [ConvHead]),
        ("auto", (2048, 4, 4), [LinearHead]),
        ("linear", (64, 16, 16), [LinearHead]),
        ("conv", (8, 8, 8), [ConvHead]),
        ("tower", (8, 8, 8), [TowerHead]),
        ("auto", (17, 192), [TokenHead]),
        ("erde", (17, 192), [TokenHead]),
        ("linear", (10,), [VectorHead]),
    ],
)
def test_head_by_features(name: str, shape: Any, expected: Any) -> None:
    features = Features.of(shape, SIZE)
    head = make_head(name, features, range(features.places), 7, 0.5, "here")
    assert [type(head)] == expected
    head.eval()
    assert head(torch.randn(3, *shape)).shape == (3, 7)
    assert [module.p for module in head.modules() if isinstance(module, nn.Dropout)] == [0.5]


def test_channels_last_maps_are_the_same_map() -> None:
    torch.manual_seed(0)
    plain = make_head("erde", Features.of((12, 8, 8), SIZE), range(1), 5, 0.0, "here").eval()
    torch.manual_seed(0)
    last = make_head("erde", Features.of((8, 8, 12), SIZE), range(1), 5, 0.0, "here").eval()
    assert isinstance(next(last.children()), ChannelsFirst)
    x = torch.randn(2, 12, 8, 8)
    assert torch.equal(plain(x), last(x.permute(0, 2, 3, 1)))


@pytest.mark.parametrize("shape", [(17, 192), (10,)])
@pytest.mark.parametrize("name", ["conv", "tower"])
def test_convolutions_are_for_maps(name: str, shape: Any) -> None:
    features = Features.of(shape, SIZE)
    message = rf"the head '{name}' needs maps, and exit 'blocks.3' gives a (token|vector) of shape"
    with pytest.raises(UserError, match=message):
        make_head(name, features, range(1), 5, 0.5, "blocks.3")


@pytest.mark.parametrize(("side", "reduced"), [(4, 4), (8, 4), (16, 4), (17, 4), (56, 4), (64, 4)])
def test_conv_reduces_to_at_most_four_pixels_a_side(side: int, reduced: int) -> None:
    head = ConvHead((6, side, side), 5)
    x = head.depthwise(torch.zeros(1, 6, side, side))
    assert x.shape[-1] <= reduced
    # No pixel goes unseen.
    assert head.depthwise.kernel_size[0] >= head.depthwise.stride[0]
    assert head.depthwise.groups == 6


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        # Channels and side of each layer's output, by hand.
        ((16, 32, 32), [(32, 16), (64, 8), (128, 4)]),
        ((8, 17, 17), [(32, 9), (64, 5), (128, 3)]),
        ((64, 8, 8), [(128, 4)]),
        ((256, 8, 8), [(128, 4)]),
        ((40, 4, 4), [(80, 4)]),
        ((40, 1, 1), [(80, 1)]),
    ],
)
def test_a_tower_halves_the_map_and_doubles_the_channels(shape: Any, layers: list[tuple[int, int]]) -> None:
    head = TowerHead(shape, 10)
    macs, parameters, channels = 0, 2 * shape[0], shape[0]
    for wide, side in layers:
        macs += 9 * channels * wide * side * side
        parameters += 9 * channels * wide + 2 * wide
        channels = wide
    assert count_macs(head.eval(), torch.zeros(1, *shape))[0] == macs + 10 * channels
    assert count_parameters(head) == parameters + 10 * (channels + 1)


def test_of_a_tower_the_first_norm_is_fixed_and_the_others_start_anew() -> None:
    head = TowerHead((16, 16, 16), 10)
    fixed = {name for name, parameter in head.named_parameters() if not parameter.requires_grad}
    assert fixed == {"norm.weight", "norm.bias"}
    with torch.no_grad():
        head.norm1.weight.fill_(3.0)
    before = head.conv2.weight.clone()
    reset_head(head)
    assert head.norm1.weight.eq(1).all()
    assert not torch.equal(head.conv2.weight, before)


def test_token_head_by_hand() -> None:
    head = TokenHead(4, range(1, 3), 2).eval()
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    values = x.numpy().astype(np.float64)
    normal = (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + 1e-5)
    weight, bias = (
        tensor.detach().numpy().astype(np.float64) for tensor in (head.linear.weight, head.linear.bias)
    )
    expected = normal[:, 1:3].mean(axis=1) @ weight.T + bias
    assert np.allclose(head(x).detach().numpy(), expected, atol=1e-5)


def test_the_pool_of_one_token_is_that_token() -> None:
    x = torch.randn(2, 5, 4)
    assert torch.equal(TokenPool(0, 1)(x), x[:, 0])


@pytest.mark.parametrize(
    ("count", "final", "looked_at", "expected"),
    [
        (17, 17, range(1), range(1)),  # the class token
        (65, 17, range(1), range(1)),  # an earlier, longer sequence with a class token
        (16, 17, range(1), range(16)),  # the class token comes later
        (17, 17, range(1, 17), range(1, 17)),  # pooled, a token in front left out
        (64, 16, range(16), range(64)),
        (18, 18, range(2), range(2)),  # class and distillation token
    ],
)
def test_which_tokens_an_early_head_reads(count: int, final: int, looked_at: range, expected: range) -> None:
    early, late = (Features.of((number, 8), SIZE) for number in (count, final))
    assert tokens_for(early, late, looked_at) == expected


def test_a_native_head_is_drawn_as_when_it_was_made() -> None:
    torch.manual_seed(0)
    head = build_backbone("msdnet", classes=10).native_heads["block1"]
    made = {name: float(value.detach().std()) for name, value in head.named_parameters() if value.ndim == 4}
    reset_head(head)
    drawn = {name: float(value.detach().std()) for name, value in head.named_parameters() if value.ndim == 4}
    assert drawn == pytest.approx(made, rel=0.02)


def test_a_fixed_scale_stays_where_batch_norm_is_over_several_processes() -> None:
    network = nn.ModuleList([ERDEHead((16, 32, 32), 10)])
    convert_batch_norm(network)
    head = network[0]
    assert isinstance(head.norm, nn.SyncBatchNorm)
    reset_head(head)
    assert head.norm.weight.eq(0.25).all()
    assert not head.norm.weight.requires_grad
