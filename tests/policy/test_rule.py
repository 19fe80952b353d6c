from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erde.policy import rule as policy
from tests.helpers import oracles


def some_logits(
    seed: int = 0, shape: tuple[int, ...] = (3, 20, 6), spread: float = 3.0
) -> NDArray[np.float32]:
    return (spread * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_softmax_against_scipy(temperature: float) -> None:
    logits = some_logits()
    expected = scipy.special.softmax(logits.astype(np.float64) / temperature, axis=-1)
    np.testing.assert_allclose(policy.softmax(logits, temperature), expected, rtol=1e-12)
    np.testing.assert_allclose(
        policy.log_softmax(logits, temperature), np.log(expected), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("sharpness", [0.25, 0.5, 1.0, 2.0])
def test_scores_against_independent_formulas(sharpness: float) -> None:
    logits = some_logits()
    p = oracles.softmax(logits, sharpness)
    rising = np.sort(p, axis=-1)
    expected = {
        "entropy": 1 - scipy.stats.entropy(p, axis=-1) / np.log(6),
        "max_probability": rising[..., -1],
        "margin": rising[..., -1] - rising[..., -2],
    }
    expected["energy"] = sharpness * scipy.special.logsumexp(logits.astype(np.float64) / sharpness, axis=-1)
    assert policy.OWN_SCORES.keys() == expected.keys()
    for name, value in expected.items():
        scores = policy.score(logits, name, sharpness)
        assert scores.dtype == np.float64
        assert scores.shape == (3, 20)
        np.testing.assert_allclose(scores, value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", policy.OWN_SCORES)
def test_higher_is_surer(name: str) -> None:
    sure = np.array([0.0, 1.0, 2.0, 4.0, 8.0])[:, None] * np.array([1.0, 0.0, 0.0, 0.0])
    assert bool((np.diff(policy.score(sure, name, 1.0)) > 0).all())


@pytest.mark.parametrize(("name", "least"), [("entropy", 0.0), ("max_probability", 0.25), ("margin", 0.0)])
@given(
    logits=st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4),
    sharpness=st.sampled_from([0.25, 1.0, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_bounds(name: str, least: float, logits: list[float], sharpness: float) -> None:
    value = float(policy.score(np.array(logits, np.float32), name, sharpness))
    assert least - 1e-12 <= value <= 1 + 1e-12


@pytest.mark.parametrize(("name", "least"), [("entropy", 0.0), ("max_probability", 0.25), ("margin", 0.0)])
def test_bounds_are_reached(name: str, least: float) -> None:
    assert float(policy.score(np.zeros(4, np.float32), name, 1.0)) == pytest.approx(least, abs=1e-12)
    assert float(policy.score(np.array([900.0, 0, 0, 0], np.float32), name, 1.0)) == pytest.approx(1)


@pytest.mark.parametrize("name", ["entropy", "max_probability", "margin"])
def test_sharpness_divides_the_logits(name: str) -> None:
    logits = some_logits().astype(np.float64)
    np.testing.assert_allclose(
        policy.score(logits, name, 0.5), policy.score(2 * logits, name, 1.0), rtol=1e-12
    )
    assert float(np.abs(policy.score(logits, name, 0.5) - policy.score(logits, name, 1.0)).max()) > 0.05


def test_float32_logits_are_scored_in_float64() -> None:
    # Half an eps of float32 apart: a float32 score could not tell them apart.
    near = np.array([[10.0, 0.0], [10.0 + 1e-6, 0.0]], np.float32)
    assert near[0, 0] != near[1, 0]
    first, second = policy.score(near, "max_probability", 1.0)
    assert 0 < second - first < 1e-9


def test_the_sharpness_of_the_energy_is_a_temperature() -> None:
    # Low temperatures leave the largest logit, high ones the mean with an offset of s ln K.
    logits = some_logits().astype(np.float64)
    np.testing.assert_allclose(policy.score(logits, "energy", 1e-3), logits.max(-1), atol=1e-2)
    np.testing.assert_allclose(
        policy.score(logits, "energy", 1e5) - 1e5 * np.log(6), logits.mean(-1), atol=1e-3
    )


# ---------------------------------------------------------------- rules that look back


def test_patience_counts_the_exits_that_agree_in_a_row() -> None:
    # Labels by exit (rows) of four images.
    labels = np.array([[0, 1, 2, 0], [0, 2, 2, 1], [1, 2, 2, 0], [1, 2, 2, 0]])
    logits = np.eye(3, dtype=np.float32)[labels]
    _, scores = policy.ExitRule("patience").apply(logits)
    assert scores.tolist() == [[1, 1, 1, 1], [2, 1, 2, 1], [1, 2, 3, 1], [2, 3, 4, 2]]
    # Patience 3: the first exit that ends three in a row.
    assert policy.decide(scores, [2.5, 2.5, 2.5]).tolist() == [3, 3, 2, 3]


def test_running_ensembles_against_scipy() -> None:
    logits = some_logits(shape=(4, 15, 6))
    each = scipy.special.softmax(logits.astype(np.float64), axis=-1)
    for index in range(1, 4):
        so_far = list(logits[: index + 1])
        mean = each[: index + 1].mean(axis=0)
        np.testing.assert_allclose(np.exp(policy.running_ensemble(so_far, "arithmetic")), mean, rtol=1e-9)
        product = np.exp(np.log(each[: index + 1]).mean(axis=0))
        geometric = scipy.special.softmax(policy.running_ensemble(so_far, "geometric"), axis=-1)
        np.testing.assert_allclose(geometric, product / product.sum(-1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize("ensemble", ["arithmetic", "geometric"])
def test_an_ensemble_answers_and_decides_together_but_for_the_final_exit(ensemble: policy.Ensemble) -> None:
    logits = some_logits(shape=(3, 200, 6))
    answers, scores = policy.ExitRule("margin", 0.5, ensemble).apply(logits)
    np.testing.assert_array_equal(answers[0], logits[0])
    np.testing.assert_array_equal(answers[2], logits[2])
    np.testing.assert_array_equal(answers[1], policy.running_ensemble(list(logits[:2]), ensemble))
    assert (answers[1].argmax(-1) != logits[1].argmax(-1)).any()
    for index in range(3):
        np.testing.assert_allclose(scores[index], policy.score(answers[index], "margin", 0.5))


HARM = policy.HarmParameters(
    -2.0, (0.7, -1.0, 0.3, 0.1, -0.2, 0.5, 0.4, -0.6), (0.1, -0.1, 0.2, 0.0, 0.3, -0.4)
)


def test_the_learned_score_against_a_loop() -> None:
    logits = some_logits(shape=(2, 40, 6))
    scores = HARM.score(list(logits))
    for n in range(40):
        p = [oracles.softmax(logits[e, n]) for e in range(2)]
        label, top = int(p[1].argmax()), np.sort(p[1])[::-1]
        features = [
            scipy.stats.entropy(p[1]) / np.log(6), top[0] - top[1], *np.log(top[:4]),
            np.log(p[0][label]), float(p[0].argmax() == label),
        ]  # fmt: skip
        log_odds = HARM.bias + np.dot(HARM.weights, features) + HARM.class_weights[label]
        assert scores[n] == pytest.approx(1 - scipy.special.expit(log_odds), rel=1e-9)
    assert policy.harm_feature_count(1, 6) == len(HARM.weights)
    assert policy.harm_feature_count(0, 3) == policy.harm_features([logits[0][:, :3]])[0].shape[1] == 5


def test_the_learned_score_stays_finite() -> None:
    wild = np.array([[1000.0, -1000, 0, 0, 0, 0]], np.float32)
    assert np.isfinite(HARM.score([wild, -wild])).all()


@pytest.mark.parametrize(
    "rule",
    [
        policy.ExitRule("entropy", 0.5),
        policy.ExitRule("patience"),
        policy.ExitRule("margin", 1.0, "arithmetic"),
        policy.ExitRule("max_probability", 2.0, "geometric"),
        policy.ExitRule("harm", 1.0, "none", (policy.HarmParameters(0.1, (0.2,) * 6, (0.1,) * 6), HARM)),
    ],
)
def test_a_rule_sees_no_later_exit_and_no_other_image(rule: policy.ExitRule) -> None:
    logits = some_logits(shape=(3, 30, 6))
    answers, scores = rule.apply(logits)
    changed = logits.copy()
    changed[2] = -changed[2]
    for before, after in zip((answers, scores), rule.apply(changed), strict=True):
        np.testing.assert_array_equal(before[:2], after[:2])
    some = np.array([3, 17, 5])
    for whole, part in zip((answers, scores), rule.apply(logits[:, some]), strict=True):
        np.testing.assert_allclose(whole[:, some], part, rtol=1e-12)
    assert rule.looks_back == (rule.score in ("patience", "harm") or rule.ensemble != "none")


def test_the_band() -> None:
    scores = np.array([[0.5, 0.5 + 1e-6, 0.9, 0.1], [0.3, 0.2, 0.3, 0.3 - 1e-6]])
    # The third image left before it came near the second threshold.
    assert policy.in_band(scores, [0.5, 0.3]).tolist() == [True, True, False, True]
    assert policy.in_band(scores, [None, 0.3]).tolist() == [True, False, True, True]
    assert not policy.in_band(scores, [None, None]).any()


# ---------------------------------------------------------------- decisions


def test_an_exit_is_taken_only_above_its_threshold() -> None:
    scores = np.array([0.5, np.nextafter(0.5, 1), np.nextafter(0.5, 0)])
    assert policy.leaves(scores, 0.5).tolist() == [False, True, False]
    assert policy.leaves(scores, None).tolist() == [False, False, False]
    assert policy.leaves(scores, -np.inf).all()


def test_none_disables_even_where_the_score_is_infinite() -> None:
    scores = np.full((2, 3), np.inf)
    assert policy.decide(scores, [None, None]).tolist() == [2, 2, 2]
    assert policy.decide(scores, [None, 0.0]).tolist() == [1, 1, 1]


def test_a_single_exit_answers_everything() -> None:
    assert policy.decide(np.zeros((1, 4)), []).tolist() == [0, 0, 0, 0]


LEVELS = [0.0, 0.25, 0.5, 0.75, 1.0]


@given(data=st.data(), exits=st.integers(2, 5), images=st.integers(1, 8), whole=st.booleans())
@settings(max_examples=150, deadline=None)
def test_decide_equals_a_slow_loop(data: st.DataObject, exits: int, images: int, whole: bool) -> None:
    rows = exits if whole else exits - 1
    scores = np.array(
        data.draw(
            st.lists(
                st.lists(st.sampled_from(LEVELS), min_size=images, max_size=images),
                min_size=rows,
                max_size=rows,
            )
        )
    )
    choice = st.one_of(st.none(), st.sampled_from(LEVELS))
    thresholds = data.draw(st.lists(choice, min_size=exits - 1, max_size=exits - 1))
    expected = []
    for image in range(images):
        answer = exits - 1
        for index in range(exits - 1):
            threshold = thresholds[index]
            if threshold is not None and scores[index, image] > threshold:
                answer = index
                break
        expected.append(answer)
    assert policy.decide(scores, thresholds).tolist() == expected


def test_take_exit() -> None:
    values = np.arange(24).reshape(3, 4, 2)
    exits = np.array([2, 0, 1, 0])
    assert policy.take_exit(values, exits).tolist() == [values[e, n].tolist() for n, e in enumerate(exits)]


def test_answer_probabilities_use_the_temperature_of_the_exit_that_answered() -> None:
    logits, exits = some_logits(shape=(5, 6)), np.array([0, 2, 1, 1, 2])
    probabilities = policy.answer_probabilities(logits, exits, [1.0, 2.0, 0.5])
    expected = [oracles.softmax(logits[n], [1.0, 2.0, 0.5][e]) for n, e in enumerate(exits)]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    np.testing.assert_allclose(probabilities.sum(-1), 1)
    assert (probabilities.argmax(-1) == logits.argmax(-1)).all()
