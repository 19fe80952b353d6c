from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from erde.calibration import harm
from erde.common.splits import TuneLogits
from erde.policy import rule as policy
from tests.helpers.oracles import synthetic_logits


def tune_logits(images: int = 600) -> tuple[TuneLogits, np.ndarray]:
    tune = TuneLogits(*synthetic_logits(0, images))
    return tune, tune.logits[-1].argmax(-1) == tune.labels


def test_logistic_regression_against_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(400, 5)) * [1, 2, 0.5, 1, 1] + [0, 1, 0, -3, 0]
    positive = generator.random(400) < 1 / (1 + np.exp(-(features @ [1, -0.5, 0.3, 0, 0.8] - 1)))
    for ridge in (0.1, 10.0, 1000.0):
        bias, weights = harm.fit_logistic(features, positive, ridge)
        oracle = LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=5000).fit(features, positive)
        assert bias == pytest.approx(oracle.intercept_[0], abs=1e-3)
        np.testing.assert_allclose(weights, oracle.coef_[0], atol=1e-3)


def test_the_fitted_score_is_the_regression_on_standardised_features() -> None:
    tune, right = tune_logits()
    for index, fitted in enumerate(harm.fit_harm(tune, right)):
        so_far = list(tune.logits[: index + 1])
        numbers, labels = policy.harm_features(so_far)
        features = np.concatenate([numbers, np.eye(5)[labels]], axis=1)
        deviation = features.std(0)
        standard = (features - features.mean(0)) / np.where(deviation > 0, deviation, 1)
        harmed = right & (labels != tune.labels)
        oracle = LogisticRegression(C=1 / harm.RIDGE, tol=1e-10, max_iter=5000).fit(standard, harmed)
        np.testing.assert_allclose(fitted.score(so_far), oracle.predict_proba(standard)[:, 0], atol=1e-3)


def test_it_ranks_harm_of_new_images() -> None:
    tune, right = tune_logits(1500)
    fresh = TuneLogits(*synthetic_logits(1, 3000))
    fresh_right = fresh.logits[-1].argmax(-1) == fresh.labels
    for index, fitted in enumerate(harm.fit_harm(tune, right)):
        scores = fitted.score(list(fresh.logits[: index + 1]))
        harmed = fresh_right & (fresh.logits[index].argmax(-1) != fresh.labels)
        surest = np.argsort(-scores)[:1000]
        assert harmed[surest].mean() < 0.4 * harmed.mean()
        # It is a probability: on average it says how much harm there is.
        assert (1 - scores).mean() == pytest.approx(harmed.mean(), rel=0.25)


def test_out_of_fold_scores_come_from_regressions_that_did_not_see_the_image() -> None:
    tune, right = tune_logits(300)
    scores = harm.out_of_fold_scores(tune, right)
    assert (scores[-1] == 1).all()
    folds = np.random.default_rng(0).permutation(300) % harm.FOLDS
    flipped = tune.labels.copy()
    image = int(np.flatnonzero((folds == 2) & right)[0])
    flipped[image] = (flipped[image] + 1) % 5
    changed = harm.out_of_fold_scores(TuneLogits(tune.logits, flipped), right)
    # Another label of one image moves the regressions of the other folds, never the one that scores it.
    np.testing.assert_array_equal(scores[:, folds == 2], changed[:, folds == 2])
    assert (scores[:2, folds != 2] != changed[:2, folds != 2]).any()
    own = np.stack(
        [
            predictor.score(list(tune.logits[: i + 1]))
            for i, predictor in enumerate(harm.fit_harm(tune, right))
        ]
    )
    assert (own != scores[:2]).mean() > 0.99


@pytest.mark.parametrize("always", [True, False])
def test_without_both_kinds_the_score_is_a_constant(always: bool) -> None:
    logits, labels = synthetic_logits(0, 100)
    logits[0, np.arange(100), labels] = -50 if always else 50
    fitted = harm.fit_harm(TuneLogits(logits, labels), np.ones(100, dtype=bool))[0]
    scores = fitted.score([logits[0]])
    assert len(set(scores.tolist())) == 1
    assert scores[0] == pytest.approx(0.5 / 101 if always else 100.5 / 101)
