from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from erde.common.errors import UserError
from erde.common.splits import TrainSplit
from erde.data.batches import TrainBatches
from erde.losses import ExitSettings, build_loss
from erde.networks.attach import attach_exits
from erde.networks.backbones import build_backbone
from erde.networks.cost import network_cost
from erde.recipe.losses import resolve_loss
from erde.recipe.schema import AugmentationConfig, DistillationConfig, TrainConfig
from erde.training.job import Job
from tests.helpers.image_sets import load, picture

torch.set_num_threads(1)

NO_AUGMENTATION = AugmentationConfig(crop_padding=0, flip=False)


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def make_batches(split: TrainSplit, **arguments: Any) -> TrainBatches:
    settings: dict[str, Any] = {
        "batch_size": 16,
        "seed": 5,
        "augmentation": AugmentationConfig(crop_padding=2, cutout=3),
        "mean": MEAN,
        "std": STD,
        "device": torch.device("cpu"),
    }
    return TrainBatches(split, **{**settings, **arguments})


@pytest.fixture(scope="module")
def train_split() -> TrainSplit:
    # Not square, so that rows and columns cannot be exchanged.
    return TrainSplit(np.stack([picture(row, (6, 9, 3)) for row in range(50)]), np.arange(50) % 10)


def assert_equal_batches(first: Any, second: Any) -> None:
    for batch, other in zip(first, second, strict=True):
        assert batch.seed == other.seed
        assert torch.equal(batch.indices, other.indices)
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)


def test_batches_are_a_function_of_seed_epoch_and_step(train_split: TrainSplit) -> None:
    epoch = list(make_batches(train_split).epoch(3))
    torch.rand(5)
    again = make_batches(train_split)
    list(again.epoch(0))
    assert_equal_batches(epoch, again.epoch(3))
    for other in (make_batches(train_split).epoch(4), make_batches(train_split, seed=6).epoch(3)):
        assert not torch.equal(epoch[0][0], next(other)[0])


@pytest.mark.parametrize("first_step", [0, 1, 2, 3])
def test_resuming_within_an_epoch(train_split: TrainSplit, first_step: int) -> None:
    batches = make_batches(train_split)
    whole = list(batches.epoch(2))
    assert len(whole) == batches.steps == 3
    assert_equal_batches(whole[first_step:], batches.epoch(2, first_step))


def test_an_epoch_shows_every_image_once(train_split: TrainSplit) -> None:
    batches = make_batches(
        train_split, batch_size=10, augmentation=NO_AUGMENTATION, mean=(0,) * 3, std=(1,) * 3
    )
    for epoch in (0, 1):
        x = torch.cat([images for images, *_ in batches.epoch(epoch)])
        y = torch.cat([labels for _, labels, *_ in batches.epoch(epoch)])
        rows = sorted(zip(x.permute(0, 2, 3, 1).reshape(50, -1).tolist(), y.tolist(), strict=True))
        pixels = (torch.from_numpy(train_split.images).float() / 255).reshape(50, -1)
        expected = sorted(zip(pixels.tolist(), train_split.labels.tolist(), strict=True))
        np.testing.assert_allclose(
            [values for values, _ in rows], [values for values, _ in expected], atol=1e-6
        )
        assert [label for _, label in rows] == [label for _, label in expected]


def test_batches_are_float32_channels_last(train_split: TrainSplit) -> None:
    x, y, *_ = next(make_batches(train_split).epoch(0))
    assert (x.shape, x.dtype) == ((16, 3, 6, 9), torch.float32)
    assert (y.shape, y.dtype) == ((16,), torch.int64)
    assert x.is_contiguous(memory_format=torch.channels_last)


