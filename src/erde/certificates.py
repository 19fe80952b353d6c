"""From counts on the certify split to a promise: p-values, the fixed-sequence test, conformal risk control.

Nothing here chooses: the path of thresholds and its order come from the tune split. A path is walked from its
careful end, and the last point before the first one that fails is certified. Three guarantees:

``risk``
    ``P(risk > ε) <= 1 - confidence``: exact binomial p-values (Learn then Test, arXiv 2110.01052).
``net_drop``
    the same for the net drop of accuracy, which counts images won by leaving early too: p-values by
    betting (Waudby-Smith and Ramdas, arXiv 2010.09686), since a loss in {-1, 0, 1} has no binomial bound.
``expected_risk``
    ``E[risk] <= ε`` over the draw of the certify split, without a confidence: conformal risk control
    (arXiv 2208.02814). It needs fewer images, and it promises less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta, binom

from erde import policy
from erde.bundle import Certificate, Guarantee, Reference
from erde.thresholds import ScoredSplit, ThresholdPath, sweep

GUARANTEES: tuple[Guarantee, ...] = get_args(Guarantee)
METHODS: dict[Guarantee, str] = {
    "risk": "fixed-sequence test on a path of thresholds, exact binomial bound",
    "net_drop": "fixed-sequence test on a path of thresholds, betting bound for losses in -1, 0, 1",
    "expected_risk": "conformal risk control on a path of thresholds, in expectation",
}
ASSUMPTIONS = (
    "images in use are drawn like those of the certify split, which chose nothing else; "
    "the promise is over the draw of that split; each operating point's promise stands by itself"
)
# Bets as shares of the largest one that cannot lose everything; small ones for large splits.
_BETS = np.geomspace(1e-3, 0.999, 60)


@dataclass(frozen=True)
class PathCounts:
    """What happens on a split at every point of a path, all (P,): images lost, images won, and lost so far.

    ``lost``: the reference right and the answer wrong; ``won``: the other way round; ``lost_so_far``: lost
    at this point or at a more careful one, which never falls along the path.
    """

    images: int
    lost: NDArray[np.int64]
    won: NDArray[np.int64]
    lost_so_far: NDArray[np.int64]


def count_along(path: ThresholdPath, split: ScoredSplit) -> PathCounts:
    """Count the images that every point of ``path`` loses and wins on ``split``."""
    counted = sweep(split, path.thresholds)
    ever_lost = np.zeros(len(split), dtype=np.bool_)
    lost_so_far = []
    for thresholds in path.thresholds:
        ever_lost |= policy.take_exit(split.harm, policy.decide(split.scores, thresholds))
        lost_so_far.append(int(ever_lost.sum()))
    return PathCounts(len(split), counted.lost, counted.won, np.asarray(lost_so_far))


def binomial_p_value(lost: NDArray[np.int64], images: int, max_risk: float) -> NDArray[np.float64]:
    """``P(Bin(images, max_risk) <= lost)``: of "risk > max_risk", given how many images were lost."""
    return np.asarray(binom.cdf(lost, images, max_risk))


def net_drop_p_value(
    lost: NDArray[np.int64], won: NDArray[np.int64], images: int, max_drop: float
) -> NDArray[np.float64]:
    """Of "net drop > max_drop", where an image's loss D is 1 if lost, -1 if won, else 0.

    ``W_λ = Π_i (1 + λ (max_drop - D_i))`` has expectation at most 1 under the hypothesis for every bet λ in
    [0, 1/(1 - max_drop)), so does the mean over a fixed grid of bets, and by Markov's inequality
    ``min(1, 1/mean W)`` is a p-value (Waudby-Smith and Ramdas 2024, arXiv 2010.09686).
    """
    bets = (_BETS / (1 - max_drop))[:, None]
    lost, won = np.atleast_1d(lost), np.atleast_1d(won)
    log_wealth = (
        lost * np.log1p(-bets * (1 - max_drop))
        + won * np.log1p(bets * (1 + max_drop))
        + (images - lost - won) * np.log1p(bets * max_drop)
    )
    highest = log_wealth.max(axis=0)
    log_mean = highest + np.log(np.exp(log_wealth - highest).mean(axis=0))
    return np.asarray(np.exp(-np.maximum(log_mean, 0.0)))


def walk(counts: PathCounts, max_risk: float, confidence: float, guarantee: Guarantee = "risk") -> int:
    """The last point of the path before the first that fails; -1 where not even the first one passes.

    With p-values, a point passes where its p-value is at most ``1 - confidence``. Since the walk stops at the
    first failure, the chance of ever accepting a point whose risk is above ``max_risk`` is at most
    ``1 - confidence``, however many points there are. With conformal risk control a point passes while
    ``(lost so far + 1) / (images + 1) <= max_risk``.
    """
    if guarantee == "expected_risk":
        passed = (counts.lost_so_far + 1) / (counts.images + 1) <= max_risk
    elif guarantee == "net_drop":
        passed = net_drop_p_value(counts.lost, counts.won, counts.images, max_risk) <= 1 - confidence
    else:
        passed = binomial_p_value(counts.lost, counts.images, max_risk) <= 1 - confidence
    failed = np.flatnonzero(~passed)
    return int(failed[0]) - 1 if len(failed) else len(passed) - 1


def upper_bound(
    lost: int, won: int, images: int, confidence: float, guarantee: Guarantee = "risk"
) -> float | None:
    """The largest risk (or net drop) that the counts do not refute at ``confidence``; None in expectation."""
    if guarantee == "expected_risk":
        return None
    if guarantee == "risk":
        return 1.0 if lost >= images else float(beta.ppf(confidence, lost + 1, images - lost))

    def excess(drop: float) -> float:
        p_value = net_drop_p_value(np.asarray(lost), np.asarray(won), images, drop)[0]
        return float(p_value) - (1 - confidence)

    lowest, highest = 1e-9, 1 - 1e-9
    if excess(lowest) <= 0:
        return 0.0  # far more won than lost
    return 1.0 if excess(highest) > 0 else float(brentq(excess, lowest, highest))


def images_needed(max_risk: float, confidence: float, guarantee: Guarantee = "risk") -> int:
    """The least number of certify images, none of them lost, that certifies ``max_risk``."""
    if guarantee == "expected_risk":
        fewest = max(1, math.ceil(1 / max_risk) - 2)
        return next(images for images in range(fewest, fewest + 4) if 1 / (images + 1) <= max_risk)
    if guarantee == "risk":
        return math.ceil(math.log(1 - confidence) / math.log1p(-max_risk))
    none = np.zeros(1, dtype=np.int64)
    low, high = 0, 1
    while net_drop_p_value(none, none, high, max_risk)[0] > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = net_drop_p_value(none, none, middle, max_risk)[0] <= 1 - confidence
        low, high = (low, middle) if enough else (middle, high)
    return high


def certify(
    path: ThresholdPath,
    certify_split: ScoredSplit,
    max_risk: float,
    confidence: float,
    reference: Reference,
    guarantee: Guarantee = "risk",
) -> tuple[int, Certificate | None]:
    """Walk ``path`` on the certify split: the index of the certified point and its certificate.

    ``(0, None)`` where not even the first point passes.
    """
    return certify_counts(count_along(path, certify_split), max_risk, confidence, reference, guarantee)


def certify_counts(
    counts: PathCounts,
    max_risk: float,
    confidence: float,
    reference: Reference,
    guarantee: Guarantee = "risk",
) -> tuple[int, Certificate | None]:
    """:func:`certify` for counts that are there already: they are the same for every risk."""
    accepted = walk(counts, max_risk, confidence, guarantee)
    if accepted < 0:
        return 0, None
    lost, won = int(counts.lost[accepted]), int(counts.won[accepted])
    seen = lost - won if guarantee == "net_drop" else lost
    return accepted, Certificate(
        guarantee=guarantee,
        max_risk=max_risk,
        confidence=None if guarantee == "expected_risk" else confidence,
        images=counts.images,
        lost=lost,
        won=won,
        risk=seen / counts.images,
        upper_bound=upper_bound(lost, won, counts.images, confidence, guarantee),
        reference=reference,
        method=METHODS[guarantee],
        assumptions=ASSUMPTIONS,
    )
