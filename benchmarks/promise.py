"""Does the promise hold, and what does it cost? Certificates drawn thousands of times from pools that are known.

    python benchmarks/promise.py LOGITS.npz --out benchmarks/results/NAME.json

LOGITS.npz holds `logits` (E, N, K) and `labels` (N,) of images that the network was not trained on, and
`exit_macs`; all of it together is the population, so the true risk of any thresholds is known. Tune and certify
splits are drawn from it with replacement. README.md beside this file has the method; `tests/calibration/test_promise.py`
runs the same functions.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from erde.calibration.certificates import PathCounts, walk
from erde.calibration.choice import choose_score
from erde.calibration.logits import calibrate_logits
from erde.calibration.settings import Settings
from erde.calibration.thresholds import ScoredSplit, ThresholdPath, search_path
from erde.common.files import write_json
from erde.common.splits import CertifyLogits, Logits, TestLogits, TuneLogits
from erde.evaluation.logits_file import LogitsFile
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.points import Guarantee
from erde.policy.rule import ExitRule

SIZES = (500, 1000, 2500, 5000)
RISKS = (0.01, 0.02, 0.05)
CONFIDENCES = (0.9, 0.95)
# A violation rate counts as too high where the level explains it less often than this.
SUSPICIOUS = 1e-3


@dataclass(frozen=True)
class Violations:
    """How often a promise was broken: the share of draws whose certified point has a true risk above ``max_risk``."""

    images: int
    max_risk: float
    confidence: float
    draws: int
    violations: int
    certified: int  # draws in which some early exit was certified

    def holds(self) -> bool:
        """Whether violations stay within binomial error of the level, ``1 - confidence``."""
        return bool(binom.sf(self.violations - 1, self.draws, 1 - self.confidence) > SUSPICIOUS)

    def to_json(self) -> dict[str, Any]:
        """With the rate and its exact 95 % interval."""
        interval = binomtest(self.violations, self.draws).proportion_ci(0.95)
        rate = self.violations / self.draws
        return {
            **asdict(self),
            "rate": rate,
            "interval": [interval.low, interval.high],
            "holds": self.holds(),
        }


@dataclass(frozen=True)
class Population:
    """A path of thresholds on images that are all there is: lost and won images (P, N), and true means (P,)."""

    lost: NDArray[np.bool_]
    won: NDArray[np.bool_]

    @classmethod
    def of(cls, path: ThresholdPath, split: ScoredSplit) -> Population:
        """Whom every point of ``path`` loses and wins."""
        exits = [policy.decide(split.scores, thresholds) for thresholds in path.thresholds]
        lost = np.stack([policy.take_exit(split.harm, one) for one in exits])
        right = np.stack([policy.take_exit(split.right, one) for one in exits])
        return cls(lost, right & ~split.reference_right)

    def risk(self, guarantee: Guarantee) -> NDArray[np.float64]:
        """What is promised, as it truly is at every point (P,)."""
        return np.asarray(self.lost.mean(axis=1) - (self.won.mean(axis=1) if guarantee == "net_drop" else 0))

    def draw(
        self, images: int, draws: int, generator: np.random.Generator, guarantee: Guarantee | None = None
    ) -> Iterator[PathCounts]:
        """Counts on ``draws`` splits of ``images``, drawn with replacement; only those that ``guarantee`` looks at."""
        population = self.lost.shape[1]
        nothing = np.zeros((len(self.lost), 250), dtype=np.int64)
        kinds = {
            "lost": self.lost,
            "won": self.won if guarantee in (None, "net_drop") else None,
            "so far": np.logical_or.accumulate(self.lost, axis=0)
            if guarantee in (None, "expected_risk")
            else None,
        }
        masks = {name: None if one is None else one.astype(np.float32) for name, one in kinds.items()}
        for start in range(0, draws, 250):
            size = min(250, draws - start)
            weights = np.stack(
                [
                    np.bincount(generator.integers(population, size=images), minlength=population)
                    for _ in range(size)
                ],
                axis=1,
            ).astype(np.float32)
            # Sums of small whole numbers: exact in float32.
            lost, won, so_far = (
                nothing if one is None else np.rint(one @ weights).astype(np.int64) for one in masks.values()
            )
            for column in range(size):
                yield PathCounts(images, lost[:, column], won[:, column], so_far[:, column])


def naive_walk(counts: PathCounts, max_risk: float) -> int:
    """What people do: the cheapest thresholds whose risk on these very images is within the target, no test."""
    return int(np.flatnonzero(counts.lost / counts.images <= max_risk)[-1])


def violation_rates(
    population: Population,
    draws: int,
    seed: int,
    *,
    guarantee: Guarantee = "risk",
    naive: bool = False,
    sizes: tuple[int, ...] = SIZES,
) -> list[Violations]:
    """Certify ``draws`` times for every size, risk and confidence, and count the broken promises."""
    generator = np.random.default_rng(seed)
    true = population.risk(guarantee)
    found = []
    for images in sizes:
        counts = list(population.draw(images, draws, generator, guarantee))
        for max_risk in RISKS:
            for confidence in CONFIDENCES:
                accepted = [
                    naive_walk(one, max_risk) if naive else walk(one, max_risk, confidence, guarantee)
                    for one in counts
                ]
                broken = sum(true[index] > max_risk for index in accepted if index >= 0)
                early = sum(index > 0 for index in accepted)
                found.append(Violations(images, max_risk, confidence, draws, int(broken), early))
    return found


def merge(several: list[list[Violations]]) -> list[Violations]:
    """Rates over several populations or paths, added up."""
    return [
        Violations(
            one[0].images, one[0].max_risk, one[0].confidence,
            sum(v.draws for v in one), sum(v.violations for v in one), sum(v.certified for v in one),
        )
        for one in zip(*several, strict=True)
    ]  # fmt: skip


def known_distribution(points: int = 100, images: int = 20_000) -> Population:
    """Score U uniform, harm with probability 0.3 (1 - u)²: leaving above t has the risk 0.1 (1 - t)³, by calculus.

    The population stands at the quantiles of U and carries harm wherever the expected number of harmed images
    passes a whole number, so its risk is the formula's to one image.
    """
    scores = (np.arange(images) + 0.5) / images
    expected = np.cumsum(0.3 * (1 - scores[::-1]) ** 2)
    harm = (np.floor(expected) > np.floor(np.concatenate([[0.0], expected[:-1]])))[::-1]
    thresholds = np.linspace(1, 0, points)
    lost = harm[None, :] & (scores[None, :] > thresholds[:, None])
    return Population(lost, np.zeros_like(lost))


def pool_split(logits: Logits, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits and labels of some images of the pool."""
    return logits.logits[:, rows], logits.labels[rows]


