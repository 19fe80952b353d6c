"""The real images that ``erde bench`` times with: of a folder, or of a data set's test split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erde import bundle
from erde.common import progress
from erde.common.errors import UserError
from erde.common.images import load_image
from erde.runtime.predict_files import images_below

if TYPE_CHECKING:
    from erde.data.load import DataSplits


def load_images(path: Path, data: str | None, count: int, seed: int) -> tuple[NDArray[np.uint8], str]:
    """``count`` real images (N, H, W, C) for the bundle at ``path``, drawn at random, and where they are from.

    ``data`` is a folder of images or a data set; without it, that of the bundle's own recipe, if it is a shipped or a
    local one: which hub id is loaded is not for a bundle to say. Of a data set the test split is taken.
    """
    manifest = bundle.read(path)
    if data is not None and Path(data).is_dir():
        files = list(images_below(Path(data)))
        if files:
            return _readable(files, manifest.input_shape, count, seed), data
    recipe = manifest.provenance.get("recipe")
    own = recipe.get("data") if isinstance(recipe, dict) else None
    own = own if isinstance(own, dict) else {}
    name = own.get("name") if data is None else data
    if not isinstance(name, str):
        raise UserError(f"{path} names no data set: give --data FOLDER with images like those it will see")
    splits = _load_test(name, own, recipe, manifest.input_shape[2], trusted=data is not None)
    if splits.image_shape != manifest.input_shape:
        raise UserError(
            f"'{name}' has images of shape {splits.image_shape}, the bundle takes {manifest.input_shape}: give others"
        )
    drawn = np.random.default_rng(seed).permutation(len(splits.test))[:count]
    return np.ascontiguousarray(splits.test.images[drawn]), f"{name}, test split"


def _readable(files: list[Path], shape: tuple[int, int, int], count: int, seed: int) -> NDArray[np.uint8]:
    """``count`` of the images, drawn at random; what cannot be read is left out, and said."""
    images: list[NDArray[np.uint8]] = []
    reasons: list[str] = []
    for index in np.random.default_rng(seed).permutation(len(files)):
        try:
            images.append(load_image(files[index], shape))
        except UserError as error:
            reasons.append(str(error))
        if len(images) == count:
            break
    if not images:
        raise UserError(f"no image can be read: {reasons[0]}")
    if reasons:
        progress.say(f"{len(reasons)} images cannot be read and are left out, the first: {reasons[0]}")
    return np.stack(images)


def _load_test(name: str, own: dict[str, Any], recipe: Any, channels: int, trusted: bool) -> DataSplits:
    from erde.data.load import load_splits
    from erde.data.sources import SHIPPED
    from erde.recipe.schema import DataConfig
    from erde.recipe.validation import validate

    try:
        if not (trusted or name in SHIPPED or Path(name).is_dir()):
            raise UserError(f"the bundle was made from '{name}', which is not a shipped data set")
        # Of a set that the bundle does not come from only the test split is looked at: the others may be small.
        small = {"name": name, "channels": channels, "tune_size": 100, "certify_size": 100, "test_size": 300}
        config = validate(DataConfig, own if own.get("name") == name else small, prefix="data.")
        seed = recipe.get("seed") if isinstance(recipe, dict) else None
        return load_splits(config, seed if isinstance(seed, int) else 0)
    except UserError as error:
        raise UserError(f"no images to time with: {error} (or give --data FOLDER with images)") from error
