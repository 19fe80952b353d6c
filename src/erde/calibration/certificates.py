"""From counts on the certify split to a promise: p-values, the fixed-sequence test, conformal risk control.

Nothing here chooses: the path of thresholds and its order come from the tune split. A path is walked from its
careful end, and the last point before the first one that fails is certified. Four guarantees:

``risk``
    ``P(risk > ε) <= 1 - confidence``: exact binomial p-values (Learn then Test, arXiv 2110.01052).
``net_drop``
    the same for the net drop of accuracy, which counts images won by leaving early too: an exact trinomial test,
    maximised over the share of images that are lost or won (Berger and Boos 1994). It passes wherever ``risk`` does.
``expected_risk``
    ``E[risk] <= ε`` over the draw of the certify split, without a confidence: conformal risk control
    (arXiv 2208.02814). It needs fewer images, and it promises less.
``disagreement``
    the test of ``risk`` where the label of every image is the reference's answer: it needs no labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr
from scipy.stats import beta, binom, norm

from erde.calibration.thresholds import ScoredSplit, ThresholdPath, sweep
from erde.common.errors import UserError
from erde.policy import rule as policy
from erde.policy.points import Certificate, Guarantee, Reference

METHODS: dict[Guarantee, str] = {
    "risk": "fixed-sequence test on a path of thresholds, exact binomial bound",
    "net_drop": "fixed-sequence test on a path of thresholds, exact trinomial bound",
    "expected_risk": "conformal risk control on a path of thresholds, in expectation",
    "disagreement": "fixed-sequence test on a path of thresholds, exact binomial bound",
}
ASSUMPTIONS = (
    "images in use are drawn like those of the certify split, which chose nothing else; "
    "the promise is over the draw of that split; each operating point's promise stands by itself"
)
# The chance that the trinomial test leaves to an interval of its nuisance parameter that misses.
_INTERVAL_MISSES = 0.001
# Shares of discordant images at which the trinomial probability is taken; with 300 no decision changed.
_SHARES_TRIED = 25


@dataclass(frozen=True)
class PathCounts:
    """Counts of a split at every point of a path, all (P,): images lost, images won, and lost so far.

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


@lru_cache(maxsize=1000)
def most_lost(images: int, max_risk: float, level: float) -> int:
    """The largest number of lost images that still passes the binomial test at ``level``; -1 if none does."""
    lost = int(binom.ppf(level, images, max_risk))
    return lost if binom.cdf(lost, images, max_risk) <= level else lost - 1


def net_drop_passes(lost: int, won: int, images: int, max_drop: float, level: float) -> bool:
    """True if the counts refute "net drop > max_drop" at ``level``, by a test that rejects wherever that of the risk does.

    Let ``s = most_lost(images, max_drop, level)``. With at most ``s`` lost images the point passes, as it would for the
    risk. Else let ``v`` be the share of discordant images (lost or won). At a net drop of exactly ``max_drop`` such
    an image is lost with probability ``(v + max_drop) / (2 v)``, and the chance to pass, be it by few lost images or by
    a net loss of at most ``d = lost - won``, is

        P_v = sum_k Bin(k; images, v) BinCDF(max(s, floor((d + k) / 2)); k, (v + max_drop) / (2 v)).

    The point passes if ``P_v + m <= level`` for all ``v`` in a Clopper-Pearson interval that misses with probability
    at most ``m``, the smaller of 0.001 and what the binomial test leaves of ``level`` (Berger and Boos 1994,
    Journal of the American Statistical Association 89). The chance to pass under the hypothesis is at most ``level``:
    where some ``d`` passes at the true ``v`` it is at most ``P_v`` for the largest such ``d``, plus ``m``; where none
    does it is at most that of ``lost <= s``, plus ``m``. A larger net drop at the same ``v`` only loses more.
    """
    if lost <= most_lost(images, max_drop, level):
        return True
    return lost - won <= _most_net_loss(lost + won, images, max_drop, level)


@lru_cache(maxsize=100_000)
def _most_net_loss(discordant: int, images: int, max_drop: float, level: float) -> int:
    """The largest net loss that passes where ``discordant`` images were lost or won; below -discordant if none does."""
    few = most_lost(images, max_drop, level)
    misses = min(_INTERVAL_MISSES, level - float(binom.cdf(few, images, max_drop)))
    nothing = -discordant - 1
    if misses <= 0:
        return nothing
    low = float(beta.ppf(misses / 2, discordant, images - discordant + 1)) if discordant else 0.0
    high = float(beta.isf(misses / 2, discordant + 1, images - discordant)) if discordant < images else 1.0
    # The chance mostly grows with the share: what fails, fails at once.
    shares = np.linspace(max(high, max_drop), max(low, max_drop), _SHARES_TRIED)

    def passes(net: int) -> bool:
        return all(_trinomial(net, few, images, float(v), max_drop) + misses <= level for v in shares)

    # The normal approximation is off by a few images.
    net = round(images * max_drop + float(norm.ppf(level)) * math.sqrt(images * shares[0]))
    net = min(max(net, nothing), discordant)
    while net > nothing and not passes(net):
        net -= 1
    while net < discordant and passes(net + 1):
        net += 1
    return net


