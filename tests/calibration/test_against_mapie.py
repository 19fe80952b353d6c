"""The fixed-sequence test and conformal risk control against MAPIE, which others wrote and keep."""

from __future__ import annotations

import numpy as np
import pytest
from mapie.risk_control import control_fwer
from mapie.risk_control.methods import (
    compute_hoeffding_bentkus_p_value,
    find_best_predict_param,
    get_r_hat_plus,
)
from numpy.typing import NDArray

from erde.calibration.certificates import binomial_p_value
from erde.calibration.thresholds import ScoredSplit, ThresholdPath, search_path
from erde.common.splits import CertifyLogits, TuneLogits
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.rule import ExitRule
from tests.helpers.certified import certify
from tests.helpers.oracles import synthetic_logits

COST = Cost(exit_macs=(42, 71, 104), no_exit_macs=100)
MARGIN = ExitRule("margin")


def path_and_losses(seed: int, images: int) -> tuple[ThresholdPath, ScoredSplit, NDArray[np.bool_]]:
    """A path that tune chose, a certify split, and whether each of its points loses each image, (P, N)."""
    path = search_path(ScoredSplit.of(TuneLogits(*synthetic_logits(seed, 500)), MARGIN, None), COST)
    split = ScoredSplit.of(CertifyLogits(*synthetic_logits(seed + 50, images)), MARGIN, None)
    losses = [
        policy.take_exit(split.harm, policy.decide(split.scores, thresholds))
        for thresholds in path.thresholds
    ]
    return path, split, np.asarray(losses)


def mapie_p_values(lost: NDArray[np.int64], images: int, max_risk: float) -> NDArray[np.float64]:
    # It rounds the number of lost images up, so a share that is a hair too large would count one more.
    shares = np.maximum(lost - 1e-6, 0) / images
    return compute_hoeffding_bentkus_p_value(shares, images, max_risk, binary=True)[:, 0]


@pytest.mark.parametrize("images", [230, 2_500])
@pytest.mark.parametrize("max_risk", [0.005, 0.01, 0.1])
def test_p_values(images: int, max_risk: float) -> None:
    lost = np.arange(images + 1)
    expected = mapie_p_values(lost, images, max_risk)
    np.testing.assert_allclose(binomial_p_value(lost, images, max_risk), expected, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_risk", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_fixed_sequence_test_certifies_the_same_point(
    seed: int, max_risk: float, confidence: float
) -> None:
    path, split, losses = path_and_losses(seed, 1_000)
    index, certificate = certify(path, split, max_risk, confidence, "final_exit")
    p_values = mapie_p_values(losses.sum(axis=1), 1_000, max_risk)
    accepted = control_fwer(p_values, 1 - confidence, "fixed_sequence")
    assert 0 < len(accepted) < len(path.thresholds)
    assert certificate is not None
    assert index == accepted[-1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_risk", [0.01, 0.02, 0.05])
def test_conformal_risk_control_takes_the_same_point(seed: int, max_risk: float) -> None:
    path, split, losses = path_and_losses(seed, 1_000)
    index, certificate = certify(path, split, max_risk, 0.9, "final_exit", "expected_risk")
    # Conformal risk control asks for losses that never fall along the path.
    monotone = np.maximum.accumulate(losses, axis=0).T.astype(np.float64)
    points = np.arange(len(path.thresholds))
    _, bounds = get_r_hat_plus(monotone, points, "crc", None, None, None)
    assert certificate is not None
    assert 0 < index < points[-1]
    assert index == find_best_predict_param(points, bounds, np.array([max_risk]))[0]
