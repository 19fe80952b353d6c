from __future__ import annotations

import hashlib
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest

import erde
from erde.calibration.checks import Request, check_reuse, doubts, seen_before
from erde.calibration.choice import MOST_FRAGILE, choose_score
from erde.calibration.logits import calibrate_logits, fit_temperatures, point_name
from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.settings import AUTO_SCORES, AUTO_SHARPNESS, SHARPNESS_GRID, Settings
from erde.calibration.thresholds import ScoredSplit, best_within_risk, search_path
from erde.common.splits import CertifyLogits, Logits, TestLogits, TuneLogits
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.rule import PAPER_RULE, ExitRule
from erde.recipe.validation import validate
from tests.helpers.checks import user_error
from tests.helpers.oracles import softmax, synthetic_logits

COST = Cost(exit_macs=(42, 71, 104), no_exit_macs=100)
MARGIN = ExitRule("margin")


def tune_logits(seed: int = 0, images: int = 500) -> TuneLogits:
    return TuneLogits(*synthetic_logits(seed, images))


def certify_logits(seed: int = 1, images: int = 500) -> CertifyLogits:
    return CertifyLogits(*synthetic_logits(seed, images))


# ---------------------------------------------------------------- temperatures


def test_temperatures_recover_the_known_ones() -> None:
    generator = np.random.default_rng(0)
    calm = 2 * generator.normal(size=(8000, 6))
    labels = np.array([generator.choice(6, p=p) for p in softmax(calm)])
    known = [0.5, 1.0, 3.0]
    logits = np.stack([temperature * calm for temperature in known]).astype(np.float32)
    temperatures = fit_temperatures(TuneLogits(logits, labels))
    assert temperatures == pytest.approx(known, rel=0.05)
    # The same images: the exits' temperatures differ by exactly what their logits were scaled with.
    assert temperatures[2] / temperatures[0] == pytest.approx(6, rel=1e-3)


def test_temperature_has_the_least_nll() -> None:
    tune = TuneLogits(*synthetic_logits(0, 400))

    def nll(index: int, temperature: float) -> float:
        p = softmax(tune.logits[index], temperature)
        return float(-np.log(p[np.arange(len(tune)), tune.labels]).mean())

    for index, fitted in enumerate(fit_temperatures(tune)):
        assert nll(index, fitted) <= min(nll(index, fitted * factor) for factor in (0.5, 0.98, 1.02, 2.0))


# ---------------------------------------------------------------- the choice of the score


def test_the_score_that_saves_most_comes_first() -> None:
    tune = tune_logits(images=300)
    choices = choose_score(tune, COST, Settings(max_risks=(0.02,)))
    tried = {(choice.rule.score, choice.rule.sharpness, choice.rule.ensemble) for choice in choices}
    own = set(itertools.product(AUTO_SCORES[:3], AUTO_SHARPNESS, ["none"]))
    assert tried == own | {("harm", 1.0, "none")}
    sturdy = [choice for choice in choices if choice.fragile <= MOST_FRAGILE]
    saved = [choice.macs_saved for choice in sturdy]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] > saved[-1]
    assert choices[: len(sturdy)] == sturdy
    for choice in choices:
        if choice.rule.score != "harm":
            path = search_path(ScoredSplit.of(tune, choice.rule, None), COST)
            assert choice.macs_saved == 1 - path.macs[best_within_risk(path, 0.02)] / COST.no_exit_macs


def test_a_named_score_is_kept() -> None:
    tune = tune_logits(images=200)

    def rules(**given: object) -> list[ExitRule]:
        return [choice.rule for choice in choose_score(tune, COST, Settings(max_risks=(0.02,), **given))]

    assert {(rule.score, rule.ensemble) for rule in rules(score="margin")} == {("margin", "none")}
    assert rules(score="entropy", sharpness=0.6) == [ExitRule("entropy", 0.6)]
    assert rules(score="margin", sharpness=1.0, ensemble="geometric") == [
        ExitRule("margin", 1.0, "geometric")
    ]
    assert [rule.score for rule in rules(score="patience")] == ["patience"]
    assert {rule.sharpness for rule in rules(score="energy")} == set(SHARPNESS_GRID)
    together = {(rule.score, rule.ensemble) for rule in rules(ensemble="arithmetic")}
    assert together == {(score, "arithmetic") for score in AUTO_SCORES[:3]}
    assert {rule.sharpness for rule in rules(sharpness=3.0) if rule.score != "harm"} == {3.0}
    (harm,) = rules(score="harm")
    assert harm.harm is not None
    assert len(harm.harm) == 2


