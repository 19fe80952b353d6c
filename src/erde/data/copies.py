"""The same image in more than one split: seen while training, and asked about again when something is certified."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from erde.common.splits import ImageSource
from erde.data.encoded import Index, StreamedImages


def image_numbers(parts: Sequence[ImageSource]) -> list[Index]:
    """A number for every image of ``parts``; images have the same one where they are the same.

    Images in memory are the same where their pixels are, streamed ones where their encoded bytes are; a streamed and a
    resident image count as two. Streamed images that are only in the first part, train, are not looked into: there may
    be millions. Copies within that part may get different numbers then.
    """
    numbers: list[Index] = [np.empty(0, np.int64)] * len(parts)
    first = 0
    for streamed in (False, True):
        places = [place for place, one in enumerate(parts) if isinstance(one, StreamedImages) == streamed]
        some = [parts[place] for place in places]
        if not some:
            continue
        found = _by_bytes(some, places[0] == 0) if streamed else _by_pixels(some)
        ends = np.cumsum([len(one) for one in some])[:-1]
        for place, one in zip(places, np.split(found + first, ends), strict=True):
            numbers[place] = one
        first += int(found.max(initial=0)) + 1
    return numbers


def _by_pixels(parts: Sequence[ImageSource]) -> Index:
    return _numbered(
        hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        for part in parts
        for image in part[:]  # an array: no copy
    )


def _by_bytes(parts: Sequence[ImageSource], has_train: bool) -> Index:
    """By encoded size, then by a piece of those of the same size, then by all bytes of those that still agree."""
    streamed = [one for one in parts if isinstance(one, StreamedImages)]
    numbers = _numbered(np.concatenate([one.encoded_lengths for one in streamed]).tolist())
    starts = np.cumsum([0, *(len(one) for one in streamed)])
    held_out = np.arange(len(numbers)) >= (starts[1] if has_train else 0)
    for whole in (False, True):
        counts = np.bincount(numbers)
        asked_about = np.zeros(len(counts), dtype=bool)
        asked_about[numbers[held_out]] = True
        alike = np.flatnonzero((counts[numbers] > 1) & asked_about[numbers])
        keys: list[Hashable] = []
        for start, part in zip(starts, streamed, strict=False):
            rows = alike[(alike >= start) & (alike < start + len(part))]
            keys += zip(numbers[rows].tolist(), part.encoded_hashes(rows - start, whole), strict=True)
        numbers = np.arange(len(numbers)) + len(keys)
        numbers[alike] = _numbered(keys)
    return numbers


def _numbered(keys: Iterable[Hashable]) -> Index:
    seen: dict[Hashable, int] = {}
    return np.asarray([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def apart(parts: Sequence[ImageSource]) -> list[Index]:
    """Positions of the images of train, tune, certify and test that stay, so that no copy stands on two sides.

    The later a split is looked at, the more its images count: train gives up what is in another split, tune what is
    in certify or test, certify what is in it twice (each image is to be one draw). Test stays as it is.
    """
    train, tune, certify, test = image_numbers(parts)
    first = np.zeros(len(certify), dtype=bool)
    first[np.unique(certify, return_index=True)[1]] = True
    keep = (
        ~np.isin(train, np.concatenate([tune, certify, test])),
        ~np.isin(tune, np.concatenate([certify, test])),
        first,
        np.ones(len(test), dtype=bool),
    )
    return [np.flatnonzero(one) for one in keep]
