"""A stranger's images: which ones train the front, which choose and certify thresholds, and which only measure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erde.calibration.labelled_images import TuneAndCertify, distinct_files, set_fingerprint
from erde.chains.cascading import Images, is_labelled
from erde.common import progress
from erde.common.environment import available_cpus
from erde.common.errors import UserError
from erde.common.images import SUFFIXES, load_image
from erde.common.splits import CertifySplit, Labels, TestSplit, TuneSplit
from erde.common.splits import Images as Pixels

# No label is known.
UNKNOWN = -1
# Of the images, where there is no other folder for them; and at most so many.
SHARES = {"tune": (0.15, 2500), "certify": (0.15, 2500), "test": (0.1, 5000)}
# Of a folder of their own.
HELD_OUT_SHARES = {"tune": 0.25, "certify": 0.25}
# Images are held in memory: of more than this a random part is taken.
MEMORY_BYTES = 4 * 2**30
# With fewer a front learns next to nothing, and a promise of 1 % needs 230 certify images.
FEWEST_IMAGES = 1000


@dataclass(frozen=True)
class Pool:
    """Files of images without copies, and their labels (``UNKNOWN`` for all where there are none)."""

    paths: tuple[Path, ...]
    labels: Labels
    digest: str

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: NDArray[np.int64]) -> tuple[tuple[Path, ...], Labels]:
        """Files and labels at ``rows``."""
        return tuple(self.paths[row] for row in rows), self.labels[rows]


@dataclass(frozen=True)
class Material:
    """The images of an acceleration, uint8 (N, H, W, C): to train the front, to calibrate, to measure."""

    train: Pixels
    train_labels: Labels
    calibration: Images
    test: TestSplit
    fingerprint: str


def read_pool(folder: Path, classes: Sequence[str]) -> Pool:
    """The images below ``folder``; labelled where most of its sub-folders are named by ``classes``."""
    labelled = is_labelled(folder, classes)
    by_digest, _ = distinct_files(folder)
    if not by_digest:
        raise UserError(f"no image below {folder}: expected files ending in {', '.join(SUFFIXES)}")
    labels = np.full(len(by_digest), UNKNOWN)
    for row, path in enumerate(by_digest.values() if labelled else ()):
        name = path.relative_to(folder).parts[0]
        if name not in classes:
            raise UserError(
                f"{path} is in no folder of a class: the folders of {folder} give the labels; move it"
            )
        labels[row] = classes.index(name)
    return Pool(tuple(by_digest.values()), labels, set_fingerprint(by_digest))


def load_material(pool: Pool, held_out: Pool | None, shape: tuple[int, int, int], seed: int) -> Material:
    """Split and decode the images; with ``held_out`` all of ``pool`` trains.

    Raises:
        UserError: too few images, or images with labels on one side only.
    """
    generator = np.random.default_rng(seed)
    whole = len(pool) + (0 if held_out is None else len(held_out))
    if whole < FEWEST_IMAGES:
        raise UserError(
            f"{whole:,} images: a front needs {FEWEST_IMAGES:,} or more to learn from and to be certified on, and gets better "
            "with tens of thousands; no labels are needed"
        )
    order = generator.permutation(len(pool))
    parts: dict[str, tuple[tuple[Path, ...], Labels]] = {}
    if held_out is None:
        for name, (share, most) in SHARES.items():
            size = min(most, round(share * len(pool)))
            parts[name] = pool.take(np.sort(order[:size]))
            order = order[size:]
    else:
        if (held_out.labels[0] == UNKNOWN) != (pool.labels[0] == UNKNOWN):
            # Train labels without labels to certify are of no use, and the other way round the model's answers do.
            pool = Pool(pool.paths, np.full(len(pool), UNKNOWN), pool.digest)
        others = generator.permutation(len(held_out))
        for name, share in HELD_OUT_SHARES.items():
            size = round(share * len(held_out))
            parts[name] = held_out.take(np.sort(others[:size]))
            others = others[size:]
        parts["test"] = held_out.take(np.sort(others))
    room = MEMORY_BYTES // int(np.prod(shape)) - sum(len(paths) for paths, _ in parts.values())
    if len(order) > room:
        progress.say(f"data: {room:,} of {len(order):,} train images, at random: more do not fit into memory")
        order = order[: max(room, 0)]
    train_paths, train_labels = pool.take(np.sort(order))
    decoded = {name: decode(paths, shape) for name, (paths, _) in parts.items()}
    labels = {name: values for name, (_, values) in parts.items()}
    labelled = bool((labels["certify"] != UNKNOWN).all())
    fingerprint = pool.digest if held_out is None else held_out.digest
    progress.say(
        f"data: {len(train_paths):,} images to train, {len(labels['tune']):,} to tune, {len(labels['certify']):,} to "
        f"certify, {len(labels['test']):,} to measure, {'with' if labelled else 'without'} labels"
    )
    splits = TuneAndCertify(
        TuneSplit(decoded["tune"], labels["tune"]),
        CertifySplit(decoded["certify"], labels["certify"]),
        0,
        fingerprint,
    )
    return Material(
        train=decode(train_paths, shape),
        train_labels=train_labels,
        calibration=Images(splits, labelled),
        test=TestSplit(decoded["test"], labels["test"]),
        fingerprint=hashlib.sha256(f"{pool.digest} {fingerprint} {seed}".encode()).hexdigest(),
    )


def decode(paths: Sequence[Path], shape: tuple[int, int, int]) -> Pixels:
    """The images as the chain takes them, uint8 (N, H, W, C)."""
    images = np.empty((len(paths), *shape), dtype=np.uint8)

    def fill(row: int) -> None:
        images[row] = load_image(paths[row], shape)

    # Pillow decodes without the interpreter lock.
    with ThreadPoolExecutor(available_cpus()) as threads:
        list(threads.map(fill, range(len(paths)), chunksize=64))
    return images
