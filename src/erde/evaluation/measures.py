"""A calibrated policy on the test split: accuracy, costs, rankings, curves.

Everything is computed from logits of the exported stages, so it is what the runtime will do. Where the
reference is not the final exit, ``reference_right`` (N,) says which test images it gets right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.thresholds import ScoredSplit, ThresholdPath, sweep, wilson_interval
from erde.common.splits import Labels, TestLogits
from erde.evaluation.results import (
    ClassMeasures,
    Curve,
    EntropyHistograms,
    ExitMeasures,
    Interval,
    Oracle,
    Reliability,
    ScoreOutcome,
)
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.points import OperatingPoint
from erde.policy.rule import PAPER_RULE, ExitRule

# Points of a curve that are kept for plots; the whole path is finer than a screen.
CURVE_POINTS = 160
RELIABILITY_BINS = 15
ENTROPY_BINS = 20
# Resamples of the test images behind the interval of an area: its ends move by about 3 % of its width.
DRAWS = 1000
# Numbers of one block of resampling weights: draws x images.
_BLOCK = 2_000_000

Probabilities = NDArray[np.float64]
ReferenceRight = NDArray[np.bool_] | None


def measure_exits(
    test: TestLogits, calibrated: CalibratedPolicy, reference_right: ReferenceRight
) -> list[ExitMeasures]:
    """Each exit as if it had answered every image, and what it answers at the default operating point.

    Probabilities are the tempered softmax of what the exit answers with: for an ensemble, the ensemble's.
    """
    answers, scores = calibrated.rule.apply(test.logits)
    right = answers.argmax(axis=-1) == test.labels
    harm = (right[-1] if reference_right is None else reference_right) & ~right
    leaving = policy.decide(scores, calibrated.default_point().thresholds)
    rows = np.arange(len(test))
    measures = []
    for index, temperature in enumerate(calibrated.temperatures):
        log_probabilities = policy.log_softmax(answers[index], temperature)
        probabilities = np.exp(log_probabilities)
        bins = reliability(probabilities, test.labels)
        here = leaving == index
        measures.append(
            ExitMeasures(
                accuracy=float(right[index].mean()),
                accuracy_interval=wilson_interval(int(right[index].sum()), len(test)),
                nll=float(-log_probabilities[rows, test.labels].mean()),
                brier=brier_score(probabilities, test.labels),
                ece=calibration_error(bins),
                auroc_correctness=auroc(scores[index], right[index]),
                # Harm is what the score must rank low.
                auroc_harm=auroc(scores[index], ~harm[index]),
                temperature=temperature,
                answered=float(here.mean()),
                answered_accuracy=float(right[index, here].mean()) if here.any() else None,
                reliability=bins,
            )
        )
    return measures


def reliability(probabilities: Probabilities, labels: Labels, bins: int = RELIABILITY_BINS) -> Reliability:
    """Equal bins of the largest of ``probabilities`` (N, K): images, mean confidence and accuracy in each."""
    confidence = probabilities.max(axis=-1)
    right = probabilities.argmax(axis=-1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    images = np.maximum(count, 1)
    return Reliability(
        count=count.tolist(),
        confidence=(np.bincount(index, confidence, minlength=bins) / images).tolist(),
        accuracy=(np.bincount(index, right, minlength=bins) / images).tolist(),
    )


def calibration_error(bins: Reliability) -> float:
    """ECE: ``sum_b (n_b / n) |accuracy_b - confidence_b|`` (Guo et al. 2017, arXiv 1706.04599)."""
    count = np.asarray(bins.count)
    gaps = np.abs(np.asarray(bins.accuracy) - np.asarray(bins.confidence))
    return float((count * gaps).sum() / count.sum())


def brier_score(probabilities: Probabilities, labels: Labels) -> float:
    """``mean_n sum_k (p_nk - [k = y_n])^2`` over all classes, in [0, 2] (Brier 1950)."""
    true = probabilities[np.arange(len(labels)), labels]
    # (p_y - 1)^2 + the squares of the others, without a table of zeros and ones.
    return float(((probabilities**2).sum(axis=-1) - 2 * true + 1).mean())


def auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float | None:
    """The chance that a positive scores above a negative, ties counted half.

    None where there is nothing to rank: no positive, no negative, or the same score for all.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0 or (scores == scores[0]).all():
        return None
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def entropies(test: TestLogits, teacher_right: NDArray[np.bool_]) -> EntropyHistograms:
    """Counts of the normalised entropy ``H(softmax(logits)) / ln K`` of every exit, each exit on its own.

    Apart for images that the teacher gets right and wrong (``teacher_right``, (N,)): ERDE's aim is that the
    two differ.
    """
    normalised = 1.0 - policy.entropy_score(test.logits)
    index = np.clip((normalised * ENTROPY_BINS).astype(int), 0, ENTROPY_BINS - 1)

    def histograms(images: NDArray[np.bool_]) -> list[list[int]]:
        return [np.bincount(row[images], minlength=ENTROPY_BINS).tolist() for row in index]

    return EntropyHistograms(
        teacher_right=histograms(teacher_right), teacher_wrong=histograms(~teacher_right)
    )


