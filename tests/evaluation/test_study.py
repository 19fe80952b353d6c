"""Statistics over seeds, held against published examples, R's formulas and scipy's other routes to the same numbers."""

import numpy as np
import pytest
from scipy import stats

from erde.evaluation.study import ArmMeasure, Estimate, Study, _compared, estimate, holm, paired_p_value
from erde.report.study_text import study_text


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


def test_paired_test_is_of_differences() -> None:
    first, second = [0.71, 0.74, 0.69], [0.70, 0.72, 0.69]
    differences = [a - b for a, b in zip(first, second, strict=True)]
    assert paired_p_value(differences) == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert paired_p_value([0.1]) is None
    assert paired_p_value([0.0, 0.0]) == 1.0
    assert paired_p_value([0.25, 0.25]) == 0.0


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
    assert "| teacher | 90.0 ± 0.0 |" in text
    single = study.model_copy(
        update={"seeds": [0], "measures": {"risk at risk-1": _compared({"kd": [0.01]}, "kd", ["kd"])}}
    )
    assert "| kd | 1.0 |" in study_text(single)
