"""``erde cascade``: networks that exist already, put one behind another, calibrated and sealed. No training, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erde.calibration.bundles import calibrate_bundle
from erde.calibration.labelled_images import (
    TuneAndCertify,
    load_tune_and_certify,
    load_unlabelled,
    say_sizes,
)
from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.settings import Settings
from erde.chains.building import built_chain, check_chain, class_names, common_shape
from erde.chains.networks import Network, open_network
from erde.chains.preprocessing import Preprocessing
from erde.common import progress
from erde.common.errors import UserError
from erde.common.files import check_new
from erde.policy.rule import softmax
from erde.runtime.session import Session

SAMPLE_IMAGES = 2


def cascade(
    networks: Sequence[str | Path],
    images: str | Path,
    out: str | Path,
    *,
    settings: Settings | None = None,
    preprocessing: Sequence[Preprocessing] = (),
    classes: Sequence[str] | None = None,
    tune_share: float = 0.5,
    seed: int = 0,
) -> CalibratedPolicy:
    """Chain ``networks``, the cheapest first, calibrate and certify the chain on ``images``, and seal it at ``out``.

    Args:
        networks: folders of bundles and ONNX files; the last one is the fallback, which the early answers are held
            against.
        images: a folder of images. With a sub-folder per class the promise is about images that the fallback gets right
            and the early answer wrong; else, without labels, about answers that differ.
        settings: those of calibration; its guarantee follows from the images unless it is another than ``risk``.
        preprocessing: of the ONNX files, in their order; a single one is for all. Without it, a
            ``preprocessor_config.json`` or ``config.json`` beside the file.
        classes: names, where no network has any.
        tune_share: of the images, for choosing thresholds; the rest certifies.
        seed: of the split.

    Raises:
        UserError: networks that cannot stand behind one another, images that cannot be used or that certified a part of the
            chain already; nothing is written.
    """
    out, folder = Path(out), Path(images)
    settings = settings or Settings()
    check_new(out)
    opened = open_networks([Path(network) for network in networks], preprocessing)
    check_chain(opened)
    names = class_names(opened, classes)
    data = load_images(folder, names, common_shape(opened), settings, tune_share, seed)
    _check_unused(opened, data.splits.fingerprint, folder)
    return seal_chain(opened, data, names, settings, out)


def _check_unused(networks: Sequence[Network], fingerprint: str, images: Path) -> None:
    """:class:`UserError` where a network of the chain was calibrated on these images already."""
    for network in networks:
        calibration = network.manifest.calibration if network.manifest is not None else None
        if calibration is not None and fingerprint in calibration.sources:
            raise UserError(
                f"the images in {images} already certified '{network.name}', a part of this chain: trying again until the "
                "answer pleases voids the promise; give images that it was not calibrated on"
            )


def seal_chain(
    networks: Sequence[Network], data: Images, classes: list[str], settings: Settings, out: Path
) -> CalibratedPolicy:
    """Build the chain of ``networks``, calibrate it on ``data`` and seal it at ``out``."""
    splits = data.splits
    if not data.labelled:
        settings = settings.model_copy(update={"guarantee": "disagreement"})
    with built_chain(networks, out, splits.tune.images[slice(SAMPLE_IMAGES)], classes) as chain:
        session = Session(chain)
        for line in first_answers(session, splits.tune.images[slice(1)]):
            progress.say(line)
        return calibrate_bundle(session, splits, settings, out, [splits.fingerprint])


def open_networks(paths: Sequence[Path], preprocessing: Sequence[Preprocessing] = ()) -> list[Network]:
    """The networks at ``paths``; each ONNX file takes the next of ``preprocessing``, a single one is for all.

    What a user should know about them is said.
    """
    files = [path for path in paths if path.suffix == ".onnx"]
    if preprocessing and not files:
        raise UserError("a preprocessing belongs to an ONNX file, and none is given: bundles have their own")
    if len(preprocessing) not in (0, 1, len(files)):
        raise UserError(
            f"{len(preprocessing)} preprocessings for {len(files)} ONNX files: give one for each, in their order, or one "
            "for all"
        )
    given = list(preprocessing) * (len(files) if len(preprocessing) == 1 else 1)
    opened = [open_network(path, given.pop(0) if path in files and given else None) for path in paths]
    # Networks may share a preprocessing.
    for note in dict.fromkeys(note for network in opened for note in network.notes):
        progress.say(note)
    return opened


@dataclass(frozen=True)
class Images:
    """Images of a calibration: splits, and whether their labels are known."""

    splits: TuneAndCertify
    labelled: bool


def load_images(
    folder: Path,
    classes: list[str],
    shape: tuple[int, int, int],
    settings: Settings,
    tune_share: float,
    seed: int,
) -> Images:
    """The images below ``folder``, with labels where it has sub-folders named by classes."""
    labelled = is_labelled(folder, classes) and settings.guarantee != "disagreement"
    if not labelled and settings.guarantee not in ("risk", "disagreement"):
        raise UserError(
            f"the guarantee '{settings.guarantee}' needs labels, and {folder} has no sub-folders named by classes "
            f"(such as {classes[0]}): sort the images by class, or ask for 'disagreement'"
        )
    if labelled:
        splits = load_tune_and_certify(folder, classes, shape, tune_share, seed)
    else:
        splits = load_unlabelled(folder, shape, tune_share, seed).without_labels()
    say_sizes(splits, ", with labels" if labelled else ", without labels")
    return Images(splits, labelled)


def is_labelled(folder: Path, classes: Sequence[str]) -> bool:
    """True if most of the folder's sub-folders are named by classes."""
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}: expected images")
    inside = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return 2 * sum(name in set(classes) for name in inside) > len(inside)


def first_answers(session: Session, image: NDArray[np.uint8]) -> list[str]:
    """What each network says to one image, a line each: wrong preprocessing shows at once."""
    logits = session.all_logits(image)[:, 0]
    stages = session.manifest.stages
    lasts = [index - 1 for index in session.manifest.networks()[1:]] + [len(stages) - 1]
    lines = []
    for index in lasts:
        probabilities = softmax(logits[index])
        label = int(probabilities.argmax())
        lines.append(
            f"first image: {stages[index].network} says '{session.classes[label]}' ({probabilities[label]:.1%})"
        )
    return lines


def read_class_names(path: Path) -> list[str]:
    """A text file with a name per line; empty lines at its end are left out."""
    try:
        return path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: expected a class name per line") from error
