"""From bytes to the array that a network takes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from erde.errors import UserError
from erde.images import channels_of, open_image, to_array


def test_16_bit_gray_is_scaled_not_clipped() -> None:
    deep = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    file = io.BytesIO()
    Image.fromarray(deep).save(file, format="PNG")
    image = open_image(file.getvalue(), "deep.png")
    assert channels_of(image) == 1
    found = to_array(image, 8, 8, 1)[..., 0]
    assert np.array_equal(found, np.round(deep / 257))
    assert len(np.unique(found)) == 64


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 2), ("P", 3), ("RGB", 3), ("RGBA", 4)]
)
def test_channels_by_mode(mode: str, channels: int) -> None:
    assert channels_of(Image.new(mode, (2, 2))) == channels


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(to_array(Image.fromarray(pixels), 5, 7, 3), pixels)


def test_resize_covers_then_crops_at_the_centre() -> None:
    # Left third black, middle white, right black: the centre crop of a wide image is white.
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    found = to_array(Image.fromarray(pixels), 8, 8, 3)
    assert found.shape == (8, 8, 3)
    assert found[:, 1:-1].min() == 255


def test_text_is_no_image() -> None:
    with pytest.raises(UserError, match=r"note\.png is not a readable image"):
        open_image(b"no picture", "note.png")
