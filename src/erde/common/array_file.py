"""Arrays in ``.npz`` files that other programs wrote: sizes are checked before they are believed."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Deflate packs nothing more than about 1,000 times. Arrays of numbers pack a few times, unless all are the same.
MAX_RATIO = 100
SMALL = 2**28


class ArrayFileError(ValueError):
    """A file that is no ``.npz`` of plain arrays; the message, of one line, says why."""


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a file, by name.

    Raises:
        ArrayFileError: not a zip file, damaged, encrypted, an array of objects, a header that does not fit its data.
        OSError: there is no file, or it cannot be read.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return {
                    info.filename.removesuffix(".npy"): _read_array(archive, info)
                    for info in archive.infolist()
                }
        except ArrayFileError:
            raise
        except Exception as error:  # headers are Python text, and decoders have errors of their own
            reason = " ".join(str(error).split())[:200]
            raise ArrayFileError(reason or type(error).__name__) from error


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    name = info.filename[:100]
    if info.flag_bits & 1:
        raise ArrayFileError(f"'{name}' is encrypted")
    if info.file_size > max(SMALL, MAX_RATIO * info.compress_size):
        raise ArrayFileError(f"'{name}' claims {info.file_size:,} bytes in {info.compress_size:,}")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ArrayFileError(f"'{name}' is of .npy version {version}, expected 1.0 or 2.0")
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(member)
        if dtype.hasobject:
            raise ArrayFileError(f"'{name}' holds Python objects, which are not read")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ArrayFileError(f"'{name}' has no shape of an array")
        if member.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ArrayFileError(f"'{name}' is of shape {shape!r:.100}, which its data does not fill")
    with archive.open(info) as member:
        array: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
    return array
