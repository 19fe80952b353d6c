"""Statistics over seeds, held against published examples, R's formulas and scipy's other routes to the same numbers."""

import numpy as np
import pytest
from scipy import stats

from erde.common.splits import CertifyLogits, TestLogits, TuneLogits
from erde.evaluation.results import SplitInfo
from erde.evaluation.study import (
    ArmMeasure,
    ArmSeed,
    Estimate,
    Study,
    _compared,
    estimate,
    holm,
    measures,
    measures_of_logits,
    paired_p_value,
    summarise,
)
from erde.policy.cost import Cost
from erde.report.study_text import study_text
from tests.helpers.hand_made import COST, hand_made_exit_choice, hand_made_policy, hand_made_results
from tests.helpers.oracles import synthetic_logits


def test_holm_as_in_the_textbook() -> None:
    # p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") of R.
    p_values = {"d": 0.04, "a": 0.01, "c": 0.03, "e": 0.05, "b": 0.02}
    assert holm(p_values) == pytest.approx({"a": 0.05, "b": 0.08, "c": 0.09, "d": 0.09, "e": 0.09})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_holm_keeps_the_share_of_studies_with_any_false_finding() -> None:
    generator = np.random.default_rng(0)
    studies = generator.uniform(size=(4000, 6))
    wrong = np.mean([min(holm(dict(enumerate(row))).values()) < 0.05 for row in map(list, studies)])
    assert 0.04 < wrong < 0.06


def test_estimate_is_the_interval_of_student() -> None:
    values = [0.71, 0.74, 0.69, 0.75]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    measured = estimate(values)
    assert measured.mean == pytest.approx(np.mean(values))
    assert measured.interval == pytest.approx((low, high))
    assert estimate([0.5]) == Estimate(mean=0.5, interval=None)
    # Equal values say nothing of how far another seed's would lie.
    assert estimate([0.5, 0.5]) == Estimate(mean=0.5, interval=None)
    assert estimate([0.1 + 0.2, 0.3]).interval is None


def test_paired_test_is_of_differences() -> None:
    first, second = [0.71, 0.74, 0.69], [0.70, 0.72, 0.69]
    differences = [a - b for a, b in zip(first, second, strict=True)]
    assert paired_p_value(differences) == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert paired_p_value([0.1]) is None
    assert paired_p_value([0.0, 0.0]) == paired_p_value([1e-16, 0.0]) == paired_p_value([1e-16] * 3) == 1.0
    assert paired_p_value([0.25, 0.25]) is None
    assert paired_p_value([0.71 - 0.70, 0.72 - 0.71]) is None


def test_arms_that_do_not_differ_seldom_seem_to() -> None:
    # Accuracies are whole numbers of images: with two seeds the same difference comes twice in 5 % of studies.
    right = np.random.default_rng(0).binomial(360, 0.97, (2000, 2, 2)) / 360
    differences = (right[:, 0] - right[:, 1]).tolist()
    p_values = [paired_p_value(seeds) for seeds in differences]
    intervals = [estimate(seeds).interval for seeds in differences]
    assert sum(p is None for p in p_values) > 60
    assert sum(p is not None and p <= 0.05 for p in p_values) < 0.06 * 2000
    assert sum(known is not None and not known[0] <= 0 <= known[1] for known in intervals) < 0.06 * 2000


def test_an_arm_without_a_p_value_still_counts_in_the_correction() -> None:
    rows = {"kd": [0.7, 0.8, 0.9], "erde": [0.75, 0.84, 0.96], "ce": [0.8, 0.9, 1.0]}
    measured = _compared(rows, "kd", ["kd", "erde", "ce"])
    erde, ce = measured["erde"].difference, measured["ce"].difference
    assert erde is not None
    assert erde.p_value is not None
    assert erde.holm_p_value == pytest.approx(2 * erde.p_value)
    assert ce is not None
    assert (ce.interval, ce.p_value, ce.holm_p_value) == (None, None, None)


def test_arms_are_held_against_the_reference_where_every_seed_has_the_measure() -> None:
    rows = {"kd": [0.7, 0.8], "erde": [0.75, 0.84], "ce": [0.7, None], "teacher": [0.9, 0.9]}
    measured = _compared(rows, "kd", ["kd", "erde", "ce"])
    assert measured["kd"].difference is None
    difference = measured["erde"].difference
    assert difference is not None
    assert difference.mean == pytest.approx(0.045)
    assert measured["ce"] == ArmMeasure(values=[0.7, None], estimate=None)
    assert measured["teacher"].difference is None
    assert measured["teacher"].estimate is not None


def test_text_shows_means_and_differences() -> None:
    rows = {"kd": [0.700, 0.704], "erde": [0.710, 0.712], "teacher": [0.9, 0.9]}
    measures = {"accuracy of exit 1": _compared(rows, "kd", ["kd", "erde"])}
    study = Study(name="small", reference="kd", seeds=[0, 1], test_images=100, measures=measures)
    text = study_text(study)
    half = 100 * stats.sem(rows["kd"]) * stats.t.ppf(0.975, 1)
    assert f"| kd | 70.2 ± {half:.1f} |" in text
    p = stats.ttest_rel(rows["erde"], rows["kd"]).pvalue
    assert f"| erde | +0.9 ± 1.3, p {p:.2g} |" in text
    assert "| teacher | 90.0 |" in text
    single = study.model_copy(
        update={"seeds": [0], "measures": {"risk at risk-1": _compared({"kd": [0.01]}, "kd", ["kd"])}}
    )
    assert "| kd | 1.0 |" in study_text(single)


