"""Copies of an image in more than one split: a copy seen in training must not count as unseen when certifying."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from erde.common.splits import ImageSource
from erde.data.encoded import Index, StreamedImages


def image_numbers(parts: Sequence[ImageSource]) -> list[Index]:
    """A number for every image of ``parts``; copies of an image share a number.

    Images in memory are copies if their pixels agree, streamed images if their encoded bytes agree; a streamed and a
    resident image never are. Streamed images that are only in the first part, train, are not compared with each other:
    there may be millions. Copies within that part may get different numbers then.
    """
    numbers: list[Index] = [np.empty(0, np.int64)] * len(parts)
    first = 0
    for streamed in (False, True):
        positions = [
            index for index, part in enumerate(parts) if isinstance(part, StreamedImages) == streamed
        ]
        sources = [parts[index] for index in positions]
        if not sources:
            continue
        joined = _by_bytes(sources, positions[0] == 0) if streamed else _by_pixels(sources)
        ends = np.cumsum([len(source) for source in sources])[:-1]
        for index, own in zip(positions, np.split(joined + first, ends), strict=True):
            numbers[index] = own
        first += int(joined.max(initial=0)) + 1
    return numbers


def _by_pixels(parts: Sequence[ImageSource]) -> Index:
    return _numbered(
        hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        for part in parts
        for image in part[:]  # an array: no copy
    )


def _by_bytes(parts: Sequence[ImageSource], has_train: bool) -> Index:
    """Compare encoded sizes, then a piece of images of equal size, then all bytes of images that still agree."""
    streamed = [part for part in parts if isinstance(part, StreamedImages)]
    numbers = _numbered(np.concatenate([part.encoded_lengths for part in streamed]).tolist())
    starts = np.cumsum([0, *(len(part) for part in streamed)])
    held_out = np.arange(len(numbers)) >= (starts[1] if has_train else 0)
    for entire in (False, True):
        counts = np.bincount(numbers)
        asked_about = np.zeros(len(counts), dtype=bool)
        asked_about[numbers[held_out]] = True
        alike = np.flatnonzero((counts[numbers] > 1) & asked_about[numbers])
        keys: list[Hashable] = []
        for start, part in zip(starts, streamed, strict=False):
            rows = alike[(alike >= start) & (alike < start + len(part))]
            keys += zip(numbers[rows].tolist(), part.encoded_hashes(rows - start, entire), strict=True)
        numbers = np.arange(len(numbers)) + len(keys)
        numbers[alike] = _numbered(keys)
    return numbers


def _numbered(keys: Iterable[Hashable]) -> Index:
    seen: dict[Hashable, int] = {}
    return np.asarray([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def separate(parts: Sequence[ImageSource], train_was_seen: bool = False) -> list[Index]:
    """Positions of the images of train, tune, certify and test that stay, so that none was seen before it is held out.

    The split that is used later keeps the image: train loses images that another split has, tune those that certify
    or test has, certify its own repetitions (each image is to be one draw). Test stays as it is. If weights from elsewhere
    have seen all of train, train stays as it is, and the others lose its images.
    """
    train, tune, certify, test = image_numbers(parts)
    first = np.zeros(len(certify), dtype=bool)
    first[np.unique(certify, return_index=True)[1]] = True
    seen = train if train_was_seen else train[:0]
    keep = (
        train_was_seen | ~np.isin(train, np.concatenate([tune, certify, test])),
        ~np.isin(tune, np.concatenate([seen, certify, test])),
        first & ~np.isin(certify, seen),
        ~np.isin(test, seen),
    )
    return [np.flatnonzero(mask) for mask in keep]
