from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erde.common.splits import TestLogits
from erde.evaluation.comparison import Answers, compare, compare_arms, mcnemar, paired_intervals
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.rule import PAPER_RULE, ExitRule
from tests.helpers.hand_made import COST, hand_made_policy
from tests.helpers.oracles import synthetic_logits


def random_answers(seed: int, images: int, share: float, macs: tuple[int, ...]) -> Answers:
    generator = np.random.default_rng(seed)
    return Answers(
        generator.integers(len(macs), size=images).astype(np.int64), generator.random(images) < share, macs
    )


def differences(first: Answers, second: Answers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    accuracy = [float(a) - float(b) for a, b in zip(first.right, second.right, strict=True)]
    macs = [
        float(first.exit_macs[a] - second.exit_macs[b])
        for a, b in zip(first.exits, second.exits, strict=True)
    ]
    return np.array(accuracy), np.array(macs)


def test_compare_by_hand() -> None:
    first = Answers(np.array([0, 0, 1, 1]), np.array([True, True, True, False]), (10, 30))
    second = Answers(np.array([0, 0, 0, 0]), np.array([True, False, False, True]), (5,))
    comparison = compare("a", first, "b", second, "default")
    assert (comparison.first, comparison.second, comparison.at) == ("a", "b", "default")
    assert comparison.accuracy_difference == 0.25
    assert comparison.macs_difference == 15
    assert (comparison.only_first_right, comparison.only_second_right) == (2, 1)
    assert comparison.mcnemar_p_value == 1
    assert comparison.macs_interval[0] >= 5
    assert comparison.macs_interval[1] <= 25


def test_an_arm_against_itself() -> None:
    answers = random_answers(0, 300, 0.7, (10, 20, 40))
    comparison = compare("a", answers, "b", answers, "no-exit")
    assert comparison.accuracy_difference == comparison.macs_difference == 0
    assert comparison.accuracy_interval == comparison.macs_interval == (0, 0)
    assert comparison.only_first_right == comparison.only_second_right == 0
    assert comparison.mcnemar_p_value == 1


def test_the_other_way_round_is_the_negative() -> None:
    first, second = random_answers(0, 500, 0.8, (10, 20, 40)), random_answers(1, 500, 0.7, (15, 60))
    forward = compare("a", first, "b", second, "default")
    backward = compare("b", second, "a", first, "default")
    assert backward.accuracy_difference == -forward.accuracy_difference != 0
    assert backward.macs_difference == -forward.macs_difference != 0
    assert (backward.only_first_right, backward.only_second_right) == (
        forward.only_second_right,
        forward.only_first_right,
    )
    assert backward.mcnemar_p_value == forward.mcnemar_p_value
    assert backward.accuracy_interval == pytest.approx(
        (-forward.accuracy_interval[1], -forward.accuracy_interval[0]), abs=0.005
    )


def test_intervals_against_a_loop_over_resampled_images() -> None:
    first, second = random_answers(2, 200, 0.8, (10, 20, 40)), random_answers(3, 200, 0.75, (15, 60))
    accuracy, macs = differences(first, second)
    comparison = compare("a", first, "b", second, "default")
    generator = np.random.default_rng(4)
    means = []
    for _ in range(10_000):
        images = generator.integers(200, size=200)
        means.append((accuracy[images].mean(), macs[images].mean()))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    assert comparison.accuracy_interval == pytest.approx((low[0], high[0]), abs=0.006)
    assert comparison.macs_interval == pytest.approx((low[1], high[1]), abs=0.06 * (high[1] - low[1]))


def test_intervals_against_scipys_paired_bootstrap() -> None:
    # Answers that hang together: unpaired intervals would be wider by half.
    generator = np.random.default_rng(5)
    easy = generator.random(400) < 0.7
    first = Answers(generator.integers(2, size=400), easy | (generator.random(400) < 0.2), (10, 40))
    second = Answers(first.exits, easy | (generator.random(400) < 0.1), (10, 40))
    comparison = compare("a", first, "b", second, "default")
    expected = scipy.stats.bootstrap(
        (first.right.astype(float), second.right.astype(float)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(6),
    ).confidence_interval
    assert comparison.accuracy_interval == pytest.approx((expected.low, expected.high), abs=0.004)
    # The same exits: no resample has another difference.
    assert comparison.macs_interval == (0, 0)


def test_intervals_of_many_images_are_normal() -> None:
    first, second = random_answers(7, 10_000, 0.8, (10, 20, 40)), random_answers(8, 10_000, 0.75, (15, 60))
    comparison = compare("a", first, "b", second, "default")
    for values, interval in zip(
        differences(first, second), (comparison.accuracy_interval, comparison.macs_interval), strict=True
    ):
        half = 1.96 * values.std() / 100
        assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)


def test_the_seed_decides() -> None:
    first, second = random_answers(0, 500, 0.8, (10, 20, 40)), random_answers(1, 500, 0.7, (15, 60))
    accuracy, macs = (values.astype(np.int64) for values in differences(first, second))
    assert paired_intervals(accuracy, macs, seed=3) == paired_intervals(accuracy, macs, seed=3)
    assert paired_intervals(accuracy, macs, seed=3)[1] != paired_intervals(accuracy, macs, seed=4)[1]


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_mcnemar_against_the_binomial_sum(only_first: int, only_second: int) -> None:
    trials, fewer = only_first + only_second, min(only_first, only_second)
    # Both tails of a fair coin; the middle belongs to both.
    tail = sum(math.comb(trials, successes) for successes in range(fewer + 1)) / 2**trials
    assert mcnemar(only_first, only_second) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 7) == pytest.approx(2 * 9 / 256)
    assert mcnemar(0, 0) == 1


