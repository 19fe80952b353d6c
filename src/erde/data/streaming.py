"""Batches of encoded images, decoded ahead of the training by DataLoader worker processes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from erde.common.errors import UserError
from erde.common.splits import Images, Labels
from erde.data.encoded import Index, ResizedCrop, StreamedImages

# Batches that each worker decodes ahead: enough to ride out a slow batch, few enough to be no burden.
PREFETCH = 2
# Seconds to wait for a batch, far beyond what the largest takes to decode: a worker that is stuck must not stop a training
# for good without a word.
PATIENCE = 600
_KILLED = (
    "a process that decodes images was killed, most likely because memory or /dev/shm is full: lower data.workers or "
    "train.batch_size, or decode without processes: data.workers=0"
)


class _Batches(Dataset[Any]):
    """Maps (epoch, positions) of a batch, in a worker, to its images and labels, or to the text of an error."""

    def __init__(self, images: StreamedImages, labels: Labels, crop: ResizedCrop | None) -> None:
        self.images, self.labels, self.crop = images, labels, crop

    def __getitem__(self, batch: tuple[int, Index]) -> tuple[Images, Labels] | str:
        epoch, index = batch
        try:
            return self.images.decode(index, self.crop, epoch), self.labels[index]
        except UserError as error:
            # A DataLoader would raise it anew with the worker's traceback for a message.
            return str(error)


class DecodedBatches:
    """Decodes batches in the order given, on ``workers`` processes that stay from epoch to epoch.

    Images and order do not depend on the number of workers, which may be 0; torch's own random numbers are left
    alone. At most ``workers * PREFETCH`` decoded batches wait in memory.
    """

    def __init__(
        self,
        images: StreamedImages,
        labels: Labels,
        *,
        workers: int,
        pin_memory: bool,
        crop: ResizedCrop | None = None,
    ) -> None:
        self._plan: list[tuple[int, Index]] = []
        self._pass = 0
        self._holder: weakref.finalize[[Any], DecodedBatches] | None = None
        self._loader: DataLoader[Any] = DataLoader(
            _Batches(images, labels, crop),
            sampler=self._plan,  # whole batches of positions; read anew by each pass
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            timeout=PATIENCE if workers else 0,
            # Its own generator: the loader's seed must not be drawn from the one that dropout uses.
            generator=torch.Generator(),
            pin_memory=pin_memory,
        )

    def decode(self, epoch: int, batches: Index) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, uint8 (B, H, W, C), and labels (B,), of each row of positions in ``batches`` (steps, B).

        A new pass ends the one before it. Random parts are those of ``epoch``.

        Raises:
            UserError: an image that cannot be read; a worker that was killed or does not answer.
        """
        self._pass += 1
        current = self._pass
        self._plan[:] = [(epoch, rows) for rows in batches]
        for result in self._results():
            assert current == self._pass, "an older pass goes on after a newer one began"
            if isinstance(result, str):
                raise UserError(result)
            images, labels = result
            yield torch.as_tensor(images), torch.as_tensor(labels)
        assert current == self._pass, "an older pass goes on after a newer one began"

    def _results(self) -> Iterator[Any]:
        try:
            iterator = iter(self._loader)
            if self._holder is None:
                # An error's traceback can put the iterator into a reference cycle. Collecting that cycle may free
                # the queues that stop the workers before the iterator, which would then wait for each worker in
                # vain. This reference from outside keeps the iterator out of the cycle's collection.
                self._holder = weakref.finalize(self, _do_nothing, iterator)
                self._holder.atexit = False
            yield from iterator
        except RuntimeError as error:
            explain_killed_worker(error)
            text = str(error)
            if "exited unexpectedly" in text or "shared memory" in text or "shm" in text:
                raise UserError(_KILLED) from error
            if "timed out" in text:
                raise UserError(
                    f"no process that decodes images has answered for {PATIENCE} seconds: continue the training, with more "
                    "time for this process, or without processes: data.workers=0"
                ) from error
            raise


def explain_killed_worker(error: RuntimeError) -> None:
    """Raise a :class:`UserError` if torch says that a worker was killed, which it does wherever the main thread is."""
    if "DataLoader worker (pid" in str(error):
        raise UserError(_KILLED) from error


def _do_nothing(iterator: Any) -> None:
    """Hold ``iterator`` until called."""