def test_a_tie_goes_to_the_papers_rule() -> None:
    # Every early answer is right, so every score lets all images leave at the first exit.
    labels = np.arange(40) % 5
    logits = np.tile(4 * np.eye(5, dtype=np.float32)[labels], (3, 1, 1))
    best = choose_score(TuneLogits(logits, labels), COST, Settings(max_risks=(0.01,)))[0]
    assert best.rule == PAPER_RULE
    assert best.macs_saved == pytest.approx(0.58)


def test_thresholds_in_a_crowd_of_scores_are_a_last_resort() -> None:
    # At sharpness 1 the scores of the surest images all lie within 1e-5 of 1, where float32 cannot tell them apart.
    logits, labels = synthetic_logits(0, 600)
    sharp = TuneLogits(logits * 12, labels)
    choices = choose_score(sharp, COST, Settings(max_risks=(0.005,), score="max_probability"))
    fragile = [choice.fragile > MOST_FRAGILE for choice in choices]
    assert any(fragile)
    assert not all(fragile)
    assert fragile == sorted(fragile)
    for choice in choices:
        scored = ScoredSplit.of(sharp, choice.rule, None)
        thresholds = choice.path.thresholds[best_within_risk(choice.path, 0.005)]
        assert choice.fragile == policy.in_band(scored.scores, thresholds).mean()


# ---------------------------------------------------------------- all together


def calibrate(images: int = 500, **settings: object) -> CalibratedPolicy:
    settings = {"score": "margin", "sharpness": 1.0, **settings}
    return calibrate_logits(tune_logits(), certify_logits(images=images), COST, validate(Settings, settings))


def test_operating_points() -> None:
    calibrated = calibrate(max_risks=(0.05, 0.01), confidence=0.9, budgets=(0.9, 0.6))
    assert [(point.name, point.kind, point.target) for point in calibrated.points] == [
        ("no-exit", "no-exit", None),
        ("risk-5", "risk", 0.05),
        ("risk-1", "risk", 0.01),
        ("budget-90", "budget", 0.9),
        ("budget-60", "budget", 0.6),
    ]
    assert calibrated.default == "risk-5"
    assert calibrated.rule == MARGIN
    no_exit, risk_5, risk_1, budget_90, budget_60 = calibrated.points
    assert no_exit.thresholds == [None, None]
    assert risk_5.certificate is not None
    assert risk_5.certificate.max_risk == 0.05
    assert risk_5.tune is not None
    assert risk_1.tune is not None
    assert no_exit.tune is not None
    assert risk_5.tune.macs < risk_1.tune.macs < no_exit.tune.macs
    measured = ScoredSplit.of(certify_logits(), MARGIN, None).measure(risk_5.thresholds, COST)
    assert risk_5.certificate.upper_bound is not None
    assert measured.risk == risk_5.certificate.risk <= risk_5.certificate.upper_bound <= 0.05
    # The dearest point of the path that fits the budget.
    for point, budget in ((budget_90, 90), (budget_60, 60)):
        assert point.certificate is None
        assert point.tune is not None
        assert point.tune.macs == max(macs for macs in calibrated.path.macs if macs <= budget)
        assert "met on tune; its risk is at most" in str(point.note)
    tune = ScoredSplit.of(tune_logits(), MARGIN, None)
    for point in calibrated.points:
        assert point.tune == tune.measure(point.thresholds, COST)
    assert calibrated.calibration.exit_rates == pytest.approx(measured.exit_rates)
    assert [sum(histogram) for histogram in calibrated.calibration.score_histograms] == [500, 500, 500]
    assert calibrated.temperatures == fit_temperatures(tune_logits())
    assert calibrated.left_out == []


