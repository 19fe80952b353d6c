from __future__ import annotations

import itertools

import numpy as np
import pytest

from erde.calibration.thresholds import (
    GRID_LEVELS,
    ScoredSplit,
    ThresholdPath,
    _threshold_grid,
    best_within_risk,
    search_path,
    sweep,
)
from erde.common.splits import CertifyLogits, TestLogits, TuneLogits
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.rule import ExitRule
from tests.helpers.oracles import synthetic_logits

COST = Cost(exit_macs=(42, 71, 104), no_exit_macs=100)
MARGIN = ExitRule("margin")


def tune_scored(seed: int = 0, images: int = 500, name: str = "margin") -> ScoredSplit:
    return ScoredSplit.of(TuneLogits(*synthetic_logits(seed, images)), ExitRule(name), None)


# ---------------------------------------------------------------- splits as the rule sees them


def test_harm_is_the_reference_right_and_the_exit_wrong() -> None:
    right = np.array([[True, False, False, True], [True, True, False, False]])
    # Class 0 is right; logits answer it or class 1.
    logits = np.where(right[..., None], [1.0, 0.0], [0.0, 1.0]).astype(np.float32)
    labels = np.zeros(4, dtype=np.int64)
    against_final = ScoredSplit.of(TuneLogits(logits, labels), MARGIN, None)
    assert against_final.right.tolist() == right.tolist()
    assert against_final.harm.tolist() == [[False, True, False, False], [False] * 4]
    reference = np.array([True, False, True, True])
    against_other = ScoredSplit.of(TuneLogits(logits, labels), MARGIN, reference)
    assert against_other.harm.tolist() == [[False, False, True, False], [False, False, True, True]]


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
        levels = {thresholds[index] for thresholds in path.thresholds}
        used = sorted(level for level in levels if level is not None)
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
    tune = ScoredSplit.of(TuneLogits(np.round(logits / 4), labels), MARGIN, None)
    assert len(np.unique(tune.scores[0])) < 30
    path = search_path(tune, COST)
    assert (np.diff(path.macs) < 0).all()
    assert path.macs[-1] == 42
    for index in range(2):
        assert not np.isin(
            [levels[index] for levels in path.thresholds if levels[index]], tune.scores[index]
        ).any()


def test_path_of_neighbouring_floats() -> None:
    below = np.nextafter(1.0, 0)
    scores = np.array([[1.0, below, 0.5, 1.0], [1.0, below, 0.25, 0.75], [0.0] * 4])
    harm = np.array([[False, True, False, False]] + [[False] * 4] * 2)
    tune = ScoredSplit(scores, ~harm, np.ones(4, dtype=bool))
    path = search_path(tune, COST)
    assert path.macs[-1] == 42
    assert not {1.0, below} & {threshold for thresholds in path.thresholds for threshold in thresholds}
    for thresholds, risk, macs in zip(path.thresholds, path.risk, path.macs, strict=True):
        assert (tune.measure(thresholds, COST).risk, tune.measure(thresholds, COST).macs) == (risk, macs)


def test_path_of_a_single_exit() -> None:
    logits, labels = synthetic_logits(0, 50, signals=(2.0,))
    path = search_path(ScoredSplit.of(TuneLogits(logits, labels), MARGIN, None), Cost((100,), 100))
    assert path.thresholds == ((),)
    assert path.macs.tolist() == [100]


def every_pair(tune: ScoredSplit) -> tuple[np.ndarray, np.ndarray]:
    """Risk and MACs of every pair of thresholds of the two grids, disabled included."""
    grids = [[None, *_threshold_grid(tune.scores[index])] for index in range(2)]
    counts = sweep(tune, list(itertools.product(*grids)))
    return counts.lost / counts.images, counts.macs(COST)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_saves_nearly_as_much_as_exhaustive_search(seed: int) -> None:
    tune = tune_scored(seed, 800)
    path = search_path(tune, COST)
    risks, macs = every_pair(tune)
    assert len(macs) == (GRID_LEVELS + 1) ** 2
    for max_risk in (0.005, 0.01, 0.02, 0.05):
        best = 1 - macs[risks <= max_risk].min() / COST.no_exit_macs
        saved = 1 - path.macs[best_within_risk(path, max_risk)] / COST.no_exit_macs
        assert best > 0.04
        assert saved <= best + 1e-12
        assert saved >= 0.95 * best, (max_risk, saved / best)


def test_best_within_risk() -> None:
    path = ThresholdPath(
        ((None,), (0.9,), (0.8,), (0.7,)), np.array([0, 0.02, 0.01, 0.03]), np.arange(4, 0, -1.0)
    )
    assert [best_within_risk(path, risk) for risk in (0.0, 0.01, 0.02, 0.5)] == [0, 2, 2, 3]
    against_teacher = ThresholdPath(((None,),), np.array([0.2]), np.array([1.0]))
    assert best_within_risk(against_teacher, 0.1) == 0


# ---------------------------------------------------------------- sweeps


def test_a_sweep_equals_one_decision_after_another() -> None:
    logits, labels = synthetic_logits(3, 400, signals=(1.0, 1.4, 1.9, 2.4))
    reference = np.random.default_rng(0).random(400) < 0.9
    split = ScoredSplit.of(TestLogits(logits, labels), MARGIN, reference)
    generator = np.random.default_rng(1)
    vectors = [
        [None if generator.random() < 0.2 else float(generator.random()) for _ in range(3)] for _ in range(50)
    ]
    counts = sweep(split, vectors)
    for index, vector in enumerate(vectors):
        exits = policy.decide(split.scores, vector)
        right = policy.take_exit(logits, exits).argmax(-1) == labels
        assert counts.leaving[index].tolist() == np.bincount(exits, minlength=4).tolist()
        assert counts.right[index] == right.sum()
        assert counts.lost[index] == (reference & ~right).sum()
        assert counts.won[index] == (right & ~reference).sum()


def test_a_measured_point_adds_up() -> None:
    split = tune_scored()
    cost = Cost((42, 71, 104), 100, (0.5, 0.75, 1.0))
    measured = split.measure([0.8, 0.6], cost)
    exits = policy.decide(split.scores, [0.8, 0.6])
    assert measured.milliseconds == pytest.approx(np.array([0.5, 0.75, 1.0])[exits].mean())
    assert measured.macs == pytest.approx(np.array([42, 71, 104])[exits].mean())
    final = split.right[-1].mean()
    # What is lost and not won back is exactly the drop of accuracy against the final exit.
    assert measured.net_drop == pytest.approx(final - measured.accuracy)
    assert measured.net_drop <= measured.risk
    assert split.measure([0.8, 0.6], COST).milliseconds is None


def test_an_ensemble_changes_early_answers_and_leaves_the_final_exit_alone() -> None:
    logits = CertifyLogits(*synthetic_logits(0, 500))
    alone, together = (
        ScoredSplit.of(logits, ExitRule("margin", 1.0, kind), None) for kind in ("none", "arithmetic")
    )
    assert (alone.right[[0, 2]] == together.right[[0, 2]]).all()
    assert (alone.right[1] != together.right[1]).any()
    assert together.measure([None, None], COST).risk == 0
