"""Data sets to the four splits, and the train split to batches that are already on the device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from erde.config import AugmentationConfig, DataConfig
from erde.copies import apart
from erde.encoded import Index, ResizedCrop, StreamedImages
from erde.errors import UserError
from erde.progress import say
from erde.sources import Columns, load_columns, load_digits, part_of
from erde.splits import CertifySplit, Labels, TestSplit, TrainSplit, TuneSplit
from erde.streaming import DecodedBatches
from erde.views import Views

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
        found = {split.name: {"size": len(split), "fingerprint": split.fingerprint()} for split in splits}
        if self.train_fingerprint is not None:
            found["train"]["fingerprint"] = self.train_fingerprint
        return found


def load_data(name: str | os.PathLike[str], *, seed: int = 0, **settings: Any) -> DataSplits:
    """The four splits of a shipped data set, a hub id or a folder; ``settings`` are keys of ``data:``."""
    from erde.config import validate

    if not isinstance(name, str | os.PathLike):
        raise UserError(f"name is {name!r}: expected the name of a data set or a folder")
    return load_splits(validate(DataConfig, {"name": os.fspath(name), **settings}, prefix="data."), seed)


def load_splits(config: DataConfig, seed: int, copies_apart: bool = True) -> DataSplits:
    """Load ``config.name`` and split it: stratified, by ``seed``, the same on every machine.

    Images that stand in more than one split are kept in one (copies.py), unless ``copies_apart`` is False: earlier
    versions of erde let them be.
    """
    seed = seed if config.split_seed is None else config.split_seed
    pool, test, classes = load_digits() if config.name == "digits" else load_columns(config)
    if config.group is not None and pool.groups is None:
        raise UserError(f"data.group is '{config.group}', and '{config.name}' has no columns: leave it out")
    if test is None:
        order = _order(pool, seed + 1)
        size = _whole_groups(pool, order, config.test_size)
        _check_size("test", size, order, "data.test_size")
        test = pool.take(order[:size])
        pool = pool.take(np.sort(order[size:]))
    order = _order(pool, seed)
    tune_size = _whole_groups(pool, order, config.tune_size)
    held_out = _whole_groups(pool, order, tune_size + config.certify_size)
    _check_size("tune and certify", held_out, order, "data.tune_size or data.certify_size")
    tune = pool.take(order[:tune_size])
    certify = pool.take(order[tune_size:held_out])
    train = pool.take(order[held_out:])
    if copies_apart:
        train, tune, certify, test = _apart(train, tune, certify, test)
    # Only train must show every class: what is promised and measured is about images as they come.
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
    both are then taken as they were. A run of an earlier erde left copies of images where they were.
    """
    for copies_apart in (True, False):
        data = _as_begun(config, seed, fingerprints, copies_apart)
        if data is not None:
            if not copies_apart:
                say("data: copies of images stand in more than one split, as this run began with them")
            return data
    return None


def _as_begun(
    config: DataConfig, seed: int, fingerprints: Mapping[str, Any], copies_apart: bool
) -> DataSplits | None:
    data = load_splits(config, seed, copies_apart)
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
        began = load_splits(always, seed, copies_apart).train.fingerprint()
    else:
        return None
    train = {"size": len(data.train), "fingerprint": began}
    if train != fingerprints.get("train"):
        return None
    mean, std = _normalisation(
        config, data.train, NORMALISATION_IMAGES if streamed else STREAMED_NORMALISATION_IMAGES
    )
    return replace(data, mean=mean, std=std, train_fingerprint=began)


def _apart(*parts: Columns) -> tuple[Columns, ...]:
    kept = apart([one.images for one in parts])
    left_out = [len(one.labels) - len(rows) for one, rows in zip(parts, kept, strict=True)]
    if not any(left_out):
        return parts
    train, tune, certify, _ = left_out
    say(
        f"copies of images in more than one split, or twice in certify: {sum(left_out):,} left out "
        f"({train:,} of train, {tune:,} of tune, {certify:,} of certify)"
    )
    return tuple(
        one if gone == 0 else one.take(rows) for one, rows, gone in zip(parts, kept, left_out, strict=True)
    )


def _order(columns: Columns, seed: int) -> Index:
    """Stratified; with groups, group after group at random, which keeps no shares."""
    if columns.groups is None:
        return stratified_order(columns.labels, seed)
    generator = np.random.default_rng(seed)
    place = generator.permutation(int(columns.groups.max()) + 1)[columns.groups]
    return np.lexsort((generator.random(len(place)), place)).astype(np.int64)