def test_the_ladder_leaves_out_what_cannot_be_proved() -> None:
    calibrated = calibrate(images=450, max_risks=Settings().max_risks)
    assert [missing.name for missing in calibrated.left_out] == ["risk-0.25", "risk-0.5"]
    assert [missing.images_needed for missing in calibrated.left_out] == [920, 460]
    assert calibrated.left_out[0].note == (
        "450 certify images cannot prove 0.25 % at 90 % confidence: at least 920 would be needed"
    )
    certified = [point for point in calibrated.points if point.kind == "risk"]
    assert [point.name for point in certified] == ["risk-1", "risk-2", "risk-3", "risk-5"]
    assert all(point.certificate is not None for point in certified)
    macs = [point.tune.macs for point in certified if point.tune]
    assert macs == sorted(macs, reverse=True)
    assert calibrated.default == "risk-1"


def test_where_the_default_cannot_be_certified_nothing_leaves_early() -> None:
    calibrated = calibrate(images=100, max_risks=(0.01, 0.05), confidence=0.9)
    assert calibrated.default == "no-exit"
    assert [point.name for point in calibrated.points] == ["no-exit", "risk-5"]
    assert calibrated.calibration.exit_rates == [0, 0, 1]


def test_calibration_does_not_choose_by_the_certify_split() -> None:
    # The same tune split with two certify splits: score, path, temperatures and budgets must not move.
    first, other = (
        calibrate(images, score="auto", sharpness=None, budgets=(0.8,), max_risks=(0.02,))
        for images in (300, 900)
    )
    assert (first.rule, first.temperatures) == (other.rule, other.temperatures)
    assert first.path.thresholds == other.path.thresholds
    assert first.points[-1].thresholds == other.points[-1].thresholds
    assert first.contenders == other.contenders


def test_the_papers_rule_stands_in_every_comparison() -> None:
    for settings in ({"score": "auto", "sharpness": None}, {"score": "margin"}, {"score": "harm"}):
        calibrated = calibrate(**settings)
        assert PAPER_RULE in [contender.rule for contender in calibrated.contenders]
        assert ("entropy", 1.0, "none") in [
            (candidate.score, candidate.sharpness, candidate.ensemble) for candidate in calibrated.candidates
        ]
        tune = ScoredSplit.of(tune_logits(), PAPER_RULE, None)
        assert calibrated.paper_path.thresholds == search_path(tune, COST).thresholds
    for contender in calibrated.contenders:
        assert [target.target for target in contender.targets] == [0.005, 0.01, 0.02]


def test_what_is_fitted_is_searched_out_of_fold() -> None:
    calibrated = calibrate(score="harm")
    assert calibrated.rule.harm is not None
    # The final regressions have seen all of tune: their own scores there are too good, and were not used.
    own = ScoredSplit.of(tune_logits(), calibrated.rule, None)
    assert search_path(own, COST).thresholds != calibrated.path.thresholds
    assert all(
        0 < threshold < 1
        for thresholds in calibrated.path.thresholds[5:50]
        for threshold in thresholds
        if threshold is not None
    )


def test_reference_reaches_the_certificate() -> None:
    right = np.zeros(500, dtype=bool)
    calibrated = calibrate_logits(
        tune_logits(),
        certify_logits(),
        COST,
        Settings(max_risks=(0.05,), reference="teacher", score="margin", sharpness=1.0),
        tune_reference_right=right,
        certify_reference_right=right,
    )
    # A teacher that is never right is harmed by nothing: everything leaves first.
    certificate = calibrated.points[1].certificate
    assert certificate is not None
    assert (certificate.reference, certificate.lost) == ("teacher", 0)
    assert certificate.won > 0
    assert calibrated.points[1].tune is not None
    assert calibrated.points[1].tune.macs == 42


