"""Whether torch and the runtime give the label and exit of every test image that the evaluation has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erde.common.errors import UserError
from erde.common.splits import TestSplit
from erde.data.load import DataSplits
from erde.evaluation.evidence import ArmInput
from erde.evaluation.results import RuntimeAgreement
from erde.networks.network import EarlyExitNetwork, split_logits
from erde.policy import rule as policy
from erde.runtime.session import Session

# As a share of the test images, at one operating point.
MOST_TORCH_DISAGREEMENTS = 0.02


def check_torch(
    network: EarlyExitNetwork, data: DataSplits, measured: ArmInput, arm: str, arm_folder: Path
) -> int:
    """Count images to which torch gives another label or exit than the evaluation, over all operating points.

    A few differ where float32 is coarse; many come from another network, and are a :class:`UserError`.
    """
    answers, scores = measured.policy.rule.apply(split_logits(network, data.test, data.mean, data.std))
    total = 0
    for thresholds, exits, labels, band in _evaluated(measured):
        torch_exits = policy.decide(scores, thresholds)
        torch_labels = policy.take_exit(answers, torch_exits).argmax(axis=-1)
        disagreements = int((((torch_exits != exits) | (torch_labels != labels)) & ~band).sum())
        if disagreements > MOST_TORCH_DISAGREEMENTS * len(labels):
            raise UserError(
                f"torch answers {disagreements:,} of {len(labels):,} test images otherwise than the exported stages of "
                f"'{arm}': its stages or its checkpoint in {arm_folder} changed after the export, so that nothing is sealed; "
                "remove stages, logits.npz and policy.json there, and run erde export, erde calibrate and erde evaluate again"
            )
        total += disagreements
    return total


def check_runtime(folder: Path, test: TestSplit, measured: ArmInput, threads: int) -> RuntimeAgreement:
    """The runtime's label and exit of every test image against the evaluation's."""
    session = Session(folder, threads=threads)
    points = measured.policy.points
    disagreements = 0
    near = np.zeros(len(test), dtype=np.bool_)
    for point, (_, exits, labels, band) in zip(points, _evaluated(measured), strict=True):
        near |= band
        answers = [session.predict(images, operating_point=point.name) for images in test.batches(256)]
        same = (np.concatenate([answer.exits for answer in answers]) == exits) & (
            np.concatenate([answer.labels for answer in answers]) == labels
        )
        disagreements += int((~same & ~band).sum())
    return RuntimeAgreement(
        images=len(test),
        operating_points=[point.name for point in points],
        disagreements=disagreements,
        band=int(near.sum()),
        band_width=policy.BAND,
    )


_Evaluated = tuple[policy.Thresholds, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


def _evaluated(measured: ArmInput) -> Iterator[_Evaluated]:
    """Per operating point: thresholds, and per test image its exit, its label, and whether it is too near to compare."""
    answers, scores = measured.policy.rule.apply(measured.test.logits)
    # Where two classes tie, the label may tip over, and with it a score that looks at labels.
    ties = policy.near_tie(measured.test.logits)
    for point in measured.policy.points:
        exits = policy.decide(scores, point.thresholds)
        labels = policy.take_exit(answers, exits).argmax(axis=-1)
        yield point.thresholds, exits, labels, policy.in_band(scores, point.thresholds) | ties
