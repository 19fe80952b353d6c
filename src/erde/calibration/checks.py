"""Checks before an honest certificate: splits that fit, budgets that can be met, one use of certify."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from erde.calibration.settings import Settings
from erde.common.errors import UserError
from erde.common.splits import CertifyLogits, Labels, Logits, TuneLogits
from erde.policy.cost import Cost
from erde.policy.points import Calibration

AnyLogits = TypeVar("AnyLogits", bound=Logits)
# Rows that tune and certify have in common: above this share it is no coincidence of equal images.
MOST_OVERLAP = 0.01
# A final exit that is right this often on certify may have been trained on it.
NEARLY_ALWAYS = 0.995
# Temperatures are searched down to 1/20; below this one they ran to the bound.
SMALLEST_TEMPERATURE = 0.055


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


def answers_as_labels(split: AnyLogits) -> AnyLogits:
    """The split with the final exit's answers in place of labels: "wrong" then means "another answer than that"."""
    return type(split)(split.logits, np.asarray(split.logits[-1].argmax(axis=-1), dtype=np.int64))


def absent_classes(labels: Labels, classes: int, split: str) -> str | None:
    """A line where classes have no image in a split. The promise is over images as they come, so it holds all the same."""
    missing = int((np.bincount(labels, minlength=classes) == 0).sum())
    if not missing:
        return None
    return (
        f"{missing:,} of {classes:,} classes have no image in {split}: the promise is over images as they come, "
        "and rare classes have none of their own"
    )


def doubts(tune: Logits, certify: Logits, temperatures: Sequence[float]) -> list[str]:
    """Reasons why a promise is worth less than it seems, a line each: absent classes, images seen before, a poor network."""
    classes = certify.logits.shape[-1]
    lines = [
        absent_classes(split.labels, classes, name) for name, split in (("tune", tune), ("certify", certify))
    ]
    right = (certify.logits.argmax(axis=-1) == certify.labels).mean(axis=1)
    final, early = float(right[-1]), float(right[:-1].max(initial=0.0))
    if final >= NEARLY_ALWAYS and len(certify) >= 200:
        lines.append(
            f"the final exit is right on {100 * final:.1f} % of the certify images: if the network was trained on them "
            "(weights from elsewhere?), the promise does not hold for new images"
        )
    lines.append(poor_network(final, early, classes, "certify"))
    bound = [
        str(index) for index, temperature in enumerate(temperatures) if temperature < SMALLEST_TEMPERATURE
    ]
    if bound:
        lines.append(
            f"the temperature of exit {', '.join(bound)} ran to its bound: tune looks as if the network had been trained on "
            "it; its probabilities mean nothing for new images"
        )
    return [line for line in lines if line is not None]


def poor_network(final: float, early: float, classes: int, split: str) -> str | None:
    """A line where the final exit, or a far better earlier one, shows that a promise against it is easily kept."""
    if final >= min(0.5, 5 / classes) and final >= early - 0.02:
        return None
    beside = f", an earlier exit on {100 * early:.1f} %" if early > final else ""
    return (
        f"the full network is right on {100 * final:.1f} % of the {split} images{beside}: a promise against it says little; "
        "train it better first"
    )


def seen_before(certify: Logits, test: Logits) -> str | None:
    """A line where the final exit is far better on certify than on test: it may have been trained on certify.

    Far is three points or more, and four standard errors of the difference of two shares.
    """
    on_certify, on_test = (
        float((split.logits[-1].argmax(axis=-1) == split.labels).mean()) for split in (certify, test)
    )
    pooled = (on_certify * len(certify) + on_test * len(test)) / (len(certify) + len(test))
    error = (pooled * (1 - pooled) * (1 / len(certify) + 1 / len(test))) ** 0.5
    if on_certify - on_test < max(0.03, 4 * error):
        return None
    return (
        f"the final exit is right on {100 * on_certify:.1f} % of certify and on {100 * on_test:.1f} % of test: "
        "if it was trained on certify, the promise does not hold; if test is another kind of images, it is not about them"
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
    seen = {row.tobytes() for row in _rows(tune)}
    common = sum(row.tobytes() in seen for row in _rows(certify_split))
    if common > MOST_OVERLAP * len(certify_split):
        raise UserError(
            f"tune and certify overlap: {common:,} of {len(certify_split):,} certify images are in tune too; "
            "a certificate needs images that chose nothing"
        )


def _rows(split: Logits) -> NDArray[np.float32]:
    return np.ascontiguousarray(split.logits.transpose(1, 0, 2))


# The settings of the first version: always hashed. A newer one is hashed where it differs from its default.
HASHED_ALWAYS = (
    "max_risks", "confidence", "budgets", "latency_budgets", "reference", "guarantee", "score", "sharpness", "ensemble",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """All that decides what a calibration gives, before certify is looked at.

    ``sources`` are fingerprints of the sets of images that certify was drawn from, if there are any; the references are
    bool (N,) of tune and of certify, where another one than the final exit is right.
    """

    tune: TuneLogits
    certify: CertifyLogits
    cost: Cost
    settings: Settings
    sources: tuple[str, ...] = ()
    tune_reference_right: NDArray[np.bool_] | None = None
    certify_reference_right: NDArray[np.bool_] | None = None

    def choices(self) -> str:
        """A hash of it: what a second calibration on the same certify images must not change.

        Milliseconds are left out: nothing that is certified depends on them, and a new profile is no second choice.
        """
        # A setting that an earlier version did not have changes no hash while it keeps its default.
        defaults = type(self.settings)().model_dump()
        settings = {
            key: value
            for key, value in self.settings.model_dump().items()
            if key in HASHED_ALWAYS or value != defaults[key]
        }
        costs = asdict(replace(self.cost, exit_milliseconds=None))
        if costs["networks"] == (0,):  # likewise
            del costs["networks"]
        references = [
            hashlib.sha256(np.asarray(right, dtype=np.bool_).tobytes()).hexdigest()
            for right in (self.tune_reference_right, self.certify_reference_right)
            if right is not None
        ]
        value = [settings, costs, self.fingerprint(self.tune), *references]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    def fingerprint(self, split: Logits) -> str:
        """That of tune or of certify, as a calibration notes it: for a promise of disagreement no label counts."""
        unlabelled = self.settings.guarantee == "disagreement"
        return (answers_as_labels(split) if unlabelled else split).fingerprint()


def check_reuse(earlier: Calibration | None, request: Request) -> None:
    """:class:`UserError` where images that would certify ``request`` already certified other choices."""
    if earlier is None or earlier.choices == request.choices():
        return
    # Noted with its labels or, by a promise of disagreement, without: the images are the same.
    certify = {split.fingerprint() for split in (request.certify, answers_as_labels(request.certify))}
    if earlier.certify_fingerprint in certify or set(earlier.sources) & set(request.sources):
        raise UserError(
            "these certify images already certified other choices: trying again until the answer pleases voids the "
            "promise; give new certify images, or ask for all risks in one calibration"
        )
