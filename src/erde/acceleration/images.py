"""A stranger's images: which ones train the front, which choose and certify thresholds, and which only measure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erde.calibration.certificates import check_enough
from erde.calibration.labelled_images import TuneAndCertify, distinct_files, set_fingerprint
from erde.calibration.settings import Settings
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
# Of a folder of their own; test has the rest.
HELD_OUT_SHARES = {"tune": 0.25, "certify": 0.25}
# Images are held in memory: of more than this a random part is taken, of held-out ones at half of it.
MEMORY_BYTES = 4 * 2**30
# With fewer to train on, a front learns next to nothing.
FEWEST_IMAGES = 500


@dataclass(frozen=True)
class Pool:
    """Files of images without copies, and their labels (``UNKNOWN`` for all where there are none)."""

    paths: tuple[Path, ...]
    labels: Labels
    digests: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labelled(self) -> bool:
        """Whether its images have labels: all have, or none."""
        return bool(np.any(self.labels != UNKNOWN))

    @property
    def fingerprint(self) -> str:
        """A hash of the whole set."""
        return set_fingerprint(self.digests)

    def without(self, other: Pool) -> Pool:
        """The images that ``other`` does not have."""
        taken = set(other.digests)
        rows = [row for row, digest in enumerate(self.digests) if digest not in taken]
        return Pool(
            tuple(self.paths[row] for row in rows),
            self.labels[rows],
            tuple(self.digests[row] for row in rows),
        )

    def take(self, rows: NDArray[np.int64]) -> tuple[tuple[Path, ...], Labels]:
        """Files and labels at ``rows``, in their order."""
        return tuple(self.paths[row] for row in rows), self.labels[rows]


@dataclass(frozen=True)
class Material:
    """The images of an acceleration, uint8 (N, H, W, C): to train the front, to calibrate, to measure.

    All are in random order: the first of them, which are all that a trial or the clock sees, are of every class.
    """

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
    return Pool(tuple(by_digest.values()), labels, tuple(by_digest))


def load_material(
    pool: Pool, held_out: Pool | None, shape: tuple[int, int, int], seed: int, max_risk: float
) -> Material:
    """Split and decode the images; with ``held_out`` all others train.

    Raises:
        UserError: too few images for a front, or to certify ``max_risk``.
    """
    generator = np.random.default_rng(seed)
    if held_out is not None:
        others = pool.without(held_out)
        if len(others) < len(pool):
            progress.say(f"data: {len(pool) - len(others):,} images are held out too, and do not train")
        pool = others
    room = MEMORY_BYTES // int(np.prod(shape))
    parts: dict[str, tuple[tuple[Path, ...], Labels]] = {}
    if held_out is None:
        order = _some(generator, pool, room, "images")
        whole = len(order)
        for name, (share, most) in SHARES.items():
            size = min(most, round(share * whole))
            parts[name] = pool.take(order[:size])
            order = order[size:]
    else:
        if held_out.labelled != pool.labelled:
            # Train labels without labels to certify are of no use, and the other way round the model's answers do.
            pool = Pool(pool.paths, np.full(len(pool), UNKNOWN), pool.digests)
        whole = min(len(held_out), room // 2)
        order = _some(generator, pool, room - whole, "train images")
        left = _some(generator, held_out, whole, "held-out images")
        for name, share in HELD_OUT_SHARES.items():
            size = round(share * whole)
            parts[name] = held_out.take(left[:size])
            left = left[size:]
        parts["test"] = held_out.take(left)
    _check_enough(len(order), len(parts["certify"][0]), max_risk)
    train_paths, train_labels = pool.take(order)
    decoded = {name: decode(paths, shape) for name, (paths, _) in parts.items()}
    labels = {name: values for name, (_, values) in parts.items()}
    labelled = bool((labels["certify"] != UNKNOWN).all())
    fingerprint = (pool if held_out is None else held_out).fingerprint
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
        fingerprint=hashlib.sha256(f"{pool.fingerprint} {fingerprint} {seed}".encode()).hexdigest(),
    )


def _some(generator: np.random.Generator, pool: Pool, most: int, images: str) -> NDArray[np.int64]:
    """Rows of ``pool`` in random order, ``most`` of them at most."""
    order = generator.permutation(len(pool))
    if len(order) > most:
        progress.say(f"data: {most:,} of {len(order):,} {images}, at random: more do not fit into memory")
    return order[:most]


def _check_enough(train: int, certify: int, max_risk: float) -> None:
    """Refuse what hours of training could not help."""
    if train < FEWEST_IMAGES:
        raise UserError(
            f"{train:,} images to train on: a front needs {FEWEST_IMAGES:,} or more, and gets better with tens of thousands; "
            "no labels are needed"
        )
    check_enough(certify, [max_risk], Settings().confidence)


def decode(paths: Sequence[Path], shape: tuple[int, int, int]) -> Pixels:
    """The images as the chain takes them, uint8 (N, H, W, C)."""
    images = np.empty((len(paths), *shape), dtype=np.uint8)

    def fill(row: int) -> None:
        images[row] = load_image(paths[row], shape)

    # Files of one folder lie one behind another on many disks: they are read so, whatever the order of the images.
    rows = sorted(range(len(paths)), key=paths.__getitem__)
    # Pillow decodes without the interpreter lock.
    with ThreadPoolExecutor(available_cpus()) as threads:
        list(threads.map(fill, rows, chunksize=64))
    return images
