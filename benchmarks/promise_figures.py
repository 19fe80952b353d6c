"""The figures of docs/promises.md, and the numbers it quotes. Half a minute of one core, no network.

    python benchmarks/promise_figures.py

The population is `tests/samples/cifar10_logits.npz`, 15,000 images, as in promise.py: their true risk is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from promise import Population, naive_walk, tuned_paths

from erde.calibration.certificates import PathCounts, binomial_p_value, images_needed, walk
from erde.calibration.thresholds import ScoredSplit, sweep
from erde.common.files import write_json
from erde.evaluation.logits_file import LogitsFile
from erde.policy.rule import ExitRule
from erde.report.figures import GREY, PALETTE, STYLE

ROOT = Path(__file__).parents[1]
LOGITS = ROOT / "tests" / "samples" / "cifar10_logits.npz"
IMAGES = ROOT / "docs" / "images"
NUMBERS = ROOT / "benchmarks" / "results" / "promise-figures.json"
RISK, CONFIDENCE, DRAWS = 0.01, 0.9, 1000
CERTIFY = 2500
SIZES = (230, 500, 1000, 2500, 5000, 10_000)
BLUE, ORANGE, GREEN = PALETTE[:3]


@dataclass(frozen=True)
class Walks:
    """Where ``DRAWS`` certify splits of one size end: true risk and share of the MACs saved, each (DRAWS,)."""

    risk: NDArray[np.float64]
    saved: NDArray[np.float64]

    def numbers(self) -> dict[str, Any]:
        """What the page quotes."""
        low, middle, high = np.quantile(self.saved, [0.05, 0.5, 0.95])
        return {
            "broken": int((self.risk > RISK).sum()),
            "saved": {"5 %": low, "median": middle, "95 %": high},
        }


def accepted(counts: PathCounts, naive: bool) -> int:
    return naive_walk(counts, RISK) if naive else walk(counts, RISK, CONFIDENCE)


def walks(
    population: Population, saved: NDArray[np.float64], images: int, naive: bool = False
) -> tuple[Walks, PathCounts]:
    """All draws of one size, and the counts of the first."""
    draws = list(population.draw(images, DRAWS, np.random.default_rng(images), "risk"))
    ends = np.array([accepted(counts, naive) for counts in draws])
    assert ends.min() >= 0  # SIZES begin where the first point of a path passes
    return Walks(population.risk("risk")[ends], saved[ends]), draws[0]


def draw_walk(
    axes: Axes, counts: PathCounts, true: NDArray[np.float64], saved: NDArray[np.float64]
) -> dict[str, Any]:
    """One walk along a path of thresholds, up to the point that is kept."""
    most = int(np.flatnonzero(binomial_p_value(np.arange(CERTIFY), CERTIFY, RISK) <= 1 - CONFIDENCE)[-1])
    kept = walk(counts, RISK, CONFIDENCE)
    shown = true <= 2 * RISK
    x, seen = 100 * saved, 100 * counts.lost / CERTIFY
    axes.step(x[shown], seen[shown], where="post", color=BLUE, label=f"on the {CERTIFY:,} certify images")
    axes.plot(x[shown], 100 * true[shown], color=GREY, label="in truth (all 15,000 images)")
    axes.axhline(100 * RISK, color=ORANGE, label="promised: at most 1 %")
    axes.axhline(
        100 * most / CERTIFY, color=ORANGE, linestyle="dashed", label=f"accepted: {most} images or fewer"
    )
    axes.plot(x[kept], seen[kept], "o", color=BLUE, label="the point that is kept")
    axes.set_xlabel("MACs saved, %: from careful (left) to cheap (right)")
    axes.set_ylabel("images that get worse, %")
    axes.set_ylim(0, 200 * RISK)
    axes.legend()
    return {
        "most_accepted": most,
        "seen": int(counts.lost[kept]),
        "true_risk": true[kept],
        "saved": saved[kept],
    }


def draw_histograms(axes: Any, tested: Walks, naive: Walks) -> None:
    """True risks of all draws, with the test and without."""
    edges = np.arange(0, 2 * RISK + 1e-9, 0.0005)
    titles = ("with the test of erde", "without: the cheapest thresholds that looked good enough")
    for panel, walked, title in zip(axes, (tested, naive), titles, strict=True):
        broken = walked.risk > RISK
        groups, colours = [100 * walked.risk[~broken], 100 * walked.risk[broken]], [BLUE, ORANGE]
        kept = f"kept: {np.sum(~broken)}"
        panel.hist(
            groups, bins=100 * edges, stacked=True, color=colours, label=[kept, f"broken: {np.sum(broken)}"]
        )
        panel.axvline(100 * RISK, color=ORANGE)
        panel.set_title(title, loc="left")
        panel.set_ylabel("draws")
        panel.legend()
    axes[-1].set_xlabel("true share of images that get worse, %")


def draw_sizes(axes: Axes, by_size: dict[int, Walks], best: float) -> None:
    """The saving that can be promised, against the number of certify images."""
    low, middle, high = 100 * np.transpose(
        [np.quantile(walked.saved, [0.05, 0.5, 0.95]) for walked in by_size.values()]
    )
    axes.fill_between(list(by_size), low, high, color=BLUE, alpha=0.2, linewidth=0, label="90 % of the draws")
    axes.plot(list(by_size), middle, "o-", color=BLUE, label="the middle draw")
    axes.axhline(100 * best, color=GREY, linestyle="dashed", label="if the true risk were known")
    axes.set_xscale("log")
    axes.set_xticks(list(by_size), [f"{size:,}" for size in by_size])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.set_xlabel("certify images")
    axes.set_ylabel("MACs saved, %")
    axes.legend(loc="lower right")


def save(figure: Figure, name: str) -> None:
    figure.savefig(IMAGES / f"promise-{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    opened = LogitsFile(LOGITS)
    logits = opened.split("").logits
    cost = opened.cost(len(logits.logits), None, None)
    rule = ExitRule("margin")
    (path,) = tuned_paths(logits, cost, rule, count=1, size=2500, seed=0)
    split = ScoredSplit.of(logits, rule, None)
    population = Population.of(path, split)
    swept = sweep(split, path.thresholds)
    saved = np.array([swept.measured(index, cost).macs_saved for index in range(len(path.thresholds))])
    true = population.risk("risk")
    best = float(saved[np.flatnonzero(true <= RISK)[-1]])
    assert images_needed(RISK, CONFIDENCE) == SIZES[0]

    by_size, firsts = {}, {}
    for size in SIZES:
        by_size[size], firsts[size] = walks(population, saved, size)
    naive, _ = walks(population, saved, CERTIFY, naive=True)
    with matplotlib.style.context(["default", STYLE]):
        figure, axes = plt.subplots(figsize=(5.5, 3.2))
        first = draw_walk(axes, firsts[CERTIFY], true, saved)
        save(figure, "walk")
        figure, panels = plt.subplots(2, figsize=(5.5, 3.6), sharex=True)
        draw_histograms(panels, by_size[CERTIFY], naive)
        save(figure, "draws")
        figure, axes = plt.subplots(figsize=(5.5, 2.8))
        draw_sizes(axes, by_size, best)
        save(figure, "sizes")
    numbers = {
        "images": len(logits),
        "draws": DRAWS,
        "walk": first,
        "naive": naive.numbers(),
        "best_saved": best,
        "sizes": {str(size): walked.numbers() for size, walked in by_size.items()},
    }
    write_json(NUMBERS, numbers)


if __name__ == "__main__":
    main()
