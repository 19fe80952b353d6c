"""Which classes are taken for which, at an arm's default operating point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from erde.calibration.policy_file import CalibratedPolicy
from erde.common.splits import TestLogits
from erde.policy import rule as policy


@dataclass(frozen=True)
class Confusion:
    """Counts (P,) of the pairs of a true class and an answer that occur, both (P,), in rising order.

    Pairs instead of a matrix: of K² entries most are zero where there are many classes.
    """

    classes: int
    true: NDArray[np.int64]
    answer: NDArray[np.int64]
    count: NDArray[np.int64]

    @classmethod
    def of(cls, test: TestLogits, calibrated: CalibratedPolicy) -> Confusion:
        """Count the answers to the test images at the default operating point."""
        answers, scores = calibrated.rule.apply(test.logits)
        exits = policy.decide(scores, calibrated.default_point().thresholds)
        labels = policy.take_exit(answers.argmax(axis=-1), exits)
        classes = test.logits.shape[-1]
        pairs, count = np.unique(test.labels.astype(np.int64) * classes + labels, return_counts=True)
        return cls(classes, pairs // classes, pairs % classes, count.astype(np.int64))

    def matrix(self) -> NDArray[np.int64]:
        """The counts as (K, K): a row for each true class, a column for each answer."""
        matrix = np.zeros((self.classes, self.classes), dtype=np.int64)
        matrix[self.true, self.answer] = self.count
        return matrix

    def mistakes(self) -> list[tuple[int, int, int]]:
        """True class, wrong answer, images: the most frequent first, then in the order of the classes."""
        wrong = np.flatnonzero(self.true != self.answer)
        ranked = wrong[np.argsort(-self.count[wrong], kind="stable")]
        return [(int(self.true[at]), int(self.answer[at]), int(self.count[at])) for at in ranked]
