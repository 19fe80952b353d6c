"""The promise itself: certified thirty thousand times on populations whose true risk is known.

The simulation is that of ``benchmarks/promise.py``. The pool is real: logits of a CIFAR-10 network on images that it
was not trained on (``tests/samples/README.md``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import promise
import pytest
from numpy.typing import NDArray
from promise import Population, Violations, merge, violation_rates

from erde.calibration import certificates
from erde.calibration.certificates import PathCounts, count_along, walk
from erde.calibration.settings import Settings
from erde.calibration.thresholds import ScoredSplit
from erde.common.splits import CertifyLogits, Logits
from erde.evaluation.logits_file import LogitsFile
from erde.policy.cost import Cost
from erde.policy.rule import PAPER_RULE, ExitRule

POOL = Path(__file__).parents[1] / "samples" / "cifar10_logits.npz"
DRAWS = 2000


@pytest.fixture(scope="module")
def pool() -> tuple[Logits, Cost]:
    opened = LogitsFile(POOL)
    logits = opened.split("").logits
    return logits, opened.cost(len(logits.logits), None, None)


@pytest.fixture(scope="module", autouse=True)
def remembered() -> Iterator[None]:
    """p-values of the same counts are summed once: the simulations ask for each of them a thousand times."""
    p_value = certificates.binomial_p_value

    @functools.cache
    def table(images: int, max_risk: float) -> NDArray[np.float64]:
        return p_value(np.arange(images + 1), images, max_risk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            certificates, "binomial_p_value", lambda lost, images, max_risk: table(images, max_risk)[lost]
        )
        yield


@pytest.fixture(scope="module")
def populations(pool: tuple[Logits, Cost]) -> list[Population]:
    """The pool along the paths that four tune splits lead to."""
    paths = promise.tuned_paths(*pool, ExitRule("margin"), count=4, size=2500, seed=0)
    split = ScoredSplit.of(pool[0], ExitRule("margin"), None)
    return [Population.of(path, split) for path in paths]


def rates(populations: list[Population], **how: object) -> list[Violations]:
    return merge(
        [violation_rates(population, DRAWS // 4, seed, **how) for seed, population in enumerate(populations)]
    )


def check_that_it_holds(rates: list[Violations], sizes: tuple[int, ...] = promise.SIZES) -> None:
    assert len(rates) == len(sizes) * len(promise.RISKS) * len(promise.CONFIDENCES)
    assert all(rate.draws == DRAWS for rate in rates)
    assert [rate for rate in rates if not rate.holds()] == []
    for rate in rates:
        if rate.images == 5000:
            assert rate.certified >= DRAWS / 2, rate


def test_on_real_logits(populations: list[Population]) -> None:
    check_that_it_holds(rates(populations))


def test_on_a_known_distribution() -> None:
    known = promise.known_distribution()
    # The integral of 0.3 (1 - u)² from the threshold to 1.
    np.testing.assert_allclose(known.risk("risk"), 0.1 * (1 - np.linspace(1, 0, 100)) ** 3, atol=1e-4)
    check_that_it_holds(violation_rates(known, DRAWS, 1))


def test_of_the_net_drop(populations: list[Population]) -> None:
    sizes = (500, 2500)
    check_that_it_holds(rates(populations, guarantee="net_drop", sizes=sizes), sizes)


def test_in_expectation(populations: list[Population]) -> None:
    # Conformal risk control promises the mean over draws, not each of them.
    generator = np.random.default_rng(0)
    for max_risk in promise.RISKS:
        true = []
        for population in populations:
            risk = population.risk("risk")
            for counts in population.draw(1000, 500, generator, "expected_risk"):
                index = walk(counts, max_risk, 0.9, "expected_risk")
                true.append(risk[max(index, 0)])
        assert np.mean(true) <= max_risk + 3 * np.std(true) / np.sqrt(len(true))
        assert np.mean(true) > 0.7 * max_risk


def test_thresholds_that_are_best_on_the_same_images_break_the_promise(populations: list[Population]) -> None:
    naive = rates(populations, naive=True)
    assert not any(rate.holds() for rate in naive)
    assert min(rate.violations for rate in naive) > 0.25 * DRAWS


def test_the_simulation_counts_as_the_certificate_does(pool: tuple[Logits, Cost]) -> None:
    (path,) = promise.tuned_paths(*pool, PAPER_RULE, count=1, size=1000, seed=3)
    logits = pool[0]
    population = Population.of(path, ScoredSplit.of(logits, PAPER_RULE, None))
    drawn = list(population.draw(700, 3, np.random.default_rng(7)))
    generator = np.random.default_rng(7)
    for counts in drawn:
        rows = generator.integers(len(logits), size=700)
        split = CertifyLogits(logits.logits[:, rows], logits.labels[rows])
        expected = count_along(path, ScoredSplit.of(split, PAPER_RULE, None))
        assert isinstance(counts, PathCounts)
        assert counts.lost.tolist() == expected.lost.tolist()
        assert counts.won.tolist() == expected.won.tolist()
        assert counts.lost_so_far.tolist() == expected.lost_so_far.tolist()


def test_power(pool: tuple[Logits, Cost]) -> None:
    settings = Settings(max_risks=(0.01, 0.005), score="margin", sharpness=1.0)
    one_percent, half_percent = promise.power(*pool, settings, draws=40, seed=0)
    assert one_percent.share >= 0.85
    assert half_percent.share >= 0.70


@pytest.mark.slow
def test_power_of_the_automatic_choice(pool: tuple[Logits, Cost]) -> None:
    one_percent, half_percent = promise.power(*pool, Settings(max_risks=(0.01, 0.005)), draws=20, seed=1)
    assert one_percent.share >= 0.85
    assert half_percent.share >= 0.70