def tuned_paths(
    logits: Logits, cost: Cost, rule: ExitRule, count: int, size: int, seed: int
) -> list[ThresholdPath]:
    """Paths that ``count`` tune splits of ``size``, drawn with replacement, lead to."""
    generator = np.random.default_rng(seed)
    return [
        search_path(
            ScoredSplit.of(
                TuneLogits(*pool_split(logits, generator.integers(len(logits), size=size))), rule, None
            ),
            cost,
        )
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Power:
    """MACs that certified thresholds save on the population, against the best thresholds of the same true risk."""

    max_risk: float
    draws: int
    saved: float
    saved_spread: float
    best: float
    best_rule: str
    violations: int

    @property
    def share(self) -> float:
        """Of the best saving."""
        return self.saved / self.best


def best_on_population(
    logits: Logits, cost: Cost, max_risk: float, settings: Settings
) -> tuple[float, ExitRule]:
    """The most MACs saved by any score of ``settings`` with thresholds searched on the population itself."""
    whole = Settings(
        max_risks=(max_risk,), score=settings.score, sharpness=settings.sharpness, ensemble=settings.ensemble
    )
    choices = choose_score(TuneLogits(logits.logits, logits.labels), cost, whole)
    best = max(choices, key=lambda one: one.macs_saved)
    return best.macs_saved, best.rule


def power(
    logits: Logits, cost: Cost, settings: Settings, draws: int, seed: int, size: int = 2500
) -> list[Power]:
    """Calibrate ``draws`` times on tune and certify splits of ``size``, and measure on the population.

    Tune is drawn without replacement, and the population is the rest of the pool; certify is drawn from that
    with replacement.
    """
    generator = np.random.default_rng(seed)
    saved: dict[float, list[float]] = {risk: [] for risk in settings.max_risks}
    broken = dict.fromkeys(settings.max_risks, 0)
    for _ in range(draws):
        shuffled = generator.permutation(len(logits))
        # What tune saw is no part of the population that is certified and measured.
        tune, rest = shuffled[:size], shuffled[size:]
        certify = rest[generator.integers(len(rest), size=size)]
        calibrated = calibrate_logits(
            TuneLogits(*pool_split(logits, tune)), CertifyLogits(*pool_split(logits, certify)), cost, settings
        )
        scored = ScoredSplit.of(TestLogits(*pool_split(logits, rest)), calibrated.rule, None)
        for risk in settings.max_risks:
            point = next((one for one in calibrated.points if one.target == risk), calibrated.points[0])
            measured = scored.measure(point.thresholds, cost)
            saved[risk].append(measured.macs_saved)
            broken[risk] += measured.risk > risk
    found = []
    for risk in settings.max_risks:
        best, rule = best_on_population(logits, cost, risk, settings)
        name = f"{rule.score} at {rule.sharpness:g}, ensemble {rule.ensemble}"
        mean, spread = float(np.mean(saved[risk])), float(np.std(saved[risk]))
        found.append(Power(risk, draws, mean, spread, best, name, broken[risk]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logits", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--power-draws", type=int, default=100)
    parser.add_argument(
        "--paths", type=int, default=10, help="tune splits that the violation draws are spread over"
    )
    arguments = parser.parse_args()
    started = time.perf_counter()
    opened = LogitsFile(arguments.logits)
    logits = opened.split("").logits
    cost = opened.cost(len(logits.logits), None, None)
    split = ScoredSplit.of(logits, policy.PAPER_RULE, None)
    each = arguments.draws // arguments.paths
    paths = tuned_paths(logits, cost, policy.PAPER_RULE, arguments.paths, 2500, seed=1)
    populations = [Population.of(path, split) for path in paths]
    known = known_distribution()

    def rates(**how: Any) -> list[dict[str, Any]]:
        found = merge([violation_rates(one, each, seed, **how) for seed, one in enumerate(populations)])
        return [one.to_json() for one in found]

    results = {
        "logits": arguments.logits.name,
        "images": len(logits),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
        "pool": rates(),
        "pool_naive": rates(naive=True),
        "pool_net_drop": rates(guarantee="net_drop"),
        "known": [one.to_json() for one in violation_rates(known, arguments.draws, 5)],
        "known_naive": [one.to_json() for one in violation_rates(known, arguments.draws, 5, naive=True)],
        "power": {},
    }
    for name, settings in {
        "auto": Settings(max_risks=(0.01, 0.005)),
        "paper's rule": Settings(max_risks=(0.01, 0.005), score="entropy", sharpness=1.0),
        "margin at 1": Settings(max_risks=(0.01, 0.005), score="margin", sharpness=1.0),
    }.items():
        found = power(logits, cost, settings, arguments.power_draws, seed=2)
        results["power"][name] = [{**asdict(one), "share": one.share} for one in found]
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(arguments.out, results)
    print(json.dumps(results["power"], indent=1))
    for name in ("pool", "pool_naive", "pool_net_drop", "known", "known_naive"):
        worst = max(results[name], key=lambda one: one["rate"] - (1 - one["confidence"]))
        print(name, "worst", worst)


if __name__ == "__main__":
    main()
