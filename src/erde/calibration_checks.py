"""What stands between logits and an honest certificate: splits that fit, budgets that can be met, one use of certify."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from erde.bundle import Calibration
from erde.errors import UserError
from erde.settings import Settings
from erde.splits import CertifyLogits, Labels, Logits, TuneLogits
from erde.thresholds import Cost

# Rows that tune and certify have in common: above this share it is no coincidence of equal images.
MOST_OVERLAP = 0.01


def check_budget(budget: float, cost: Cost) -> None:
    """:class:`UserError` where not even leaving at the first exit keeps within ``budget``, a share of the MACs."""
    least = cost.exit_macs[0] / cost.no_exit_macs
    if least > budget:
        raise UserError(
            f"a budget of {budget * 100:g} % of the MACs cannot be met: leaving at the first exit takes {least * 100:.0f} %; "
            "give a larger budget or an earlier exit"
        )


def check_latency_budget(milliseconds: float, cost: Cost) -> None:
    """:class:`UserError` where the machine was not profiled, or the first exit alone takes longer."""
    if cost.exit_milliseconds is None:
        raise UserError(
            f"a latency budget of {milliseconds:g} ms needs a profile of the machine: "
            "erde bundle profile BUNDLE (in Python Session(bundle).profile()) measures one"
        )
    if cost.exit_milliseconds[0] > milliseconds:
        raise UserError(
            f"a latency budget of {milliseconds:g} ms cannot be met: the first exit alone takes "
            f"{cost.exit_milliseconds[0]:.3g} ms on the profiled machine; give a larger budget or an earlier exit"
        )


def check_logits(split: Logits, name: str) -> None:
    """:class:`UserError` where logits are not numbers or a label is not a class."""
    if len(split) == 0:
        raise UserError(f"the {name} split holds no images")
    bad = np.argwhere(~np.isfinite(split.logits))
    if len(bad):
        exit_index, image, _ = bad[0]
        raise UserError(
            f"the {name} logits hold {len(bad):,} values that are NaN or infinite (first: exit {exit_index}, "
            f"image {image}): a network that gives these cannot be calibrated"
        )
    classes = split.logits.shape[-1]
    if split.labels.min() < 0 or split.labels.max() >= classes:
        raise UserError(
            f"the {name} labels run from {split.labels.min()} to {split.labels.max()}, but there are {classes} classes "
            f"(0 to {classes - 1})"
        )


def check_classes(tune_labels: Labels, classes: int) -> None:
    """:class:`UserError` where a class has no image in tune."""
    missing = np.flatnonzero(np.bincount(tune_labels, minlength=classes) == 0)
    if len(missing):
        raise UserError(
            f"{len(missing)} of {classes} classes have no image in tune (first: class {missing[0]}): "
            "thresholds would be blind to them; give tune images of every class"
        )


def check_splits(tune: TuneLogits, certify_split: CertifyLogits) -> None:
    """:class:`UserError` where the two splits cannot give an honest certificate."""
    check_logits(tune, "tune")
    check_logits(certify_split, "certify")
    if tune.logits[:, :0].shape != certify_split.logits[:, :0].shape:
        raise UserError(
            f"tune logits are of shape {tune.logits.shape} and certify logits of {certify_split.logits.shape}: "
            "both must have the same exits and classes, (E, N, K)"
        )
    check_classes(tune.labels, tune.logits.shape[-1])
    seen = {row.tobytes() for row in _rows(tune)}
    common = sum(row.tobytes() in seen for row in _rows(certify_split))
    if common > MOST_OVERLAP * len(certify_split):
        raise UserError(
            f"tune and certify overlap: {common:,} of {len(certify_split):,} certify images are in tune too; "
            "a certificate needs images that chose nothing"
        )


def _rows(split: Logits) -> NDArray[np.float32]:
    return np.ascontiguousarray(split.logits.transpose(1, 0, 2))


@dataclass(frozen=True)
class Request:
    """All that decides what a calibration gives, before certify is looked at.

    ``sources`` are fingerprints of sets of images that both splits were drawn from, if there are any.
    """

    tune: TuneLogits
    certify: CertifyLogits
    cost: Cost
    settings: Settings
    sources: tuple[str, ...] = ()

    def choices(self) -> str:
        """A hash of it: what a second calibration on the same certify images must not change."""
        value = [asdict(self.settings), asdict(self.cost), self.tune.fingerprint()]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_reuse(earlier: Calibration | None, request: Request) -> None:
    """:class:`UserError` where images that would certify ``request`` already certified other choices."""
    if earlier is None or earlier.choices == request.choices():
        return
    if earlier.certify_fingerprint == request.certify.fingerprint() or set(earlier.sources) & set(
        request.sources
    ):
        raise UserError(
            "these certify images already certified other choices: trying again until the answer pleases voids the "
            "promise; give new certify images, or ask for all risks in one calibration"
        )
