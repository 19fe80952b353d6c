"""From logits to an exit policy: temperatures, the score, thresholds, certified operating points.

Everything that is fitted or searched sees the tune split; the certify split is touched once, by
certificates.py, along a path of thresholds that was fixed before. Terms as in docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from erde.calibration.certificates import certificate_at, count_along, images_needed, upper_bound, walk
from erde.calibration.checks import (
    Request,
    answers_as_labels,
    check_budget,
    check_latency_budget,
    check_splits,
    doubts,
)
from erde.calibration.choice import Choice, choose_score, find_contenders, try_rule
from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.settings import Settings
from erde.calibration.thresholds import ScoredSplit, cheaper, sweep
from erde.common import progress
from erde.common.splits import CertifyLogits, TuneLogits
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.points import Calibration, Certificate, LeftOut, OperatingPoint, Reference, ScoreCandidate
from erde.policy.rule import PAPER_RULE

# Of a chain of networks whose early exits, at the risk in question, take more than they save.
NOTHING_SAVED = "the networks before the last one would cost more than they save: only the last one runs"


def fit_temperatures(tune: TuneLogits) -> list[float]:
    """Per exit the temperature with the least NLL on tune (Guo et al. 2017), within [1/20, 20]."""
    rows = np.arange(len(tune))

    def fit(logits: NDArray[np.float32]) -> float:
        def negative_log_likelihood(log_temperature: float) -> float:
            log_probabilities = policy.log_softmax(logits, math.exp(log_temperature))
            return float(-log_probabilities[rows, tune.labels].mean())

        bound = math.log(20)
        minimum = minimize_scalar(negative_log_likelihood, bounds=(-bound, bound), method="bounded")
        return math.exp(float(minimum.x))

    return [fit(logits) for logits in tune.logits]


def point_name(max_risk: float) -> str:
    """``risk-1`` for 0.01: the name of a certified operating point, in per cent."""
    return f"risk-{max_risk * 100:g}"


def calibrate_logits(
    tune: TuneLogits,
    certify_split: CertifyLogits,
    cost: Cost,
    settings: Settings | None = None,
    *,
    tune_reference_right: NDArray[np.bool_] | None = None,
    certify_reference_right: NDArray[np.bool_] | None = None,
    sources: Sequence[str] = (),
    name: str = "",
) -> CalibratedPolicy:
    """Fit on tune, certify on certify: ``no-exit``, an operating point per certified risk, one per budget.

    The first of the risks is the default operating point where it could be certified, else ``no-exit``.
    ``sources`` are kept in the result, so that a second choice on the same images can be told (:func:`check_reuse`).
    What makes the promise worth less than it seems is said on stderr, with ``name`` before it.
    """
    settings = settings or Settings()
    unlabelled = settings.guarantee == "disagreement"
    if unlabelled:
        tune, certify_split = answers_as_labels(tune), answers_as_labels(certify_split)
    check_splits(tune, certify_split)
    asked = settings
    if len(cost.exit_macs) == 1:
        # Nothing to decide: one exit answers all. The paper's rule stands in for a score.
        settings = Settings(score=PAPER_RULE.score, sharpness=PAPER_RULE.sharpness)
    choices = choose_score(tune, cost, settings, tune_reference_right)
    chosen = choices[0]
    certify_scored = ScoredSplit.of(certify_split, chosen.rule, certify_reference_right)
    points, left_out, default = operating_points(chosen, certify_scored, cost, settings)
    paper = next((choice for choice in choices if choice.rule == PAPER_RULE), None)
    if paper is None:
        paper = try_rule(tune, PAPER_RULE, cost, settings, tune_reference_right)
        choices.append(paper)
    temperatures = fit_temperatures(TuneLogits(chosen.rule.apply(tune.logits)[0], tune.labels))
    if unlabelled:
        temperatures[-1] = 1.0  # its own answers are its labels: they say nothing of how sure it may be
    for line in [] if unlabelled else doubts(tune, certify_split, temperatures):
        progress.say(f"{name}{': ' if name else ''}warning: {line}")
    return CalibratedPolicy(
        rule=chosen.rule,
        temperatures=temperatures,
        path=chosen.path,
        points=points,
        default=default,
        left_out=left_out,
        calibration=seen(
            chosen,
            certify_scored,
            points,
            default,
            Request(
                tune,
                certify_split,
                cost,
                asked,
                tune_reference_right=tune_reference_right,
                certify_reference_right=certify_reference_right,
            ),
            sources,
        ),
        candidates=[
            ScoreCandidate(
                score=choice.rule.score,
                sharpness=choice.rule.sharpness,
                ensemble=choice.rule.ensemble,
                macs_saved=choice.macs_saved,
                fragile=choice.fragile,
            )
            for choice in choices
        ],
        paper_path=paper.path,
        contenders=find_contenders(choices, cost),
    )


def seen(
    chosen: Choice,
    certify_scored: ScoredSplit,
    points: Sequence[OperatingPoint],
    default: str,
    request: Request,
    sources: Sequence[str],
) -> Calibration:
    """The record of a calibration, for the drift watch and against a second choice on the same images."""
    ranges = _score_ranges(chosen)
    thresholds = next(point.thresholds for point in points if point.name == default)
    return Calibration(
        # Of certify, on which nothing was fitted: what new images of the same kind would give.
        exit_rates=certify_scored.measure(thresholds, request.cost).exit_rates,
        score_histograms=[
            np.histogram(np.clip(scores, *limits), bins=20, range=limits)[0].tolist()
            for scores, limits in zip(certify_scored.scores, ranges, strict=True)
        ],
        score_ranges=ranges,
        tune_images=len(request.tune),
        certify_images=len(request.certify),
        tune_fingerprint=request.tune.fingerprint(),
        certify_fingerprint=request.certify.fingerprint(),
        sources=list(sources),
        choices=request.choices(),
    )


def operating_points(
    chosen: Choice, certify_scored: ScoredSplit, cost: Cost, settings: Settings
) -> tuple[list[OperatingPoint], list[LeftOut], str]:
    """The named points of ``chosen``'s path, what could not be certified, and the name of the default point."""
    points, left_out = _operating_points(chosen, certify_scored, cost, settings)
    default = point_name(settings.max_risks[0])
    return points, left_out, default if default in [point.name for point in points] else "no-exit"


