from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from erde import policy
from erde.calibration import (
    SHARPNESS_GRID,
    Cost,
    ScoredSplit,
    ThresholdPath,
    _threshold_grid,
    best_within_risk,
    calibrate_logits,
    certify,
    choose_score,
    fit_temperatures,
    images_needed,
    point_name,
    search_path,
)
from erde.errors import UserError
from erde.splits import CertifyLogits, TuneLogits
from tests.oracles import softmax, synthetic_logits

COST = Cost(exit_macs=(42, 71, 104), no_exit_macs=100)


def tune_scored(seed: int = 0, images: int = 500, name: str = "margin") -> ScoredSplit:
    return ScoredSplit.of(TuneLogits(*synthetic_logits(seed, images)), name, 1.0, None)


def certify_scored(seed: int, images: int) -> ScoredSplit:
    return ScoredSplit.of(CertifyLogits(*synthetic_logits(seed, images)), "margin", 1.0, None)


# ---------------------------------------------------------------- risk and temperatures


def test_harm_is_the_reference_right_and_the_exit_wrong() -> None:
    right = np.array([[True, False, False, True], [True, True, False, False]])
    # Class 0 is right; logits answer it or class 1.
    logits = np.where(right[..., None], [1.0, 0.0], [0.0, 1.0]).astype(np.float32)
    labels = np.zeros(4, dtype=np.int64)
    against_final = ScoredSplit.of(TuneLogits(logits, labels), "margin", 1.0, None)
    assert against_final.right.tolist() == right.tolist()
    assert against_final.harm.tolist() == [[False, True, False, False], [False] * 4]
    reference = np.array([True, False, True, True])
    against_other = ScoredSplit.of(TuneLogits(logits, labels), "margin", 1.0, reference)
    assert against_other.harm.tolist() == [[False, False, True, False], [False, False, True, True]]


def test_temperatures_recover_the_known_ones() -> None:
    generator = np.random.default_rng(0)
    calm = 2 * generator.normal(size=(8000, 6))
    labels = np.array([generator.choice(6, p=p) for p in softmax(calm)])
    known = [0.5, 1.0, 3.0]
    logits = np.stack([temperature * calm for temperature in known]).astype(np.float32)
    found = fit_temperatures(TuneLogits(logits, labels))
    assert found == pytest.approx(known, rel=0.05)
    # The same images: the exits' temperatures differ by exactly what their logits were scaled with.
    assert found[2] / found[0] == pytest.approx(6, rel=1e-3)


def test_temperature_has_the_least_nll() -> None:
    tune = TuneLogits(*synthetic_logits(0, 400))

    def nll(index: int, temperature: float) -> float:
        p = softmax(tune.logits[index], temperature)
        return float(-np.log(p[np.arange(len(tune)), tune.labels]).mean())

    for index, found in enumerate(fit_temperatures(tune)):
        assert nll(index, found) <= min(nll(index, found * factor) for factor in (0.5, 0.98, 1.02, 2.0))


# ---------------------------------------------------------------- the path


@pytest.fixture(scope="module", params=["entropy", "max_probability", "margin"])
def searched(request: pytest.FixtureRequest) -> tuple[ScoredSplit, ThresholdPath]:
    tune = tune_scored(name=request.param)
    return tune, search_path(tune, COST)


def test_path_runs_from_no_early_exit_to_the_first_exit(searched: tuple[ScoredSplit, ThresholdPath]) -> None:
    tune, path = searched
    assert path.thresholds[0] == (None, None)
    assert path.macs[0] == 104
    assert path.risk[0] == 0
    assert path.macs[-1] == 42
    assert (policy.decide(tune.scores, path.thresholds[-1]) == 0).all()
    assert len(path.thresholds) == len(path.macs) == len(path.risk) > 50


