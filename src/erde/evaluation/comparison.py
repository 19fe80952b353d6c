"""Arms against each other on the same test images: paired differences, intervals and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.thresholds import ScoredSplit
from erde.common.splits import TestLogits
from erde.evaluation.results import Comparison, Interval
from erde.policy import rule as policy
from erde.policy.cost import Cost

DRAWS = 10_000
At = Literal["default", "no-exit"]
PLACES: tuple[At, ...] = ("default", "no-exit")


@dataclass(frozen=True)
class Answers:
    """The answers of an arm to N images: the exits (N,), whether they are right (N,), the MACs of each exit (E,)."""

    exits: NDArray[np.int64]
    right: NDArray[np.bool_]
    exit_macs: tuple[int, ...]

    @classmethod
    def of(cls, test: TestLogits, calibrated: CalibratedPolicy, cost: Cost, at: At) -> Answers:
        """The answers at the default operating point, or with every early exit disabled."""
        scored = ScoredSplit.of(test, calibrated.rule, None)
        thresholds: policy.Thresholds = [None] * (len(cost.exit_macs) - 1)
        if at == "default":
            thresholds = calibrated.default_point().thresholds
        exits = policy.decide(scored.scores, thresholds)
        return cls(exits, policy.take_exit(scored.right, exits), cost.exit_macs)


def compare_arms(arms: Mapping[str, tuple[TestLogits, CalibratedPolicy, Cost]]) -> list[Comparison]:
    """Every pair of arms, earlier minus later in the order of ``arms``; each at its default point, then no-exit.

    All arms must have seen the same test images in the same order.
    """
    answers = {
        name: {at: Answers.of(test, calibrated, cost, at) for at in PLACES}
        for name, (test, calibrated, cost) in arms.items()
    }
    for first, second in combinations(arms, 2):
        assert np.array_equal(arms[first][0].labels, arms[second][0].labels), (
            f"{first}, {second}: other images"
        )
    return [
        compare(first, answers[first][at], second, answers[second][at], at)
        for first, second in combinations(arms, 2)
        for at in PLACES
    ]


def compare(first_name: str, first: Answers, second_name: str, second: Answers, at: At) -> Comparison:
    """``first`` minus ``second`` in accuracy and mean MACs per image, paired image by image.

    Intervals are percentiles (95 %) of the paired bootstrap over images; McNemar's exact test (1947) is of
    "an image that only one of the two gets right is as likely the first's as the second's".
    """
    assert first.right.shape == second.right.shape
    only_first = int((first.right & ~second.right).sum())
    only_second = int((second.right & ~first.right).sum())
    accuracy = first.right.astype(np.int64) - second.right
    macs = np.asarray(first.exit_macs)[first.exits] - np.asarray(second.exit_macs)[second.exits]
    accuracy_interval, macs_interval = paired_intervals(accuracy, macs)
    return Comparison(
        first=first_name,
        second=second_name,
        at=at,
        accuracy_difference=float(accuracy.mean()),
        accuracy_interval=accuracy_interval,
        macs_difference=float(macs.mean()),
        macs_interval=macs_interval,
        only_first_right=only_first,
        only_second_right=only_second,
        mcnemar_p_value=mcnemar(only_first, only_second),
    )


def paired_intervals(
    accuracy: NDArray[np.int64], macs: NDArray[np.int64], seed: int = 0, draws: int = DRAWS
) -> tuple[Interval, Interval]:
    """95 % bootstrap intervals of the means of two differences per image, (N,) each.

    Images with the same two differences are interchangeable (there are at most three times the pairs of
    exits of these): how often each kind is drawn is multinomial, so this is the bootstrap over images itself.
    """
    kinds, counts = np.unique(np.stack([accuracy, macs]), axis=1, return_counts=True)
    images = len(accuracy)
    drawn = np.random.default_rng(seed).multinomial(images, counts / images, size=draws)
    low, high = np.quantile(drawn @ kinds.T.astype(np.float64) / images, [0.025, 0.975], axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test, ``Bin(only_first + only_second, 1/2)``; 1 for none."""
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)
