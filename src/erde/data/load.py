"""Data sets to the four splits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from erde.common.errors import UserError, check_seed
from erde.common.progress import say
from erde.common.splits import CertifySplit, Labels, TestSplit, TrainSplit, TuneSplit
from erde.data.copies import separate
from erde.data.encoded import Index
from erde.data.sources import Columns, load_columns, load_digits, part_of
from erde.recipe.schema import DataConfig

# Normalisation is measured on at most this many train images; more would not move the 4th digit.
NORMALISATION_IMAGES = 50_000
# Of a streamed set, whose images must be decoded for it: the mean of natural images is off by about 0.001 then.
STREAMED_NORMALISATION_IMAGES = 10_000


@dataclass(frozen=True)
class DataSplits:
    """The four splits with what a network must know of them. Images are uint8 (N, H, W, C)."""

    name: str
    train: TrainSplit
    tune: TuneSplit
    certify: CertifySplit
    test: TestSplit
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    workers: int = 0  # processes that decode, where images are streamed
    train_fingerprint: str | None = None  # of a run that held train in another way: see load_splits_again

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W), as networks take it."""
        height, width, channels = self.image_shape
        return channels, height, width

    def train_share(self, size: int | None, skip: int = 0) -> TrainSplit:
        """``size`` train images from position ``skip``; any such stretch is stratified."""
        size = len(self.train) - skip if size is None else size
        if skip + size > len(self.train) or size < 1:
            raise UserError(
                f"{size:,} train images{f' beside {skip:,} others' if skip else ''} were asked for, "
                f"the train split has {len(self.train):,}: lower train_subset"
            )
        if skip == 0 and size == len(self.train):
            return self.train
        stretch = slice(skip, skip + size)
        images = self.train.images
        # A view of an array: several arms share it.
        share = (
            images[stretch]
            if isinstance(images, np.ndarray)
            else part_of(images, np.arange(skip, skip + size))
        )
        return TrainSplit(share, self.train.labels[stretch])

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Size and fingerprint per split, for ``splits.json``."""
        splits = (self.train, self.tune, self.certify, self.test)
        entries = {split.name: {"size": len(split), "fingerprint": split.fingerprint()} for split in splits}
        if self.train_fingerprint is not None:
            entries["train"]["fingerprint"] = self.train_fingerprint
        return entries


def load_data(name: str | os.PathLike[str], *, seed: int = 0, **settings: Any) -> DataSplits:
    """The four splits of a shipped data set, a hub id or a folder; ``settings`` are keys of ``data:``."""
    from erde.recipe.validation import validate

    if not isinstance(name, str | os.PathLike):
        raise UserError(f"name is {name!r}: expected the name of a data set or a folder")
    check_seed(seed)
    return load_splits(validate(DataConfig, {"name": os.fspath(name), **settings}, prefix="data."), seed)


def load_splits(config: DataConfig, seed: int) -> DataSplits:
    """Load ``config.name`` and split it: stratified, by ``seed``, the same on every machine.

    An image with copies in several splits stays in one of them (copies.py).
    """
    seed = seed if config.split_seed is None else config.split_seed
    pool, test, classes = load_digits() if config.name == "digits" else load_columns(config)
    if len(classes) < 2:
        raise UserError(
            f"'{config.name}' has a single class, {classes[0]}: a classifier needs images of two classes or more"
        )
    if config.group is not None and pool.groups is None:
        raise UserError(f"data.group is '{config.group}', and '{config.name}' has no columns: leave it out")
    if test is None:
        order = _order(pool, seed + 1)
        size = _whole_groups(pool, order, config.test_size)
        _check_size("test", size, order, "data.test_size")
        test = pool.take(order[:size])
        pool = pool.take(np.sort(order[size:]))
    whole = pool if config.held_out == "train" else test
    order = _order(whole, seed)
    tune_size = _whole_groups(whole, order, config.tune_size)
    held_out = _whole_groups(whole, order, tune_size + config.certify_size)
    _check_size("tune and certify", held_out, order, "data.tune_size or data.certify_size", config.held_out)
    tune = whole.take(order[:tune_size])
    certify = whole.take(order[tune_size:held_out])
    rest = whole.take(order[held_out:])
    train, test = (rest, test) if config.held_out == "train" else (pool, rest)
    train, tune, certify, test = _separate(config, train, tune, certify, test)
    # Only train needs every class: promises and measurements are about images as they come.
    missing = sorted(set(range(len(classes))) - set(train.labels.tolist()))
    if missing:
        raise UserError(
            f"data set '{config.name}': class '{classes[missing[0]]}' has no image in the train split "
            f"({len(train.labels):,} images for {len(classes)} classes): enlarge the data set"
        )
    train_split = TrainSplit(train.images, train.labels)
    if config.train_subset is not None and config.train_subset > len(train_split):
        raise UserError(
            f"data.train_subset is {config.train_subset:,}, the train split has {len(train_split):,} images: lower it"
        )
    resident = isinstance(train_split.images, np.ndarray)
    limit = NORMALISATION_IMAGES if resident else STREAMED_NORMALISATION_IMAGES
    mean, std = _normalisation(config, train_split, limit)
    return DataSplits(
        config.name,
        train_split,
        TuneSplit(tune.images, tune.labels),
        CertifySplit(certify.images, certify.labels),
        TestSplit(test.images, test.labels),
        tuple(classes),
        mean,
        std,
        config.workers,
    )


def load_splits_again(config: DataConfig, seed: int, fingerprints: Mapping[str, Any]) -> DataSplits | None:
    """:func:`load_splits` for a run that began with ``fingerprints``; None where the data is not the same.

    Where a run held its train images in memory and this one streams them, or the other way round, the train split
    has another kind of fingerprint, and its mean and standard deviation are measured on another number of images:
    both are then taken as they were.
    """
    data = load_splits(config, seed)
    now = data.fingerprints()
    if now == fingerprints:
        return data
    if {**now, "train": None} != {**fingerprints, "train": None}:
        return None
    streamed = not isinstance(data.train.images, np.ndarray)
    if streamed:
        began = data.train.decoded_fingerprint()
    elif config.name != "digits":
        always = config.model_copy(update={"streaming": "always"})
        began = load_splits(always, seed).train.fingerprint()
    else:
        return None
    train = {"size": len(data.train), "fingerprint": began}
    if train != fingerprints.get("train"):
        return None
    mean, std = _normalisation(
        config, data.train, NORMALISATION_IMAGES if streamed else STREAMED_NORMALISATION_IMAGES
    )
    return replace(data, mean=mean, std=std, train_fingerprint=began)


def _separate(config: DataConfig, *parts: Columns) -> tuple[Columns, ...]:
    remaining = separate([part.images for part in parts], train_was_seen=config.held_out == "test")
    left_out = [len(part.labels) - len(rows) for part, rows in zip(parts, remaining, strict=True)]
    if not any(left_out):
        return parts
    train, tune, certify, test = left_out
    say(
        f"copies of images in more than one split, or twice in certify: {sum(left_out):,} left out "
        f"({train:,} of train, {tune:,} of tune, {certify:,} of certify{f', {test:,} of test' if test else ''})"
    )
    for name, rows in zip(("tune", "certify", "test"), remaining[1:], strict=True):
        if not len(rows):
            raise UserError(
                f"data set '{config.name}': no image of {name} is left: all are copies of images of other splits; give a set "
                "whose splits differ"
            )
    return tuple(
        part.take(rows) if count else part
        for part, rows, count in zip(parts, remaining, left_out, strict=True)
    )


def _order(columns: Columns, seed: int) -> Index:
    """A stratified random order; with groups, groups in random order, without regard to classes."""
    if columns.groups is None:
        return stratified_order(columns.labels, seed)
    generator = np.random.default_rng(seed)
    place = generator.permutation(int(columns.groups.max()) + 1)[columns.groups]
    return np.lexsort((generator.random(len(place)), place)).astype(np.int64)


def _whole_groups(columns: Columns, order: Index, size: int) -> int:
    """The smallest size from ``size`` on that cuts no group in two."""
    groups = columns.groups
    while groups is not None and 0 < size < len(order) and groups[order[size]] == groups[order[size - 1]]:
        size += 1
    return size


def stratified_order(labels: Labels, seed: int) -> Index:
    """A random order of which every stretch has the classes in nearly the shares of the whole."""
    generator = np.random.default_rng(seed)
    noise = generator.random(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rank = np.argsort(np.argsort(noise[rows]))
        # Spread each class evenly over [0, 1); its own offset keeps equal ranks of classes apart.
        position[rows] = (rank + generator.random()) / len(rows)
    return np.argsort(position, kind="stable").astype(np.int64)


def _check_size(splits: str, size: int, order: Index, key: str, rest: str = "train") -> None:
    if size >= len(order):
        raise UserError(
            f"{size:,} images were asked for {splits}, of {len(order):,} in all, and {rest} needs some too: lower {key}"
        )


def _normalisation(
    config: DataConfig, train: TrainSplit, limit: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = train.images.shape[-1]
    for key, given in (("mean", config.mean), ("std", config.std)):
        if given and len(given) != channels:
            raise UserError(f"data.{key} has {len(given)} values for {channels} channels")
    # Measuring decodes the images of a streamed set: only where it is needed.
    mean, std = ((), ()) if config.mean and config.std else measure_pixels(train, channels, limit)
    mean, std = tuple(config.mean or mean), tuple(config.std or std)
    return mean, tuple(max(value, 1e-3) for value in std)


def measure_pixels(
    train: TrainSplit, channels: int, limit: int = NORMALISATION_IMAGES
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of the first ``limit`` images, of pixels between 0 and 1."""
    counts = np.zeros((channels, 256))
    limit = min(len(train), limit)
    for start in range(0, limit, 1024):
        batch = train.images[start : min(start + 1024, limit)].reshape(-1, channels)
        counts += [np.bincount(batch[:, channel], minlength=256) for channel in range(channels)]
    values = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    std = np.sqrt(shares @ values**2 - mean**2)
    return tuple(round(float(value), 4) for value in mean), tuple(round(float(value), 4) for value in std)
