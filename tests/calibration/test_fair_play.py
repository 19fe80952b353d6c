"""What the field has fallen into, one test each (the rest of the list stands with its own module's tests)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from erde.calibration.logits import calibrate_logits
from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.settings import Settings
from erde.calibration.thresholds import ScoredSplit
from erde.common.splits import CertifyLogits, Logits, TestLogits, TuneLogits
from erde.evaluation.measures import measure_curve, measure_points
from erde.policy.cost import Cost
from erde.recipe.load import load_config, shipped_recipes

COST = Cost((40, 70, 103), 100)


def logits_of(kind: type[Logits], seed: int, count: int = 800) -> Logits:
    """Three exits of rising strength on images of varying difficulty."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, count)
    ease = generator.normal(2.5, 1.5, count)
    rows = []
    for strength in (0.8, 1.0, 1.3):
        logits = generator.normal(0, 1, (count, 10))
        logits[np.arange(count), labels] += strength * ease
        rows.append(logits)
    return kind(np.stack(rows).astype(np.float32), labels.astype(np.int64))


@pytest.fixture(scope="module")
def calibrated() -> CalibratedPolicy:
    tune, certify = logits_of(TuneLogits, 1), logits_of(CertifyLogits, 2)
    assert isinstance(tune, TuneLogits)
    assert isinstance(certify, CertifyLogits)
    return calibrate_logits(tune, certify, COST, Settings(max_risks=(0.05,), budgets=(0.6,)))


def test_exit_decisions_do_not_see_the_label(calibrated: CalibratedPolicy) -> None:
    test = logits_of(TestLogits, 3)
    assert isinstance(test, TestLogits)
    shuffled = TestLogits(test.logits, np.random.default_rng(0).permutation(test.labels))
    honest = measure_points(test, calibrated, COST, None)
    other = measure_points(shuffled, calibrated, COST, None)
    for fair, unfair in zip(honest, other, strict=True):
        assert fair.test is not None
        assert unfair.test is not None
        assert fair.test.exit_rates == unfair.test.exit_rates
        assert fair.test.macs == unfair.test.macs
    assert any(
        a.test and b.test and a.test.accuracy != b.test.accuracy for a, b in zip(honest, other, strict=True)
    )


def test_the_curve_uses_thresholds_of_tune_not_the_best_of_test(calibrated: CalibratedPolicy) -> None:
    test = logits_of(TestLogits, 3)
    assert isinstance(test, TestLogits)
    curve = measure_curve(test, calibrated, COST, None)
    scored = ScoredSplit.of(test, calibrated.rule, None)
    path = calibrated.path.thresholds
    assert curve.macs[0] == scored.measure(path[0], COST).macs
    assert curve.accuracy[-1] == scored.measure(path[-1], COST).accuracy
    # Every point is one of the path's, which was walked on tune, and no other labels of test can move its thresholds.
    measured = [scored.measure(thresholds, COST) for thresholds in path]
    assert set(zip(curve.macs, curve.accuracy, strict=True)) <= {
        (point.macs, point.accuracy) for point in measured
    }
    assert len(curve.macs) > 10
    # A curve whose path was walked on test would be another one.
    best = TuneLogits(test.logits, test.labels)
    certify = logits_of(CertifyLogits, 2)
    assert isinstance(certify, CertifyLogits)
    peeking = calibrate_logits(best, certify, COST, Settings(max_risks=(0.05,), budgets=(0.6,)))
    optimised = measure_curve(test, peeking, COST, None)
    assert list(optimised.accuracy) != list(curve.accuracy)


def test_head_cost_is_in_the_macs(calibrated: CalibratedPolicy) -> None:
    test = logits_of(TestLogits, 3)
    assert isinstance(test, TestLogits)
    never = next(point for point in measure_points(test, calibrated, COST, None) if point.name == "no-exit")
    assert never.test is not None
    # Without any early exit the heads were computed for nothing: that costs, and it is shown.
    assert never.test.macs == 103
    assert never.test.macs_saved == pytest.approx(-0.03)


def test_every_recipe_has_smaller_fixed_networks_of_several_sizes() -> None:
    for recipe in shipped_recipes():
        config = load_config(recipe)
        fixed = [arm for arm in config.arms if config.network_of(arm).exits == 1]
        backbones = {config.network_of(arm).backbone for arm in fixed}
        assert len(backbones - {config.student.backbone}) >= 2, recipe
        assert {arm.loss.name for arm in config.arms.values()} >= {"ce", "kd", "erde"}, recipe


def test_compared_arms_share_all_but_the_loss() -> None:
    for recipe in shipped_recipes():
        config = load_config(recipe)
        students = [arm for arm in config.arms if config.network_of(arm).exits != 1]
        for arm in students:
            assert config.distillation_of(arm) == config.distillation, (recipe, arm)
            assert config.network_of(arm) == config.student, (recipe, arm)


@pytest.mark.slow
def test_a_split_cannot_stand_in_for_another(tmp_path: Path) -> None:
    lines = [
        "from erde.calibration.choice import choose_score",
        "from erde.calibration.logits import calibrate_logits, fit_temperatures",
        "from erde.calibration.settings import Settings",
        "from erde.common.splits import CertifyLogits, Logits, TestLogits, TuneLogits",
        "from erde.policy.cost import Cost",
        "def check(train: Logits, tune: TuneLogits, certify: CertifyLogits, test: TestLogits, cost: Cost, "
        "settings: Settings) -> None:",
        "    calibrate_logits(tune, certify, cost)",
        "    choose_score(tune, cost, settings)",
        "    calibrate_logits(test, certify, cost)  # wrong",
        "    calibrate_logits(train, certify, cost)  # wrong",
        "    calibrate_logits(tune, tune, cost)  # wrong",
        "    choose_score(certify, cost, settings)  # wrong",
        "    fit_temperatures(test)  # wrong",
    ]
    (tmp_path / "snippet.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "snippet.py"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout
    marked = {
        int(line.split(":")[1])
        for line in out.splitlines()
        if line.startswith("snippet.py:") and ": error: " in line
    }
    assert marked == {number for number, line in enumerate(lines, start=1) if line.endswith("# wrong")}
