from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erde.bundle.manifest import Manifest, Stage
from erde.calibration.logits import calibrate_logits
from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.settings import Settings
from erde.common.splits import CertifyLogits, TuneLogits
from erde.data.load import DataSplits
from erde.evaluation.logits_file import LogitsFile
from erde.policy.cost import Cost
from erde.policy.points import Calibration
from erde.policy.rule import decide, take_exit
from erde.runtime import monitor as module
from erde.runtime.monitor import BLOCK, Monitor, cut_p_values, smallest_p_value
from erde.runtime.prediction import Prediction
from erde.runtime.session import Session
from tests.helpers.checks import user_error

POOL = Path(__file__).parents[1] / "samples" / "cifar10_logits.npz"
MACS = (10, 20, 30)
Array = NDArray[np.float64]


def manifest(calibration: Calibration | None, default: str = "risk-5", certified: bool = True) -> Manifest:
    """All of a manifest that a monitor looks at, for three exits and ten classes."""
    fields: dict[str, Any] = {
        "name": "made",
        "classes": [str(label) for label in range(10)],
        "stages": [
            Stage(file=f"stage_{index}.onnx", exit_name=str(index), macs=macs, parameters=1)
            for index, macs in enumerate(MACS)
        ],
        "no_exit_macs": MACS[-1],
        "calibration": calibration,
        "operating_points": [
            SimpleNamespace(name=default, thresholds=[0.5, 0.5], certificate=object() if certified else None)
        ],
        "default_operating_point": default,
    }
    return Manifest.model_construct(**fields)


def calibration(scores: Array, exits: NDArray[np.int64]) -> Calibration:
    """What calibration would keep of certify images with these scores (N,) at exit 0, which left at ``exits``."""
    histogram = np.histogram(scores, bins=20, range=(0, 1))[0].tolist()
    rates = (np.bincount(exits, minlength=3) / len(exits)).tolist()
    fields: dict[str, Any] = {
        "exit_rates": rates,
        "score_histograms": [histogram, histogram, histogram],
        "score_ranges": [(0.0, 1.0)] * 3,
        "certify_images": len(exits),
    }
    return Calibration.model_construct(**fields)


def prediction(scores: Array, exits: NDArray[np.int64], point: str | None = "risk-5") -> Prediction:
    count = len(exits)
    return Prediction(
        labels=np.zeros(count, dtype=np.int64),
        logits=np.zeros((count, 10)),
        exits=exits,
        scores=np.zeros(count),
        macs=np.asarray(MACS)[exits],
        capped=False,
        milliseconds=(),
        first_scores=scores,
        operating_point=point,
        temperatures=np.ones(3),
    )


def draw(generator: np.random.Generator, count: int, shift: float = 0.0) -> tuple[Array, NDArray[np.int64]]:
    """A known distribution: scores of exit 0, and exits that follow from them and from luck."""
    scores = generator.beta(3, 1 + shift, count)
    later = generator.random(count) < 0.6 * scores
    return scores, np.where(scores > 0.9, 0, np.where(later, 1, 2)).astype(np.int64)


def watch(tune: int, seed: int, shift: float = 0.0, images: int = 1600, false_alarm: float = 0.1) -> Monitor:
    """One life of a monitor: a calibration of its own, and a stream in batches, asked after each of them."""
    generator = np.random.default_rng(seed)
    monitor = Monitor(manifest(calibration(*draw(generator, tune))), false_alarm=false_alarm)
    scores, exits = draw(generator, images, shift)
    for start in range(0, images, 400):
        monitor.add(prediction(scores[start : start + 400], exits[start : start + 400]))
    return monitor


# ---------------------------------------------------------------- the test of one block


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3000)), min_size=2, max_size=8).filter(
        lambda rows: all(sum(column) for column in zip(*rows, strict=True))
    )
)
def test_cuts_are_fishers_exact_test(rows: list[tuple[int, int]]) -> None:
    first, second = np.asarray(rows).T
    n, m = first.sum(), second.sum()
    before = 0
    for cut, p_value in enumerate(cut_p_values(first, second)):
        below, both = first[: cut + 1].sum(), int(first[: cut + 1].sum() + second[: cut + 1].sum())
        if both in (before, n + m):
            assert np.isnan(p_value)
        else:
            table = scipy.stats.hypergeom(n + m, both, n)
            tail = table.sf(below - 1) if below * (n + m) > both * n else table.cdf(below)
            np.testing.assert_allclose(p_value, min(1.0, 2 * tail), rtol=1e-6, atol=1e-250)
        before = both


