from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from erde.calibration.certificates import (
    METHODS,
    PathCounts,
    count_along,
    images_needed,
    most_lost,
    net_drop_passes,
    upper_bound,
    walk,
)
from erde.calibration.thresholds import ScoredSplit, ThresholdPath, search_path
from erde.common.splits import CertifyLogits, TuneLogits
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.rule import ExitRule
from tests.helpers.certified import certify
from tests.helpers.oracles import synthetic_logits

COST = Cost(exit_macs=(42, 71, 104), no_exit_macs=100)
MARGIN = ExitRule("margin")


def tune_scored(seed: int = 0, images: int = 500) -> ScoredSplit:
    return ScoredSplit.of(TuneLogits(*synthetic_logits(seed, images)), MARGIN, None)


def certify_scored(seed: int, images: int) -> ScoredSplit:
    return ScoredSplit.of(CertifyLogits(*synthetic_logits(seed, images)), MARGIN, None)


# ---------------------------------------------------------------- the exact binomial


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
    p_values = [scipy.stats.binomtest(count, 700, max_risk, alternative="less").pvalue for count in errors]
    first_failure = next(number for number, p in enumerate(p_values) if p > 1 - confidence)
    assert index == first_failure - 1 > 0
    assert certificate is not None
    assert (certificate.images, certificate.lost) == (700, errors[index])
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
    split = ScoredSplit(np.full((3, 500), 0.9), ~harm, np.ones(500, dtype=bool))
    path = ThresholdPath(((None, None), (None, 0.5), (0.5, 0.5)), np.zeros(3), np.array([3.0, 2.0, 1.0]))
    assert certify(path, split, 0.01, 0.9, "final_exit")[0] == 0
    assert certify(path, split, 0.05, 0.9, "final_exit")[0] == 2


def test_no_certificate_against_a_better_reference() -> None:
    logits, labels = synthetic_logits(1, 1000)
    split = ScoredSplit.of(CertifyLogits(logits, labels), MARGIN, np.ones(1000, dtype=bool))
    assert split.harm[-1].mean() > 0.05
    path = search_path(tune_scored(), COST)
    assert certify(path, split, 0.01, 0.9, "teacher") == (0, None)


# ---------------------------------------------------------------- the net drop


def counts_of(lost: int, won: int, images: int) -> PathCounts:
    losses = np.array([lost])
    return PathCounts(images, losses, np.array([won]), losses)


def chance_to_pass(images: int, max_drop: float, level: float, share: float) -> float:
    """The exact size of the test where ``share`` of the images are lost or won: a sum over all counts."""
    lost_share, won_share = (share + max_drop) / 2, (share - max_drop) / 2
    chance = 0.0
    for lost in range(images + 1):
        of_lost = scipy.stats.binom.pmf(lost, images, lost_share)
        if of_lost < 1e-9:
            continue
        most_won = images - lost
        of_won = scipy.stats.binom.pmf(np.arange(most_won + 1), most_won, won_share / (1 - lost_share))
        for won in np.flatnonzero(of_won > 1e-7):
            if net_drop_passes(lost, int(won), images, max_drop, level):
                chance += of_lost * of_won[won]
    return float(chance)


@pytest.mark.parametrize("level", [0.05, 0.1])
@pytest.mark.parametrize("share", [0.05, 0.06, 0.1, 0.3])
def test_the_size_of_the_net_drop_test_at_the_edge_of_the_hypothesis(level: float, share: float) -> None:
    chance = chance_to_pass(100, 0.05, level, share)
    assert chance <= level
    assert chance > 0.1 * level


def test_images_that_are_won_help_the_net_drop_only() -> None:
    assert walk(counts_of(40, 0, 1000), 0.02, 0.9, "net_drop") == -1
    assert walk(counts_of(40, 60, 1000), 0.02, 0.9, "net_drop") == 0
    assert walk(counts_of(40, 60, 1000), 0.02, 0.9, "risk") == -1


