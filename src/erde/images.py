"""From an image file's bytes to the uint8 array that a network takes: the same for training and runtime."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from erde.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# Pillow's mode -> channels, alpha included; palettes are colours.
_CHANNELS = {
    "1": 1,
    "L": 1,
    "I": 1,
    "I;16": 1,
    "F": 1,
    "LA": 2,
    "P": 3,
    "RGB": 3,
    "YCbCr": 3,
    "RGBA": 4,
    "CMYK": 4,
}


def open_image(
    source: bytes | Image.Image, where: str, prepare: Callable[[Image.Image], None] | None = None
) -> Image.Image:
    """Decode ``source``; ``where`` names it in the error. ``prepare`` sees the opened image before it is decoded."""
    if isinstance(source, Image.Image):
        return source
    try:
        image = Image.open(io.BytesIO(source))
        if prepare is not None:
            prepare(image)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{where} is not a readable image (PNG, JPEG, WebP, ... expected): remove or replace it"
        ) from error
    return image


def channels_of(image: Image.Image) -> int:
    """How many channels an image has: 1 gray, 2 gray and alpha, 3 colour, 4 colour and alpha."""
    return _CHANNELS.get(image.mode, len(image.getbands()))


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
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    array: NDArray[Any] = np.asarray(image, dtype=np.uint8)
    return array[:, :, None] if channels == 1 else array


def load_image(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """An image file as the bundle takes it: uint8 (H, W, C), resized and cropped as in training."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return to_array(open_image(content, str(path)), *shape)
