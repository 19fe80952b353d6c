"""Mistakes, against scikit-learn's matrix of answers that a plain loop finds."""

from __future__ import annotations

import dataclasses

import numpy as np
from sklearn.metrics import confusion_matrix

from erde.common.splits import TestLogits
from erde.evaluation.confusion import Confusion
from erde.evaluation.measures import measure_classes
from erde.policy.rule import PAPER_RULE
from tests.helpers.hand_made import hand_made_policy
from tests.helpers.oracles import entropy, synthetic_logits

THRESHOLDS = (0.55, 0.4)


def looped_answers(test: TestLogits) -> list[int]:
    """The first exit whose normalised entropy is low enough answers, else the last."""
    answers = []
    for image in range(len(test)):
        exits = test.logits[:, image]
        chosen = next(
            (
                index
                for index, threshold in enumerate(THRESHOLDS)
                if 1 - float(entropy(exits[index])) / np.log(exits.shape[-1]) > threshold
            ),
            len(THRESHOLDS),
        )
        answers.append(int(exits[chosen].argmax()))
    return answers


def test_counts_are_those_of_scikit_learn() -> None:
    test = TestLogits(*synthetic_logits(11, 700))
    answers = looped_answers(test)
    # Leaving early must matter here.
    assert answers != test.logits[-1].argmax(axis=-1).tolist()
    calibrated = hand_made_policy(PAPER_RULE, THRESHOLDS)
    confusion = Confusion.of(test, calibrated)
    expected = confusion_matrix(test.labels, answers, labels=range(5))
    np.testing.assert_array_equal(confusion.matrix(), expected)
    # The accuracy of each class is the one that the results state.
    shares = expected.diagonal() / expected.sum(axis=1)
    np.testing.assert_allclose([row.accuracy for row in measure_classes(test, calibrated)], shares)


def test_mistakes_are_the_pairs_off_the_diagonal_the_most_frequent_first() -> None:
    # Class 1 is absent and never answered; two mistakes are equally frequent.
    labels = np.array([0, 0, 0, 2, 2, 3, 3, 3])
    answers = [0, 3, 3, 2, 3, 0, 0, 3]
    logits = np.stack([np.eye(4, dtype=np.float32)[answers]] * 3)
    confusion = Confusion.of(TestLogits(logits, labels), hand_made_policy(PAPER_RULE, (None, None)))
    assert confusion.mistakes() == [(0, 3, 2), (3, 0, 2), (2, 3, 1)]
    np.testing.assert_array_equal(confusion.matrix(), confusion_matrix(labels, answers, labels=range(4)))


def test_many_classes_need_no_matrix() -> None:
    # A matrix of so many classes would be 2 TB.
    classes = 500_000
    labels = np.array([7, classes - 1])
    logits = np.zeros((1, 2, classes), dtype=np.float32)
    logits[0, :, 9] = 1
    plain = dataclasses.replace(hand_made_policy(PAPER_RULE, (None, None)), temperatures=[1.0])
    plain = dataclasses.replace(
        plain, points=[plain.points[0].model_copy(update={"thresholds": []})], default="no-exit"
    )
    assert Confusion.of(TestLogits(logits, labels), plain).mistakes() == [(7, 9, 1), (classes - 1, 9, 1)]
