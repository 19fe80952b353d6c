"""Build ``digits-demo``, the bundle that comes with erde, and its sample images. A minute of one core, no network.

    python benchmarks/digits_demo.py [--out FOLDER]

The smallest network of the recipe ``digits`` with three exits, trained by cross-entropy. Samples are images of the test split.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import erde
from erde import bundle
from erde.bundle.shipped import FOLDER, SAMPLES
from erde.common.splits import TestSplit
from erde.data.load import load_splits
from erde.recipe.load import load_config

NAME = "digits-demo"
RECIPE = (
    f"name={NAME}",
    "threads=1",
    "arms={ce: {loss: ce}}",
    "export={arm: ce}",
    "student.backbone=resnet8x0.25",
    "train.epochs=30",
    "calibration.max_risks=[0.02, 0.05]",
    "calibration.budgets=[]",
    "data.train_subset=null",
    # A run has a teacher; cross-entropy does not ask it.
    "teacher={backbone: resnet8x0.25, train: {epochs: 1}}",
)
ATTRIBUTION = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, "
    "https://doi.org/10.24432/C50P49, CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/); the copy in scikit-learn, "
    "pixels scaled to 0 to 255"
)


def build(out: Path) -> None:
    """Train in a temporary folder; write the bundle to ``out``, and images below it."""
    config = load_config("digits", RECIPE)
    with tempfile.TemporaryDirectory() as scratch:
        erde.run(config, Path(scratch) / "run")
        source = Path(scratch) / "run" / "bundle"
        manifest = bundle.read(source)
        named = manifest.model_copy(
            update={"name": NAME, "provenance": {**manifest.provenance, "attribution": ATTRIBUTION}}
        )
        bundle.write(out, named, [source / stage.file for stage in manifest.stages])
    write_samples(out, load_splits(config.data, config.seed).test)


def write_samples(out: Path, test: TestSplit) -> None:
    """One image for each exit, of different digits, if they are answered rightly."""
    images = np.asarray(test.images[:])
    answer = erde.load(out, threads=1).predict(images)
    (out / SAMPLES).mkdir()
    taken: set[int] = set()
    for exit in range(len(answer.temperatures)):
        fits = (answer.exits == exit) & (answer.labels == test.labels) & ~np.isin(test.labels, list(taken))
        for row in np.flatnonzero(fits)[:1]:
            digit = int(test.labels[row])
            taken.add(digit)
            Image.fromarray(images[row, :, :, 0]).save(out / SAMPLES / f"{digit}.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER / NAME)
    build(parser.parse_args().out)
