"""The choice of exits by time, against an exhaustive search that knows nothing of erde's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from erde.calibration.exit_choice import HAIR, ExitChoice, ExitSubset, ExitTimes, choose_exits, pick
from erde.calibration.settings import Settings
from erde.common.splits import TuneLogits
from tests.helpers.checks import user_error
from tests.helpers.oracles import softmax, synthetic_logits

NAMES = ("first", "second", "third")
MAX_RISK = 0.05


def times_of(bodies: list[float], heads: list[float], boundary: float, decision: float) -> ExitTimes:
    """Times in which a stage is its bodies, the head at its end, and a hand-over where it does not begin at the image."""
    exits = len(bodies)
    stages = np.full((exits, exits), np.nan)
    for start, end in itertools.combinations_with_replacement(range(exits), 2):
        stages[start, end] = sum(bodies[start : end + 1]) + heads[end] + (boundary if start else 0.0)
    return ExitTimes(stages, decision)


def logits_of(seed: int, images: int = 40) -> TuneLogits:
    return TuneLogits(*synthetic_logits(seed, images, signals=(0.9, 1.6, 2.2, 2.6)))


def choose(tune: TuneLogits, times: ExitTimes, **settings: object) -> ExitChoice:
    given = {"max_risks": (MAX_RISK,), "score": "max_probability", "sharpness": 1.0, **settings}
    return choose_exits(
        tune, NAMES, times, Settings(**given), threads=1, machine="by hand", first_shares=(0.3, 0.6, 0.8)
    )


def exhaustive(
    tune: TuneLogits, bodies: list[float], heads: list[float], boundary: float, decision: float
) -> dict[tuple[str, ...], float]:
    """Per subset the least mean time of all threshold vectors that lose no more than the risk allows."""
    final = len(bodies) - 1
    right = tune.logits.argmax(-1) == tune.labels
    sure = softmax(tune.logits).max(-1)
    images = len(tune.labels)
    best = {}
    for size in range(final + 1):
        for kept in itertools.combinations(range(final), size):
            # Per kept exit: nobody leaves, or all whose score is at least that of some image.
            levels = [[2.0, *sorted(set(sure[exit]))] for exit in kept]
            least = np.inf
            for thresholds in itertools.product(*levels):
                time, lost = np.zeros(images), np.zeros(images, dtype=bool)
                waiting = np.ones(images, dtype=bool)
                for place, exit in enumerate(kept):
                    before = kept[place - 1] + 1 if place else 0
                    stage = sum(bodies[before : exit + 1]) + heads[exit] + decision
                    time[waiting] += stage + (boundary if place else 0.0)
                    leaving = waiting & (sure[exit] >= thresholds[place])
                    lost |= leaving & right[final] & ~right[exit]
                    waiting &= ~leaving
                before = kept[-1] + 1 if kept else 0
                time[waiting] += sum(bodies[before:]) + heads[final] + (boundary if kept else 0.0)
                if lost.sum() <= MAX_RISK * images:
                    least = min(least, float(time.mean()))
            best[tuple(NAMES[exit] for exit in kept)] = least
    return best


MADE_UP = [
    # Cheap heads; then heads that cost about as much as what they save; then a late exit that is free.
    ([1.0, 1.0, 1.0, 1.0], [0.02, 0.02, 0.02, 0.02], 0.01, 0.01),
    ([1.0, 1.0, 1.0, 1.0], [0.6, 0.5, 0.4, 0.02], 0.1, 0.1),
    ([2.0, 1.0, 0.5, 3.0], [0.3, 0.3, 0.01, 0.02], 0.05, 0.02),
]


@pytest.mark.parametrize("made_up", MADE_UP)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_choice_is_that_of_an_exhaustive_search(
    made_up: tuple[list[float], list[float], float, float], seed: int
) -> None:
    tune, (bodies, heads, boundary, decision) = logits_of(seed, 20), made_up
    choice = choose(tune, times_of(bodies, heads, boundary, decision))
    no_exit = sum(bodies) + heads[-1]
    oracle = exhaustive(tune, bodies, heads, boundary, decision)
    for subset in choice.best_of_size:
        least = min(time for kept, time in oracle.items() if len(kept) == len(subset.exits))
        # One exit has one threshold: nothing is left to be greedy about. With more the path may miss a little.
        allowed = 1e-6 if len(subset.exits) < 2 else 0.03 * no_exit
        assert least - 1e-6 <= subset.milliseconds <= least + allowed
        assert subset.time_saved == pytest.approx(1 - subset.milliseconds / no_exit)
        assert subset.risk <= MAX_RISK
    chosen = oracle[tuple(choice.chosen.exits)]
    assert chosen <= min(oracle.values()) + (HAIR + 0.03) * no_exit
    assert [exit.name for exit in choice.candidates if exit.kept] == choice.chosen.exits


def test_an_exit_that_saves_nothing_is_not_kept() -> None:
    tune = logits_of(3)
    free = choose(tune, times_of([1.0] * 4, [0.0] * 4, 0.0, 0.0))
    dear = choose(tune, times_of([1.0] * 4, [5.0, 5.0, 5.0, 0.0], 0.0, 0.0))
    assert free.chosen.exits
    assert free.chosen.time_saved > 0.1
    assert dear.chosen == ExitSubset(exits=[], milliseconds=4.0, time_saved=0.0, risk=0.0)
    assert dear.line() == "none of 3 exits saves time (at 4 ms an image): only the final exit is kept"
    assert "saved on tune at a risk of 5 %" in free.line()


def test_of_subsets_within_a_hair_the_smallest_is_kept() -> None:
    def subset(exits: str, saved: float) -> ExitSubset:
        return ExitSubset(exits=list(exits), milliseconds=1 - saved, time_saved=saved, risk=0.0)

    tried = {
        (): subset("", 0.0),
        (0,): subset("a", 0.296),
        (1,): subset("b", 0.297),
        (0, 1): subset("ab", 0.3),
    }
    assert pick(tried) == (1,)
    assert pick({**tried, (0, 1): subset("ab", 0.31)}) == (0, 1)
    assert pick({(): subset("", 0.0), (0,): subset("a", 0.004)}) == ()


def test_what_passing_an_exit_costs_is_head_decision_and_hand_over() -> None:
    choice = choose(logits_of(4), times_of([1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4], 0.05, 0.01))
    first, second, third = choice.candidates
    assert choice.no_exit_milliseconds == pytest.approx(10.4)
    assert (first.milliseconds, second.milliseconds, third.milliseconds) == pytest.approx((1.11, 3.21, 6.31))
    assert first.passing_milliseconds == pytest.approx(0.1 + 0.05 + 0.01)
    assert third.passing_milliseconds == pytest.approx(0.3 + 0.05 + 0.01)
    assert second.share == pytest.approx(3.21 / 10.4)
    assert [len(row) for row in choice.stage_milliseconds] == [4, 3, 2, 1]
    assert ExitChoice.model_validate_json(choice.model_dump_json()) == choice


def test_subsets_that_could_not_keep_a_budget_are_left_out() -> None:
    times = times_of([1.0, 1.0, 1.0, 1.0], [0.02] * 4, 0.01, 0.01)
    for budgets, first in (((0.7,), {"first", "second"}), ((0.7, 0.35), {"first"})):
        choice = choose(logits_of(5), times, budgets=budgets)
        assert all(subset.exits and subset.exits[0] in first for subset in choice.best_of_size)
    with user_error(r"a budget of 20 % of the MACs cannot be met: leaving at the first exit takes 30 %"):
        choose(logits_of(5), times, budgets=(0.7, 0.2))


def test_with_the_guarantee_of_disagreement_no_label_is_looked_at() -> None:
    tune, times = logits_of(6), times_of(*MADE_UP[0])
    others = TuneLogits(tune.logits, (tune.labels + 1) % 5)
    choices = [choose(split, times, guarantee="disagreement") for split in (tune, others)]
    assert choices[0] == choices[1]
    assert choose(tune, times) != choose(others, times)
