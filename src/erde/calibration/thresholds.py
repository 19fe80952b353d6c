"""Splits as an exit rule sees them, what thresholds do on them, and the search for a path of thresholds.

The search sees the tune split only. A threshold stands midway between observed scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainSerializer, PlainValidator

from erde.common.splits import Logits
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.points import Agreement, Measured
from erde.policy.rule import ExitRule

# Thresholds tried per exit: 0.4 % of the images apart on a large split.
GRID_LEVELS = 250
# Elements of one block of a sweep: threshold vectors x images.
_BLOCK = 2_000_000
# An array that policy.json holds as a list.
Numbers = Annotated[
    NDArray[np.float64],
    PlainValidator(lambda value: np.asarray(value, dtype=np.float64)),
    PlainSerializer(lambda value: value.tolist()),
]


@dataclass(frozen=True)
class ScoredSplit:
    """A split as the exit rule sees it: scores (E, N), right answers (E, N), and whether the reference is right (N,)."""

    scores: NDArray[np.float64]
    right: NDArray[np.bool_]
    reference_right: NDArray[np.bool_]

    @classmethod
    def of(cls, logits: Logits, rule: ExitRule, reference_right: NDArray[np.bool_] | None) -> ScoredSplit:
        """Apply ``rule`` to ``logits``; ``reference_right`` is None where the final exit is the reference."""
        answers, scores = rule.apply(logits.logits)
        right = answers.argmax(axis=-1) == logits.labels
        # The final exit answers alone under every rule: the last row is the network's own.
        return cls(scores, right, right[-1] if reference_right is None else reference_right)

    def __len__(self) -> int:
        return int(self.scores.shape[1])

    @property
    def harm(self) -> NDArray[np.bool_]:
        """The yes/no of which risk is the mean (E, N): the reference is right and this exit is wrong."""
        return self.reference_right & ~self.right

    def measure(self, thresholds: policy.Thresholds, cost: Cost) -> Measured:
        """Accuracy, risk and cost of ``thresholds`` on this split."""
        return sweep(self, [thresholds]).measured(0, cost)


@dataclass(frozen=True)
class Sweep:
    """Counts of images for each of T threshold vectors: who leaves where (T, E), and the rest (T,).

    ``lost``: the reference right, the answer wrong; ``won``: the reference wrong, the answer right.
    """

    images: int
    thresholds: Sequence[policy.Thresholds]
    leaving: NDArray[np.int64]
    right: NDArray[np.int64]
    lost: NDArray[np.int64]
    won: NDArray[np.int64]

    def macs(self, cost: Cost) -> NDArray[np.float64]:
        """Mean MACs per image (T,)."""
        costs = np.stack([cost.macs_at(vector) for vector in self.thresholds])
        return np.asarray((self.leaving * costs).sum(axis=1) / self.images)

    def milliseconds(self, cost: Cost) -> NDArray[np.float64] | None:
        """Mean milliseconds per image (T,); None where the machine was not profiled."""
        costs = [cost.milliseconds_at(vector) for vector in self.thresholds]
        known = [milliseconds for milliseconds in costs if milliseconds is not None]
        return np.asarray((self.leaving * np.stack(known)).sum(axis=1) / self.images) if known else None

    def agreement(self, index: int, cost: Cost) -> Agreement:
        """One of the vectors, of a split whose labels are the reference's answers."""
        measured = self.measured(index, cost)
        shared = measured.model_dump(include={"images", "macs", "macs_saved", "milliseconds", "exit_rates"})
        return Agreement(disagreement=measured.risk, **shared)

    def measured(self, index: int, cost: Cost) -> Measured:
        """One of the vectors, as it stands in manifests and results."""
        milliseconds = self.milliseconds(cost)
        macs, right = float(self.macs(cost)[index]), int(self.right[index])
        return Measured(
            images=self.images,
            accuracy=right / self.images,
            accuracy_interval=wilson_interval(right, self.images),
            risk=int(self.lost[index]) / self.images,
            net_drop=(int(self.lost[index]) - int(self.won[index])) / self.images,
            macs=macs,
            macs_saved=1.0 - macs / cost.no_exit_macs,
            milliseconds=None if milliseconds is None else float(milliseconds[index]),
            exit_rates=(self.leaving[index] / self.images).tolist(),
        )