def test_path_gets_cheaper_and_thresholds_only_fall(searched: tuple[ScoredSplit, ThresholdPath]) -> None:
    _, path = searched
    assert (np.diff(path.macs) < 0).all()
    for before, after in itertools.pairwise(path.thresholds):
        for old, new in zip(before, after, strict=True):
            assert old is None or (new is not None and new <= old)
        assert before != after


def test_path_tells_the_truth_of_itself(searched: tuple[ScoredSplit, ThresholdPath]) -> None:
    tune, path = searched
    for thresholds, risk, macs in list(zip(path.thresholds, path.risk, path.macs, strict=True))[::5]:
        measured = tune.measure(thresholds, COST)
        assert (measured.risk, measured.macs) == pytest.approx((risk, macs))


def test_thresholds_stand_strictly_between_scores(searched: tuple[ScoredSplit, ThresholdPath]) -> None:
    tune, path = searched
    for index in range(2):
        used = sorted({one[index] for one in path.thresholds} - {None})
        scores = np.unique(tune.scores[index])
        places = np.searchsorted(scores, used)
        # Midway between neighbours; only the last one stands below all scores.
        assert not np.isin(used, scores).any()
        inside = places > 0
        below, above = scores[places[inside] - 1], scores[places[inside]]
        np.testing.assert_allclose(np.asarray(used)[inside], (below + above) / 2, rtol=1e-12)
        assert (~inside).sum() <= 1


def test_path_with_tied_scores() -> None:
    logits, labels = synthetic_logits(0, 300)
    tune = ScoredSplit.of(TuneLogits(np.round(logits / 4), labels), "margin", 1.0, None)
    assert len(np.unique(tune.scores[0])) < 30
    path = search_path(tune, COST)
    assert (np.diff(path.macs) < 0).all()
    assert path.macs[-1] == 42
    for index in range(2):
        assert not np.isin([one[index] for one in path.thresholds if one[index]], tune.scores[index]).any()


def test_path_of_neighbouring_floats() -> None:
    one = np.nextafter(1.0, 0)
    scores = np.array([[1.0, one, 0.5, 1.0], [1.0, one, 0.25, 0.75], [0.0] * 4])
    harm = np.array([[False, True, False, False]] + [[False] * 4] * 2)
    tune = ScoredSplit(scores, ~harm, harm)
    path = search_path(tune, COST)
    assert path.macs[-1] == 42
    assert not {1.0, one} & {threshold for thresholds in path.thresholds for threshold in thresholds}
    for thresholds, risk, macs in zip(path.thresholds, path.risk, path.macs, strict=True):
        assert (tune.measure(thresholds, COST).risk, tune.measure(thresholds, COST).macs) == (risk, macs)


def test_path_of_a_single_exit() -> None:
    logits, labels = synthetic_logits(0, 50, signals=(2.0,))
    path = search_path(ScoredSplit.of(TuneLogits(logits, labels), "margin", 1.0, None), Cost((100,), 100))
    assert path.thresholds == ((),)
    assert path.macs.tolist() == [100]


def every_pair(tune: ScoredSplit) -> tuple[np.ndarray, np.ndarray]:
    """Risk and MACs of every pair of thresholds of the two grids, disabled included."""
    grids = [[None, *_threshold_grid(tune.scores[index])] for index in range(2)]
    risks, macs = [], []
    for pair in itertools.product(*grids):
        exits = policy.decide(tune.scores, pair)
        risks.append(policy.take_exit(tune.harm, exits).mean())
        macs.append(np.asarray(COST.exit_macs)[exits].mean())
    return np.asarray(risks), np.asarray(macs)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_saves_nearly_as_much_as_exhaustive_search(seed: int) -> None:
    tune = tune_scored(seed, 800)
    path = search_path(tune, COST)
    risks, macs = every_pair(tune)
    assert len(macs) == 101**2
    for max_risk in (0.005, 0.01, 0.02, 0.05):
        best = 1 - macs[risks <= max_risk].min() / COST.no_exit_macs
        found = 1 - path.macs[best_within_risk(path, max_risk)] / COST.no_exit_macs
        assert best > 0.04
        assert found <= best + 1e-12
        assert found >= 0.95 * best, (max_risk, found / best)


