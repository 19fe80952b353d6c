from __future__ import annotations

import torch

from erde.data.normalise import Normalise


def test_every_pixel_value_of_every_channel() -> None:
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.5, 0.001)
    pixels = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 3)
    x = Normalise(mean, std)(pixels)
    assert x.dtype == torch.float32
    expected = (pixels.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-4)
