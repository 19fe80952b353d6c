"""The four splits as four types, for images and for logits: a type checker tells them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


class ImageSource(Protocol):
    """Images that need not fit in memory; an array of shape (N, H, W, C) qualifies."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: NDArray[np.int64] | slice, /) -> Images: ...


@runtime_checkable
class EncodedSource(ImageSource, Protocol):
    """Images with a hash that needs no decoding."""

    def encoded_digest(self) -> bytes:
        """A hash of the images as they are stored."""


@dataclass(frozen=True)
class Split:
    """Images, uint8 (N, H, W, C), and their labels, int64 (N,). Use one of the four subclasses."""

    images: ImageSource
    labels: Labels
    name: ClassVar[str] = "split"

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[Images]:
        """The images in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.images[start : start + size]

    def fingerprint(self) -> str:
        """SHA-256 over shape, labels and pixels, in order: equal only for equal splits."""
        # Streamed images never change, so their hash is cached; an array may change.
        return self._pixels_hash() if isinstance(self.images, np.ndarray) else self._decoded_hash

    @cached_property
    def _decoded_hash(self) -> str:
        return self._pixels_hash()

    def _pixels_hash(self) -> str:
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
        for batch in self.batches(1024):
            digest.update(np.ascontiguousarray(batch).tobytes())
        return digest.hexdigest()


class TrainSplit(Split):
    """Images that networks are trained on; int8 ranges come from here too.

    The fingerprint of streamed images covers their encoded form (``StreamedImages.encoded_digest``).
    """

    name = "train"

    def decoded_fingerprint(self) -> str:
        """The fingerprint of the same images in memory; streamed ones are decoded for it."""
        return self._pixels_hash()

    @cached_property
    def _decoded_hash(self) -> str:
        # Training images may be millions: hashed as they are stored, not decoded.
        if not isinstance(self.images, EncodedSource):
            return self._pixels_hash()
        digest = hashlib.sha256(repr(("encoded", *self.images.shape)).encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
        digest.update(self.images.encoded_digest())
        return digest.hexdigest()


class TuneSplit(Split):
    """Images for everything that is fitted or chosen after training: temperatures, scores, thresholds."""

    name = "tune"


class CertifySplit(Split):
    """Images that are used once per artifact, after everything else is fixed."""

    name = "certify"


class TestSplit(Split):
    """Images for the evaluation only."""

    name = "test"
    __test__ = False  # not a pytest class


@dataclass(frozen=True)
class Logits:
    """Raw logits, float32 (E, N, K), of the exported stages, with labels, int64 (N,)."""

    logits: NDArray[np.float32]
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """SHA-256 over shape, labels and logits, in order."""
        digest = hashlib.sha256(repr(self.logits.shape).encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(self.logits, dtype="<f4").tobytes())
        return digest.hexdigest()


class TuneLogits(Logits):
    """Logits on the tune split."""


class CertifyLogits(Logits):
    """Logits on the certify split."""


class TestLogits(Logits):
    """Logits on the test split."""

    __test__ = False