# ---------------------------------------------------------------- exits together


def measure_points(
    test: TestLogits, calibrated: CalibratedPolicy, cost: Cost, reference_right: ReferenceRight
) -> list[OperatingPoint]:
    """The operating points with their measures on test."""
    scored = ScoredSplit.of(test, calibrated.rule, reference_right)
    swept = sweep(scored, [point.thresholds for point in calibrated.points])
    return [
        point.model_copy(update={"test": swept.measured(index, cost)})
        for index, point in enumerate(calibrated.points)
    ]


def measure_classes(test: TestLogits, calibrated: CalibratedPolicy) -> list[ClassMeasures]:
    """Accuracy, drop and exit rates of each class at the default operating point; zeros for a class without test images."""
    scored = ScoredSplit.of(test, calibrated.rule, None)
    exits = policy.decide(scored.scores, calibrated.default_point().thresholds)
    count, classes = len(scored.scores), test.logits.shape[-1]

    def per_class(values: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(test.labels[values], minlength=classes)

    images = np.bincount(test.labels, minlength=classes)
    shares = np.maximum(images, 1)
    alone = per_class(scored.right[-1]) / shares
    early = per_class(policy.take_exit(scored.right, exits)) / shares
    rates = np.stack([per_class(exits == index) for index in range(count)], axis=-1) / shares[:, None]
    return [
        ClassMeasures(
            images=int(images[label]),
            no_exit_accuracy=float(alone[label]),
            accuracy=float(early[label]),
            drop=float(alone[label] - early[label]),
            exit_rates=rates[label].tolist(),
        )
        for label in range(classes)
    ]


def oracle(test: TestLogits, calibrated: CalibratedPolicy, cost: Cost) -> Oracle:
    """The best that any score could do with these answers: the first right exit answers, else the first.

    It sees the labels: a bound for the figures, never a policy.
    """
    right = ScoredSplit.of(test, calibrated.rule, None).right
    exits = right.argmax(axis=0)  # 0 where none is right
    macs = np.asarray(cost.exit_macs, dtype=np.float64)[exits]
    return Oracle(accuracy=float(right.any(axis=0).mean()), macs=float(macs.mean()))


def score_outcomes(
    test: TestLogits, calibrated: CalibratedPolicy, cost: Cost, reference_right: ReferenceRight
) -> list[ScoreOutcome]:
    """The contending scores on test, with thresholds from tune at each target risk; uncertified."""
    outcomes = []
    for contender in calibrated.contenders:
        rule, targets = contender.rule, contender.targets
        swept = sweep(ScoredSplit.of(test, rule, reference_right), [target.thresholds for target in targets])
        for index, target in enumerate(targets):
            measured = swept.measured(index, cost)
            outcomes.append(
                ScoreOutcome(
                    score=rule.score,
                    sharpness=rule.sharpness,
                    ensemble=rule.ensemble,
                    target=target.target,
                    tune_macs_saved=target.macs_saved,
                    test_macs_saved=measured.macs_saved,
                    test_risk=measured.risk,
                    test_accuracy=measured.accuracy,
                )
            )
    return outcomes


# ---------------------------------------------------------------- curves


def measure_curve(
    test: TestLogits, calibrated: CalibratedPolicy, cost: Cost, reference_right: ReferenceRight
) -> Curve:
    """Accuracy against MACs on test, along the path of thresholds that tune chose."""
    return _curve(test, calibrated.rule, calibrated.path, cost, reference_right)


def paper_curve(
    test: TestLogits, calibrated: CalibratedPolicy, cost: Cost, reference_right: ReferenceRight
) -> Curve:
    """Like :func:`measure_curve` for the paper's rule (entropy at sharpness 1) along its own path."""
    return _curve(test, PAPER_RULE, calibrated.paper_path, cost, reference_right)


def _curve(
    test: TestLogits,
    rule: ExitRule,
    path: ThresholdPath,
    cost: Cost,
    reference_right: ReferenceRight,
) -> Curve:
    scored = ScoredSplit.of(test, rule, reference_right)
    count = len(path.thresholds)
    kept = np.unique(np.linspace(0, count - 1, min(CURVE_POINTS, count)).astype(int))
    thresholds = [path.thresholds[index] for index in kept]
    swept = sweep(scored, thresholds)
    macs, accuracy = swept.macs(cost), swept.right / swept.images
    rates = swept.leaving / swept.images
    area = area_under(macs, accuracy) if macs[0] > macs[-1] else None
    milliseconds = None
    if cost.exit_milliseconds is not None:
        milliseconds = (rates @ np.asarray(cost.exit_milliseconds)).tolist()
    return Curve(
        macs=macs.tolist(),
        accuracy=accuracy.tolist(),
        risk=(swept.lost / swept.images).tolist(),
        exit_rates=rates.tolist(),
        milliseconds=milliseconds,
        area=None if area is None else float(area),
        area_interval=None if area is None else area_interval(scored, thresholds, cost),
    )


def area_under(macs: NDArray[np.float64], accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean accuracy over a curve's range of MACs: trapezoids divided by the width; over the last axis.

    A curve without width is a point, and its mean the accuracy there.
    """
    width = macs[..., 0] - macs[..., -1]
    area = ((macs[..., :-1] - macs[..., 1:]) * (accuracy[..., :-1] + accuracy[..., 1:]) / 2).sum(axis=-1)
    return np.asarray(np.where(width > 0, area / np.where(width > 0, width, 1.0), accuracy[..., 0]))


def area_interval(
    scored: ScoredSplit,
    thresholds: Sequence[policy.Thresholds],
    cost: Cost,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval:
    """Percentile bootstrap interval (95 %) of :func:`area_under`: images drawn anew, thresholds kept.

    A resample is one weight per image, multinomial over N draws; all its curves are two matrix products.
    """
    images = scored.scores.shape[1]
    exits = np.stack([policy.decide(scored.scores, vector) for vector in thresholds])
    # Sums of whole numbers, exact in these types (up to 2^24 images, 2^53 MACs): the same on any number of threads.
    right = scored.right[exits, np.arange(images)].astype(np.float32).T
    macs = np.asarray(cost.exit_macs, dtype=np.float64)[exits].T
    generator = np.random.default_rng(seed)
    step = max(1, _BLOCK // images)
    areas = []
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn = generator.integers(images, size=(size, images)) + images * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * images).reshape(size, images)
        right_answers = (weights.astype(np.float32) @ right).astype(np.float64)
        areas.append(area_under(weights.astype(np.float64) @ macs, right_answers / images))
    low, high = np.quantile(np.concatenate(areas), [0.025, 0.975])
    return float(low), float(high)