def _trinomial(net: int, few: int, images: int, share: float, drop: float) -> float:
    """``P(lost <= few or lost - won <= net)`` where ``share`` are lost or won and the net drop is ``drop``."""
    spread = 9 * math.sqrt(images * share * (1 - share)) + 10
    first, last = max(0, int(images * share - spread)), min(images, int(images * share + spread))
    discordant = np.arange(first, last + 1)
    lost = np.minimum(np.maximum(few, (net + discordant) // 2), discordant)
    at_most = np.where(
        lost < 0, 0.0, bdtr(np.maximum(lost, 0), discordant, min(1.0, (share + drop) / (2 * share)))
    )
    return float(binom.pmf(discordant, images, share) @ at_most)


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
        return _walk_net_drop(counts, max_risk, 1 - confidence)
    else:
        passed = binomial_p_value(counts.lost, counts.images, max_risk) <= 1 - confidence
    failed = np.flatnonzero(~passed)
    return int(failed[0]) - 1 if len(failed) else len(passed) - 1


def _walk_net_drop(counts: PathCounts, max_drop: float, level: float) -> int:
    # Point by point: the test is worth its sums up to the first failure only.
    for index, (lost, won) in enumerate(zip(counts.lost.tolist(), counts.won.tolist(), strict=True)):
        if not net_drop_passes(lost, won, counts.images, max_drop, level):
            return index - 1
    return len(counts.lost) - 1


def upper_bound(
    lost: int, won: int, images: int, confidence: float, guarantee: Guarantee = "risk"
) -> float | None:
    """The largest risk (or net drop) that the counts do not refute at ``confidence``; None in expectation."""
    if guarantee == "expected_risk":
        return None
    bound = 1.0 if lost >= images else float(beta.ppf(confidence, lost + 1, images - lost))
    if guarantee in ("risk", "disagreement") or bound == 1:
        return bound
    refuted, passes = 0.0, bound
    while passes - refuted > 1e-7:
        middle = (refuted + passes) / 2
        if net_drop_passes(lost, won, images, middle, 1 - confidence):
            passes = middle
        else:
            refuted = middle
    return passes


def images_needed(max_risk: float, confidence: float, guarantee: Guarantee = "risk") -> int:
    """The least number of certify images, none of them lost, that certifies ``max_risk``."""
    if guarantee == "expected_risk":
        fewest = max(1, math.ceil(1 / max_risk) - 2)
        return next(images for images in range(fewest, fewest + 4) if 1 / (images + 1) <= max_risk)
    # With none lost the test of the net drop is that of the risk.
    return math.ceil(math.log(1 - confidence) / math.log1p(-max_risk))


def check_enough(
    images: int, max_risks: Sequence[float], confidence: float, guarantee: Guarantee = "risk"
) -> None:
    """Raise a :class:`UserError` if the certify images are too few for every one of ``max_risks``."""
    largest = max(max_risks)
    needed = images_needed(largest, confidence, guarantee)
    if images >= needed:
        return
    sure = "in expectation" if guarantee == "expected_risk" else f"with {100 * confidence:g} % confidence"
    raise UserError(
        f"{images:,} images to certify on: a promise of {100 * largest:g} % {sure} needs {needed:,} at the least. Give "
        "more images, or a larger --max-risk"
    )


def certificate_at(
    counts: PathCounts,
    index: int,
    max_risk: float,
    confidence: float,
    reference: Reference,
    guarantee: Guarantee = "risk",
) -> Certificate:
    """The certificate of a point of the path that :func:`walk` passed."""
    lost, won = int(counts.lost[index]), int(counts.won[index])
    bound = upper_bound(lost, won, counts.images, confidence, guarantee)
    seen = lost - won if guarantee == "net_drop" else lost
    return Certificate(
        guarantee=guarantee,
        max_risk=max_risk,
        confidence=None if guarantee == "expected_risk" else confidence,
        images=counts.images,
        lost=lost,
        won=won,
        risk=seen / counts.images,
        # The point passed at max_risk, so the bound cannot be larger but by rounding.
        upper_bound=None if bound is None else min(bound, max_risk),
        reference=reference,
        method=METHODS[guarantee],
        assumptions=ASSUMPTIONS,
    )
