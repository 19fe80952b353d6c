from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erde import policy
from tests import oracles


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
    assert policy.SCORES.keys() == expected.keys()
    for name, value in expected.items():
        found = policy.score(logits, name, sharpness)
        assert found.dtype == np.float64
        assert found.shape == (3, 20)
        np.testing.assert_allclose(found, value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", policy.SCORES)
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
    found = float(policy.score(np.array(logits, np.float32), name, sharpness))
    assert least - 1e-12 <= found <= 1 + 1e-12


@pytest.mark.parametrize(("name", "least"), [("entropy", 0.0), ("max_probability", 0.25), ("margin", 0.0)])
def test_bounds_are_reached(name: str, least: float) -> None:
    assert float(policy.score(np.zeros(4, np.float32), name, 1.0)) == pytest.approx(least, abs=1e-12)
    assert float(policy.score(np.array([900.0, 0, 0, 0], np.float32), name, 1.0)) == pytest.approx(1)


@pytest.mark.parametrize("name", policy.SCORES)
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
    found = policy.answer_probabilities(logits, exits, [1.0, 2.0, 0.5])
    expected = [oracles.softmax(logits[n], [1.0, 2.0, 0.5][e]) for n, e in enumerate(exits)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 1)
    assert (found.argmax(-1) == logits.argmax(-1)).all()