def _whole_groups(columns: Columns, order: Index, size: int) -> int:
    """``size``, or so much more that no group is cut in two."""
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


def _check_size(what: str, size: int, order: Index, key: str) -> None:
    if size >= len(order):
        raise UserError(
            f"{size:,} images were asked for {what}, only {len(order):,} are there and train needs some too: lower {key}"
        )


def _normalisation(
    config: DataConfig, train: TrainSplit, limit: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = train.images.shape[-1]
    for key, given in (("mean", config.mean), ("std", config.std)):
        if given and len(given) != channels:
            raise UserError(f"data.{key} has {len(given)} values for {channels} channels")
    # Measuring decodes the images of a streamed set: only where it is needed.
    mean, std = ((), ()) if config.mean and config.std else _measure(train, channels, limit)
    mean, std = tuple(config.mean or mean), tuple(config.std or std)
    return mean, tuple(max(one, 1e-3) for one in std)


def _measure(train: TrainSplit, channels: int, limit: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    counts = np.zeros((channels, 256))
    limit = min(len(train), limit)
    for start in range(0, limit, 1024):
        batch = train.images[start : min(start + 1024, limit)].reshape(-1, channels)
        counts += [np.bincount(batch[:, channel], minlength=256) for channel in range(channels)]
    values = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    std = np.sqrt(shares @ values**2 - mean**2)
    return tuple(round(float(one), 4) for one in mean), tuple(round(float(one), 4) for one in std)


# ---------------------------------------------------------------- from the train split to batches


class Batch(NamedTuple):
    """One step's images, as the network takes them, and what else the step is made of."""

    images: Tensor  # float32 (B, C, H, W), in channels-last order, on the device
    labels: Tensor  # int64 (B,), on the device
    indices: Tensor  # int64 (B,), positions in the train split, on the host
    views: Tensor | None  # int64 (B,), which of its views each image is, on the host; see views.py
    seed: int  # of what is drawn while the step is computed: dropout


class TrainBatches:
    """Augmented, normalised batches of the train split on ``device``, a function of seed, epoch and step.

    Order and augmentation do not depend on the arm, so arms that are compared see the same images. A
    last batch that is not full is left out; every epoch shuffles anew. Of several processes that share the
    training each gets its part of every batch: ``share`` is (rank, processes).
    """

    def __init__(
        self,
        split: TrainSplit,
        *,
        batch_size: int,
        seed: int,
        augmentation: AugmentationConfig,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        workers: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        assert 1 <= batch_size <= len(split), (batch_size, len(split))
        assert batch_size % share[1] == 0, (batch_size, share)
        self.steps = len(split) // batch_size
        self.batch_size = batch_size
        self.views = Views.of(augmentation)
        part = batch_size // share[1]
        self._mine = slice(share[0] * part, (share[0] + 1) * part)
        self._rank = share[0]
        self._split, self._seed, self._augmentation, self._workers = split, seed, augmentation, workers
        self._device = device
        self._scale = torch.tensor([1 / (255 * value) for value in std], device=device)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
        self._resident: Tensor | None = None
        if isinstance(split.images, np.ndarray):
            self._resident = torch.from_numpy(split.images).to(device)
            self._labels = torch.from_numpy(split.labels).to(device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from ``first_step`` on."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._split))
        batches = order[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)
        draws = self._draw(epoch)
        views = self._choose_views(epoch, batches, draws)
        mine = {name: draw[:, self._mine].to(self._device) for name, draw in draws.items()}
        batches = np.ascontiguousarray(batches[:, self._mine])
        seeds = np.random.default_rng([self._seed, epoch, 3 + self._rank]).integers(2**62, size=self.steps)
        indices = torch.from_numpy(batches)
        for step, (images, labels) in enumerate(self._gather(epoch, batches[first_step:]), start=first_step):
            yield Batch(
                self._augment(images, {name: draw[step] for name, draw in mine.items()}),
                labels,
                indices[step],
                None if views is None else views[step, self._mine],
                int(seeds[step]),
            )

    def view(self, view: int, batches: Index) -> Iterator[Tensor]:
        """The images at ``batches`` (n, B), all as their view number ``view``: n times (B, C, H, W)."""
        assert self.views is not None
        for indices, (images, _) in zip(batches, self._gather(0, batches), strict=True):
            numbers = torch.from_numpy(self.views.numbers(indices, np.full_like(indices, view)))
            draw = {name: one.to(self._device) for name, one in self.views.unpack(numbers).items()}
            yield self._augment(images, draw)

    def plain(self, batches: Index) -> Iterator[tuple[Tensor, Tensor]]:
        """The images at ``batches`` (n, B), normalised and not augmented (B, C, H, W), and their labels (B,)."""
        for images, labels in self._gather(0, batches):
            yield self._normalise(images).permute(0, 3, 1, 2), labels

    def _gather(self, epoch: int, batches: Index) -> Iterator[tuple[Tensor, Tensor]]:
        if self._resident is not None:
            if self._augmentation.resized_crop is not None:
                raise UserError(
                    "augmentation.resized_crop cuts parts from image files, and these images are in memory, at the "
                    "network's size already: load them with data.streaming=always, or use augmentation.crop_padding"
                )
            index = torch.from_numpy(batches).to(self._device)
            for rows in index:
                yield self._resident[rows], self._labels[rows]
            return
        for images, labels in self._decoded.decode(epoch, batches):
            yield (
                images.to(self._device, non_blocking=True),
                labels.to(self._device, non_blocking=True),
            )

    @cached_property
    def _decoded(self) -> DecodedBatches:
        assert isinstance(self._split.images, StreamedImages)
        scale = self._augmentation.resized_crop
        return DecodedBatches(
            self._split.images,
            self._split.labels,
            workers=self._workers,
            pin_memory=self._device.type == "cuda",
            crop=None if scale is None else ResizedCrop(scale, self._seed),
        )

    def _draw(self, epoch: int) -> dict[str, Tensor]:
        """All random numbers of an epoch at once, (steps, B): one transfer to the device instead of one a step."""
        generator = torch.Generator().manual_seed(
            int(np.random.default_rng([self._seed, epoch, 1]).integers(2**63))
        )
        height, width = self._split.images.shape[1:3]
        shape, padding = (self.steps, self.batch_size), self._augmentation.crop_padding
        limits = {
            "top": 2 * padding + 1,
            "left": 2 * padding + 1,
            "flip": 2,
            "hole_top": height,
            "hole_left": width,
        }
        return {name: torch.randint(limit, shape, generator=generator) for name, limit in limits.items()}

    def _choose_views(self, epoch: int, batches: Index, draws: dict[str, Tensor]) -> Tensor | None:
        """Which of its views each image is, (steps, B): one of a few, which replaces the draw, or that of the draw."""
        views = self.views
        if views is None:
            return None
        if views.count == views.all:
            return views.number(draws["top"], draws["left"], draws["flip"])
        choice = np.random.default_rng([self._seed, epoch, 2]).integers(views.count, size=batches.shape)
        draws |= views.unpack(torch.from_numpy(views.numbers(batches, choice)))
        return torch.from_numpy(choice)

    def _augment(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        batch, height, width, _ = images.shape
        rows = torch.arange(height, device=images.device).expand(batch, -1)
        columns = torch.arange(width, device=images.device).expand(batch, -1)
        if self._augmentation.flip:
            columns = torch.where(draw["flip"][:, None] == 1, width - 1 - columns, columns)
        padding = self._augmentation.crop_padding
        if padding:
            images = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
            rows = rows + draw["top"][:, None]
            columns = columns + draw["left"][:, None]
        if padding or self._augmentation.flip:
            # One gather does crop and flip.
            index = torch.arange(batch, device=images.device)[:, None, None]
            images = images[index, rows[:, :, None], columns[:, None, :]]
        x = self._normalise(images)
        if self._augmentation.cutout:
            x = x * self._cutout_mask(draw, height, width)
        # NHWC seen as NCHW is channels-last already: no copy.
        return x.permute(0, 3, 1, 2)

    def _normalise(self, images: Tensor) -> Tensor:
        return images.to(torch.float32) * self._scale + self._shift

    def _cutout_mask(self, draw: dict[str, Tensor], height: int, width: int) -> Tensor:
        side = self._augmentation.cutout
        rows = torch.arange(height, device=self._device) - draw["hole_top"][:, None] + side // 2
        columns = torch.arange(width, device=self._device) - draw["hole_left"][:, None] + side // 2
        inside_rows = (rows >= 0) & (rows < side)
        inside_columns = (columns >= 0) & (columns < side)
        return ~(inside_rows[:, :, None] & inside_columns[:, None, :])[..., None]
