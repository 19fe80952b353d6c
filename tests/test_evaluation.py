from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from erde import policy
from erde.calibration import CalibratedPolicy, Cost, ScoredSplit, calibrate_logits, wilson_interval
from erde.evaluation import auroc, expected_calibration_error, in_band, measure_curve, measure_exits
from erde.splits import CertifyLogits, TestLogits, TuneLogits
from tests.oracles import synthetic_logits

COST = Cost(exit_macs=(42, 71, 104), no_exit_macs=100)


@pytest.fixture(scope="module")
def held_out() -> TestLogits:
    return TestLogits(*synthetic_logits(3, 600))


@pytest.fixture(scope="module")
def calibrated() -> CalibratedPolicy:
    return calibrate_logits(
        TuneLogits(*synthetic_logits(1, 600)),
        CertifyLogits(*synthetic_logits(2, 600)),
        COST,
        max_risks=[0.05],
        score="margin",
        sharpness=1.0,
    )


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (1, 299), (9876, 10000)])
def test_wilson_interval_against_scipy(successes: int, trials: int) -> None:
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=80, deadline=None)
def test_auroc_against_sklearn_with_ties(pairs: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in pairs], np.float64)
    positive = np.array([one for _, one in pairs])
    if positive.all() or not positive.any():
        assert auroc(scores, positive) is None
    else:
        assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_against_a_slow_loop(bins: int) -> None:
    logits, labels = synthetic_logits(0, 400)
    p = policy.softmax(logits[0])
    expected = 0.0
    for index in range(bins):
        inside = [
            n
            for n in range(len(p))
            if index / bins <= p[n].max() < (index + 1) / bins or (index == bins - 1 and p[n].max() == 1)
        ]
        if inside:
            accuracy = np.mean([p[n].argmax() == labels[n] for n in inside])
            expected += len(inside) / len(p) * abs(accuracy - np.mean([p[n].max() for n in inside]))
    assert expected > 0.01
    assert expected_calibration_error(p, labels, bins) == pytest.approx(expected, abs=1e-12)


def test_ece_by_hand() -> None:
    # Sure and right, sure and wrong: confidence 1, accuracy 1/2.
    p = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert expected_calibration_error(p, np.array([0, 1])) == pytest.approx(0.5)
    # In one bin an over- and an under-confident answer cancel; in two they do not.
    p = np.array([[0.65, 0.35], [0.95, 0.05]])
    labels = np.array([0, 1])
    assert expected_calibration_error(p, labels, bins=1) == pytest.approx(abs(0.5 - 0.8))
    assert expected_calibration_error(p, labels, bins=10) == pytest.approx((0.35 + 0.95) / 2)


def test_measures_of_every_exit(held_out: TestLogits, calibrated: CalibratedPolicy) -> None:
    measures = measure_exits(held_out, calibrated, None)
    final_right = held_out.logits[-1].argmax(-1) == held_out.labels
    assert len(measures) == 3
    for index, found in enumerate(measures):
        logits = held_out.logits[index].astype(np.float64)
        right = logits.argmax(-1) == held_out.labels
        p = policy.softmax(logits / calibrated.temperatures[index])
        score = policy.margin_score(logits)
        assert found.accuracy == right.mean()
        assert found.accuracy_interval == wilson_interval(int(right.sum()), len(right))
        assert found.temperature == calibrated.temperatures[index]
        assert found.nll == pytest.approx(
            -np.mean([np.log(p[n, label]) for n, label in enumerate(held_out.labels)])
        )
        assert found.ece == pytest.approx(expected_calibration_error(p, held_out.labels))
        assert found.auroc_correctness == pytest.approx(roc_auc_score(right, score))
        if index < 2:
            assert found.auroc_harm == pytest.approx(roc_auc_score(~(final_right & ~right), score))
    # The final exit does no harm when it is itself the reference.
    assert measures[-1].auroc_harm is None


def test_measures_against_another_reference(held_out: TestLogits, calibrated: CalibratedPolicy) -> None:
    reference_right = np.random.default_rng(0).random(len(held_out)) < 0.8
    found = measure_exits(held_out, calibrated, reference_right)[-1].auroc_harm
    right = held_out.logits[-1].argmax(-1) == held_out.labels
    expected = roc_auc_score(~(reference_right & ~right), policy.margin_score(held_out.logits[-1]))
    assert found == pytest.approx(expected)


def test_measured_against_a_slow_loop(held_out: TestLogits) -> None:
    scored = ScoredSplit.of(held_out, "margin", 1.0, None)
    thresholds = (0.6, 0.4)
    found = scored.measure(thresholds, COST)
    right = risk = macs = 0
    rates = [0, 0, 0]
    for n, label in enumerate(held_out.labels):
        answer = 2
        for index in (1, 0):
            p = np.sort(policy.softmax(held_out.logits[index, n]))
            if p[-1] - p[-2] > thresholds[index]:
                answer = index
        answered_right = held_out.logits[answer, n].argmax() == label
        right += answered_right
        risk += held_out.logits[2, n].argmax() == label and not answered_right
        macs += COST.exit_macs[answer]
        rates[answer] += 1
    count = len(held_out)
    assert min(rates) > 20
    assert found.images == count
    assert found.accuracy == right / count
    assert found.accuracy_interval == wilson_interval(right, count)
    assert found.risk == pytest.approx(risk / count)
    assert found.risk > 0
    assert found.macs == pytest.approx(macs / count)
    assert found.macs_saved == pytest.approx(1 - macs / count / COST.no_exit_macs)
    assert found.exit_rates == pytest.approx([rate / count for rate in rates])


def test_risk_bounds_the_net_drop(held_out: TestLogits, calibrated: CalibratedPolicy) -> None:
    scored = ScoredSplit.of(held_out, "margin", 1.0, None)
    final = scored.right[-1].mean()
    for thresholds in calibrated.path.thresholds[::7]:
        measured = scored.measure(thresholds, COST)
        assert final - measured.accuracy <= measured.risk + 1e-12


def test_curve(held_out: TestLogits, calibrated: CalibratedPolicy) -> None:
    curve = measure_curve(held_out, calibrated, COST, None)
    scored = ScoredSplit.of(held_out, "margin", 1.0, None)
    assert len(curve.macs) == len(curve.accuracy) == len(curve.risk) == len(curve.exit_rates) <= 160
    assert curve.macs[0] == COST.exit_macs[-1]
    assert curve.accuracy[0] == scored.right[-1].mean()
    assert curve.risk[0] == 0
    # The last thresholds were below every score of tune, not of test: nearly all leave first.
    assert curve.macs[-1] < 1.1 * COST.exit_macs[0]
    assert curve.exit_rates[-1][0] > 0.95
    assert np.corrcoef(curve.macs, np.arange(len(curve.macs)))[0, 1] < -0.9


def test_in_band() -> None:
    scores = np.array([[0.5, 0.5 + 1.5e-5, 0.9, 0.1, 0.1], [0.7, 0.7, 0.7, 0.7 - 5e-6, 0.2], [0.0] * 5])
    # Of image 2 exit 1 is never asked, so its score there does not matter.
    assert in_band(scores, [0.5, 0.7]).tolist() == [True, False, False, True, False]
    assert in_band(scores, [0.5, 0.7], band=1e-4).tolist() == [True, True, False, True, False]
    assert in_band(scores, [None, 0.7]).tolist() == [True, True, True, True, False]
    assert not in_band(scores, [None, None]).any()