def test_a_reference_that_is_never_wrong_leaves_every_rung_out() -> None:
    right = np.ones(500, dtype=bool)
    settings = Settings(max_risks=(0.01,), reference="teacher", score="margin", sharpness=1.0)
    calibrated = calibrate_logits(
        tune_logits(),
        certify_logits(),
        COST,
        settings,
        tune_reference_right=right,
        certify_reference_right=right,
    )
    assert calibrated.default == "no-exit"
    assert calibrated.left_out[0].images_needed is None
    assert (
        "against the reference 'teacher' even the full network loses too many" in calibrated.left_out[0].note
    )


@pytest.mark.parametrize("guarantee", ["risk", "net_drop", "expected_risk"])
def test_guarantees(guarantee: str) -> None:
    calibrated = calibrate(guarantee=guarantee, max_risks=(0.05,), images=2000)
    certificate = calibrated.points[1].certificate
    assert certificate is not None
    assert certificate.guarantee == guarantee
    assert calibrated.points[1].tune is not None
    assert calibrated.points[1].tune.macs < 100


def test_a_latency_budget() -> None:
    cost = Cost(COST.exit_macs, COST.no_exit_macs, (1.0, 2.0, 3.0))
    settings = Settings(max_risks=(0.05,), latency_budgets=(1.5,), score="margin", sharpness=1.0)
    calibrated = calibrate_logits(tune_logits(), certify_logits(), cost, settings)
    point = calibrated.points[-1]
    assert (point.name, point.kind, point.target) == ("latency-1.5ms", "latency", 1.5)
    assert point.tune is not None
    assert point.tune.milliseconds is not None
    assert 1.4 < point.tune.milliseconds <= 1.5
    assert "its risk is at most" in str(point.note)


def test_a_single_exit_has_nothing_to_decide() -> None:
    tune, certify = (
        kind(*synthetic_logits(seed, 200, signals=(2.0,)))
        for seed, kind in enumerate((TuneLogits, CertifyLogits))
    )
    assert isinstance(tune, TuneLogits)
    assert isinstance(certify, CertifyLogits)
    settings = Settings(max_risks=(0.01,), budgets=(0.1,))
    calibrated = calibrate_logits(tune, certify, Cost((100,), 100), settings)
    assert [point.name for point in calibrated.points] == ["no-exit"]
    assert calibrated.default == "no-exit"
    # The same settings again are no second choice.
    check_reuse(calibrated.calibration, Request(tune, certify, Cost((100,), 100), settings))