def slow_augmentation(
    image: NDArray[np.uint8], draw: dict[str, int], augmentation: AugmentationConfig
) -> NDArray[np.float64]:
    """One image: pad with zeros, crop, flip, normalise, cut out; (H, W, C) to (C, H, W)."""
    height, width, _ = image.shape
    padding = augmentation.crop_padding
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    if padding:
        padded = padded[draw["top"] : draw["top"] + height, draw["left"] : draw["left"] + width]
    if augmentation.flip and draw["flip"]:
        padded = padded[:, ::-1]
    x = (padded / 255 - np.array(MEAN)) / np.array(STD)
    side = augmentation.cutout
    for row, column in itertools.product(range(height), range(width)):
        from_top = row - (draw["hole_top"] - side // 2)
        from_left = column - (draw["hole_left"] - side // 2)
        if 0 <= from_top < side and 0 <= from_left < side:
            x[row, column] = 0
    return x.transpose(2, 0, 1)


@pytest.mark.parametrize(
    "augmentation",
    [
        AugmentationConfig(crop_padding=2, flip=True, cutout=0),
        AugmentationConfig(crop_padding=3, flip=False, cutout=0),
        AugmentationConfig(crop_padding=0, flip=True, cutout=0),
        AugmentationConfig(crop_padding=0, flip=False, cutout=0),
        AugmentationConfig(crop_padding=1, flip=True, cutout=4),
    ],
    ids=repr,
)
def test_augmentation_equals_a_slow_one(train_split: TrainSplit, augmentation: AugmentationConfig) -> None:
    batches = make_batches(train_split, augmentation=augmentation)
    draws = batches._draw(4)
    order = np.random.default_rng([5, 4]).permutation(50)
    for step, (images, labels, *_) in enumerate(batches.epoch(4)):
        for place in range(16):
            row = order[16 * step + place]
            draw = {name: int(values[step, place]) for name, values in draws.items()}
            expected = slow_augmentation(train_split.images[row], draw, augmentation)
            np.testing.assert_allclose(images[place].numpy(), expected, atol=2e-6)
            assert labels[place] == train_split.labels[row]


def test_draws_cover_their_ranges_evenly(train_split: TrainSplit) -> None:
    batches = make_batches(train_split)
    draws = [batches._draw(epoch) for epoch in range(60)]
    for name, high in (("top", 5), ("left", 5), ("flip", 2), ("hole_top", 6), ("hole_left", 9)):
        values = torch.cat([draw[name].flatten() for draw in draws])
        counts = torch.bincount(values, minlength=high) / len(values)
        assert len(counts) == high
        assert float((counts - 1 / high).abs().max()) < 0.03
    # Independent of each other.
    top, left = (torch.cat([draw[name].flatten() for draw in draws]).float() for name in ("top", "left"))
    assert abs(float(torch.corrcoef(torch.stack([top, left]))[0, 1])) < 0.1


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_size_of_the_hole(side: int) -> None:
    split = TrainSplit(np.full((64, 12, 12, 3), 255, np.uint8), np.zeros(64, np.int64))
    augmentation = AugmentationConfig(crop_padding=0, flip=False, cutout=side)
    holes = [
        (images == 0).all(dim=1) for images, *_ in make_batches(split, augmentation=augmentation).epoch(0)
    ]
    sizes = torch.cat(holes).sum(dim=(1, 2))
    # At the border a part of the hole lies outside.
    assert int(sizes.max()) == side * side
    assert int(sizes.min()) == (side - side // 2 if side > 1 else 1) ** 2
    assert (sizes == side * side).float().mean() > 0.4


def test_batch_larger_than_the_train_split(train_split: TrainSplit) -> None:
    network = attach_exits(build_backbone("resnet8", classes=10), 2, input_size=(3, 6, 9))
    settings = ExitSettings.resolve(DistillationConfig(), 10, network_cost(network, (3, 6, 9)).macs, None)
    arguments: dict[str, Any] = {
        "name": "ce",
        "network": network,
        "criterion": build_loss(resolve_loss("ce"), settings),
        "teacher": None,
        "train": train_split,
        "augmentation": NO_AUGMENTATION,
        "mean": MEAN,
        "std": STD,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    with pytest.raises(UserError, match=r"train\.batch_size is 51, 'ce' trains on 50 images"):
        Job(config=TrainConfig(batch_size=51), **arguments).check()
    Job(config=TrainConfig(batch_size=50), **arguments).check()
    with pytest.raises(AssertionError, match="51"):
        make_batches(train_split, batch_size=51)
    assert make_batches(train_split, batch_size=50).steps == 1


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_streaming_changes_nothing(root: Path, streaming: Any) -> None:
    resident, splits = load(root / "svhn"), load(root / "svhn", streaming=streaming)
    assert isinstance(splits.train.images, np.ndarray) == (streaming == "never")
    held_out = ("tune", "certify", "test")
    prints, expected_prints = splits.fingerprints(), resident.fingerprints()
    assert [prints[name] for name in held_out] == [expected_prints[name] for name in held_out]
    # Streamed train images are told apart without decoding them (tests/data/test_streaming.py).
    assert (prints["train"] == expected_prints["train"]) == (streaming == "never")
    assert (splits.mean, splits.std) == (resident.mean, resident.std)
    share, expected = splits.train_share(64, skip=20), resident.train_share(64, skip=20)
    assert all(np.array_equal(x, y) for x, y in zip(share.batches(50), expected.batches(50), strict=True))
    for workers in (0, 1):
        streamed = make_batches(share, workers=workers).epoch(1, first_step=1)
        for (x, y, *_), (u, v, *_) in zip(
            streamed, make_batches(expected).epoch(1, first_step=1), strict=True
        ):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_streaming_leaves_torchs_own_generator_alone(root: Path) -> None:
    split = load(root / "svhn", streaming="always").train
    before = torch.get_rng_state()
    assert len(list(make_batches(split).epoch(0))) == 10
    assert torch.equal(torch.get_rng_state(), before)
