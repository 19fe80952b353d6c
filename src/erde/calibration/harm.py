"""The learned score: per intermediate exit a small logistic regression for harm, fitted on tune.

Harm is what the risk counts (the reference right, this exit wrong), so ranking images by its probability
is what thresholds want; policy.rule says what the regression looks at and evaluates it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from erde.common.splits import TuneLogits
from erde.policy.rule import HarmParameters, harm_features

# Ridge penalty on standardised features, in units of one image's log-likelihood. Between 1 and 30 nothing
# changed by more than noise on CIFAR-10; above 100 the score got worse.
RIDGE = 10.0
FOLDS = 5

Array = NDArray[np.float64]


def fit_harm(tune: TuneLogits, reference_right: NDArray[np.bool_]) -> tuple[HarmParameters, ...]:
    """The E-1 regressions, fitted on all of tune; ``reference_right`` (N,)."""
    return tuple(
        _fit_exit(tune, reference_right, index, np.arange(len(tune))) for index in range(len(tune.logits) - 1)
    )


def out_of_fold_scores(tune: TuneLogits, reference_right: NDArray[np.bool_]) -> Array:
    """Scores (E, N) of tune images by regressions that did not see them: what new images would get.

    Thresholds are searched on these, since the scores of the images that a regression was fitted on flatter it.
    """
    exits, images = tune.logits.shape[:2]
    folds = np.random.default_rng(0).permutation(images) % FOLDS
    scores = np.ones((exits, images))
    for index in range(exits - 1):
        for fold in range(FOLDS):
            fitted = _fit_exit(tune, reference_right, index, np.flatnonzero(folds != fold))
            held_out = np.flatnonzero(folds == fold)
            scores[index, held_out] = fitted.score(list(tune.logits[: index + 1, held_out]))
    return scores


def _fit_exit(
    tune: TuneLogits, reference_right: NDArray[np.bool_], index: int, rows: NDArray[np.int64]
) -> HarmParameters:
    logits = tune.logits[: index + 1, rows]
    numbers, labels = harm_features(list(logits))
    classes = logits.shape[-1]
    harm = reference_right[rows] & (labels != tune.labels[rows])
    if harm.all() or not harm.any():
        # Nothing to tell apart: a constant, with half an image of each kind added.
        share = (harm.sum() + 0.5) / (len(harm) + 1)
        return HarmParameters(float(np.log(share / (1 - share))), (0.0,) * numbers.shape[1], (0.0,) * classes)
    features = np.concatenate([numbers, np.eye(classes)[labels]], axis=1)
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation[deviation == 0] = 1.0
    bias, weights = fit_logistic((features - mean) / deviation, harm, RIDGE)
    weights = weights / deviation
    split = numbers.shape[1]
    return HarmParameters(
        float(bias - weights @ mean), tuple(weights[:split].tolist()), tuple(weights[split:].tolist())
    )


def fit_logistic(features: Array, positive: NDArray[np.bool_], ridge: float) -> tuple[float, Array]:
    """Bias and weights (F,) of the logistic regression with the least ``NLL sum + ridge/2 |weights|²``."""
    signs = np.where(positive, 1.0, -1.0)

    def objective(parameters: Array) -> tuple[float, Array]:
        margins = signs * (parameters[0] + features @ parameters[1:])
        # d/dm ln(1 + e^-m) = -σ(-m)
        slopes = -signs * expit(-margins)
        gradient = np.concatenate([[slopes.sum()], features.T @ slopes + ridge * parameters[1:]])
        value = np.logaddexp(0.0, -margins).sum() + ridge / 2 * parameters[1:] @ parameters[1:]
        return float(value), gradient

    minimum = minimize(
        objective, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500}
    )
    return float(minimum.x[0]), np.asarray(minimum.x[1:])
