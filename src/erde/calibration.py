"""From logits to an exit policy: temperatures, the score, thresholds, certified operating points.

Everything that is fitted or searched sees the tune split; the certify split is touched once, by
certificates.py, along a path of thresholds that was fixed before. Terms as in docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from erde import bundle, policy, progress
from erde.bundle import (
    Calibration,
    Certificate,
    Guarantee,
    LeftOut,
    Manifest,
    OperatingPoint,
    ScoreCandidate,
)
from erde.calibration_checks import (
    Request,
    check_budget,
    check_latency_budget,
    check_reuse,
    check_splits,
    doubts,
)
from erde.certificates import certify_counts, count_along, images_needed, upper_bound
from erde.errors import UserError
from erde.files import make_folder
from erde.harm import fit_harm, out_of_fold_scores
from erde.policy import PAPER_RULE, Ensemble, ExitRule
from erde.profile import PROFILE
from erde.runtime import Session
from erde.settings import LADDER, Settings
from erde.splits import CertifyLogits, CertifySplit, TuneLogits, TuneSplit
from erde.thresholds import Cost, ScoredSplit, ThresholdPath, best_within_risk, search_path, sweep

# Scores are compared at these risks, whatever is promised.
COMPARED_RISKS = (0.005, 0.01, 0.02)
# A score with more tune images than this on the edge of its thresholds is chosen only for want of another.
MOST_FRAGILE = 0.001


def fit_temperatures(tune: TuneLogits) -> list[float]:
    """Per exit the temperature with the least NLL on tune (Guo et al. 2017), within [1/20, 20]."""
    rows = np.arange(len(tune))

    def fit(logits: NDArray[np.float32]) -> float:
        def negative_log_likelihood(log_temperature: float) -> float:
            log_probabilities = policy.log_softmax(logits, math.exp(log_temperature))
            return float(-log_probabilities[rows, tune.labels].mean())

        bound = math.log(20)
        found = minimize_scalar(negative_log_likelihood, bounds=(-bound, bound), method="bounded")
        return math.exp(float(found.x))

    return [fit(logits) for logits in tune.logits]


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
) -> list[Choice]:
    """All candidates, the best first: by MACs saved on tune within the first of ``settings.max_risks``.

    Candidates whose thresholds stand where scores crowd (``fragile``) come last; ties keep the paper's rule
    in front. Never by NLL.
    """
    choices = [_try_rule(tune, rule, cost, settings, reference_right) for rule in settings.rules()]
    return sorted(
        choices,
        key=lambda one: (
            one.fragile > MOST_FRAGILE,
            -one.macs_saved,
            one.rule.ensemble != "none",
            one.rule.score != "entropy",
            one.rule.sharpness != 1.0,
        ),
    )


def _try_rule(
    tune: TuneLogits,
    rule: ExitRule,
    cost: Cost,
    settings: Settings,
    reference_right: NDArray[np.bool_] | None,
) -> Choice:
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


@dataclass(frozen=True)
class CalibratedPolicy:
    """What calibration gives: the rule, temperatures, the path, and the named operating points.

    ``paper_path`` is the path that tune gives the paper's rule; ``contenders`` are the other scores.
    """

    rule: ExitRule
    temperatures: list[float]
    path: ThresholdPath
    points: list[OperatingPoint]
    default: str
    left_out: list[LeftOut]
    calibration: Calibration
    candidates: list[ScoreCandidate]
    paper_path: ThresholdPath
    contenders: list[Contender]

    def to_json(self) -> dict[str, Any]:
        """What ``policy.json`` holds."""
        return {
            "rule": asdict(self.rule),
            "temperatures": self.temperatures,
            "path": self.path.to_json(),
            "points": [point.model_dump(mode="json") for point in self.points],
            "default": self.default,
            "left_out": [one.model_dump(mode="json") for one in self.left_out],
            "calibration": self.calibration.model_dump(mode="json"),
            "candidates": [one.model_dump(mode="json") for one in self.candidates],
            "paper_path": self.paper_path.to_json(),
            "contenders": [asdict(one) for one in self.contenders],
        }

    def default_point(self) -> OperatingPoint:
        """The operating point that answers when none is named."""
        return next(one for one in self.points if one.name == self.default)

    def summary(self) -> dict[str, Any]:
        """What the command line prints as JSON."""
        return {
            "score": self.rule.score,
            "sharpness": self.rule.sharpness,
            "ensemble": self.rule.ensemble,
            "default_operating_point": self.default,
            "operating_points": [point.model_dump(mode="json") for point in self.points],
            "left_out": [one.model_dump(mode="json") for one in self.left_out],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CalibratedPolicy:
        """Read what :meth:`to_json` gave."""
        return cls(
            rule=ExitRule.from_json(value["rule"]),
            temperatures=value["temperatures"],
            path=ThresholdPath.from_json(value["path"]),
            points=[OperatingPoint.model_validate(one) for one in value["points"]],
            default=value["default"],
            left_out=[LeftOut.model_validate(one) for one in value["left_out"]],
            calibration=Calibration.model_validate(value["calibration"]),
            candidates=[ScoreCandidate.model_validate(one) for one in value["candidates"]],
            paper_path=ThresholdPath.from_json(value["paper_path"]),
            contenders=[
                Contender(
                    ExitRule.from_json(one["rule"]),
                    tuple(
                        ContenderTarget(target["target"], tuple(target["thresholds"]), target["macs_saved"])
                        for target in one["targets"]
                    ),
                )
                for one in value["contenders"]
            ],
        )


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
    check_splits(tune, certify_split)
    asked = settings
    if len(cost.exit_macs) == 1:
        # Nothing to decide: one exit answers all. The paper's rule stands in for a score.
        settings = Settings(score=PAPER_RULE.score, sharpness=PAPER_RULE.sharpness)
    choices = choose_score(tune, cost, settings, tune_reference_right)
    chosen = choices[0]
    certify_scored = ScoredSplit.of(certify_split, chosen.rule, certify_reference_right)
    points, left_out, default = operating_points(chosen, certify_scored, cost, settings)
    paper = next((one for one in choices if one.rule == PAPER_RULE), None)
    if paper is None:
        paper = _try_rule(tune, PAPER_RULE, cost, settings, tune_reference_right)
        choices.append(paper)
    temperatures = fit_temperatures(TuneLogits(chosen.rule.apply(tune.logits)[0], tune.labels))
    for line in doubts(tune, certify_split, temperatures):
        progress.say(f"{name}{': ' if name else ''}warning: {line}")
    return CalibratedPolicy(
        rule=chosen.rule,
        temperatures=temperatures,
        path=chosen.path,
        points=points,
        default=default,
        left_out=left_out,
        calibration=seen(chosen, certify_scored, points, default, tune, certify_split, cost, asked, sources),
        candidates=[
            ScoreCandidate(
                score=one.rule.score,
                sharpness=one.rule.sharpness,
                ensemble=one.rule.ensemble,
                macs_saved=one.macs_saved,
                fragile=one.fragile,
            )
            for one in choices
        ],
        paper_path=paper.path,
        contenders=_contenders(choices, cost),
    )


def seen(
    chosen: Choice,
    certify_scored: ScoredSplit,
    points: Sequence[OperatingPoint],
    default: str,
    tune: TuneLogits,
    certify_split: CertifyLogits,
    cost: Cost,
    asked: Settings,
    sources: Sequence[str],
) -> Calibration:
    """What calibration saw, for the drift watch and against a second choice on the same images; ``asked`` as given."""
    ranges = _score_ranges(chosen)
    thresholds = next(point.thresholds for point in points if point.name == default)
    return Calibration(
        # Of certify, on which nothing was fitted: what new images of the same kind would give.
        exit_rates=certify_scored.measure(thresholds, cost).exit_rates,
        score_histograms=[
            np.histogram(np.clip(scores, *limits), bins=20, range=limits)[0].tolist()
            for scores, limits in zip(certify_scored.scores, ranges, strict=True)
        ],
        score_ranges=ranges,
        tune_images=len(tune),
        certify_images=len(certify_split),
        tune_fingerprint=tune.fingerprint(),
        certify_fingerprint=certify_split.fingerprint(),
        sources=list(sources),
        choices=Request(tune, certify_split, cost, asked, tuple(sources)).choices(),
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
        return OperatingPoint(
            name=name,
            kind=kind,
            target=target,
            thresholds=list(path.thresholds[index]),
            certificate=certificate,
            note=note,
            tune=chosen.tune.measure(path.thresholds[index], cost),
        )

    points = [point("no-exit", "no-exit", None, 0)]
    left_out: list[LeftOut] = []
    if len(cost.exit_macs) == 1:
        return points, left_out
    counts = count_along(path, certify_scored)
    for max_risk in settings.max_risks:
        index, certificate = certify_counts(
            counts, max_risk, settings.confidence, settings.reference, settings.guarantee
        )
        if certificate is None:
            left_out.append(_left_out(max_risk, len(certify_scored), settings))
        else:
            points.append(point(point_name(max_risk), "risk", max_risk, index, certificate))
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
    """What certify says of thresholds that tune alone had chosen."""
    exits = policy.decide(certify_scored.scores, thresholds)
    lost = int(policy.take_exit(certify_scored.harm, exits).sum())
    bound = upper_bound(lost, 0, len(certify_scored), settings.confidence)
    assert bound is not None
    # Rounded up: a bound may be stated larger than it is, never smaller.
    return f"its risk is at most {math.ceil(bound * 1000) / 10:g} % with {settings.confidence * 100:g} % confidence"


def _score_ranges(chosen: Choice) -> list[tuple[float, float]]:
    """What the histograms of each exit's scores span: [0, 1], or what tune had where scores have no bounds."""
    if chosen.rule.score not in ("energy", "patience"):
        return [(0.0, 1.0)] * len(chosen.tune.scores)
    return [
        (float(scores.min()), float(max(scores.max(), scores.min() + 1))) for scores in chosen.tune.scores
    ]


