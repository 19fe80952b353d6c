"""What people have for images (files, encoded bytes, Pillow's images, arrays), as the uint8 batch that a bundle takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from erde.common.errors import UserError, in_one_line
from erde.common.images import load_image, open_image, opened_image, to_array

# One image, but for an array with four axes.
ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]
# Gray, RGB and RGBA.
CHANNELS = (1, 3, 4)


def read_images(
    given: ImageLike | Sequence[ImageLike], shape: tuple[int, int, int]
) -> tuple[NDArray[np.uint8], list[str]]:
    """The images as uint8 (N, H, W, C), upright, resized and cropped as ``erde predict`` does, and their files' names.

    ``given`` is a path, the bytes of an image file, an image of Pillow's, a uint8 array (H, W), (H, W, C) or
    (N, H, W, C) with 1, 3 or 4 channels, or a list of these. What came from no file has the name "".

    Raises:
        UserError: what is none of these, or cannot be read; in a list the first such image.
    """
    several = given if isinstance(given, list | tuple) else None
    parts: list[NDArray[np.uint8]] = [np.empty((0, *shape), dtype=np.uint8)]
    names: list[str] = []
    for number, item in enumerate([given] if several is None else several):
        part = _read(
            item, shape, f"image {number} of the list (from 0)" if several is not None else "the image"
        )
        parts.append(part)
        names += [str(item) if isinstance(item, str | os.PathLike) else ""] * len(part)
    return np.concatenate(parts), names


def read_rows(items: Any, shape: tuple[int, int, int]) -> tuple[NDArray[np.uint8], list[str]]:
    """Those of N images that can be read, uint8 (n, H, W, C), and for each of the N why it cannot; "" if it can.

    Each is one image as :func:`read_images` takes it, or a mapping with ``bytes`` or else ``path``, as Hugging Face's
    data sets have it.
    """
    if isinstance(items, np.ndarray) and items.dtype == np.uint8 and items.shape[1:] == shape:
        return np.ascontiguousarray(items), [""] * len(items)
    parts: list[NDArray[np.uint8]] = [np.empty((0, *shape), dtype=np.uint8)]
    reasons = []
    for item in items:
        reason = ""
        try:
            parts.append(_read_row(item, shape))
        except UserError as error:
            reason = in_one_line(str(error))
        except Exception as error:  # a decoder may raise anything; a bad image must not end hours of work
            reason = in_one_line(f"the image cannot be decoded: {type(error).__name__}: {error}")
        reasons.append(reason)
    return np.concatenate(parts), reasons


def _read_row(item: Any, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    where = "the image"
    if isinstance(item, Mapping):
        content, path = item.get("bytes"), item.get("path")
        item = path if content is None else content
        where = path or where
    if item is None or (isinstance(item, float) and item != item):  # pandas has NaN for nothing
        raise UserError("there is no image: the row is empty")
    image = _read(item, shape, where)
    if len(image) != 1:
        raise UserError(f"{where} holds {len(image)} images, expected 1 per row")
    return image


def _read(item: Any, shape: tuple[int, int, int], where: str) -> NDArray[np.uint8]:
    if isinstance(item, str | os.PathLike):
        path = Path(item)
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the image files in it, or use `erde predict`")
        return load_image(path, shape)[None]
    if isinstance(item, bytes | bytearray | memoryview):
        return to_array(open_image(bytes(item), where), *shape)[None]
    if isinstance(item, Image.Image):
        return to_array(opened_image(item, where), *shape)[None]
    return _read_array(item, shape, where)


def _read_array(item: Any, shape: tuple[int, int, int], where: str) -> NDArray[np.uint8]:
    try:
        array = np.asarray(item)
    except Exception as error:  # tensors on a GPU, rows of different lengths, ...
        raise _refusal(where, shape, f"{type(item).__name__} ({in_one_line(str(error))})") from error
    got = f"{array.dtype} of shape {array.shape}" if array.shape else type(item).__name__
    if array.dtype != np.uint8 or array.ndim not in (2, 3, 4):
        raise _refusal(where, shape, got)
    batch = array[:, :, None] if array.ndim == 2 else array
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.shape[1:] == shape:
        return batch
    if batch.shape[3] not in CHANNELS or 0 in batch.shape[1:]:
        raise _refusal(where, shape, got)
    resized = np.empty((len(batch), *shape), dtype=np.uint8)
    for row, image in zip(resized, batch, strict=True):
        row[:] = to_array(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), *shape)
    return resized


def _refusal(where: str, shape: tuple[int, int, int], got: str) -> UserError:
    return UserError(
        f"{where}: expected uint8 images of shape (N, {', '.join(map(str, shape))}), got {got}: give such an array, one of "
        "another size with the channels (1, 3 or 4) last, a path, encoded bytes, an image of Pillow's, or a list of these"
    )