def test_best_within_risk() -> None:
    path = ThresholdPath(
        ((None,), (0.9,), (0.8,), (0.7,)), np.array([0, 0.02, 0.01, 0.03]), np.arange(4, 0, -1.0)
    )
    assert [best_within_risk(path, risk) for risk in (0.0, 0.01, 0.02, 0.5)] == [0, 2, 2, 3]
    against_teacher = ThresholdPath(((None,),), np.array([0.2]), np.array([1.0]))
    assert best_within_risk(against_teacher, 0.1) == 0


# ---------------------------------------------------------------- the choice of the score


def test_the_score_that_saves_most_comes_first() -> None:
    tune = TuneLogits(*synthetic_logits(0, 300))
    candidates = choose_score(tune, COST, 0.02)
    assert {(one.score, one.sharpness) for one in candidates} == set(
        itertools.product(policy.SCORES, SHARPNESS_GRID)
    )
    saved = [one.macs_saved for one in candidates]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] > saved[-1]
    for one in candidates[::6]:
        path = search_path(ScoredSplit.of(tune, one.score, one.sharpness, None), COST)
        assert one.macs_saved == 1 - path.macs[best_within_risk(path, 0.02)] / COST.no_exit_macs


def test_a_given_score_and_sharpness_are_kept() -> None:
    tune = TuneLogits(*synthetic_logits(0, 200))
    assert {one.score for one in choose_score(tune, COST, 0.02, score="margin")} == {"margin"}
    (only,) = choose_score(tune, COST, 0.02, score="entropy", sharpness=0.6)
    assert (only.score, only.sharpness) == ("entropy", 0.6)


def test_a_tie_goes_to_the_papers_rule() -> None:
    # Every early answer is right, so every score lets all images leave at the first exit.
    labels = np.arange(40) % 5
    logits = np.tile(4 * np.eye(5, dtype=np.float32)[labels], (3, 1, 1))
    best = choose_score(TuneLogits(logits, labels), COST, 0.01)[0]
    assert (best.score, best.sharpness) == ("entropy", 1.0)
    assert best.macs_saved == pytest.approx(0.58)


# ---------------------------------------------------------------- certificates


@pytest.mark.parametrize(
    ("risk", "confidence", "needed"), [(0.01, 0.95, 299), (0.0025, 0.95, 1197), (0.01, 0.9, 230)]
)
def test_images_needed(risk: float, confidence: float, needed: int) -> None:
    assert images_needed(risk, confidence) == needed
    assert (1 - risk) ** needed <= 1 - confidence < (1 - risk) ** (needed - 1)


@pytest.mark.parametrize(("images", "passes"), [(298, False), (299, True)])
def test_without_error_the_least_number_certifies(images: int, passes: bool) -> None:
    path = ThresholdPath(((None, None),), np.zeros(1), np.full(1, 104.0))
    index, certificate = certify(path, certify_scored(5, images), 0.01, 0.95, "final_exit")
    assert index == 0
    assert (certificate is not None) == passes