def test_a_policy_survives_json() -> None:
    for score in ("harm", "patience", "energy"):
        calibrated = calibrate(score=score, sharpness=None)
        again = CalibratedPolicy.from_json(json.loads(json.dumps(calibrated.to_json())))
        assert again.rule == calibrated.rule
        assert again.path.thresholds == calibrated.path.thresholds
        assert again.to_json() == calibrated.to_json()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_risks": (1.0,)}, "max_risks.0: expected less than 1, got 1.0"),
        ({"max_risks": (0.0,)}, "max_risks.0: expected greater than 0, got 0.0"),
        ({"max_risks": (math.nan,)}, "max_risks.0: expected a finite number, got nan"),
        ({"confidence": 1.0}, "confidence: expected less than 1, got 1.0"),
        ({"max_risks": ()}, "max_risks: expected"),
        ({"max_risks": (0.01, 0.01)}, "max_risks: expected each once, got .0.01, 0.01."),
        ({"max_risks": (0.05, 0.0500000001)}, "max_risks: expected each once"),
        ({"latency_budgets": (2.0, 2.0)}, "latency_budgets: expected each once"),
        ({"budgets": (0.4,)}, "a budget of 40 % of the MACs cannot be met.*takes 42 %"),
        ({"latency_budgets": (2.0,)}, "a latency budget of 2 ms needs a profile of the machine"),
        ({"latency_budgets": (-2.0,)}, "latency_budgets.0: expected greater than 0, got -2.0"),
        ({"latency_budgets": (math.inf,)}, "latency_budgets.0: expected a finite number, got inf"),
        ({"score": "entrpy"}, "unknown score 'entrpy'.*did you mean 'entropy'"),
        (
            {"ensemble": "mean"},
            "ensemble: expected 'auto', 'none', 'arithmetic' or 'geometric', got 'mean'",
        ),
        (
            {"score": "energy", "ensemble": "geometric"},
            "'energy' reads raw logits: it has no geometric ensemble",
        ),
        (
            {"score": "harm", "ensemble": "arithmetic"},
            "'harm' looks at earlier exits by itself: it has no arithmetic",
        ),
        (
            {"guarantee": "expected_risk", "reference": "teacher"},
            "needs the reference 'final_exit', got 'teacher'",
        ),
        (
            {"guarantee": "certain"},
            "guarantee: expected 'risk', 'net_drop', 'expected_risk' or 'disagreement', got 'certain'",
        ),
        ({"sharpness": math.inf}, "sharpness: expected a finite number, got inf"),
        ({"sharpness": 0.0}, "sharpness: expected greater than or equal to 0.001, got 0.0"),
        ({"confidence": "90%"}, "confidence: expected .*number.*, got '90%'"),
        ({"confidense": 0.9}, "unknown key 'confidense' .did you mean 'confidence'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], message: str) -> None:
    with user_error(message):
        calibrate(**settings)


def test_an_impossible_latency_budget() -> None:
    cost = Cost(COST.exit_macs, COST.no_exit_macs, (1.0, 2.0, 3.0))
    with user_error("a latency budget of 0.5 ms cannot be met: the first exit alone takes 1 ms"):
        calibrate_logits(tune_logits(), certify_logits(), cost, Settings(latency_budgets=(0.5,)))


def damaged(**changes: Any) -> TuneLogits:
    logits, labels = synthetic_logits(0, 500)
    if "at" in changes:
        logits[changes["at"]] = changes["value"]
    if "labels" in changes:
        labels[:2] = changes["labels"]
    if "without" in changes:
        keep = labels != changes["without"]
        logits, labels = logits[:, keep], labels[keep]
    if "exits" in changes:
        logits = logits[: changes["exits"]]
    return TuneLogits(logits, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": (1, 7, 2), "value": np.nan}, r"the tune logits hold 1 values that are NaN .*exit 1, image 7"),
        ({"at": (0, 3), "value": np.inf}, "hold 5 values that are NaN or infinite"),
        ({"labels": 5}, "the tune labels run from 0 to 5, but there are 5 classes"),
        ({"labels": -1}, "the tune labels run from -1 to 4"),
        ({"exits": 2}, r"tune logits are of shape \(2, 500, 5\) and certify logits of \(3, 500, 5\)"),
    ],
)
def test_splits_that_are_refused(changes: dict[str, object], message: str) -> None:
    with user_error(message):
        calibrate_logits(damaged(**changes), certify_logits(), COST)


def test_splits_that_overlap_are_refused() -> None:
    logits, labels = synthetic_logits(0, 900)
    tune = TuneLogits(logits[:, :500], labels[:500])
    with user_error("tune and certify overlap: 100 of 500 certify images are in tune too"):
        calibrate_logits(tune, CertifyLogits(logits[:, 400:], labels[400:]), COST)
    calibrate_logits(tune, CertifyLogits(logits[:, 500:], labels[500:]), COST, Settings(max_risks=(0.05,)))


def test_absent_classes_are_said_and_no_reason_to_stop(capsys: pytest.CaptureFixture[str]) -> None:
    calibrated = calibrate_logits(damaged(without=3), certify_logits(), COST, Settings(max_risks=(0.05,)))
    assert calibrated.points[1].certificate is not None
    assert (
        "warning: 1 of 5 classes have no image in tune: the promise is over images as they come, and rare classes have none "
        "of their own" in capsys.readouterr().err
    )
    split = certify_logits()
    present = split.labels != 3
    certify = CertifyLogits(split.logits[:, present], split.labels[present])
    calibrate_logits(tune_logits(), certify, COST, Settings(max_risks=(0.05,)))
    assert "warning: 1 of 5 classes have no image in certify: the promise" in capsys.readouterr().err