def test_operating_points_stand_in_the_order_of_their_risk() -> None:
    points = ("risk-1", "risk-0.25", "risk-10", "risk-1, before the teacher", "risk-2")
    measures = {f"MACs saved at {point}": _compared({"kd": [0.3]}, "kd", ["kd"]) for point in points}
    text = study_text(Study(name="small", reference="kd", seeds=[0], test_images=100, measures=measures))
    assert "| arm | risk-0.25 | risk-1 | risk-2 | risk-10 | risk-1, in front of the teacher |" in text


def test_exits_that_were_chosen_by_the_clock_are_compared_by_their_places() -> None:
    logits, labels = synthetic_logits(1, 200, signals=(0.9, 1.6, 2.2))
    # As many exits in each seed, at other places; and in the last seed the final one alone.
    kept = {0: ["group1", "group2", "final"], 1: ["group1", "group3", "final"], 2: ["final"]}
    seeds = {}
    for seed, names in kept.items():
        own = logits[-len(names) :]
        cost = COST if len(names) > 1 else Cost(COST.exit_macs[-1:], COST.no_exit_macs)
        auto = (TestLogits(own, labels), hand_made_policy(cost=cost), cost)
        made = hand_made_results(
            {"auto": auto, "plain": (TestLogits(logits, labels), hand_made_policy(), COST)}
        )
        places = [
            exit.model_copy(update={"name": name})
            for exit, name in zip(made.arms["auto"].cost, names, strict=True)
        ]
        chosen = made.arms["auto"].model_copy(update={"cost": places, "exit_choice": hand_made_exit_choice()})
        made = made.model_copy(
            update={
                "arms": {**made.arms, "auto": chosen},
                "recipe": {"calibration": {"max_risks": [0.01, 0.02]}},
            }
        )
        seeds[seed] = {
            arm: ArmSeed(
                role="student", test=SplitInfo(size=200, fingerprint="f"), measures=measures(made, arm)
            )
            for arm in made.arms
        }
    study = summarise("small", "plain", seeds).measures
    assert study["accuracy of exit 1"]["auto"].values == [None, None, None]
    assert study["accuracy of exit 1"]["plain"].estimate is not None
    accuracy = (logits.argmax(axis=-1) == labels).mean(axis=1)
    assert study["accuracy of exit group1"]["auto"].values == [accuracy[0], accuracy[0], None]
    assert study["accuracy of exit group2"]["auto"].values == [accuracy[1], None, None]
    assert study["accuracy of the final exit"]["auto"].values == [accuracy[2]] * 3
    assert study["AUROC of exit group1"]["auto"].estimate is None
    # Where no early exit was kept, nothing is saved.
    assert study["MACs saved at risk-1"]["auto"].values[2] == 0.0
    assert study["accuracy of the final exit"]["plain"].values == [None, None, None]


def test_the_same_entropy_at_every_exit() -> None:
    logits, labels = synthetic_logits(3, 300, signals=(0.9, 1.6, 2.2))
    made = hand_made_results({"plain": (TestLogits(logits, labels), hand_made_policy(), COST)}).arms["plain"]
    others = synthetic_logits(4, 50, signals=(0.9, 1.6, 2.2))
    tune, certify = TuneLogits(*others), CertifyLogits(logits, labels)
    measured = measures_of_logits(made, tune, certify, TestLogits(logits, labels))
    tuned = others[0].argmax(axis=-1) == others[1]
    assert measured["accuracy of exits on tune, mean"] == pytest.approx(tuned.mean())
    share = stats.entropy(np.exp(logits), axis=-1) / np.log(logits.shape[-1])
    for most in (0.1, 0.3, 0.5):
        counts, right, macs = [0, 0, 0], 0, 0
        for image, label in enumerate(labels):
            number = 0 if share[0, image] < most else 1 if share[1, image] < most else 2
            counts[number] += 1
            right += int(logits[number, image].argmax() == label)
            macs += COST.exit_macs[number]
        assert min(counts) > 0
        at = f"at entropy {most}"
        assert [measured[f"answers of exit {number} {at}"] for number in range(3)] == [
            count / 300 for count in counts
        ]
        assert measured[f"accuracy {at}"] == pytest.approx(right / 300)
        assert measured[f"MACs saved {at}"] == pytest.approx(1 - macs / 300 / COST.no_exit_macs)
    rows = {name: _compared({"kd": [value]}, "kd", ["kd"]) for name, value in measured.items()}
    text = study_text(Study(name="small", reference="kd", seeds=[0], test_images=300, measures=rows))
    assert text.count("at entropy 0.3") == 5
    # A network without early exits has nothing to choose.
    plain = (TestLogits(logits[-1:], labels), hand_made_policy(cost=Cost((9,), 9)), Cost((9,), 9))
    single = hand_made_results({"plain": plain}).arms["plain"]
    tune_1, certify_1 = TuneLogits(tune.logits[-1:], tune.labels), CertifyLogits(logits[-1:], labels)
    assert len(measures_of_logits(single, tune_1, certify_1, TestLogits(logits[-1:], labels))) == 1
