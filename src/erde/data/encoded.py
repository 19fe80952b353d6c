"""Encoded images of a table: decoded when asked for, so that the set need not fit in memory.

The pixels of an image are a function of its bytes alone; with a :class:`ResizedCrop` of seed, epoch and
position too, never of who decodes it or when.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from erde.common.environment import available_cpus
from erde.common.errors import UserError
from erde.common.images import UnreadableError, converted, open_image, read_file, to_array, upright_size
from erde.common.splits import Images

Index = NDArray[np.int64]
# (left, top, right, bottom) in pixels; right and bottom lie outside.
Box = tuple[float, float, float, float]

# Images of a streamed train split whose bytes go into its fingerprint; of all others name and size do.
CONTENT_IMAGES = 4096
# Images that a thread decodes at a time.
_CHUNK = 16


@dataclass(frozen=True)
class ResizedCrop:
    """A random part of the image, resized to the network's input (Szegedy et al. 2014, arXiv 1409.4842, section 6).

    The part's area is a uniform share of the image's, within ``scale``; its width over its height is log-uniform
    from 3/4 to 4/3; its place is uniform. A part that does not fit is drawn anew, ten times; then the largest
    central part with a permitted shape is taken.
    """

    scale: tuple[float, float]
    seed: int

    def box(self, epoch: int, position: int, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the part: a function of seed, epoch and the image's place in train."""
        # The last number keeps this apart from the other draws of an epoch (batches.py), which have none there.
        generator = np.random.default_rng([self.seed, epoch, position, 1])
        for _ in range(10):
            area = width * height * generator.uniform(*self.scale)
            ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high <= height:
                left = int(generator.integers(width - wide + 1))
                top = int(generator.integers(height - high + 1))
                return left, top, left + wide, top + high
        wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - wide) // 2, (height - high) // 2
        return left, top, left + wide, top + high


