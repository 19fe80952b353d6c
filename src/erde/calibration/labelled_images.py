"""An operator's own labelled images, a folder per class, as tune and certify splits. No torch.

Images are decoded batch by batch: the folder may be larger than memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erde.common import progress
from erde.common.errors import UserError, check_seed, listed, nearest
from erde.common.images import SUFFIXES, load_image, read_file
from erde.common.splits import CertifySplit, Images, Labels, TuneSplit


@dataclass(frozen=True)
class ImageFiles:
    """Image files as an :class:`erde.common.splits.ImageSource`: decoded when they are asked for."""

    paths: tuple[Path, ...]
    image_shape: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self.paths), *self.image_shape)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: NDArray[np.int64] | slice, /) -> Images:
        chosen = self.paths[index] if isinstance(index, slice) else [self.paths[row] for row in index]
        images = [load_image(path, self.image_shape) for path in chosen]
        return np.stack(images) if images else np.zeros((0, *self.image_shape), dtype=np.uint8)


@dataclass(frozen=True)
class TuneAndCertify:
    """Labelled images in two parts, how many files were left out as copies, and a hash of the whole set."""

    tune: TuneSplit
    certify: CertifySplit
    copies: int
    fingerprint: str


@dataclass(frozen=True)
class Unlabelled:
    """Images without labels in two parts: the certify files' names and hashes, and those of all by name."""

    tune: ImageFiles
    certify: ImageFiles
    certify_names: tuple[str, ...]
    digests: dict[str, str]
    copies: int
    fingerprint: str

    def without_labels(self) -> TuneAndCertify:
        """The same as splits, for a calibration that looks at no label: every label is -1."""
        tune, certify = (np.full(len(part), -1) for part in (self.tune, self.certify))
        return TuneAndCertify(
            TuneSplit(self.tune, tune), CertifySplit(self.certify, certify), self.copies, self.fingerprint
        )


def say_sizes(images: TuneAndCertify | Unlabelled, kind: str = "") -> None:
    """Print how many images tune and certify; ``kind`` says more about them."""
    copies = f"; {images.copies:,} copies left out" if images.copies else ""
    progress.say(
        f"data: {len(images.tune):,} images to tune, {len(images.certify):,} to certify{kind}{copies}"
    )


def load_unlabelled(
    folder: Path, shape: tuple[int, int, int], tune_share: float = 0.5, seed: int = 0
) -> Unlabelled:
    """The images below ``folder`` at any depth, split at random by seed; a copy of a file counts once.

    Raises:
        UserError: no such folder, fewer than two images.
    """
    _check_split(tune_share, seed)
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}: expected images")
    by_digest, copies = distinct_files(folder)
    if len(by_digest) < 2:
        raise UserError(
            f"{len(by_digest)} images below {folder}: calibration needs two or more, to tune and to certify"
        )
    # In the order of the hashes: a renamed file stays on its side.
    files = sorted(by_digest.items())
    order = np.random.default_rng(seed).permutation(len(files))
    size = max(1, min(len(files) - 1, round(tune_share * len(files))))
    names = [path.relative_to(folder).as_posix() for _, path in files]
    tune, certify = (tuple(int(row) for row in np.sort(part)) for part in (order[:size], order[size:]))
    return Unlabelled(
        ImageFiles(tuple(files[row][1] for row in tune), shape),
        ImageFiles(tuple(files[row][1] for row in certify), shape),
        tuple(names[row] for row in certify),
        {name: digest.hex() for name, (digest, _) in zip(names, files, strict=True)},
        copies,
        set_fingerprint(by_digest),
    )


def distinct_files(folder: Path) -> tuple[dict[bytes, Path], int]:
    """SHA-256 to file of the images below ``folder``, in the order of their paths, and the number of copies."""
    by_digest: dict[bytes, Path] = {}
    copies = 0
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            digest = _digest(path)
            copies += digest in by_digest
            by_digest.setdefault(digest, path)
    return by_digest, copies


def _digest(path: Path) -> bytes:
    return hashlib.sha256(read_file(path)).digest()


def set_fingerprint(digests: Iterable[bytes]) -> str:
    """A hash of a set of files, whatever their names."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _check_split(tune_share: float, seed: int) -> None:
    check_seed(seed)
    if not 0 < tune_share < 1:
        raise UserError(f"the tune share must lie between 0 and 1 (0 % and 100 %), got {tune_share:g}")


def halves(labels: Labels, tune_share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a stratified random split in two: per class ``tune_share`` of the images, rounded up or down at random.

    On average each class gives its share to both parts, however rare it is: a part that rare classes are missing
    from would make the certificate lean one way.
    """
    _check_split(tune_share, seed)
    generator = np.random.default_rng(seed)
    tune, certify = [], []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        # floor(share * n + U) has the mean share * n.
        size = int(np.floor(tune_share * len(rows) + generator.random()))
        tune.append(rows[:size])
        certify.append(rows[size:])
    return np.sort(np.concatenate(tune)), np.sort(np.concatenate(certify))


def load_tune_and_certify(
    folder: Path, classes: list[str], shape: tuple[int, int, int], tune_share: float = 0.5, seed: int = 0
) -> TuneAndCertify:
    """The images below ``folder``, one sub-folder per class of ``classes``, split by seed and stratified.

    A file with the same bytes as another counts once: a copy on the other side would make the certificate lie.

    Raises:
        UserError: no such folder, a sub-folder that is no class, fewer than two images.
    """
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}: expected labelled images, a sub-folder per class")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"{folder} has no sub-folders: expected one per class, such as {folder / classes[0]}")
    for class_folder in folders:
        name = class_folder.name
        if name not in classes:
            raise UserError(
                f"{class_folder} is not a class of this bundle{nearest(name, classes)}; its classes are: {listed(classes)}"
            )
    paths, labels, copies = [], [], 0
    seen: dict[bytes, Path] = {}
    for class_folder in folders:
        for path in sorted(class_folder.rglob("*")):
            if path.suffix.lower() not in SUFFIXES or path.is_dir():
                continue
            digest = _digest(path)
            if digest in seen:
                if seen[digest].relative_to(folder).parts[0] != class_folder.name:
                    raise UserError(
                        f"{path} and {seen[digest]} are the same image in two classes: keep one of them"
                    )
                copies += 1
                continue
            seen[digest] = path
            paths.append(path)
            labels.append(classes.index(class_folder.name))
    all_labels = np.asarray(labels, dtype=np.int64)
    if len(all_labels) < 2:
        raise UserError(
            f"{len(all_labels)} image{'s' * (len(all_labels) != 1)} below {folder}: calibration needs two or more, to tune "
            "and to certify"
        )
    tune, certify = halves(all_labels, tune_share, seed)

    def files(rows: NDArray[np.int64]) -> ImageFiles:
        return ImageFiles(tuple(paths[row] for row in rows), shape)

    return TuneAndCertify(
        TuneSplit(files(tune), all_labels[tune]),
        CertifySplit(files(certify), all_labels[certify]),
        copies,
        set_fingerprint(seen),
    )