def _contenders(choices: list[Choice], cost: Cost) -> list[Contender]:
    """The best of each score and ensemble, and the paper's rule."""
    kept: dict[tuple[str, str], Choice] = {}
    for one in choices:
        kept.setdefault((one.rule.score, one.rule.ensemble), one)
    best = list(kept.values())
    if PAPER_RULE not in [one.rule for one in best]:
        best += [one for one in choices if one.rule == PAPER_RULE]

    def targets(path: ThresholdPath) -> tuple[ContenderTarget, ...]:
        found = [(risk, best_within_risk(path, risk)) for risk in COMPARED_RISKS]
        return tuple(
            ContenderTarget(risk, path.thresholds[index], 1.0 - float(path.macs[index]) / cost.no_exit_macs)
            for risk, index in found
        )

    return [Contender(one.rule, targets(one.path)) for one in best]


def apply(
    manifest: Manifest, calibrated: CalibratedPolicy, points: list[OperatingPoint] | None = None
) -> Manifest:
    """``manifest`` with a calibrated policy; ``points`` in place of its own, for example with test results."""
    # Validated anew: what is sealed must be readable.
    return Manifest.model_validate(
        {
            **dict(manifest),
            "score": calibrated.rule.score,
            "sharpness": calibrated.rule.sharpness,
            "ensemble": calibrated.rule.ensemble,
            "score_parameters": None if calibrated.rule.harm is None else list(calibrated.rule.harm),
            "temperatures": calibrated.temperatures,
            "operating_points": points or calibrated.points,
            "default_operating_point": calibrated.default,
            "left_out": calibrated.left_out,
            "calibration": calibrated.calibration,
        }
    )


