"""From logits to an exit policy: temperatures, thresholds, certificates.

Everything that is fitted or searched sees the tune split; the certify split is touched once, by
:func:`certify`, along a path of thresholds that was fixed before. Terms as in docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import beta, binom

from erde import bundle, policy
from erde.bundle import Calibration, Certificate, Manifest, Measured, OperatingPoint, ScoreCandidate
from erde.errors import UserError, nearest
from erde.runtime import Session
from erde.splits import CertifyLogits, CertifySplit, Logits, TuneLogits, TuneSplit

METHOD = "fixed-sequence test on a path of thresholds, exact binomial bound"
ASSUMPTIONS = (
    "images in use are drawn like those of the certify split, which chose nothing else; "
    "confidence is over the draw of that split"
)
SHARPNESS_GRID = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
# Thresholds tried per exit: 1 % of the images apart on a large split.
GRID_LEVELS = 100
Reference = Literal["final_exit", "no_exit_network", "teacher"]


@dataclass(frozen=True)
class Cost:
    """MACs of an image that leaves at each exit, heads included (E,), and of the network without exits."""

    exit_macs: tuple[int, ...]
    no_exit_macs: int


@dataclass(frozen=True)
class ScoredSplit:
    """A split as the exit rule sees it: scores and harm, both (E, N), and right answers (E, N).

    Harm is the yes/no of which risk is the mean: the reference is right and this exit is wrong.
    """

    scores: NDArray[np.float64]
    right: NDArray[np.bool_]
    harm: NDArray[np.bool_]

    @classmethod
    def of(
        cls, logits: Logits, name: str, sharpness: float, reference_right: NDArray[np.bool_] | None
    ) -> ScoredSplit:
        """Score ``logits``; ``reference_right`` (N,) is None where the final exit is the reference."""
        right = logits.logits.argmax(axis=-1) == logits.labels
        reference = right[-1] if reference_right is None else reference_right
        return cls(policy.score(logits.logits, name, sharpness), right, reference & ~right)

    def measure(self, thresholds: policy.Thresholds, cost: Cost) -> Measured:
        """Accuracy, risk and cost of ``thresholds`` on this split."""
        exits = policy.decide(self.scores, thresholds)
        count = len(exits)
        right = int(policy.take_exit(self.right, exits).sum())
        macs = float(np.asarray(cost.exit_macs)[exits].mean())
        return Measured(
            images=count,
            accuracy=right / count,
            accuracy_interval=wilson_interval(right, count),
            risk=float(policy.take_exit(self.harm, exits).mean()),
            macs=macs,
            macs_saved=1.0 - macs / cost.no_exit_macs,
            exit_rates=(np.bincount(exits, minlength=len(self.scores)) / count).tolist(),
        )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a binomial share (Wilson 1927)."""
    z = 1.959963984540054
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


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
class ThresholdPath:
    """Threshold vectors from "no early exit" to "everything leaves first", each cheaper than the last."""

    thresholds: tuple[tuple[float | None, ...], ...]
    risk: NDArray[np.float64]
    macs: NDArray[np.float64]


def search_path(tune: ScoredSplit, cost: Cost) -> ThresholdPath:
    """Walk greedily from no early exit to the first exit for all, by the least harm per MAC saved.

    A step lowers the threshold of one exit along a grid of midpoints between observed scores; the step
    taken is the one with the smallest ratio of added harm to saved MACs (the lower convex hull of what
    is reachable), and every grid point passed on the way belongs to the path.
    """
    count = tune.scores.shape[1]
    macs = np.asarray(cost.exit_macs, dtype=np.float64)
    harm = tune.harm.astype(np.float64)
    intermediate = len(macs) - 1
    grids = [_threshold_grid(tune.scores[index]) for index in range(intermediate)]
    # entry[k][i]: the first level of exit k's grid at which image i would leave there (level 0: disabled).
    entry = [_entry_levels(scores, grid) for scores, grid in zip(tune.scores[:-1], grids, strict=True)]
    images = np.arange(count)
    levels = [0] * intermediate
    exits = np.full(count, intermediate)
    path = [tuple[float | None, ...]([None] * intermediate)]
    path_exits_cost = [float(macs[exits].mean())]
    path_risk = [float(harm[exits, images].mean())]
    while True:
        best: tuple[float, float, int, int] | None = None
        for index in range(intermediate):
            later = exits > index
            size = len(grids[index]) + 2
            weights_cost = (macs[exits] - macs[index])[later]
            weights_harm = (harm[index] - harm[exits, images])[later]
            entered = entry[index][later]
            saved = np.bincount(entered, weights_cost, minlength=size).cumsum()
            added = np.bincount(entered, weights_harm, minlength=size).cumsum()
            reachable = np.arange(levels[index] + 1, len(grids[index]) + 1)
            reachable = reachable[saved[reachable] > 0]
            if not len(reachable):
                continue
            slope = added[reachable] / saved[reachable]
            choice = np.lexsort((-saved[reachable], slope))[0]
            candidate = (
                float(slope[choice]),
                -float(saved[reachable][choice]),
                index,
                int(reachable[choice]),
            )
            best = candidate if best is None else min(best, candidate)
        if best is None:
            break
        _, _, index, target = best
        for level in range(levels[index] + 1, target + 1):
            exits = np.where((exits > index) & (entry[index] <= level), index, exits)
            levels[index] = level
            step_cost = float(macs[exits].mean())
            if step_cost < path_exits_cost[-1]:
                path.append(
                    tuple(
                        grid[level - 1] if level else None for grid, level in zip(grids, levels, strict=True)
                    )
                )
                path_exits_cost.append(step_cost)
                path_risk.append(float(harm[exits, images].mean()))
    return ThresholdPath(tuple(path), np.asarray(path_risk), np.asarray(path_exits_cost))


