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
    found = compare("a", first, "b", second, "default")
    assert (found.first, found.second, found.at) == ("a", "b", "default")
    assert found.accuracy_difference == 0.25
    assert found.macs_difference == 15
    assert (found.only_first_right, found.only_second_right) == (2, 1)
    assert found.mcnemar_p_value == 1
    assert found.macs_interval[0] >= 5
    assert found.macs_interval[1] <= 25


def test_an_arm_against_itself() -> None:
    answers = random_answers(0, 300, 0.7, (10, 20, 40))
    found = compare("a", answers, "b", answers, "no-exit")
    assert found.accuracy_difference == found.macs_difference == 0
    assert found.accuracy_interval == found.macs_interval == (0, 0)
    assert found.only_first_right == found.only_second_right == 0
    assert found.mcnemar_p_value == 1


def test_the_other_way_round_is_the_negative() -> None:
    first, second = random_answers(0, 500, 0.8, (10, 20, 40)), random_answers(1, 500, 0.7, (15, 60))
    one = compare("a", first, "b", second, "default")
    other = compare("b", second, "a", first, "default")
    assert other.accuracy_difference == -one.accuracy_difference != 0
    assert other.macs_difference == -one.macs_difference != 0
    assert (other.only_first_right, other.only_second_right) == (one.only_second_right, one.only_first_right)
    assert other.mcnemar_p_value == one.mcnemar_p_value
    assert other.accuracy_interval == pytest.approx(
        (-one.accuracy_interval[1], -one.accuracy_interval[0]), abs=0.005
    )


def test_intervals_against_a_loop_over_resampled_images() -> None:
    first, second = random_answers(2, 200, 0.8, (10, 20, 40)), random_answers(3, 200, 0.75, (15, 60))
    accuracy, macs = differences(first, second)
    found = compare("a", first, "b", second, "default")
    generator = np.random.default_rng(4)
    means = []
    for _ in range(10_000):
        images = generator.integers(200, size=200)
        means.append((accuracy[images].mean(), macs[images].mean()))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    assert found.accuracy_interval == pytest.approx((low[0], high[0]), abs=0.006)
    assert found.macs_interval == pytest.approx((low[1], high[1]), abs=0.06 * (high[1] - low[1]))


def test_intervals_against_scipys_paired_bootstrap() -> None:
    # Answers that hang together: unpaired intervals would be wider by half.
    generator = np.random.default_rng(5)
    easy = generator.random(400) < 0.7
    first = Answers(generator.integers(2, size=400), easy | (generator.random(400) < 0.2), (10, 40))
    second = Answers(first.exits, easy | (generator.random(400) < 0.1), (10, 40))
    found = compare("a", first, "b", second, "default")
    expected = scipy.stats.bootstrap(
        (first.right.astype(float), second.right.astype(float)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(6),
    ).confidence_interval
    assert found.accuracy_interval == pytest.approx((expected.low, expected.high), abs=0.004)
    # The same exits: no resample has another difference.
    assert found.macs_interval == (0, 0)


def test_intervals_of_many_images_are_normal() -> None:
    first, second = random_answers(7, 10_000, 0.8, (10, 20, 40)), random_answers(8, 10_000, 0.75, (15, 60))
    found = compare("a", first, "b", second, "default")
    for values, interval in zip(
        differences(first, second), (found.accuracy_interval, found.macs_interval), strict=True
    ):
        half = 1.96 * values.std() / 100
        assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)


def test_the_seed_decides() -> None:
    first, second = random_answers(0, 500, 0.8, (10, 20, 40)), random_answers(1, 500, 0.7, (15, 60))
    accuracy, macs = (one.astype(np.int64) for one in differences(first, second))
    assert paired_intervals(accuracy, macs, seed=3) == paired_intervals(accuracy, macs, seed=3)
    assert paired_intervals(accuracy, macs, seed=3)[1] != paired_intervals(accuracy, macs, seed=4)[1]


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_mcnemar_against_the_binomial_sum(only_first: int, only_second: int) -> None:
    trials, fewer = only_first + only_second, min(only_first, only_second)
    # Both tails of a fair coin; the middle belongs to both.
    tail = sum(math.comb(trials, one) for one in range(fewer + 1)) / 2**trials
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
    found = compare_arms(arms)
    pairs = [("erde", "ce"), ("erde", "fixed"), ("ce", "fixed")]
    assert [(one.first, one.second, one.at) for one in found] == [
        (*pair, at) for pair in pairs for at in ("default", "no-exit")
    ]
    final = {name: (test.logits[-1].argmax(-1) == labels).mean() for name, (test, _, _) in arms.items()}
    for one in found[1::2]:
        assert one.accuracy_difference == pytest.approx(final[one.first] - final[one.second])
        assert one.macs_difference == arms[one.first][2].exit_macs[-1] - arms[one.second][2].exit_macs[-1]
        assert one.macs_interval == (one.macs_difference, one.macs_difference)
    # At the default points: image by image.
    scores = {"erde": policy.margin_score(logits), "ce": policy.entropy_score(other)}
    levels = {"erde": (0.6, 0.4), "ce": (0.5, math.inf)}
    right, macs = {}, {}
    for name, values in scores.items():
        exits = [next((k for k in (0, 1) if values[k, n] > levels[name][k]), 2) for n in range(400)]
        answers = [arms[name][0].logits[k, n].argmax() for n, k in enumerate(exits)]
        right[name] = np.array(answers) == labels
        macs[name] = np.array([COST.exit_macs[k] for k in exits])
    assert found[0].accuracy_difference == pytest.approx(right["erde"].mean() - right["ce"].mean())
    assert found[0].macs_difference == pytest.approx(macs["erde"].mean() - macs["ce"].mean())
    assert found[0].only_first_right == (right["erde"] & ~right["ce"]).sum()
    assert found[0].only_second_right == (right["ce"] & ~right["erde"]).sum()
    # Which other arms there are changes nothing.
    assert compare_arms({name: arms[name] for name in ("erde", "fixed")}) == found[2:4]


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
    one, two = (TestLogits(*synthetic_logits(seed, 100)) for seed in (1, 2))
    with pytest.raises(AssertionError, match="other images"):
        compare_arms({"a": (one, hand_made_policy(), COST), "b": (two, hand_made_policy(), COST)})