@pytest.mark.parametrize(("n", "m"), [(2500, 100), (2500, 10**7), (50_000, 300), (30, 20)])
def test_tails_at_every_size(n: int, m: int) -> None:
    generator = np.random.default_rng(0)
    smallest = 1.0
    for share in (0.002, 0.1, 0.5, 0.99):
        for factor in (0.5, 0.9, 1.0):
            a, b = int(generator.binomial(n, share)), int(generator.binomial(m, share * factor))
            if not 0 < a + b < n + m:
                continue
            p_value = cut_p_values(np.array([a, n - a]), np.array([b, m - b]))[0]
            table = scipy.stats.hypergeom(n + m, a + b, n)
            tail = table.sf(a - 1) if a * (n + m) > (a + b) * n else table.cdf(a)
            np.testing.assert_allclose(p_value, min(1.0, 2 * tail), rtol=1e-5, atol=1e-250)
            smallest = min(smallest, p_value)
    assert smallest < 1e-4


def test_a_p_value_is_one() -> None:
    # The chance of p <= x is at most x, also in the far tail where a chi-squared test is wrong by far.
    for both, n, m in [(70, 2500, 100), (6, 300, 100), (2400, 2500, 400)]:
        table = scipy.stats.hypergeom(n + m, both, n)
        support = np.arange(max(0, both - m), min(n, both) + 1)
        p = np.array(
            [cut_p_values(np.array([a, n - a]), np.array([both - a, m - both + a]))[0] for a in support]
        )
        for x in (0.3, 0.01, 1e-5, 1e-9):
            assert table.pmf(support)[p <= x].sum() <= x * (1 + 1e-6)


def arrangements(pooled: NDArray[np.int64], n: int) -> Iterator[tuple[NDArray[np.int64], float]]:
    """All calibration counts that ``pooled`` allows, with their chances: the multivariate hypergeometric law."""
    for chosen in itertools.product(*(range(size + 1) for size in pooled.tolist())):
        if sum(chosen) == n:
            ways = math.prod(math.comb(size, k) for size, k in zip(pooled.tolist(), chosen, strict=True))
            yield np.array(chosen), ways / math.comb(int(pooled.sum()), n)


@pytest.mark.parametrize(
    "pooled", [(6, 7, 5, 8), (1, 0, 9, 9, 2), (0, 12, 12, 0), (3, 3, 3, 3, 3), (15, 1, 14)], ids=str
)
def test_the_smallest_p_value_is_corrected_exactly(pooled: tuple[int, ...]) -> None:
    counts = np.array(pooled)
    for n in (int(counts.sum()) // 2, int(counts.sum()) // 4):
        possible = list(arrangements(counts, n))
        smallest = [
            float(np.nanmin(cut_p_values(histogram, counts - histogram))) for histogram, _ in possible
        ]
        for value, (histogram, _) in zip(smallest, possible, strict=True):
            corrected = smallest_p_value(histogram, counts - histogram, value)
            as_small = sum(
                chance
                for other, (_, chance) in zip(smallest, possible, strict=True)
                if other <= value * (1 + 1e-6)
            )
            if value <= 0.05:
                assert corrected == pytest.approx(as_small, rel=1e-6, abs=1e-11)
            assert as_small * (1 - 1e-9) <= corrected <= min(1.0, 4 * value)


@pytest.mark.parametrize(("n", "m"), [(2500, 100), (2500, 102_400), (50_000, 400)])
def test_the_correction_of_large_samples(n: int, m: int) -> None:
    # Half of Bonferroni's bound or less where cuts are many, and never below what one cut alone has.
    generator = np.random.default_rng(0)
    shares = np.full(20, 0.05)
    first, second = generator.multinomial(n, shares), generator.multinomial(m, shares)
    # The observed cut is made extreme by hand: these counts are about the range of the others only.
    corrected = smallest_p_value(first, second, 1e-4)
    assert 4e-4 < corrected < 1.2e-3
    assert smallest_p_value(first, second, 1e-12) == pytest.approx(19e-12, rel=0.5)


# ---------------------------------------------------------------- false alarms


class OneSample:
    """Not what the monitor does: calibration's shares are taken for the truth."""

    @staticmethod
    def cut_p_values(first: NDArray[np.int64], second: NDArray[np.int64]) -> Array:
        return cut_p_values(first * 10_000, second)


def alarms(lives: int, tune: int, **how: Any) -> int:
    return sum(watch(tune, seed, **how).report().drifted for seed in range(lives))


def upper(lives: int, level: float) -> float:
    """What a rate of exactly ``level`` exceeds once in 2,000 repetitions of the experiment."""
    return float(scipy.stats.binom(lives, level).ppf(1 - 0.0005))


def test_false_alarms_are_as_rare_as_promised() -> None:
    # 31 looks in each life; the rate is below the level, as the union bound is not tight.
    # 1,000 lives find a rate a third above 0.2, or a fifth above 0.5, in 95 of 100 repetitions.
    lives, level = 1000, 0.2
    p_values = [watch(500, seed, false_alarm=level).report().p_value for seed in range(lives)]
    for x in (0.05, 0.1, level, 0.5):
        assert sum(p <= x for p in p_values) <= upper(lives, x)
    # And not by doing nothing.
    assert sum(p <= 0.5 for p in p_values) > 0.01 * lives


def test_without_spending_the_level_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every look at the share of the first one, 1/4: each at a level of 10 %.
    look = Monitor._look
    monkeypatch.setattr(Monitor, "_look", lambda self, block, level, number: look(self, block, 0, 1))
    assert alarms(200, 500, false_alarm=0.4) > 2 * upper(200, 0.1)


def test_with_calibration_taken_for_the_truth_the_level_does_not_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "cut_p_values", OneSample.cut_p_values)
    assert alarms(200, 500) > 2 * upper(200, 0.1)