class _TuneAndCertify(Protocol):
    """What :func:`calibrate` needs of a data set; the test split is not among it."""

    @property
    def tune(self) -> TuneSplit: ...

    @property
    def certify(self) -> CertifySplit: ...


def calibrate(
    path: str | Path,
    data: _TuneAndCertify,
    *,
    max_risk: float | Sequence[float] = LADDER,
    confidence: float = 0.9,
    budgets: Sequence[float] = (),
    latency_budgets: Sequence[float] = (),
    guarantee: Guarantee = "risk",
    score: str = "auto",
    sharpness: float | None = None,
    ensemble: Literal["auto"] | Ensemble = "auto",
    out: str | Path | None = None,
) -> CalibratedPolicy:
    """Calibrate the bundle at ``path`` on ``data.tune`` and ``data.certify``, and seal it anew.

    Sealed in place, or into ``out``. ``max_risk`` is one target or several (the first is the default operating
    point); the reference is the bundle's own final exit. A latency budget needs the bundle's ``profile.json``.
    """
    for what, value in (("max_risk", max_risk), ("budgets", budgets), ("latency_budgets", latency_budgets)):
        if isinstance(value, str):
            raise UserError(
                f"{what} is '{value}': expected {'a number or ' if what == 'max_risk' else ''}a list of numbers, such as "
                f"{'[2.0]' if what == 'latency_budgets' else '[0.05] for 5 %'}"
            )
    settings = Settings(
        max_risks=(max_risk,) if isinstance(max_risk, int | float) else tuple(max_risk),
        confidence=confidence,
        budgets=tuple(budgets),
        latency_budgets=tuple(latency_budgets),
        guarantee=guarantee,
        score=score,
        sharpness=sharpness,
        ensemble=ensemble,
    )
    target = Path(out or path)
    if target.exists() and not (target / bundle.MANIFEST).is_file():
        raise UserError(f"{target} is there already and is no bundle: give another place for the new one")
    return calibrate_bundle(Session(path), data, settings, target)


def calibrate_bundle(
    session: Session, data: _TuneAndCertify, settings: Settings, out: Path, sources: Sequence[str] = ()
) -> CalibratedPolicy:
    """Calibrate the bundle of ``session`` and seal it into ``out``; see :func:`calibrate`."""
    manifest = session.manifest
    check_exits(manifest)
    # A profile that does not fit must not stand in the way of who asks for no milliseconds.
    cost = session.cost(timed=bool(settings.latency_budgets))
    tune = TuneLogits(session.all_logits(data.tune.images), data.tune.labels)
    certify_logits = CertifyLogits(session.all_logits(data.certify.images), data.certify.labels)
    check_reuse(manifest.calibration, Request(tune, certify_logits, cost, settings, tuple(sources)))
    calibrated = calibrate_logits(tune, certify_logits, cost, settings, sources=sources)
    seal_calibrated(session, calibrated, out)
    return calibrated


def check_exits(manifest: Manifest) -> None:
    """:class:`UserError` where a bundle has one exit only."""
    if len(manifest.stages) == 1:
        raise UserError("this bundle has one exit: there is nothing to calibrate")


def seal_calibrated(session: Session, calibrated: CalibratedPolicy, out: Path) -> None:
    """Seal the bundle of ``session`` with another policy into ``out``."""
    profile = session.folder / PROFILE
    make_folder(out.parent)
    bundle.write(
        out,
        apply(session.manifest, calibrated),
        [session.folder / stage.file for stage in session.manifest.stages],
        # The stages stay, so their times do.
        beside_seal=[profile] if profile.is_file() else [],
    )
