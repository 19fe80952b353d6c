"""Small checks that many tests make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erde.common.errors import UserError
from erde.common.splits import Split


@contextlib.contextmanager
def user_error(match: str) -> Iterator[None]:
    """Expect a :class:`UserError` of one line that matches ``match``."""
    with pytest.raises(UserError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


def entries(folder: Path) -> list[str]:
    """Names of all that stands in ``folder``, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def save_by_class(split: Split, folder: Path, names: Sequence[str] | None = None) -> Path:
    """The images of ``split`` as PNG files, a sub-folder per class."""
    names = names or [str(label) for label in range(int(split.labels.max()) + 1)]
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for row in np.flatnonzero(split.labels == label):
            pixels = split.images[np.array([row])][0]
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            picture.save(folder / name / f"{row:05}.png")
    return folder