@pytest.mark.parametrize("max_risk", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_certificate_against_binomtest(max_risk: float, confidence: float) -> None:
    path, split = search_path(tune_scored(), COST), certify_scored(1, 700)
    index, certificate = certify(path, split, max_risk, confidence, "final_exit")
    errors = [
        int(policy.take_exit(split.harm, policy.decide(split.scores, thresholds)).sum())
        for thresholds in path.thresholds
    ]
    p_values = [scipy.stats.binomtest(one, 700, max_risk, alternative="less").pvalue for one in errors]
    first_failure = next(number for number, p in enumerate(p_values) if p > 1 - confidence)
    assert index == first_failure - 1 > 0
    assert certificate is not None
    assert (certificate.images, certificate.errors) == (700, errors[index])
    assert certificate.risk == errors[index] / 700
    bound = scipy.stats.binomtest(errors[index], 700, alternative="less").proportion_ci(confidence).high
    assert certificate.upper_bound == pytest.approx(bound)
    assert certificate.risk <= certificate.upper_bound <= max_risk
    assert (certificate.max_risk, certificate.confidence) == (max_risk, confidence)
    assert certificate.reference == "final_exit"


def test_the_walk_stops_at_the_first_failure() -> None:
    # Exit 1 harms ten images; at the last point they leave at exit 0, which gets them right.
    harm = np.zeros((3, 500), dtype=bool)
    harm[1, :10] = True
    split = ScoredSplit(np.full((3, 500), 0.9), ~harm, harm)
    path = ThresholdPath(((None, None), (None, 0.5), (0.5, 0.5)), np.zeros(3), np.array([3.0, 2.0, 1.0]))
    assert certify(path, split, 0.01, 0.9, "final_exit")[0] == 0
    assert certify(path, split, 0.05, 0.9, "final_exit")[0] == 2


def test_no_certificate_against_a_better_reference() -> None:
    logits, labels = synthetic_logits(1, 1000)
    split = ScoredSplit.of(CertifyLogits(logits, labels), "margin", 1.0, np.ones(1000, dtype=bool))
    assert split.harm[-1].mean() > 0.05
    path = search_path(tune_scored(), COST)
    assert certify(path, split, 0.01, 0.9, "teacher") == (0, None)


class Population:
    """One exit and a final one that is always right; the exit is wrong the more often the lower its score."""

    thresholds = (None, *np.linspace(0.98, 0.3, 60))

    @staticmethod
    def draw(generator: np.random.Generator, images: int) -> ScoredSplit:
        scores = generator.random(images)
        harm = np.stack([generator.random(images) < 0.15 * (1 - scores), np.zeros(images, dtype=bool)])
        return ScoredSplit(np.stack([scores, scores]), ~harm, harm)

    @staticmethod
    def true_risk(threshold: float | None) -> float:
        # The integral of 0.15 (1 - s) from the threshold to 1.
        return 0.0 if threshold is None else 0.15 * (1 - threshold) ** 2 / 2


def test_the_promise_holds_over_many_draws_and_a_naive_choice_breaks_it() -> None:
    draws, images, max_risk, confidence = 300, 600, 0.01, 0.9
    path = ThresholdPath(
        tuple((one,) for one in Population.thresholds), np.zeros(61), np.linspace(104, 42, 61)
    )
    generator = np.random.default_rng(0)
    violations = naive_violations = certified = 0
    for _ in range(draws):
        split = Population.draw(generator, images)
        index, certificate = certify(path, split, max_risk, confidence, "final_exit")
        certified += certificate is not None and index > 0
        violations += (
            certificate is not None and Population.true_risk(Population.thresholds[index]) > max_risk
        )
        measured = [
            policy.take_exit(split.harm, policy.decide(split.scores, thresholds)).mean()
            for thresholds in path.thresholds
        ]
        naive = int(np.flatnonzero(np.asarray(measured) <= max_risk)[-1])
        naive_violations += Population.true_risk(Population.thresholds[naive]) > max_risk
    # 99.9 % of all simulations of a procedure that violates in exactly one of ten draws stay below this.
    assert violations <= scipy.stats.binom.ppf(0.999, draws, 1 - confidence)
    assert certified > 0.9 * draws
    assert naive_violations > 0.3 * draws
    assert naive_violations > 3 * violations


# ---------------------------------------------------------------- all together


def calibrate(images: int = 500, **arguments: object) -> object:
    arguments = {"score": "margin", "sharpness": 1.0, **arguments}
    tune, held_out = TuneLogits(*synthetic_logits(0, 500)), CertifyLogits(*synthetic_logits(1, images))
    return calibrate_logits(tune, held_out, COST, **arguments)  # type: ignore[arg-type]


def test_operating_points() -> None:
    found = calibrate(max_risks=[0.05, 0.01], confidence=0.9, budgets=[0.9, 0.6])
    assert [(one.name, one.kind, one.target) for one in found.points] == [
        ("no-exit", "no-exit", None),
        ("risk-5", "risk", 0.05),
        ("risk-1", "risk", 0.01),
        ("budget-90", "budget", 0.9),
        ("budget-60", "budget", 0.6),
    ]
    assert found.default == "risk-5"
    assert (found.score, found.sharpness) == ("margin", 1.0)
    no_exit, risk_5, risk_1, budget_90, budget_60 = found.points
    assert no_exit.thresholds == [None, None]
    assert risk_5.certificate.max_risk == 0.05
    assert risk_5.tune.macs < risk_1.tune.macs < no_exit.tune.macs
    split = certify_scored(1, 500)
    measured = split.measure(risk_5.thresholds, COST)
    assert measured.risk == risk_5.certificate.risk <= risk_5.certificate.upper_bound <= 0.05
    # The dearest point of the path that fits the budget.
    for point, budget in ((budget_90, 90), (budget_60, 60)):
        assert point.certificate is None
        assert point.tune.macs == max(macs for macs in found.path.macs if macs <= budget)
    tune = tune_scored()
    for point in found.points:
        assert point.tune == tune.measure(point.thresholds, COST)
    assert found.calibration.exit_rates == pytest.approx(risk_5.tune.exit_rates)
    assert [sum(one) for one in found.calibration.score_histograms] == [500, 500, 500]
    assert found.temperatures == fit_temperatures(TuneLogits(*synthetic_logits(0, 500)))


def test_too_few_images_for_a_certificate() -> None:
    found = calibrate(images=100, max_risks=[0.01], confidence=0.95)
    point = found.points[1]
    assert point.certificate is None
    assert point.thresholds == [None, None]
    assert "100 certify images cannot prove a risk of 1 % at 95 % confidence" in point.note
    assert "at least 299 would be needed" in point.note


def test_calibration_does_not_choose_by_the_certify_split() -> None:
    # The same tune split with two certify splits: score, path, temperatures and budgets must not move.
    one, other = (calibrate(images, score="auto", sharpness=None, budgets=[0.8]) for images in (300, 900))
    assert (one.score, one.sharpness, one.temperatures) == (other.score, other.sharpness, other.temperatures)
    assert one.path.thresholds == other.path.thresholds
    assert one.points[-1] == other.points[-1]


def test_reference_reaches_the_certificate() -> None:
    right = np.zeros(500, dtype=bool)
    found = calibrate(
        max_risks=[0.05], reference="teacher", tune_reference_right=right, certify_reference_right=right
    )
    # A teacher that is never right is harmed by nothing: everything leaves first.
    certificate = found.points[1].certificate
    assert (certificate.reference, certificate.errors) == ("teacher", 0)
    assert found.points[1].tune.macs == 42


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_risks": [1.0]}, "between 0 and 1, got 1"),
        ({"max_risks": [0.0]}, "between 0 and 1, got 0"),
        ({"max_risks": [math.nan]}, "between 0 and 1, got nan"),
        ({"confidence": 1.0}, "between 0 and 1, got 1"),
        ({"max_risks": []}, "at least one target risk"),
        ({"budgets": [0.4]}, "a budget of 40 % of the MACs cannot be met.*takes 42 %"),
    ],
)
def test_what_calibration_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        calibrate(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("risk", "name"), [(0.01, "risk-1"), (0.005, "risk-0.5"), (0.07, "risk-7"), (0.0025, "risk-0.25")]
)
def test_point_names(risk: float, name: str) -> None:
    assert point_name(risk) == name