@pytest.fixture(scope="module")
def pool() -> tuple[NDArray[Any], NDArray[np.int64], Cost]:
    opened = LogitsFile(POOL)
    logits = opened.split("").logits
    return logits.logits, logits.labels, opened.cost(3, None, None)


Life = tuple[CalibratedPolicy, Monitor, NDArray[np.int64]]


def calibrated(
    pool: tuple[NDArray[Any], NDArray[np.int64], Cost], score: str, seed: int, false_alarm: float = 0.01
) -> Life:
    """A calibration on 5,000 images of the pool, its monitor, and the rows of the other images."""
    logits, labels, cost = pool
    rows = np.random.default_rng(seed).permutation(len(labels))
    tune, certify, rest = rows[:2500], rows[2500:5000], rows[5000:]
    policy = calibrate_logits(
        TuneLogits(logits[:, tune], labels[tune]),
        CertifyLogits(logits[:, certify], labels[certify]),
        cost,
        Settings(max_risks=(0.05,), score=score, sharpness=None if score in ("harm", "patience") else 1.0),
    )
    return policy, Monitor(manifest(policy.calibration, policy.default), false_alarm=false_alarm), rest


def answers(policy: CalibratedPolicy, logits: NDArray[Any]) -> Prediction:
    scores = policy.rule.apply(logits)[1]
    thresholds = next(point.thresholds for point in policy.points if point.name == policy.default)
    exits = decide(scores[:-1], thresholds)
    answer = prediction(scores[0], exits, policy.default)
    return replace(answer, scores=take_exit(scores, exits))


@pytest.mark.parametrize("score", ["margin", "harm"])
def test_silent_on_real_logits(score: str, pool: tuple[NDArray[Any], NDArray[np.int64], Cost]) -> None:
    # What is fitted was fitted on other images than those that are compared with.
    lives, p_values = 10, []
    for seed in range(lives):
        policy, monitor, rest = calibrated(pool, score, seed, 0.1)
        monitor.add(answers(policy, pool[0][:, rest]))
        report = monitor.report()
        assert report.images == 10_000
        p_values.append(report.p_value)
    assert sum(p <= 0.1 for p in p_values) <= upper(lives, 0.1)
    assert sum(p <= 0.01 for p in p_values) <= 1


# ---------------------------------------------------------------- power


def noisier(logits: NDArray[Any], _: NDArray[np.int64], generator: np.random.Generator) -> NDArray[Any]:
    return logits + generator.normal(0, 1.0, logits.shape)


def flatter(logits: NDArray[Any], _: NDArray[np.int64], generator: np.random.Generator) -> NDArray[Any]:
    return logits * 0.8