def test_doubts() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(500) % 5
    logits = generator.normal(size=(3, 500, 5)).astype(np.float32)
    poor = Logits(logits, labels)
    assert ["the full network is right on" in line for line in doubts(poor, poor, [1.0] * 3)] == [True]
    logits[:, np.arange(500), labels] += 20
    seen = Logits(logits, labels)
    lines = doubts(seen, seen, [0.05, 0.3, 0.0500001])
    assert lines[0].startswith(
        "the final exit is right on 100.0 % of the certify images: if the network was trained on them"
    )
    assert lines[1].startswith("the temperature of exit 0, 2 ran to its bound")
    wrong_late = logits.copy()
    wrong_late[-1, :100] = generator.normal(size=(100, 5))
    (line,) = doubts(seen, Logits(wrong_late, labels), [1.0] * 3)
    assert "an earlier exit on 100.0 %" in line
    assert doubts(tune_logits(), certify_logits(), [1.0] * 3) == []


def test_far_better_on_certify_than_on_test() -> None:
    certify, labels = certify_logits(), certify_logits().labels
    assert seen_before(certify, TestLogits(*synthetic_logits(2, 500))) is None
    wrong = labels.copy()
    wrong[:100] = (wrong[:100] + 1) % 5
    line = seen_before(certify, TestLogits(certify.logits, wrong))
    assert line is not None
    assert line.startswith("the final exit is right on ")
    assert "if it was trained on certify, the promise does not hold" in line


def test_what_python_is_given_is_checked_before_the_bundle_is_opened() -> None:
    nothing: Any = None
    with user_error("max_risks.0: expected .*number.*, got '5%'"):
        erde.calibrate("nowhere", nothing, max_risk=nothing or "5%")
    with user_error("max_risks.0: expected less than 1, got 2"):
        erde.calibrate("nowhere", nothing, max_risk=2)
    with user_error("budgets: expected .*, got '70%'"):
        erde.calibrate("nowhere", nothing, budgets="70%")
    with user_error("unknown key 'budget' .did you mean 'budgets'"):
        erde.calibrate("nowhere", nothing, budget=[0.7])
    with user_error("reference is 'teacher': a bundle has its own final exit only"):
        erde.calibrate("nowhere", nothing, reference="teacher")


def test_no_images_are_refused() -> None:
    empty = CertifyLogits(np.zeros((3, 0, 5), np.float32), np.zeros(0, np.int64))
    with user_error("the certify split holds no images"):
        calibrate_logits(tune_logits(), empty, COST)


def request(**changes: object) -> Request:
    """What :func:`calibrate` asks for at a risk of 5 %, with changes."""
    given: dict[str, object] = {
        "tune": tune_logits(),
        "certify": certify_logits(),
        "cost": COST,
        "settings": Settings(max_risks=(0.05,), score="margin", sharpness=1.0),
    }
    return Request(**{**given, **changes})


def test_a_certify_split_serves_one_choice() -> None:
    calibration = calibrate(max_risks=(0.05,)).calibration
    other = Settings(max_risks=(0.02,), score="margin", sharpness=1.0)
    check_reuse(None, request(settings=other))
    check_reuse(calibration, request())
    check_reuse(calibration, request(settings=other, certify=certify_logits(seed=9)))
    for changes in (
        {"settings": other}, {"tune": tune_logits(seed=7)}, {"cost": Cost((42, 70, 104), 100)},
    ):  # fmt: skip
        with user_error("these certify images already certified other choices"):
            check_reuse(calibration, request(**changes))


def test_another_split_of_the_same_images_is_a_second_choice_too() -> None:
    whole = ("the same images",)
    first = calibrate_logits(
        tune_logits(), certify_logits(), COST, request().settings, sources=whole
    ).calibration
    again = {"tune": tune_logits(seed=7), "certify": certify_logits(seed=9)}
    with user_error("these certify images already certified other choices"):
        check_reuse(first, request(**again, sources=whole))
    check_reuse(first, request(**again, sources=("others",)))