def _threshold_grid(scores: NDArray[np.float64]) -> list[float]:
    """At most GRID_LEVELS falling thresholds, midway between neighbouring scores; the last lets all leave."""
    distinct = np.unique(scores)[::-1]
    midpoints = (distinct[:-1] + distinct[1:]) / 2
    # Scores that differ in the last bit only have no number between them: no threshold parts them.
    midpoints = midpoints[(midpoints < distinct[:-1]) & (midpoints > distinct[1:])]
    kept = np.unique(np.linspace(0, len(midpoints) - 1, min(GRID_LEVELS - 1, len(midpoints))).astype(int))
    lowest = float(distinct[-1])
    below_all = lowest - max(1e-6, abs(lowest) * 1e-6)
    return [*(float(value) for value in midpoints[kept]), below_all]


def _entry_levels(scores: NDArray[np.float64], grid: list[float]) -> NDArray[np.int64]:
    rising = np.asarray(grid)[::-1]
    # The number of thresholds that are strictly below the score: score > threshold.
    below = np.searchsorted(rising, scores, side="left")
    return np.asarray(len(grid) - below + 1, dtype=np.int64)


def best_within_risk(path: ThresholdPath, max_risk: float) -> int:
    """The cheapest point of the path whose risk on tune is at most ``max_risk``."""
    return int(np.flatnonzero(path.risk <= max_risk)[-1]) if (path.risk <= max_risk).any() else 0


@dataclass(frozen=True)
class ScoreChoice:
    """One candidate of the choice between scores: the MACs it saves on tune at the target risk."""

    score: str
    sharpness: float
    macs_saved: float
    path: ThresholdPath


def choose_score(
    tune: TuneLogits,
    cost: Cost,
    max_risk: float,
    reference_right: NDArray[np.bool_] | None = None,
    score: str = "auto",
    sharpness: float | None = None,
) -> list[ScoreChoice]:
    """All candidates, the best first: by MACs saved on tune within ``max_risk``, never by NLL.

    ``score="auto"`` tries every score; ``sharpness=None`` tries SHARPNESS_GRID. Ties keep the paper's
    rule (entropy, sharpness 1) in front.
    """
    names = list(policy.SCORES) if score == "auto" else [score]
    grid = SHARPNESS_GRID if sharpness is None else (sharpness,)
    candidates = []
    for name in names:
        for value in grid:
            path = search_path(ScoredSplit.of(tune, name, value, reference_right), cost)
            macs = path.macs[best_within_risk(path, max_risk)]
            candidates.append(ScoreChoice(name, value, 1.0 - float(macs) / cost.no_exit_macs, path))
    return sorted(candidates, key=lambda one: (-one.macs_saved, one.score != "entropy", one.sharpness != 1.0))


