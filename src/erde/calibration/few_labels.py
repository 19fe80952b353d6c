"""Certify with few labels: against the final exit a label is needed only where an early answer differs from it.

An image whose early answer equals the final one does no harm, whatever it shows. So tune needs no label: the path of
thresholds is searched by disagreement, with the rule and the temperatures that the bundle has. On certify each image
without a label counts as harmed wherever it differs, which can only make the certificate more careful; with the labels of
all images that differ up to the first point that fails it is the one that all labels would give. No torch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde.calibration.certificates import PathCounts, walk
from erde.calibration.checks import Request, answers_as_labels, check_splits
from erde.calibration.choice import Choice
from erde.calibration.logits import operating_points, seen
from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.settings import Settings
from erde.calibration.thresholds import ScoredSplit, ThresholdPath, search_path, sweep
from erde.common.errors import UserError, nearest
from erde.common.files import check_new, write_text
from erde.common.splits import CertifyLogits, Labels, TuneLogits
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.rule import ExitRule

COLUMNS = ("image", "sha256", "label")
# How far to ask: of differing images without a label this share is thought to be harmed. On CIFAR-10 it is 0.35 to 0.6; with a
# smaller number more labels are asked for at once, with a larger one more rounds are needed.
HARM_SHARE = 0.4
UNKNOWN = -1
# Of a file that is there already.
LABELS_ADVICE = "it may hold labels; give another --labels-out"


@dataclass(frozen=True)
class FewLabels:
    """A calibration that waits for labels: tune and certify logits (E, N, K) of unlabelled images, and what is asked."""

    tune: TuneLogits
    certify: CertifyLogits
    rule: ExitRule
    temperatures: Sequence[float]
    cost: Cost
    settings: Settings
    path: ThresholdPath

    @classmethod
    def of(
        cls,
        tune: NDArray[np.float32],
        certify: NDArray[np.float32],
        rule: ExitRule,
        temperatures: Sequence[float],
        cost: Cost,
        settings: Settings,
    ) -> FewLabels:
        """Fix the path on ``tune`` (E, N, K), by disagreement per MAC saved; ``certify`` (E, M, K) is not looked at.

        Raises:
            UserError: a guarantee or a reference that needs the labels of all images.
        """
        if settings.guarantee not in ("risk", "expected_risk") or settings.reference != "final_exit":
            raise UserError(
                "few labels certify the guarantee 'risk' or 'expected_risk' against the reference 'final_exit', got "
                f"'{settings.guarantee}' against '{settings.reference}': give labels of all images for 'net_drop', and none "
                "for 'disagreement'"
            )
        tune_split = answers_as_labels(TuneLogits(tune, _no_labels(tune)))
        certify_split = answers_as_labels(CertifyLogits(certify, _no_labels(certify)))
        check_splits(tune_split, certify_split)
        path = search_path(ScoredSplit.of(tune_split, rule, None), cost)
        return cls(tune_split, certify_split, rule, temperatures, cost, settings, path)

    def asked(self, labels: Labels | None = None) -> NDArray[np.int64]:
        """Rows of certify whose label is needed, the most careful thresholds first.

        ``labels`` (M,) are those that are known, ``UNKNOWN`` elsewhere; their rows are among what is returned. Asked is
        up to the first point of the path that fails for every target, where an unknown label counts ``HARM_SHARE``.
        """
        labels = np.full(len(self.certify), UNKNOWN) if labels is None else labels
        differs = ScoredSplit.of(self.certify, self.rule, None)
        known = labels != UNKNOWN
        harmed = self._scored(labels).harm
        first = np.full(len(labels), len(self.path.thresholds))
        ever_lost = np.zeros(len(labels))
        for index, thresholds in enumerate(self.path.thresholds):
            exits = policy.decide(differs.scores, thresholds)
            apart = policy.take_exit(differs.harm, exits)
            lost = np.where(known, policy.take_exit(harmed, exits), HARM_SHARE * apart)
            ever_lost = np.maximum(ever_lost, lost)
            first[apart & (first > index)] = index
            if not self._passes(float(lost.sum()), float(ever_lost.sum())):
                break
        rows = np.flatnonzero(first < len(self.path.thresholds))
        return rows[np.argsort(first[rows], kind="stable")]

    def certified(self, labels: Labels, sources: Sequence[str] = ()) -> CalibratedPolicy:
        """The calibration with what is known of the ``labels`` (M,) of certify, ``UNKNOWN`` elsewhere."""
        scored = self._scored(labels)
        tune = ScoredSplit.of(self.tune, self.rule, None)
        chosen = Choice(self.rule, tune, self.path, 0.0, 0.0)
        points, left_out, default = operating_points(chosen, scored, self.cost, self.settings)
        finished = []
        for point in points:
            certificate = point.certificate
            if certificate is not None:
                unknown = self._unknown_harm(labels, point.thresholds)
                assumed = (
                    f"; {unknown:,} of the lost are images without a label, which count as harmed"
                    if unknown
                    else ""
                )
                certificate = certificate.model_copy(
                    update={
                        "assumptions": f"{certificate.assumptions}; labels were asked only where the early and the "
                        f"final answer differ{assumed}"
                    }
                )
            # Without labels there is no accuracy of tune to report.
            agreement = sweep(tune, [point.thresholds]).agreement(0, self.cost)
            finished.append(
                point.model_copy(
                    update={"tune": None, "tune_agreement": agreement, "certificate": certificate}
                )
            )
        return CalibratedPolicy(
            rule=self.rule,
            temperatures=list(self.temperatures),
            path=self.path,
            points=finished,
            default=default,
            left_out=left_out,
            calibration=seen(
                chosen,
                scored,
                points,
                default,
                Request(self.tune, self.certify, self.cost, self.settings),
                sources,
            ),
            candidates=[],
            paper_path=self.path,
            contenders=[],
        )

    def more_labels(self, labels: Labels) -> NDArray[np.int64]:
        """Rows without a label that :meth:`asked` would ask for now: with their labels more might be certified."""
        rows = self.asked(labels)
        return np.asarray(rows[labels[rows] == UNKNOWN])

    def _scored(self, labels: Labels) -> ScoredSplit:
        known = np.where(labels == UNKNOWN, self.certify.labels, labels)
        return ScoredSplit.of(CertifyLogits(self.certify.logits, known), self.rule, None)

    def _unknown_harm(self, labels: Labels, thresholds: policy.Thresholds) -> int:
        """The number of images without a label that get another answer than the final one: they count as harmed."""
        differs = ScoredSplit.of(self.certify, self.rule, None)
        apart = policy.take_exit(differs.harm, policy.decide(differs.scores, thresholds))
        return int((apart & (labels == UNKNOWN)).sum())

    def _passes(self, lost: float, ever_lost: float) -> bool:
        counts = np.array([int(lost)])
        along = PathCounts(len(self.certify), counts, np.zeros_like(counts), np.array([int(ever_lost)]))
        return any(
            walk(along, risk, self.settings.confidence, self.settings.guarantee) == 0
            for risk in self.settings.max_risks
        )


def _no_labels(logits: NDArray[np.float32]) -> Labels:
    return np.full(logits.shape[1], UNKNOWN)


def write_label_file(path: Path, images: Sequence[tuple[str, str, str]]) -> None:
    """Write the CSV that asks for labels: image, SHA-256 of its file, label (empty where it is asked for)."""
    check_new(path, LABELS_ADVICE)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *images])
    write_text(path, text.getvalue())


def read_label_file(path: Path, classes: Sequence[str], digests: Mapping[str, str]) -> dict[str, int]:
    """SHA-256 to label (``UNKNOWN`` where it was left empty) of a filled CSV.

    ``digests`` has the SHA-256 of each image of the pool by its name, as in the file. Rows of other images are skipped.

    Raises:
        UserError: no such file, another format, a label that is no class, two labels for one image.
    """
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
        rows = list(reader)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; --labels-out FILE writes such a file"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} is not a CSV file in UTF-8: fill in the one that --labels-out wrote"
        ) from error
    labels: dict[str, int] = {}
    known = set(digests.values())
    for number, row in enumerate(rows, start=2):
        values: list[Any] = [row.get(column) for column in COLUMNS]
        if not all(isinstance(value, str) for value in values) or None in row:
            raise UserError(
                f"{path}, line {number}: expected the columns {','.join(COLUMNS)}, as --labels-out wrote them"
            )
        image, digest, label = (str(value).strip() for value in values)
        if digest not in known:
            # Of another folder, where a name may stand too; or gone or changed. The caller looks whether a row is missing.
            continue
        if label and label not in classes:
            raise UserError(
                f"{path}, line {number}: '{label}' is not a class of this bundle{nearest(label, classes)}; leave it empty where "
                "no class fits"
            )
        value = classes.index(label) if label else UNKNOWN
        if labels.setdefault(digest, value) != value:
            raise UserError(f"{path}, line {number}: {image} has two labels: keep the right one")
    # Where no label is needed there is nothing but the heading.
    if not set(COLUMNS) <= set(reader.fieldnames or ()):
        raise UserError(
            f"{path} has no rows: expected the columns {','.join(COLUMNS)}, as --labels-out wrote them"
        )
    return labels