def imbalanced(
    logits: NDArray[Any], labels: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[Any]:
    """Cats and dogs three times in four, as against once in five."""
    pets = np.isin(labels, (3, 5))
    chosen = [generator.choice(np.flatnonzero(mask), count) for mask, count in ((pets, 7500), (~pets, 2500))]
    return logits[:, generator.permutation(np.concatenate(chosen))]


@pytest.mark.parametrize(
    ("shift", "within"),
    [(noisier, 1600), (flatter, 800), (imbalanced, 400)],
    ids=lambda value: str(value)[:20],
)
def test_shifts_of_real_logits_are_noticed(
    shift: Callable[..., NDArray[Any]], within: int, pool: tuple[NDArray[Any], NDArray[np.int64], Cost]
) -> None:
    logits, labels, _ = pool
    after = []
    for seed in range(10):
        policy, monitor, rest = calibrated(pool, "margin", seed)
        shifted = shift(logits[:, rest].astype(np.float64), labels[rest], np.random.default_rng(seed))
        monitor.add(answers(policy, shifted))
        report = monitor.report()
        assert report.drifted, report
        after.append(report.drifted_after)
    assert np.median(after) <= within, after


def test_a_change_late_in_life_is_noticed() -> None:
    generator = np.random.default_rng(0)
    monitor = Monitor(manifest(calibration(*draw(generator, 2500))))
    monitor.add(prediction(*draw(generator, 100_000)))
    assert not monitor.report().drifted
    monitor.add(prediction(*draw(generator, 6400, shift=0.7)))
    after = monitor.report().drifted_after
    assert after is not None
    assert 100_000 < after <= 101_600


def test_a_small_change_is_noticed_in_the_end() -> None:
    # By blocks of 100 alone it would not be.
    report = watch(20_000, 0, shift=0.08, images=25_600).report()
    assert report.drifted_after is not None
    assert report.drifted_after >= 800


def test_exits_alone_can_give_the_alarm() -> None:
    generator = np.random.default_rng(1)
    scores, exits = draw(generator, 2000)
    monitor = Monitor(manifest(calibration(scores, exits)))
    scores, exits = draw(generator, 2000)
    monitor.add(prediction(scores, np.where(exits == 1, 2, exits)))
    report = monitor.report()
    assert report.drifted
    assert "leave by exit 1, at calibration" in report.message


# ---------------------------------------------------------------- the report


def test_the_first_report() -> None:
    monitor = Monitor(manifest(calibration(*draw(np.random.default_rng(0), 500))))
    report = monitor.report()
    assert (report.images, report.ignored, report.p_value, report.drifted) == (0, 0, 1.0, False)
    assert np.isnan(report.exit_rates).all()
    assert report.message == "0 images: the first look is at 100"
    with pytest.raises(AttributeError):
        report.images = 1  # type: ignore[misc]


def test_counts_do_not_depend_on_batches() -> None:
    generator = np.random.default_rng(3)
    known = manifest(calibration(*draw(generator, 500)))
    scores, exits = draw(generator, 1730, shift=0.3)
    reports = []
    for sizes in ([1730], [1] * 1730, [0, 99, 1, 0, 100, 101, 1429]):
        monitor, start = Monitor(known), 0
        for size in sizes:
            monitor.add(prediction(scores[start : start + size], exits[start : start + size]))
            start += size
        reports.append(monitor.report())
    assert reports[0] == reports[1] == reports[2]
    assert reports[0].images == 1730
    assert reports[0].exit_rates == tuple((np.bincount(exits) / 1730).tolist())
    assert reports[0].score_histogram == tuple(np.histogram(scores, 20, (0, 1))[0].tolist())


def test_which_blocks_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(
        Monitor, "_look", lambda self, block, level, k: looks.append((level, k, block.copy()))
    )
    watch(500, 0, images=800)
    assert [look[:2] for look in looks] == [
        (0, 1), (0, 2), (1, 1), (0, 3), (0, 4), (1, 2), (2, 1),
        (0, 5), (0, 6), (1, 3), (0, 7), (0, 8), (1, 4), (2, 2), (3, 1),
    ]  # fmt: skip
    blocks = {(level, k): block for level, k, block in looks}
    for (level, k), block in blocks.items():
        assert block[:20].sum() == block[20:].sum() == BLOCK * 2**level
        if level:
            assert np.array_equal(block, blocks[level - 1, 2 * k - 1] + blocks[level - 1, 2 * k])


@pytest.mark.parametrize(("family", "share"), [("scores", 2 / 3), ("exits", 1 / 3)])
def test_what_may_be_spent_is_the_level_and_no_more(
    family: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one cut of p-value 1 at every look, the p-value reported is the inverse of the look's share.
    spent = 0.0

    def p_values(first: NDArray[np.int64], second: NDArray[np.int64]) -> Array:
        telling = len(first) == (20 if family == "scores" else 3)
        return np.array([1e-300 if telling else np.nan] + [np.nan] * (len(first) - 2))

    monkeypatch.setattr(module, "cut_p_values", p_values)
    monkeypatch.setattr(module, "smallest_p_value", lambda first, second, smallest: smallest)
    monitor = Monitor(manifest(calibration(*draw(np.random.default_rng(0), 500))))
    for level in range(300):
        for number in range(1, 300):
            monitor._p_value = 1.0
            monitor._look(np.ones(23, dtype=np.int64), level, number)
            spent += 1e-300 / monitor._p_value
    assert 0.99 * share < spent <= share * (1 + 1e-9)


def test_an_alarm_stays_and_says_what_to_do() -> None:
    monitor = watch(2500, 0, shift=2.0, images=400)
    report = monitor.report()
    assert report.drifted
    assert report.drifted_after == 100
    assert report.message.endswith(
        "'risk-5' and its certificate no longer stand on solid ground: calibrate again on labelled images of today: "
        "erde calibrate BUNDLE --data FOLDER"
    )
    assert "% of the last 100 images score below 0." in report.message
    assert "\n" not in report.message
    monitor.add(prediction(*draw(np.random.default_rng(9), 50_000)))
    assert monitor.report().drifted
    assert monitor.report().message == report.message
    assert report.images == 400


def test_a_point_without_a_certificate_is_not_said_to_have_one() -> None:
    monitor = Monitor(manifest(calibration(*draw(np.random.default_rng(0), 500)), "no-exit", certified=False))
    monitor.add(prediction(*draw(np.random.default_rng(1), 400, shift=3), "no-exit"))
    assert "'no-exit' and what was measured of it no longer" in monitor.report().message


def test_scores_beyond_the_range_and_none_at_all() -> None:
    scores, exits = draw(np.random.default_rng(0), 500)
    monitor = Monitor(manifest(calibration(scores, exits)))
    odd = np.array([-3.0, -np.inf, np.nan, 0.0, 1.0, np.inf, 7.0])
    monitor.add(prediction(odd, np.zeros(7, dtype=np.int64)))
    assert monitor.report().score_histogram == (4, *[0] * 18, 3)


@pytest.mark.parametrize("span", [(0.0, 1.0), (-0.3, 0.7), (1 / 3, 1e6), (-2.3, -2.1), (0.4, 0.4)])
def test_scores_are_counted_as_calibration_counted_them(span: tuple[float, float]) -> None:
    edges = np.linspace(*span, 21)
    scores = np.concatenate([edges, np.nextafter(edges, -np.inf), np.nextafter(edges, np.inf)])
    exits = np.zeros(len(scores), dtype=np.int64)
    known = calibration(scores, exits)
    watched = known.model_copy(
        update={"score_ranges": [span] * 3, "score_histograms": [[len(scores), *[0] * 19]] * 3}
    )
    monitor = Monitor(manifest(watched))
    monitor.add(prediction(scores, exits))
    expected = np.histogram(np.clip(scores, *span), 20, span)[0]
    assert monitor.report().score_histogram == tuple(expected.tolist())


def test_memory_is_bounded() -> None:
    monitor = watch(500, 0, images=51_200)
    assert len(monitor._waiting) == 10
    assert all(scores.shape == (23,) for scores in monitor._waiting)


def test_several_threads_add() -> None:
    generator = np.random.default_rng(0)
    monitor = Monitor(manifest(calibration(*draw(generator, 500))))
    parts = [prediction(*draw(generator, 7)) for _ in range(200)]

    def add_all() -> None:
        for part in parts:
            monitor.add(part)
            monitor.report()

    threads = [threading.Thread(target=add_all) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = monitor.report()
    assert report.images == sum(report.score_histogram) == 6 * 200 * 7
    exits = np.concatenate([part.exits for part in parts])
    np.testing.assert_allclose(report.exit_rates, np.bincount(exits) / len(exits))


# ---------------------------------------------------------------- a real session


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Session:
    return Session(tiny_bundle, threads=1)


def test_a_session_watches(session: Session, digits: DataSplits) -> None:
    images = np.asarray(digits.test.images[:])
    monitor = session.monitor()
    for start in range(0, 200, 40):
        monitor.add(session.predict(images[start : start + 40]))
    report = monitor.report()
    scores = session.rule.apply(session.all_logits(images))[1]
    calibration = session.manifest.calibration
    assert calibration is not None
    assert report.score_histogram == tuple(
        np.histogram(scores[0], 20, calibration.score_ranges[0])[0].tolist()
    )
    assert report.exit_rates == tuple(
        (np.bincount(session.predict(images).exits, minlength=3) / 200).tolist()
    )
    assert report.expected_exit_rates == tuple(calibration.exit_rates)
    assert report.message == "no sign of drift in 200 images"
    noise = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 1), dtype=np.uint8)
    monitor.add(session.predict(noise))
    assert monitor.report().drifted


def test_what_calibration_saw_is_no_drift(session: Session, digits: DataSplits) -> None:
    monitor = session.monitor()
    monitor.add(session.predict(np.asarray(digits.certify.images[:])))
    report = monitor.report()
    assert report.exit_rates == pytest.approx(report.expected_exit_rates)
    assert report.score_histogram == report.expected_score_histogram


def test_first_scores(session: Session, digits: DataSplits) -> None:
    images = np.asarray(digits.test.images[:50])
    scores = session.rule.apply(session.all_logits(images))[1]
    for how in ({}, {"thresholds": [None, None]}, {"max_exit": 0}, {"operating_point": "no-exit"}):
        np.testing.assert_allclose(session.predict(images, **how).first_scores, scores[0], atol=1e-5)
    empty = session.predict(images[:0])
    assert empty.first_scores.shape == (0,)
    assert empty.first_scores.dtype == np.float64


def test_answers_at_something_else_are_ignored(session: Session, digits: DataSplits) -> None:
    images = np.asarray(digits.test.images[:10])
    default = session.manifest.default_operating_point
    monitor = session.monitor()
    others: list[dict[str, Any]] = [
        {"operating_point": "no-exit"}, {"thresholds": list(session.manifest.point(None).thresholds)},
        {"max_exit": 1}, {"max_macs": session.manifest.stages[0].macs},
    ]  # fmt: skip
    for how in others:
        monitor.add(session.predict(images, **how))
    assert (monitor.report().images, monitor.report().ignored) == (0, 40)
    assert monitor.report().message.startswith(f"0 images (40 not at '{default}' ignored): the first look")
    for how in ({}, {"operating_point": default}, {"max_exit": 2}):
        monitor.add(session.predict(images, **how))
    assert (monitor.report().images, monitor.report().ignored) == (30, 40)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("wrong", [0, 1, -0.1, 5, float("nan")])
def test_wrong_false_alarm(wrong: float, session: Session) -> None:
    with user_error(f"false_alarm is {wrong}, expected a chance between 0 and 1"):
        session.monitor(false_alarm=wrong)


def test_a_bundle_without_calibration(session: Session) -> None:
    with user_error("bundle 'tiny' is not calibrated, so there is nothing to watch against: erde calibrate"):
        Monitor(session.manifest.model_copy(update={"calibration": None}))


@pytest.mark.parametrize(
    "change",
    [
        {"exit_rates": []}, {"exit_rates": [0.5, 0.5]}, {"score_histograms": []},
        {"score_histograms": [[1] * 20] * 3}, {"exit_rates": [0.1, 0.1, 0.1]}, {"certify_images": 7},
    ],
)  # fmt: skip
def test_a_calibration_that_lacks_something(change: dict[str, Any], session: Session) -> None:
    known = session.manifest.calibration
    assert known is not None
    wrong = session.manifest.model_copy(update={"calibration": known.model_copy(update=change)})
    with user_error("its calibration lacks the exit rates or the score histogram of its"):
        Monitor(wrong)


def test_answers_of_another_bundle() -> None:
    monitor = Monitor(manifest(calibration(*draw(np.random.default_rng(0), 500))))
    good = prediction(*draw(np.random.default_rng(1), 30))
    for change, message in [
        ({"logits": np.zeros((30, 7))}, "these answers have 7 classes, the bundle of this monitor 10"),
        ({"macs": good.macs + 1}, "these answers are of another bundle"),
        ({"exits": good.exits + 1}, "these answers are of another bundle"),
        ({"first_scores": np.zeros(3)}, "first scores for 30 answers: expected"),
    ]:
        with user_error(message):
            monitor.add(replace(good, **change))
    assert monitor.report().images == 0