def sweep(split: ScoredSplit, thresholds: Sequence[policy.Thresholds]) -> Sweep:
    """Count what each threshold vector does on ``split``; memory stays bounded however many there are."""
    exits, images = split.scores.shape
    levels = np.asarray(
        [[np.inf if threshold is None else threshold for threshold in vector] for vector in thresholds],
        dtype=np.float64,
    ).reshape(len(thresholds), exits - 1)
    leaving = np.zeros((len(levels), exits), dtype=np.int64)
    counts = np.zeros((3, len(levels)), dtype=np.int64)
    kinds = np.stack([split.right, split.harm, split.right & ~split.reference_right])
    step = max(1, _BLOCK // max(1, images))
    for start in range(0, len(levels), step):
        part = slice(start, start + step)
        waiting = np.ones((len(levels[part]), images), dtype=np.bool_)
        for index in range(exits):
            done = waiting
            if index < exits - 1:
                done = waiting & policy.leaves(split.scores[index], levels[part, index, None])
                waiting = waiting & ~done
            leaving[part, index] = np.count_nonzero(done, axis=1)
            for kind, masks in enumerate(kinds):
                counts[kind, part] += np.count_nonzero(done & masks[index], axis=1)
    return Sweep(images, thresholds, leaving, *counts)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a binomial share (Wilson 1927)."""
    z = 1.959963984540054
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class ThresholdPath:
    """Threshold vectors from "no early exit" to "everything leaves first", each cheaper than the last.

    In a chain of networks the first one, where only the last network runs, may be cheaper than those that follow.
    """

    thresholds: tuple[tuple[float | None, ...], ...]
    risk: Numbers
    macs: Numbers


def search_path(tune: ScoredSplit, cost: Cost) -> ThresholdPath:
    """Walk greedily from no early exit to the first exit for all, by the least harm per MAC saved.

    A step lowers the threshold of one exit along a grid of midpoints between observed scores; the step
    taken is the one with the smallest ratio of added harm to saved MACs (the lower convex hull of what
    is reachable), and every grid point passed on the way belongs to the path. Trying every combination
    finds more on tune and less on other images: hull and order keep the path from fitting noise.
    """
    count = len(tune)
    macs = np.asarray(cost.exit_macs, dtype=np.float64)
    harm = tune.harm.astype(np.float64)
    intermediate = len(macs) - 1
    grids = [_threshold_grid(tune.scores[index]) for index in range(intermediate)]
    # entry[k][i]: the first level of exit k's grid at which image i would leave there (level 0: disabled).
    entry = [_entry_levels(scores, grid) for scores, grid in zip(tune.scores[:-1], grids, strict=True)]
    images = np.arange(count)
    levels = [0] * intermediate
    exits = np.full(count, intermediate)
    path = [tuple[float | None, ...]([None] * intermediate)]
    path_exits_cost = [float(macs[exits].mean())]
    path_risk = [float(harm[exits, images].mean())]
    while True:
        best: tuple[float, float, int, int] | None = None
        for index in range(intermediate):
            later = exits > index
            size = len(grids[index]) + 2
            weights_cost = (macs[exits] - macs[index])[later]
            weights_harm = (harm[index] - harm[exits, images])[later]
            entered = entry[index][later]
            saved = np.bincount(entered, weights_cost, minlength=size).cumsum()
            added = np.bincount(entered, weights_harm, minlength=size).cumsum()
            reachable = np.arange(levels[index] + 1, len(grids[index]) + 1)
            reachable = reachable[saved[reachable] > 0]
            if not len(reachable):
                continue
            slope = added[reachable] / saved[reachable]
            choice = np.lexsort((-saved[reachable], slope))[0]
            candidate = (
                float(slope[choice]),
                -float(saved[reachable][choice]),
                index,
                int(reachable[choice]),
            )
            best = candidate if best is None else min(best, candidate)
        if best is None:
            break
        _, _, index, target = best
        for level in range(levels[index] + 1, target + 1):
            exits = np.where((exits > index) & (entry[index] <= level), index, exits)
            levels[index] = level
            step_cost = float(macs[exits].mean())
            if step_cost < path_exits_cost[-1]:
                path.append(
                    tuple(
                        grid[level - 1] if level else None for grid, level in zip(grids, levels, strict=True)
                    )
                )
                path_exits_cost.append(step_cost)
                path_risk.append(float(harm[exits, images].mean()))
    path_exits_cost[0] = float(cost.macs_at(path[0])[-1])
    return ThresholdPath(tuple(path), np.asarray(path_risk), np.asarray(path_exits_cost))


def _threshold_grid(scores: NDArray[np.float64]) -> list[float]:
    """At most GRID_LEVELS falling thresholds, midway between neighbouring scores; the last lets all leave."""
    distinct = np.unique(scores)[::-1]
    midpoints = (distinct[:-1] + distinct[1:]) / 2
    # Scores that differ in the last bit only have no number between them: no threshold parts them.
    midpoints = midpoints[(midpoints < distinct[:-1]) & (midpoints > distinct[1:])]
    kept = np.unique(np.linspace(0, len(midpoints) - 1, min(GRID_LEVELS - 1, len(midpoints))).astype(int))
    lowest = float(distinct[-1])
    # Farther than the last bits of a float can move a score.
    below_all = lowest - max(10 * policy.BAND, abs(lowest) * 1e-4)
    return [*(float(value) for value in midpoints[kept]), below_all]


def _entry_levels(scores: NDArray[np.float64], grid: list[float]) -> NDArray[np.int64]:
    rising = np.asarray(grid)[::-1]
    # The number of thresholds that are strictly below the score: score > threshold.
    below = np.searchsorted(rising, scores, side="left")
    return np.asarray(len(grid) - below + 1, dtype=np.int64)


def best_within_risk(path: ThresholdPath, max_risk: float) -> int:
    """The cheapest point of the path whose risk on tune is at most ``max_risk``."""
    return cheaper(
        path, int(np.flatnonzero(path.risk <= max_risk)[-1]) if (path.risk <= max_risk).any() else 0
    )


def cheaper(path: ThresholdPath, index: int) -> int:
    """``index``, or 0 where no early exit at all costs no more: so it can be in a chain of networks."""
    return index if path.macs[index] < path.macs[0] else 0