def images_needed(max_risk: float, confidence: float) -> int:
    """The least number of certify images, all without error, that certifies ``max_risk``."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-max_risk))


def certify(
    path: ThresholdPath, certify_split: ScoredSplit, max_risk: float, confidence: float, reference: Reference
) -> tuple[int, Certificate | None]:
    """Walk ``path`` from the careful end while risk <= ``max_risk`` is proved; the last proved point.

    At each point the hypothesis "risk > max_risk" is tested with the exact binomial p-value
    ``P(Bin(n, max_risk) <= errors)`` at level ``1 - confidence``; the walk stops at the first point
    that fails, so the chance of ever accepting a false point is at most ``1 - confidence``
    (fixed-sequence testing, Angelopoulos et al., Learn then Test, arXiv 2110.01052).

    Returns the index on the path and its certificate; ``(0, None)`` where not even the first point passes.
    """
    count = certify_split.scores.shape[1]
    accepted, errors_there = -1, 0
    for index, thresholds in enumerate(path.thresholds):
        exits = policy.decide(certify_split.scores, thresholds)
        errors = int(policy.take_exit(certify_split.harm, exits).sum())
        if binom.cdf(errors, count, max_risk) > 1 - confidence:
            break
        accepted, errors_there = index, errors
    if accepted < 0:
        return 0, None
    return accepted, Certificate(
        max_risk=max_risk,
        confidence=confidence,
        images=count,
        errors=errors_there,
        risk=errors_there / count,
        upper_bound=float(beta.ppf(confidence, errors_there + 1, count - errors_there)),
        reference=reference,
        method=METHOD,
        assumptions=ASSUMPTIONS,
    )


@dataclass(frozen=True)
class CalibratedPolicy:
    """What calibration gives: the score, temperatures, the path, and the named operating points."""

    score: str
    sharpness: float
    temperatures: list[float]
    path: ThresholdPath
    points: list[OperatingPoint]
    default: str
    calibration: Calibration
    candidates: list[ScoreCandidate]

    def to_json(self) -> dict[str, Any]:
        """What ``policy.json`` holds."""
        return {
            "score": self.score,
            "sharpness": self.sharpness,
            "temperatures": self.temperatures,
            "path": {
                "thresholds": [list(one) for one in self.path.thresholds],
                "risk": self.path.risk.tolist(),
                "macs": self.path.macs.tolist(),
            },
            "points": [point.model_dump(mode="json") for point in self.points],
            "default": self.default,
            "calibration": self.calibration.model_dump(mode="json"),
            "candidates": [one.model_dump(mode="json") for one in self.candidates],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CalibratedPolicy:
        """Read what :meth:`to_json` gave."""
        path = value["path"]
        return cls(
            score=value["score"],
            sharpness=value["sharpness"],
            temperatures=value["temperatures"],
            path=ThresholdPath(
                tuple(tuple(one) for one in path["thresholds"]),
                np.asarray(path["risk"]),
                np.asarray(path["macs"]),
            ),
            points=[OperatingPoint.model_validate(one) for one in value["points"]],
            default=value["default"],
            calibration=Calibration.model_validate(value["calibration"]),
            candidates=[ScoreCandidate.model_validate(one) for one in value["candidates"]],
        )


def check_budget(budget: float, cost: Cost) -> None:
    """:class:`UserError` where not even leaving at the first exit keeps within ``budget``, a share of the MACs."""
    least = cost.exit_macs[0] / cost.no_exit_macs
    if least > budget:
        raise UserError(
            f"a budget of {budget * 100:g} % of the MACs cannot be met: leaving at the first exit takes {least * 100:.0f} %; "
            "give a larger budget or an earlier exit"
        )


def point_name(max_risk: float) -> str:
    """``risk-1`` for 0.01: the name of a certified operating point, in per cent."""
    return f"risk-{max_risk * 100:g}"


def calibrate_logits(
    tune: TuneLogits,
    certify_split: CertifyLogits,
    cost: Cost,
    *,
    max_risks: Sequence[float] = (0.01,),
    confidence: float = 0.9,
    budgets: Sequence[float] = (),
    reference: Reference = "final_exit",
    tune_reference_right: NDArray[np.bool_] | None = None,
    certify_reference_right: NDArray[np.bool_] | None = None,
    score: str = "auto",
    sharpness: float | None = None,
) -> CalibratedPolicy:
    """Fit on tune, certify on certify: one operating point per risk, per MAC budget, and ``no-exit``.

    The score is chosen for the first of ``max_risks``, which is also the default operating point where
    it could be certified. A budget is a share of the no-exit network's MACs and is not certified.
    """
    for value in (*max_risks, confidence, *budgets):
        if not 0 < value < 1:
            raise UserError(f"risks, budgets and confidence must lie between 0 and 1, got {value:g}")
    for what, values in (("target risk", max_risks), ("budget", budgets)):
        if len(set(values)) != len(values):
            raise UserError(f"a {what} is given twice in {list(values)}: give each once")
    if not max_risks:
        raise UserError("calibration needs at least one target risk")
    if score not in ("auto", *policy.SCORES):
        raise UserError(f"unknown score '{score}'{nearest(score, ['auto', *policy.SCORES])}")
    if sharpness is not None and not sharpness > 0:
        raise UserError(f"a sharpness must be above 0, got {sharpness:g}")
    if len(cost.exit_macs) == 1:
        # Nothing to decide: one exit answers all. The paper's rule stands in for a score.
        score, sharpness, max_risks, budgets = "entropy", 1.0, (), ()
    candidates = choose_score(
        tune, cost, max_risks[0] if max_risks else 0.0, tune_reference_right, score, sharpness
    )
    chosen = candidates[0]
    tune_scored = ScoredSplit.of(tune, chosen.score, chosen.sharpness, tune_reference_right)
    certify_scored = ScoredSplit.of(certify_split, chosen.score, chosen.sharpness, certify_reference_right)
    path = chosen.path

    def point(
        name: str,
        kind: Literal["no-exit", "risk", "budget"],
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
            tune=tune_scored.measure(path.thresholds[index], cost),
        )

    points = [point("no-exit", "no-exit", None, 0)]
    for max_risk in max_risks:
        index, certificate = certify(path, certify_scored, max_risk, confidence, reference)
        note = None
        if certificate is None:
            needed = images_needed(max_risk, confidence)
            note = (
                f"not certified, so no early exit: {len(certify_split):,} certify images cannot prove a risk "
                f"of {max_risk * 100:g} % at {confidence * 100:g} % confidence"
                + (f" (at least {needed:,} would be needed)" if needed > len(certify_split) else "")
            )
        points.append(point(point_name(max_risk), "risk", max_risk, index, certificate, note))
    for budget in budgets:
        within = np.flatnonzero(path.macs <= budget * cost.no_exit_macs)
        check_budget(budget, cost)
        points.append(
            point(
                f"budget-{budget * 100:g}", "budget", budget, int(within[0]), note="a budget, not certified"
            )
        )
    default = point_name(max_risks[0]) if max_risks else "no-exit"
    default_thresholds = next(one.thresholds for one in points if one.name == default)
    exits = policy.decide(tune_scored.scores, default_thresholds)
    return CalibratedPolicy(
        score=chosen.score,
        sharpness=chosen.sharpness,
        temperatures=fit_temperatures(tune),
        path=path,
        points=points,
        default=default,
        calibration=Calibration(
            exit_rates=(np.bincount(exits, minlength=len(cost.exit_macs)) / len(exits)).tolist(),
            score_histograms=[
                np.histogram(scores, bins=20, range=(0.0, 1.0))[0].tolist() for scores in tune_scored.scores
            ],
        ),
        candidates=[
            ScoreCandidate(score=one.score, sharpness=one.sharpness, macs_saved=one.macs_saved)
            for one in candidates
        ],
    )


def apply(
    manifest: Manifest, calibrated: CalibratedPolicy, points: list[OperatingPoint] | None = None
) -> Manifest:
    """``manifest`` with a calibrated policy; ``points`` in place of its own, for example with test results."""
    # Validated anew: what is sealed must be readable.
    return Manifest.model_validate(
        {
            **dict(manifest),
            "score": calibrated.score,
            "sharpness": calibrated.sharpness,
            "temperatures": calibrated.temperatures,
            "operating_points": points or calibrated.points,
            "default_operating_point": calibrated.default,
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
    max_risk: float | Sequence[float] = 0.01,
    confidence: float = 0.9,
    budgets: Sequence[float] = (),
    score: str = "auto",
    sharpness: float | None = None,
) -> CalibratedPolicy:
    """Calibrate the bundle at ``path`` on ``data.tune`` and ``data.certify``, and seal it anew in place.

    ``max_risk`` is one target or several (the first is the default operating point); the reference is
    the bundle's own final exit.
    """
    folder = Path(path)
    session = Session(folder)
    manifest = session.manifest
    max_risks = (max_risk,) if isinstance(max_risk, int | float) else tuple(max_risk)
    calibrated = calibrate_logits(
        TuneLogits(session.all_logits(data.tune.images), data.tune.labels),
        CertifyLogits(session.all_logits(data.certify.images), data.certify.labels),
        Cost(tuple(stage.macs for stage in manifest.stages), manifest.no_exit_macs),
        max_risks=max_risks,
        confidence=confidence,
        budgets=budgets,
        score=score,
        sharpness=sharpness,
    )
    bundle.write(folder, apply(manifest, calibrated), [folder / stage.file for stage in manifest.stages])
    return calibrated