class StreamedImages:
    """Rows of a ``datasets`` table, decoded when asked for: for sets that do not fit in memory."""

    def __init__(
        self, table: Any, column: str, where: str, rows: Index, shape: tuple[int, int, int], same_size: bool
    ) -> None:
        self._table, self._column, self._where, self._rows = table, column, where, rows
        self._image_shape, self._same_size = shape, same_size

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self._rows), *self._image_shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Index | slice) -> Images:
        if isinstance(index, slice):
            index = np.arange(len(self))[index]
        return self.decode(index, threads=available_cpus())

    def decode(
        self, index: Index, crop: ResizedCrop | None = None, epoch: int = 0, threads: int = 1
    ) -> Images:
        """The images at ``index``, uint8 (B, H, W, C); with ``crop`` as ``epoch`` of a training sees them.

        Raises:
            UserError: an image that is no image, or not like the others; it names data set, split, row and file.
        """
        rows = self._rows[index].tolist()
        encoded = self._table[rows][self._column] if rows else []
        images = np.empty((len(rows), *self._image_shape), dtype=np.uint8)

        def fill(start: int) -> None:
            for place in range(start, min(start + _CHUNK, len(rows))):
                draw = None
                if crop is not None:
                    draw = partial(crop.box, epoch, int(index[place]))
                where = f"{self._where}, row {rows[place]}"
                images[place] = pixels(encoded[place], where, self._image_shape, self._same_size, draw)

        chunks = range(0, len(rows), _CHUNK)
        if threads == 1 or len(chunks) < 2:
            for start in chunks:
                fill(start)
        else:
            # Pillow decodes without the interpreter lock.
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, chunks))
        return images

    def part(self, rows: Index) -> StreamedImages:
        """The images at ``rows`` of these."""
        return StreamedImages(
            self._table, self._column, self._where, self._rows[rows], self._image_shape, self._same_size
        )

    @cached_property
    def encoded_lengths(self) -> Index:
        """Bytes of each image as it is stored; offsets and file sizes are read, no image."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = arrow_column(self._table, self._column)
        # Lengths come from offsets: the bytes themselves stay on the disk.
        lengths = pc.fill_null(pc.binary_length(pc.struct_field(column, "bytes")), -1).to_numpy()
        sizes: Index = lengths.astype(np.int64)[self._rows]
        files = np.flatnonzero(sizes < 0)
        names = pc.struct_field(column, "path").take(pa.array(self._rows[files])).to_pylist()
        for place, row, name in zip(files.tolist(), self._rows[files].tolist(), names, strict=True):
            if name is not None:
                sizes[place] = self._size_on_disk(row, name)
        return sizes

    def encoded_hashes(self, index: Index, entire: bool) -> list[bytes]:
        """A hash of each image as it is stored; unless ``entire``, a file is hashed by a piece of its middle."""
        hashes = []
        for start in range(0, len(index), 1024):
            rows = self._rows[index[start : start + 1024]].tolist()
            for row, value in zip(rows, self._table[rows][self._column], strict=True):
                try:
                    content = self._middle(row, value) if not entire else None
                    content = content or encoded_bytes(value, f"{self._where}, row {row}")[0]
                except UnreadableError:  # decoding it will report it
                    content = str(row).encode()
                hashes.append(hashlib.blake2b(content, digest_size=16).digest())
        return hashes

    def _middle(self, row: int, value: Any) -> bytes | None:
        """4 KiB from the middle of a file; None where the image is no file."""
        if value is None or value["bytes"] is not None or value["path"] is None:
            return None
        try:
            with open(value["path"], "rb") as file:
                file.seek(os.fstat(file.fileno()).st_size // 2)
                return file.read(4096)
        except OSError as error:
            raise UnreadableError(f"{self._where}, row {row} cannot be read: {error.strerror}") from error

    def encoded_digest(self) -> bytes:
        """SHA-256 over name and encoded size of every image, and the bytes of ``CONTENT_IMAGES`` evenly spaced ones.

        Decodes nothing and reads little: a million images take seconds. A change that keeps name and size
        of an image that is not among the evenly spaced ones goes unnoticed.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        paths = pc.struct_field(arrow_column(self._table, self._column), "path")
        digest = hashlib.sha256()
        for start in range(0, len(self), 65_536):
            part = slice(start, start + 65_536)
            names = paths.take(pa.array(self._rows[part])).to_pylist()
            for name, length in zip(names, self.encoded_lengths[part].tolist(), strict=True):
                # The set may be moved: only the class's folder and the file's name count.
                last = "/".join(Path(name).parts[-2:]) if name is not None else ""
                digest.update(f"{last}\0{length}\n".encode("utf-8", "surrogateescape"))
        sample = np.unique(np.linspace(0, len(self) - 1, min(CONTENT_IMAGES, len(self))).astype(np.int64))
        for start in range(0, len(sample), 256):
            rows = self._rows[sample[start : start + 256]].tolist()
            for row, value in zip(rows, self._table[rows][self._column], strict=True):
                digest.update(hashlib.sha256(encoded_bytes(value, f"{self._where}, row {row}")[0]).digest())
        return digest.digest()

    def _size_on_disk(self, row: int, path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError as error:
            raise UserError(f"{self._where}, row {row} ({path}) cannot be read: {error.strerror}") from error


def arrow_column(table: Any, column: str) -> Any:
    """A column of a ``datasets`` table as Arrow holds it: memory-mapped, without Python objects."""
    return table.select_columns([column]).with_format("arrow")[:].column(column)


def pixels(
    value: Any,
    where: str,
    shape: tuple[int, int, int],
    same_size: bool,
    draw: Callable[[int, int], Box] | None = None,
) -> Images:
    """One encoded image as uint8 (H, W, C); ``draw`` gives the part to take, from width and height.

    A part that is much larger than needed is decoded at a half, a quarter or an eighth where the file is a
    JPEG, never below what is needed. Whole images are never decoded so: tune, certify, test and the deployed
    network see the same pixels.
    """
    height, width, channels = shape
    box: Box = (0, 0, 0, 0)

    def reduce(image: Image.Image) -> None:
        nonlocal box
        assert draw is not None
        full = upright_size(image)
        left, top, right, bottom = draw(*full)
        factor = min((right - left) / width, (bottom - top) / height)
        if factor >= 2:
            target = int(full[0] / factor), int(full[1] / factor)
            image.draft(None, target if full == image.size else target[::-1])
        reduced = upright_size(image)
        across, down = reduced[0] / full[0], reduced[1] / full[1]
        box = (left * across, top * down, right * across, bottom * down)

    image = decode(value, where, reduce if draw is not None and not same_size else None)
    if same_size and image.size != (width, height):
        raise UserError(
            f"{where} is {image.width}x{image.height}, the first image is {width}x{height}: "
            "set data.image_size to bring all to one size"
        )
    if draw is None:
        return to_array(image, height, width, channels)
    if same_size:
        box = draw(*image.size)
    image = converted(image, channels).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image, dtype=np.uint8).reshape(shape)


def decode(value: Any, where: str, prepare: Callable[[Image.Image], None] | None = None) -> Image.Image:
    """An encoded image of a ``datasets`` table as a Pillow image; ``where`` names it in errors."""
    return open_image(*encoded_bytes(value, where), prepare)


def encoded_bytes(value: Any, where: str) -> tuple[bytes, str]:
    """The file's content, and ``where`` with the file's path if it is a file."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise UnreadableError(f"{where} has no image: remove the row")
    if value["bytes"] is not None:
        return value["bytes"], where
    where = f"{where} ({value['path']})"
    return read_file(Path(value["path"]), where), where