@pytest.mark.parametrize("guarantees", [("risk", "disagreement"), ("disagreement", "risk")])
def test_a_promise_without_labels_is_a_second_choice_on_the_same_images(guarantees: tuple[str, str]) -> None:
    first, second = (
        validate(Settings, {"max_risks": [0.05], "score": "margin", "sharpness": 1.0, "guarantee": guarantee})
        for guarantee in guarantees
    )
    calibration = calibrate_logits(tune_logits(), certify_logits(), COST, first).calibration
    check_reuse(calibration, request(settings=first))
    with user_error("these certify images already certified other choices"):
        check_reuse(calibration, request(settings=second))
    check_reuse(calibration, request(settings=second, certify=certify_logits(seed=9)))


def test_a_new_profile_is_no_second_choice() -> None:
    times = [Cost(COST.exit_macs, COST.no_exit_macs, (1.0, 2.0, last)) for last in (3.0, 3.1)]
    settings = Settings(max_risks=(0.05,), score="margin", sharpness=1.0, latency_budgets=(2.5,))
    calibrated = calibrate_logits(tune_logits(), certify_logits(), times[0], settings)
    check_reuse(calibrated.calibration, request(cost=times[1], settings=settings))
    check_reuse(calibrated.calibration, request(cost=COST, settings=settings))


def test_the_hash_of_choices_is_that_of_the_first_version() -> None:
    settings = {
        "max_risks": [0.05], "confidence": 0.9, "budgets": [], "latency_budgets": [], "reference": "final_exit",
        "guarantee": "risk", "score": "margin", "sharpness": 1.0, "ensemble": "auto",
    }  # fmt: skip
    cost = {"exit_macs": [42, 71, 104], "no_exit_macs": 100, "exit_milliseconds": None}
    value = json.dumps([settings, cost, tune_logits().fingerprint()], sort_keys=True)
    # 1 and 1.0 are one choice, and milliseconds none.
    mine = request(
        settings=validate(Settings, {"max_risks": [0.05], "score": "margin", "sharpness": 1}),
        cost=Cost((42, 71, 104), 100, (1.0, 2.0, 3.0)),
    )
    assert mine.choices() == hashlib.sha256(value.encode()).hexdigest()


def test_a_setting_of_a_later_version_keeps_the_hash_while_it_has_its_default() -> None:
    class Later(Settings):
        new: int = 3

    same, new = Later(max_risks=(0.05,)), Later(max_risks=(0.05,), new=4)
    assert request(settings=same).choices() == request(settings=Settings(max_risks=(0.05,))).choices()
    assert request(settings=new).choices() != request(settings=same).choices()


def test_every_setting_is_a_choice() -> None:
    hashes = {
        request(settings=Settings(**changes)).choices()
        for changes in (
            {}, {"max_risks": (0.01,)}, {"confidence": 0.95}, {"budgets": (0.5,)}, {"reference": "teacher"},
            {"guarantee": "net_drop"}, {"score": "margin"}, {"sharpness": 1.0}, {"ensemble": "none"},
            {"latency_budgets": (2.0,)},
        )
    }  # fmt: skip
    assert len(hashes) == 10
    assert request().choices() == request().choices()


def test_a_budget_just_at_the_first_exit() -> None:
    # 0.29 * 100 is a little less than 29 in floats.
    cost = Cost((29, 60, 100), 100)
    calibrated = calibrate_logits(
        tune_logits(), certify_logits(), cost, Settings(max_risks=(0.05,), budgets=(0.29,))
    )
    assert calibrated.points[-1].tune is not None
    assert calibrated.points[-1].tune.macs == 29


@pytest.mark.parametrize(
    ("risk", "name"), [(0.01, "risk-1"), (0.005, "risk-0.5"), (0.07, "risk-7"), (0.0025, "risk-0.25")]
)
def test_point_names(risk: float, name: str) -> None:
    assert point_name(risk) == name