@pytest.mark.parametrize(("images", "max_risk"), [(400, 0.01), (2500, 0.01), (1000, 0.05)])
@pytest.mark.parametrize("won", [0, 5, 100])
def test_what_passes_for_the_risk_passes_for_the_net_drop(images: int, max_risk: float, won: int) -> None:
    most = most_lost(images, max_risk, 0.1)
    assert walk(counts_of(most, won, images), max_risk, 0.9, "risk") == 0
    assert walk(counts_of(most + 1, won, images), max_risk, 0.9, "risk") == -1
    assert walk(counts_of(most, won, images), max_risk, 0.9, "net_drop") == 0


def test_many_images_won_pass_far_beyond_the_risk() -> None:
    # Worked by hand for 2,500 images, 1 %, level 0.1: with 72 discordant images the trinomial test allows a net loss of 11.
    assert net_drop_passes(41, 31, 2500, 0.01, 0.1)
    assert not net_drop_passes(42, 30, 2500, 0.01, 0.1)


# ---------------------------------------------------------------- in expectation


def test_conformal_counts_what_was_lost_at_any_more_careful_point() -> None:
    path, split = search_path(tune_scored(), COST), certify_scored(1, 700)
    counts = count_along(path, split)
    ever: NDArray[np.bool_] = np.zeros(700, dtype=bool)
    for index, thresholds in enumerate(path.thresholds):
        ever |= policy.take_exit(split.harm, policy.decide(split.scores, thresholds))
        assert counts.lost_so_far[index] == ever.sum() >= counts.lost[index]
    accepted, certificate = certify(path, split, 0.02, 0.9, "final_exit", "expected_risk")
    assert (counts.lost_so_far[accepted] + 1) / 701 <= 0.02 < (counts.lost_so_far[accepted + 1] + 1) / 701
    assert certificate is not None
    assert certificate.confidence is None
    assert certificate.upper_bound is None
    assert certificate.sentence().startswith("In expectation, at most 2 %")
    # It promises less, so it goes further.
    assert accepted > certify(path, split, 0.02, 0.9, "final_exit")[0]


# ---------------------------------------------------------------- bounds and words


@pytest.mark.parametrize("guarantee", ["risk", "net_drop"])
@pytest.mark.parametrize(("lost", "won"), [(0, 0), (7, 0), (7, 30), (500, 0)])
def test_the_bound_is_where_the_p_value_crosses_the_level(guarantee: str, lost: int, won: int) -> None:
    bound = upper_bound(lost, won, 1000, 0.9, guarantee)
    assert bound is not None
    assert bound >= (lost - won * (guarantee == "net_drop")) / 1000
    assert walk(counts_of(lost, won, 1000), min(bound + 1e-6, 0.999), 0.9, guarantee) == 0
    if bound > 1e-5:
        assert walk(counts_of(lost, won, 1000), bound - 1e-6, 0.9, guarantee) == -1


def test_all_lost_bounds_nothing() -> None:
    assert upper_bound(10, 0, 10, 0.9) == 1.0


@pytest.mark.parametrize("guarantee", METHODS)
def test_without_error_the_needed_images_certify_and_one_fewer_does_not(guarantee: str) -> None:
    needed = images_needed(0.02, 0.9, guarantee)
    assert walk(counts_of(0, 0, needed), 0.02, 0.9, guarantee) == 0
    assert walk(counts_of(0, 0, needed - 1), 0.02, 0.9, guarantee) == -1


def test_sentences() -> None:
    path, split = search_path(tune_scored(), COST), certify_scored(1, 700)
    for reference, words in (
        ("final_exit", "the full network gets right"),
        ("no_exit_network", "the network without exits gets right"),
        ("teacher", "the teacher gets right"),
    ):
        _, certificate = certify(path, split, 0.05, 0.95, reference)
        assert certificate is not None
        assert "With 95 % confidence, at most 5 % of images" in certificate.sentence()
        assert words in certificate.sentence()
        assert f"{certificate.lost} of 700 certify images" in certificate.sentence()
    _, certificate = certify(path, split, 0.05, 0.95, "final_exit", "net_drop")
    assert certificate is not None
    assert (
        "the accuracy is at most 5 % (of all images) below that of the full network" in certificate.sentence()
    )
    assert f"{certificate.lost} lost and {certificate.won} won of 700" in certificate.sentence()
