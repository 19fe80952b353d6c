"""Sets of small images in the hub's layout, and what loading them gives."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from erde.common.errors import UserError
from erde.data.load import DataSplits, load_data

SIZES = {"tune_size": 30, "certify_size": 40}


def png(array: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def picture(number: int, shape: tuple[int, ...] = (8, 8, 3)) -> NDArray[np.uint8]:
    """Noise of which no two are alike."""
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def write_split(
    path: Path, encoded: list[Any], labels: list[Any], names: int | None = 10, image: str = "image"
) -> None:
    import datasets

    label = (
        datasets.ClassLabel(names=[str(number) for number in range(names)])
        if names
        else datasets.Value("int64")
    )
    features = datasets.Features({image: datasets.Image(), "label": label})
    rows = [None if content is None else {"bytes": content, "path": None} for content in encoded]
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({image: rows, "label": labels}, features=features).to_parquet(path)


def write_set(folder: Path, train: int = 240, test: int | None = 60, **arguments: Any) -> Path:
    """The hub's layout: <folder>/data/<split>-<part>.parquet, with images 0 .. and test images 10,000 .."""
    for name, first, number in (("train", 0, train), ("test", 10_000, test)):
        if number is not None:
            encoded = [png(picture(first + row)) for row in range(number)]
            labels = [row % 10 for row in range(number)]
            write_split(folder / "data" / f"{name}-00000-of-00001.parquet", encoded, labels, **arguments)
    return folder


def load(folder: Path | str, **settings: Any) -> DataSplits:
    return load_data(str(folder), **{**SIZES, **settings})


def parts(splits: DataSplits) -> list[Any]:
    return [splits.train, splits.tune, splits.certify, splits.test]


def load_and_look(folder: Path | str, **settings: Any) -> None:
    for part in parts(load(folder, **settings)):
        assert sum(len(batch) for batch in part.batches(64)) == len(part)


def refusal(folder: Path | str, **settings: Any) -> str:
    """The message of the UserError that loading gives, always one line; streamed images are looked at too."""
    with pytest.raises(UserError) as caught:
        load_and_look(folder, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows_and_labels(part: Any) -> list[tuple[NDArray[np.uint8], int]]:
    return list(zip(part.images[np.arange(len(part))], part.labels.tolist(), strict=True))
