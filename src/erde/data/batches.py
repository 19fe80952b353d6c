"""The train split as batches that are on the device, augmented."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from erde.common.errors import UserError
from erde.common.splits import TrainSplit
from erde.data.encoded import Index, ResizedCrop, StreamedImages
from erde.data.normalise import Normalise
from erde.data.streaming import DecodedBatches
from erde.data.views import Views
from erde.recipe.schema import AugmentationConfig


class Batch(NamedTuple):
    """One step's images, as the network takes them, and the rest of its input."""

    images: Tensor  # float32 (B, C, H, W), in channels-last order, on the device
    labels: Tensor  # int64 (B,), on the device
    indices: Tensor  # int64 (B,), positions in the train split, on the host
    views: Tensor | None  # int64 (B,), the number of each image's view, on the host; see views.py
    seed: int  # for random numbers within the step: dropout


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
        self._part = slice(share[0] * part, (share[0] + 1) * part)
        self._rank = share[0]
        self._split, self._seed, self._augmentation, self._workers = split, seed, augmentation, workers
        self._device = device
        self._normalise = Normalise(mean, std, device)
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
        own_draws = {name: draw[:, self._part].to(self._device) for name, draw in draws.items()}
        batches = np.ascontiguousarray(batches[:, self._part])
        seeds = np.random.default_rng([self._seed, epoch, 3 + self._rank]).integers(2**62, size=self.steps)
        indices = torch.from_numpy(batches)
        for step, (images, labels) in enumerate(self._gather(epoch, batches[first_step:]), start=first_step):
            yield Batch(
                self._augment(images, {name: draw[step] for name, draw in own_draws.items()}),
                labels,
                indices[step],
                None if views is None else views[step, self._part],
                int(seeds[step]),
            )

    def view(self, view: int, batches: Index) -> Iterator[Tensor]:
        """The images at ``batches`` (n, B), all as their view number ``view``: n times (B, C, H, W)."""
        assert self.views is not None
        for indices, (images, _) in zip(batches, self._gather(0, batches), strict=True):
            numbers = torch.from_numpy(self.views.numbers(indices, np.full_like(indices, view)))
            draw = {name: values.to(self._device) for name, values in self.views.unpack(numbers).items()}
            yield self._augment(images, draw)

    def plain(self, batches: Index) -> Iterator[tuple[Tensor, Tensor]]:
        """The images at ``batches`` (n, B), normalised and not augmented (B, C, H, W), and their labels (B,)."""
        whole = self._gather(0, batches)
        if self._augmentation.resized_crop is not None:
            # What is decoded for training are parts.
            split, device = self._split, self._device
            whole = (
                (
                    torch.from_numpy(split.images[rows]).to(device),
                    torch.from_numpy(split.labels[rows]).to(device),
                )
                for rows in batches
            )
        for images, labels in whole:
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
        """The number of each image's view, (steps, B); with a limit on views it is chosen here and replaces the draw."""
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

    def _cutout_mask(self, draw: dict[str, Tensor], height: int, width: int) -> Tensor:
        side = self._augmentation.cutout
        rows = torch.arange(height, device=self._device) - draw["hole_top"][:, None] + side // 2
        columns = torch.arange(width, device=self._device) - draw["hole_left"][:, None] + side // 2
        inside_rows = (rows >= 0) & (rows < side)
        inside_columns = (columns >= 0) & (columns < side)
        return ~(inside_rows[:, :, None] & inside_columns[:, None, :])[..., None]
