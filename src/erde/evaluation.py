"""What a calibrated policy does on the test split: accuracy, costs, rankings, the curve.

Everything is computed from logits of the exported stages, so it is what the runtime will do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from erde import policy
from erde.bundle import OperatingPoint
from erde.calibration import CalibratedPolicy, Cost, ScoredSplit, wilson_interval
from erde.results import Curve, ExitMeasures
from erde.splits import TestLogits

# Points of a curve that are kept for plots; the whole path is finer than a screen.
CURVE_POINTS = 160
# torch, ONNX Runtime and batch sizes differ in the last bits: a score this near its threshold may tip over.
BAND = 1e-5


def expected_calibration_error(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], bins: int = 15
) -> float:
    """``sum_b (n_b / n) |accuracy_b - confidence_b|`` over equal bins of the max probability (Guo 2017)."""
    confidence = probabilities.max(axis=-1)
    right = probabilities.argmax(axis=-1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float | None:
    """The chance that a positive scores above a negative, ties counted half; None where one is absent."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return None
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def measure_exits(
    test: TestLogits, calibrated: CalibratedPolicy, reference_right: NDArray[np.bool_] | None
) -> list[ExitMeasures]:
    """Accuracy, NLL, ECE (both tempered) and the score's AUROC of every exit, had it answered every image."""
    scored = ScoredSplit.of(test, calibrated.score, calibrated.sharpness, reference_right)
    rows = np.arange(len(test))
    measures = []
    for index, temperature in enumerate(calibrated.temperatures):
        log_probabilities = policy.log_softmax(test.logits[index], temperature)
        right = scored.right[index]
        measures.append(
            ExitMeasures(
                accuracy=float(right.mean()),
                accuracy_interval=wilson_interval(int(right.sum()), len(test)),
                nll=float(-log_probabilities[rows, test.labels].mean()),
                ece=expected_calibration_error(np.exp(log_probabilities), test.labels),
                auroc_correctness=auroc(scored.scores[index], right),
                # Harm is what the score must rank low.
                auroc_harm=auroc(scored.scores[index], ~scored.harm[index]),
                temperature=temperature,
            )
        )
    return measures


def measure_points(
    test: TestLogits, calibrated: CalibratedPolicy, cost: Cost, reference_right: NDArray[np.bool_] | None
) -> list[OperatingPoint]:
    """The operating points with what they do on test."""
    scored = ScoredSplit.of(test, calibrated.score, calibrated.sharpness, reference_right)
    return [
        point.model_copy(update={"test": scored.measure(point.thresholds, cost)})
        for point in calibrated.points
    ]


def measure_curve(
    test: TestLogits, calibrated: CalibratedPolicy, cost: Cost, reference_right: NDArray[np.bool_] | None
) -> Curve:
    """Accuracy against MACs on test, along the path of thresholds that tune chose."""
    scored = ScoredSplit.of(test, calibrated.score, calibrated.sharpness, reference_right)
    path = calibrated.path.thresholds
    kept = np.unique(np.linspace(0, len(path) - 1, min(CURVE_POINTS, len(path))).astype(int))
    measured = [scored.measure(path[index], cost) for index in kept]
    return Curve(
        macs=[one.macs for one in measured],
        accuracy=[one.accuracy for one in measured],
        risk=[one.risk for one in measured],
        exit_rates=[one.exit_rates for one in measured],
    )


def in_band(
    scores: NDArray[np.float64], thresholds: policy.Thresholds, band: float = BAND
) -> NDArray[np.bool_]:
    """Images (N,) with a score within ``band`` of the threshold of an enabled exit that they reach."""
    near = np.zeros(scores.shape[-1], dtype=np.bool_)
    exits = policy.decide(scores, thresholds)
    for index, threshold in enumerate(thresholds):
        if threshold is not None:
            near |= (np.abs(scores[index] - threshold) <= band) & (exits >= index)
    return near
