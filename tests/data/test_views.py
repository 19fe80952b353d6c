from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from erde.data.batches import TrainBatches
from erde.data.load import DataSplits
from erde.data.views import Views
from erde.recipe.schema import AugmentationConfig
from erde.recipe.validation import validate
from tests.helpers.checks import user_error


@pytest.mark.parametrize(
    ("padding", "flip", "expected"), [(4, True, 162), (1, False, 9), (0, True, 2), (0, False, 1)]
)
def test_how_many_there_are(padding: int, flip: bool, expected: int) -> None:
    views = Views(padding, flip)
    assert views.all == views.count == expected
    numbers = torch.arange(expected)
    parts = views.unpack(numbers)
    assert torch.equal(views.number(parts["top"], parts["left"], parts["flip"]), numbers)
    # All flips and shifts, each once.
    assert len(set(zip(*(part.tolist() for part in parts.values()), strict=True))) == expected
    assert max(parts["top"].tolist()) == max(parts["left"].tolist()) == 2 * padding
    assert set(parts["flip"].tolist()) == ({0, 1} if flip else {0})


def test_a_few_for_each_image_all_different_and_always_the_same() -> None:
    views, images = Views(4, True, limit=8), np.arange(5000)
    table = np.stack(
        [views.numbers(images, np.full_like(images, view)) for view in range(views.count)], axis=1
    )
    assert table.shape == (5000, 8)
    assert table.min() >= 0
    assert table.max() < 162
    assert all(len(set(row)) == 8 for row in table.tolist())
    # Spread evenly over all views; of 162 starts and 54 strides 5,000 images draw about 3,810 different pairs.
    shares = np.bincount(table.ravel(), minlength=162) / table.size
    assert np.abs(shares - 1 / 162).max() < 5 * np.sqrt(1 / 162 / table.size)
    assert len({tuple(row) for row in table.tolist()}) > 3700
    again = Views(4, True, limit=8).numbers(images[7:9], np.array([3, 3]))
    assert again.tolist() == table[7:9, 3].tolist()


def test_a_limit_above_all_is_no_limit() -> None:
    assert Views(0, True, limit=9).count == 2
    assert Views.of(AugmentationConfig(cutout=3)) is None
    with user_error("views counts flips and shifts, and cutout has places without number"):
        validate(AugmentationConfig, {"cutout": 3, "views": 4}, "data.augmentation.")


def batches_of(digits: DataSplits, share: tuple[int, int] = (0, 1), **augmentation: Any) -> TrainBatches:
    return TrainBatches(
        digits.train_share(40),
        batch_size=8,
        seed=3,
        augmentation=AugmentationConfig(**augmentation),
        mean=digits.mean,
        std=digits.std,
        device=torch.device("cpu"),
        share=share,
    )


@pytest.mark.parametrize("views", [None, 3])
def test_the_view_that_a_batch_names_is_the_one_that_it_shows(views: int | None, digits: DataSplits) -> None:
    batches = batches_of(digits, crop_padding=1, views=views)
    seen: dict[int, set[int]] = {}
    for epoch in range(20):
        for batch in batches.epoch(epoch):
            assert batch.views is not None
            for row, (index, view) in enumerate(
                zip(batch.indices.tolist(), batch.views.tolist(), strict=True)
            ):
                seen.setdefault(index, set()).add(view)
                if epoch < 2:
                    shown = next(batches.view(view, np.array([[index]])))
                    assert torch.equal(shown[0], batch.images[row])
    kinds = [len(each) for each in seen.values()]
    assert max(kinds) == 3 if views else min(kinds) > 6
    assert len(seen) == 40


def test_processes_share_each_batch(digits: DataSplits) -> None:
    whole = list(batches_of(digits, crop_padding=1).epoch(2))
    parts = [list(batches_of(digits, (rank, 2), crop_padding=1).epoch(2)) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        for name in ("images", "labels", "indices", "views"):
            halves = [getattr(first, name), getattr(second, name)]
            assert torch.equal(torch.cat(halves), getattr(batch, name)), name
        # Dropout must not draw the same in both.
        assert first.seed == batch.seed != second.seed
