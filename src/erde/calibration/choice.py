"""The choice of a score on tune, and its contenders for the comparison on test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from erde.calibration.harm import fit_harm, out_of_fold_scores
from erde.calibration.settings import Settings
from erde.calibration.thresholds import ScoredSplit, ThresholdPath, best_within_risk, search_path
from erde.common.splits import TuneLogits
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.rule import PAPER_RULE, ExitRule

# Scores are compared at these risks, whatever is promised.
COMPARED_RISKS = (0.005, 0.01, 0.02)
# A rule with a larger share of tune images on the edge of its thresholds is chosen only for want of another.
MOST_FRAGILE = 0.002


@dataclass(frozen=True)
class Choice:
    """One candidate of the choice between scores: its path on tune, and what that saves at the target risk.

    ``tune`` is tune as the search saw it: with a fitted score, scored by regressions fitted on other folds.
    """

    rule: ExitRule
    tune: ScoredSplit = field(repr=False)
    path: ThresholdPath = field(repr=False)
    macs_saved: float
    fragile: float


def choose_score(
    tune: TuneLogits,
    cost: Cost,
    settings: Settings,
    reference_right: NDArray[np.bool_] | None = None,
    rules: Sequence[ExitRule] | None = None,
) -> list[Choice]:
    """All candidates, the best first: by MACs saved on tune within the first of ``settings.max_risks``.

    Candidates whose thresholds stand where scores crowd (``fragile``) come last; ties keep the paper's rule
    in front. Never by NLL. ``rules``: those to try; those of ``settings`` without it.
    """
    choices = [try_rule(tune, rule, cost, settings, reference_right) for rule in rules or settings.rules()]
    return sorted(
        choices,
        key=lambda choice: (
            choice.fragile > MOST_FRAGILE,
            -choice.macs_saved,
            choice.rule.ensemble != "none",
            choice.rule.score != "entropy",
            choice.rule.sharpness != 1.0,
        ),
    )


def try_rule(
    tune: TuneLogits,
    rule: ExitRule,
    cost: Cost,
    settings: Settings,
    reference_right: NDArray[np.bool_] | None,
) -> Choice:
    """Fit ``rule`` on tune where it has parameters, and search its path of thresholds."""
    if rule.score == "harm":
        right = tune.logits[-1].argmax(axis=-1) == tune.labels if reference_right is None else reference_right
        rule = ExitRule(rule.score, rule.sharpness, rule.ensemble, fit_harm(tune, right))
        scored = ScoredSplit.of(tune, rule, reference_right)
        scored = ScoredSplit(out_of_fold_scores(tune, right), scored.right, scored.reference_right)
    else:
        scored = ScoredSplit.of(tune, rule, reference_right)
    path = search_path(scored, cost)
    index = best_within_risk(path, settings.max_risks[0])
    return Choice(
        rule=rule,
        tune=scored,
        path=path,
        macs_saved=1.0 - float(path.macs[index]) / cost.no_exit_macs,
        fragile=float(policy.in_band(scored.scores, path.thresholds[index]).mean()),
    )


@dataclass(frozen=True)
class ContenderTarget:
    """Thresholds that a contender would have at one risk, from tune, and the MACs that they save there."""

    target: float
    thresholds: tuple[float | None, ...]
    macs_saved: float


@dataclass(frozen=True)
class Contender:
    """The best sharpness of one score and ensemble, for the comparison of scores on test."""

    rule: ExitRule
    targets: tuple[ContenderTarget, ...]


def find_contenders(choices: list[Choice], cost: Cost) -> list[Contender]:
    """The best of each score and ensemble, and the paper's rule."""
    best: dict[tuple[str, str], Choice] = {}
    for choice in choices:
        best.setdefault((choice.rule.score, choice.rule.ensemble), choice)
    contenders = list(best.values())
    if PAPER_RULE not in [choice.rule for choice in contenders]:
        contenders += [choice for choice in choices if choice.rule == PAPER_RULE]

    def targets(path: ThresholdPath) -> tuple[ContenderTarget, ...]:
        points = [(risk, best_within_risk(path, risk)) for risk in COMPARED_RISKS]
        return tuple(
            ContenderTarget(risk, path.thresholds[index], 1.0 - float(path.macs[index]) / cost.no_exit_macs)
            for risk, index in points
        )

    return [Contender(choice.rule, targets(choice.path)) for choice in contenders]