def _operating_points(
    chosen: Choice, certify_scored: ScoredSplit, cost: Cost, settings: Settings
) -> tuple[list[OperatingPoint], list[LeftOut]]:
    path = chosen.path

    def point(
        name: str,
        kind: Literal["no-exit", "risk", "budget", "latency"],
        target: float | None,
        index: int,
        certificate: Certificate | None = None,
        note: str | None = None,
    ) -> OperatingPoint:
        swept = sweep(chosen.tune, [path.thresholds[index]])
        unlabelled = settings.guarantee == "disagreement"
        return OperatingPoint(
            name=name,
            kind=kind,
            target=target,
            thresholds=list(path.thresholds[index]),
            certificate=certificate,
            note=note,
            tune=None if unlabelled else swept.measured(0, cost),
            tune_agreement=swept.agreement(0, cost) if unlabelled else None,
        )

    points = [point("no-exit", "no-exit", None, 0)]
    left_out: list[LeftOut] = []
    if len(cost.exit_macs) == 1:
        return points, left_out
    counts = count_along(path, certify_scored)
    chain = len(cost.networks) > 1 and settings.reference == "final_exit"
    reference: Reference = "fallback" if chain else settings.reference
    for max_risk in settings.max_risks:
        index = walk(counts, max_risk, settings.confidence, settings.guarantee)
        if index < 0:
            left_out.append(_left_out(max_risk, len(certify_scored), settings))
            continue
        useful = cheaper(path, index)
        note = None if useful == index else NOTHING_SAVED
        certificate = certificate_at(
            counts, useful, max_risk, settings.confidence, reference, settings.guarantee
        )
        points.append(point(point_name(max_risk), "risk", max_risk, useful, certificate, note))
    for budget in settings.budgets:
        check_budget(budget, cost)
        index = _first_within(path.macs / cost.no_exit_macs, budget)
        note = f"a budget, met on tune; {_bound(certify_scored, path.thresholds[index], settings)}"
        points.append(point(f"budget-{budget * 100:g}", "budget", budget, index, note=note))
    for milliseconds in settings.latency_budgets:
        check_latency_budget(milliseconds, cost)
        times = sweep(chosen.tune, path.thresholds).milliseconds(cost)
        assert times is not None
        index = _first_within(times, milliseconds)
        note = f"a latency budget, met on tune; {_bound(certify_scored, path.thresholds[index], settings)}"
        points.append(point(f"latency-{milliseconds:g}ms", "latency", milliseconds, index, note=note))
    return points, left_out


def _first_within(costs: NDArray[np.float64], limit: float) -> int:
    """The most careful point of a path that costs at most ``limit``; the last one if only rounding is in the way."""
    within = np.flatnonzero(costs <= limit)
    return int(within[0]) if len(within) else len(costs) - 1


def _left_out(max_risk: float, images: int, settings: Settings) -> LeftOut:
    needed = images_needed(max_risk, settings.confidence, settings.guarantee)
    sure = (
        "in expectation"
        if settings.guarantee == "expected_risk"
        else f"at {settings.confidence * 100:g} % confidence"
    )
    note = f"{images:,} certify images cannot prove {max_risk * 100:g} % {sure}"
    if needed > images:
        note += f": at least {needed:,} would be needed"
    else:
        note += f": against the reference '{settings.reference}' even the full network loses too many"
    return LeftOut(
        name=point_name(max_risk),
        target=max_risk,
        images_needed=needed if needed > images else None,
        note=note,
    )


def _bound(certify_scored: ScoredSplit, thresholds: policy.Thresholds, settings: Settings) -> str:
    """The bound that certify gives for thresholds that tune alone had chosen, in words."""
    exits = policy.decide(certify_scored.scores, thresholds)
    lost = int(policy.take_exit(certify_scored.harm, exits).sum())
    bound = upper_bound(lost, 0, len(certify_scored), settings.confidence)
    assert bound is not None
    # Rounded up: a bound may be stated larger than it is, never smaller.
    return f"its risk is at most {math.ceil(bound * 1000) / 10:g} % with {settings.confidence * 100:g} % confidence"


def _score_ranges(chosen: Choice) -> list[tuple[float, float]]:
    """The ranges of the score histograms: [0, 1], or tune's own where scores have no bounds."""
    if chosen.rule.score not in ("energy", "patience"):
        return [(0.0, 1.0)] * len(chosen.tune.scores)
    return [
        (float(scores.min()), float(max(scores.max(), scores.min() + 1))) for scores in chosen.tune.scores
    ]
