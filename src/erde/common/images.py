"""From an image file's bytes to the uint8 array that a network takes: the same for training and runtime.

Every image that erde reads passes here, from unknown sources too: its format, size and kind of pixels are checked
before it is decoded.
"""

from __future__ import annotations

import io
import math
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from erde.common.errors import UserError, in_one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Formats that Pillow may open, whatever the file's name. Some others start programs (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_BYTES = 2**29  # of a file: 512 MiB
MAX_PIXELS = 2**27  # 134 million: decoded in colour 512 MiB
# Of an image that is so many times longer than wide, next to what the network takes, only the middle is enlarged: a
# strip of 1 x 100,000 pixels would take gigabytes otherwise.
STRIP = 16
# Pillow's names for 8 bits and less; 16 bits are scaled down. Floats and 32 bits have no white that is agreed upon.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr", "CMYK")
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N")

_ORIENTATION = 0x0112  # EXIF's tag
# EXIF orientation -> the transposition that turns the image upright (EXIF 2.3, section 4.6.4). 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableError(UserError):
    """A file that is no image, is damaged, or is of a kind that erde does not read."""


def open_image(
    source: bytes, where: str, prepare: Callable[[Image.Image], None] | None = None
) -> Image.Image:
    """Decode ``source``, upright; ``where`` names it in the error. ``prepare`` sees the image before it is decoded.

    Raises:
        UnreadableError: no image of ``FORMATS``, a damaged or huge one, or pixels of another kind than 8 or 16 bits.
    """
    if len(source) > MAX_BYTES:
        raise UnreadableError(
            f"{where} is larger than {MAX_BYTES // 2**20} MiB: make it smaller or remove it"
        )
    with _explained(where):
        image = Image.open(io.BytesIO(source), formats=FORMATS)
        _check_pixels(image, where)
        if prepare is not None:
            prepare(image)
        return _decoded(image)


def opened_image(image: Image.Image, where: str) -> Image.Image:
    """An image that somebody else opened with Pillow, as :func:`open_image` gives it; errors as there."""
    with _explained(where):
        _check_pixels(image, where)
        return _decoded(image)


def _decoded(image: Image.Image) -> Image.Image:
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Whatever a decoder raises, as an :class:`UnreadableError` that names the image."""
    try:
        yield
    except UserError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableError(
            f"{where} is not a readable image (PNG, JPEG, WebP, BMP, GIF or TIFF expected): remove or replace it"
        ) from error
    except Exception as error:  # a decoder may raise anything
        reason = in_one_line(f"{type(error).__name__}: {error}")
        raise UnreadableError(f"{where} cannot be decoded ({reason}): remove or replace it") from error


def _check_pixels(image: Image.Image, where: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableError(
            f"{where} has {width:,} x {height:,} pixels, at most {MAX_PIXELS:,} are read: make it smaller or remove it"
        )
    # Older versions of Pillow give 16-bit PNG files the mode of 32 bits.
    if image.mode not in (*_MODES, *_DEEP) and not (image.mode == "I" and image.format == "PNG"):
        raise UnreadableError(
            f"{where} has pixels of mode '{image.mode}', expected gray or RGB of 8 or 16 bits: convert it"
        )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF: the pixels are still good
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image that was opened and not decoded yet, as it will be when it is."""
    # Of TIFF files Pillow turns size and pixels itself.
    turned = image.format != "TIFF" and _orientation(image) >= 5
    return (image.height, image.width) if turned else image.size


def converted(image: Image.Image, channels: int) -> Image.Image:
    """The image with 8 bits, in gray or RGB; alpha is dropped."""
    if image.mode.startswith("I"):
        # 16-bit gray: Pillow's own conversion clips at 255 instead of scaling.
        deep = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray(np.round(deep / 257).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def to_array(image: Image.Image, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """uint8 (H, W, C): resized so that it covers height x width (bilinear), then cropped at the centre.

    An image that already has the size is left as it is. Colour becomes gray where ``channels`` is 1 and
    the other way round; alpha is dropped.
    """
    image = converted(image, channels)
    if image.size != (width, height):
        scale = max(height / image.height, width / image.width)
        if image.width * scale > STRIP * width or image.height * scale > STRIP * height:
            image = _centre(image, math.ceil(STRIP * width / scale), math.ceil(STRIP * height / scale))
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = _centre(image.resize(size, Image.Resampling.BILINEAR), width, height)
    array: NDArray[Any] = np.asarray(image, dtype=np.uint8)
    return array[:, :, None] if channels == 1 else array


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of an image, at most so large."""
    width, height = min(width, image.width), min(height, image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def read_file(path: Path, where: str | None = None) -> bytes:
    """A file's content, if it is a regular file and not huge; ``where`` names it in errors."""
    where = str(path) if where is None else where
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise UnreadableError(f"{where} cannot be read: it is not a regular file")
        if state.st_size > MAX_BYTES:
            raise UnreadableError(
                f"{where} is larger than {MAX_BYTES // 2**20} MiB: make it smaller or remove it"
            )
        return path.read_bytes()
    except UserError:
        raise
    except OSError as error:
        raise UnreadableError(f"{where} cannot be read: {error.strerror}") from error
    except ValueError as error:  # no file can have this name
        raise UnreadableError(f"{in_one_line(where)} cannot be read: {error}") from error


def load_image(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """An image file as the bundle takes it: uint8 (H, W, C), resized and cropped as in training."""
    return to_array(open_image(read_file(path), str(path)), *shape)