def test_every_pair_of_arms_in_a_stable_order() -> None:
    logits, labels = synthetic_logits(3, 400)
    other, _ = synthetic_logits(3, 400, signals=(0.9, 1.2, 1.5))
    fixed = Cost((60,), 60)
    arms = {
        "erde": (TestLogits(logits, labels), hand_made_policy(ExitRule("margin"), (0.6, 0.4)), COST),
        "ce": (TestLogits(other, labels), hand_made_policy(PAPER_RULE, (0.5, None)), COST),
        "fixed": (TestLogits(logits[1:2], labels), hand_made_policy(cost=fixed), fixed),
    }
    comparisons = compare_arms(arms)
    pairs = [("erde", "ce"), ("erde", "fixed"), ("ce", "fixed")]
    assert [(comparison.first, comparison.second, comparison.at) for comparison in comparisons] == [
        (*pair, at) for pair in pairs for at in ("default", "no-exit")
    ]
    final = {name: (test.logits[-1].argmax(-1) == labels).mean() for name, (test, _, _) in arms.items()}
    for comparison in comparisons[1::2]:
        assert comparison.accuracy_difference == pytest.approx(
            final[comparison.first] - final[comparison.second]
        )
        assert (
            comparison.macs_difference
            == arms[comparison.first][2].exit_macs[-1] - arms[comparison.second][2].exit_macs[-1]
        )
        assert comparison.macs_interval == (comparison.macs_difference, comparison.macs_difference)
    # At the default points: image by image.
    scores = {"erde": policy.margin_score(logits), "ce": policy.entropy_score(other)}
    levels = {"erde": (0.6, 0.4), "ce": (0.5, math.inf)}
    right, macs = {}, {}
    for name, values in scores.items():
        exits = [next((k for k in (0, 1) if values[k, n] > levels[name][k]), 2) for n in range(400)]
        answers = [arms[name][0].logits[k, n].argmax() for n, k in enumerate(exits)]
        right[name] = np.array(answers) == labels
        macs[name] = np.array([COST.exit_macs[k] for k in exits])
    assert comparisons[0].accuracy_difference == pytest.approx(right["erde"].mean() - right["ce"].mean())
    assert comparisons[0].macs_difference == pytest.approx(macs["erde"].mean() - macs["ce"].mean())
    assert comparisons[0].only_first_right == (right["erde"] & ~right["ce"]).sum()
    assert comparisons[0].only_second_right == (right["ce"] & ~right["erde"]).sum()
    # Which other arms there are changes nothing.
    assert compare_arms({name: arms[name] for name in ("erde", "fixed")}) == comparisons[2:4]


def test_ensembles_answer_together() -> None:
    test = TestLogits(*synthetic_logits(3, 400))
    together = hand_made_policy(ExitRule("margin", ensemble="arithmetic"), (None, 0.3))
    answers = Answers.of(test, together, COST, "default")
    early = answers.exits == 1
    p = np.exp(policy.log_softmax(test.logits[:2])).mean(axis=0)
    assert early.any()
    assert not early.all()
    assert (answers.right[early] == (p.argmax(-1) == test.labels)[early]).all()
    assert (answers.right[early] != (test.logits[1].argmax(-1) == test.labels)[early]).any()


def test_arms_must_have_seen_the_same_images() -> None:
    first, second = (TestLogits(*synthetic_logits(seed, 100)) for seed in (1, 2))
    with pytest.raises(AssertionError, match="other images"):
        compare_arms({"a": (first, hand_made_policy(), COST), "b": (second, hand_made_policy(), COST)})
