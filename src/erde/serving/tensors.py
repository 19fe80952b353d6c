"""Tensors of the protocol: images out of a request, outputs into a response. Sizes are checked before memory is taken."""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde.common.images import open_image, to_array
from erde.runtime.prediction import Prediction
from erde.serving.errors import bad

INPUT = "images"
# Name -> datatype of the protocol and of numpy; little-endian, as the protocol has it.
OUTPUTS: dict[str, tuple[str, str]] = {
    "labels": ("INT64", "<i8"),
    "probabilities": ("FP32", "<f4"),
    "exit": ("INT64", "<i8"),
    "score": ("FP32", "<f4"),
    "macs": ("INT64", "<i8"),
}


@dataclass(frozen=True)
class Tensor:
    """An input as it came: ``data`` is the raw content (bytes), or values (a list, of lists perhaps)."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: bytes | memoryview | list[Any]


def read_images(tensor: Tensor, shape: tuple[int, int, int], max_batch: int) -> NDArray[np.uint8]:
    """The images (B, H, W, C) of an input: pixels as UINT8, or encoded files as BYTES (B,) or (B, 1).

    Raises:
        RequestError: another name, datatype or shape, content that does not fit the shape, or too many images.
        UserError: an encoded image that cannot be read.
    """
    if tensor.name != INPUT:
        raise bad(f"there is no input '{tensor.name}': the only one is '{INPUT}'")
    pixels = ", ".join(map(str, shape))
    expected = f"UINT8 of shape (B, {pixels}), or encoded images as BYTES of shape (B) or (B, 1)"
    given = tuple(tensor.shape)
    if tensor.datatype == "UINT8":
        fits = len(given) == 4 and given[1:] == shape
    elif tensor.datatype == "BYTES":
        fits = len(given) == 1 or (len(given) == 2 and given[1] == 1)
    else:
        raise bad(f"the datatype of '{INPUT}' is '{tensor.datatype}', expected {expected}")
    if not fits or given[0] < 0:
        # A request may claim thousands of dimensions.
        said = ", ".join(str(side)[:20] for side in given[:8])
        raise bad(f"'{INPUT}' is {tensor.datatype} of shape ({said}), expected {expected}")
    if given[0] > max_batch:
        raise bad(
            f"the request has {given[0]} images, at most {max_batch} are taken at once: send several requests"
        )
    if tensor.datatype == "UINT8":
        return _pixels(tensor.data, (given[0], *shape))
    return _decoded(tensor.data, given[0], shape)


def _pixels(data: bytes | memoryview | list[Any], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    count = math.prod(shape)
    if isinstance(data, bytes | memoryview):
        if len(data) != count:
            raise bad(f"'{INPUT}' has {len(data):,} bytes, its shape needs {count:,}")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)
    try:
        values = _whole_numbers(data, shape)
    except ValueError as error:
        raise bad(
            f"the data of '{INPUT}' are not whole numbers from 0 to 255, flat or as nested as its shape"
        ) from error
    if len(values) != count:
        raise bad(f"'{INPUT}' has {len(values):,} whole numbers from 0 to 255, its shape needs {count:,}")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _whole_numbers(values: list[Any], shape: tuple[int, ...]) -> bytes:
    """The numbers of a flat list, or of lists nested exactly as ``shape`` is; :class:`ValueError` for all else.

    NumPy is not asked: of a long text among many values it would make an array that has room for as many long ones.
    """
    if values and type(values[0]) is list:
        if len(values) != shape[0]:
            raise ValueError
        for length in shape[1:]:
            if set(map(type, values)) != {list} or set(map(len, values)) != {length}:
                raise ValueError
            values = list(chain.from_iterable(values))
    if not set(map(type, values)) <= {int}:  # True is none
        raise ValueError
    return bytes(values)


def _decoded(
    data: bytes | memoryview | list[Any], count: int, shape: tuple[int, int, int]
) -> NDArray[np.uint8]:
    files = _split(data, count) if isinstance(data, bytes | memoryview) else [_file(item) for item in data]
    if len(files) != count:
        raise bad(f"'{INPUT}' has {len(files)} encoded images, its shape needs {count}")
    images = np.empty((count, *shape), dtype=np.uint8)
    for index, content in enumerate(files):
        images[index] = to_array(open_image(content, f"image {index} of the request (from 0)"), *shape)
    return images


def _split(data: bytes | memoryview, count: int) -> list[bytes]:
    """The elements of a BYTES tensor: each has its length before it, in four bytes, little-endian."""
    elements: list[bytes] = []
    start = 0
    while start < len(data) and len(elements) <= count:
        length = struct.unpack_from("<I", data, start)[0] if start + 4 <= len(data) else len(data)
        start += 4
        if start + length > len(data):
            raise bad(f"element {len(elements)} of '{INPUT}' (from 0) is longer than what was sent")
        elements.append(bytes(data[start : start + length]))
        start += length
    return elements


def _file(item: Any) -> bytes:
    """An encoded image among JSON or gRPC values."""
    if isinstance(item, list) and len(item) == 1:
        item = item[0]
    if isinstance(item, bytes):
        return item
    try:
        if isinstance(item, str):
            return base64.b64decode(item, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise bad(f"the data of '{INPUT}' are not base64 texts, one for each encoded image")


def outputs_of(prediction: Prediction, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The outputs ``names`` of a prediction, in the protocol's types; nothing else is computed."""
    fields = {"exit": "exits", "score": "scores"}
    return {
        name: np.ascontiguousarray(getattr(prediction, fields.get(name, name)), dtype=OUTPUTS[name][1])
        for name in names
    }
