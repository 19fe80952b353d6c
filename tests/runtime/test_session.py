from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count as counting
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import scipy.special
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erde import bundle
from erde.bundle.profile import PROFILE
from erde.data.load import DataSplits
from erde.policy import rule as policy
from erde.runtime.prediction import Prediction
from erde.runtime.session import Session
from erde.runtime.stages import StageRunner
from tests.helpers.checks import user_error

# Logits of other batch sizes differ in the last bits: scores this near to a threshold may tip over.
BAND = 1e-5


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Session:
    return Session(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def images(digits: DataSplits) -> NDArray[np.uint8]:
    return np.asarray(digits.test.images[:])


def scores_of(session: Session, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    return session.rule.apply(session.all_logits(images))[1]


def check_answer(
    session: Session, images: NDArray[np.uint8], answer: Prediction, exits: NDArray[np.int64]
) -> None:
    """``answer`` is that of ``exits``, row by row, in the order of ``images``."""
    logits = session.all_logits(images)
    rows = np.arange(len(images))
    temperatures = np.array(session.manifest.temperatures)
    expected = logits[exits, rows].astype(np.float64)
    assert answer.exits.tolist() == exits.tolist()
    assert answer.labels.tolist() == expected.argmax(axis=1).tolist()
    tempered = scipy.special.softmax(expected / temperatures[exits][:, None], axis=1)
    np.testing.assert_allclose(answer.probabilities, tempered, atol=1e-4)
    np.testing.assert_allclose(answer.probabilities.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(answer.scores, scores_of(session, images)[exits, rows], atol=BAND)
    macs = [session.manifest.stages[exit].macs for exit in exits]
    assert answer.macs.tolist() == macs


# ---------------------------------------------------------------- exits


def test_the_bundle_is_worth_testing(session: Session, images: NDArray[np.uint8]) -> None:
    # All three exits are taken, temperatures matter and the exits do not all agree.
    exits = session.predict(images, thresholds=[0.9, 0.9]).exits
    assert set(exits.tolist()) == {0, 1, 2}
    assert len(set(session.manifest.temperatures)) == 3
    labels = session.all_logits(images).argmax(axis=-1)
    assert (labels[0] != labels[2]).any()


thresholds = st.one_of(st.none(), st.floats(0, 1), st.sampled_from([-1.0, 2.0]))
# Images of a batch, none, one and odd numbers of them more often than chance would have it.
sizes = st.one_of(st.sampled_from([0, 1, 3, 31, 33]), st.integers(0, 40))
batches = sizes.flatmap(lambda size: st.lists(st.integers(0, 199), min_size=size, max_size=size))


@contextmanager
def recorded() -> Iterator[list[tuple[int, int]]]:
    """(stage, size of batch) of every call of a stage."""
    runs: list[tuple[int, int]] = []
    run = StageRunner.run_bound

    def record(self: StageRunner, index: int, x: NDArray[Any]) -> Any:
        runs.append((index, len(x)))
        return run(self, index, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageRunner, "run_bound", record)
        yield runs


def expected_runs(exits: NDArray[np.int64], last: int = 2) -> list[tuple[int, int]]:
    """What has to run for ``exits``, and no more: a stage for those that left at no earlier exit."""
    left = [(stage, int((exits >= stage).sum())) for stage in range(last + 1)]
    return [(stage, rows) for stage, rows in left if rows or not stage]


@settings(max_examples=60, deadline=None)
@given(
    rows=batches,
    levels=st.tuples(thresholds, thresholds),
    max_exit=st.sampled_from([None, 0, 1, 2]),
)
def test_any_mixture_of_exits_is_what_the_policy_decides(
    session: Session,
    images: NDArray[np.uint8],
    rows: list[int],
    levels: tuple[float | None, float | None],
    max_exit: int | None,
) -> None:
    some = images[np.array(rows, dtype=int)]
    scores = scores_of(session, some)
    for index, level in enumerate(levels):
        assume(level is None or not (np.abs(scores[index] - level) < BAND).any())
    exits = np.minimum(policy.decide(scores, levels), 2 if max_exit is None else max_exit)
    with recorded() as runs:
        answer = session.predict(some, thresholds=levels, max_exit=max_exit)
    assert runs == expected_runs(exits)
    assert len(answer.milliseconds) == len(runs)
    check_answer(session, some, answer, exits)


@pytest.mark.parametrize("name", [None, "no-exit", "risk-5", "risk-10", "budget-80"])
@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_operating_points(name: str | None, count: int, session: Session, images: NDArray[np.uint8]) -> None:
    some = images[:count]
    levels = session.manifest.point(name).thresholds
    exits = policy.decide(scores_of(session, some), levels)
    check_answer(session, some, session.predict(some, operating_point=name), exits)
    if name == "no-exit":
        assert (exits == 2).all()


def test_types_and_shapes_of_answers(session: Session, images: NDArray[np.uint8]) -> None:
    for count in (0, 3):
        answer = session.predict(images[:count])
        assert answer.probabilities.shape == (count, 10)
        for values in (answer.labels, answer.exits, answer.scores, answer.macs):
            assert values.shape == (count,)
        assert answer.labels.dtype == answer.exits.dtype == answer.macs.dtype == np.int64
        assert answer.scores.dtype == answer.probabilities.dtype == np.float64


def test_a_score_at_its_threshold_goes_on(session: Session, images: NDArray[np.uint8]) -> None:
    image = images[:1]
    score = float(session.predict(image, max_exit=0).scores[0])
    assert session.predict(image, thresholds=[score, None]).exits.tolist() == [2]
    below = np.nextafter(score, 0)
    assert session.predict(image, thresholds=[below, None]).exits.tolist() == [0]


# ---------------------------------------------------------------- what runs


@pytest.fixture
def runs() -> Iterator[list[tuple[int, int]]]:
    with recorded() as runs:
        yield runs


def test_a_stage_runs_for_those_only_that_are_undecided(
    session: Session, images: NDArray[np.uint8], runs: list[tuple[int, int]]
) -> None:
    exits = session.predict(images, thresholds=[0.9, 0.9]).exits
    left = [200, int((exits > 0).sum()), int((exits > 1).sum())]
    assert 200 > left[1] > left[2] > 0
    assert runs == list(enumerate(left))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"thresholds": [-1.0, None]}, [(0, 5)]),
        ({"thresholds": [None, -1.0]}, [(0, 5), (1, 5)]),
        ({"thresholds": [None, None]}, [(0, 5), (1, 5), (2, 5)]),
        ({"thresholds": [None, None], "max_exit": 0}, [(0, 5)]),
        ({"operating_point": "no-exit", "max_exit": 1}, [(0, 5), (1, 5)]),
    ],
)
def test_later_stages_do_not_run(
    arguments: dict[str, Any],
    expected: list[tuple[int, int]],
    session: Session,
    images: NDArray[np.uint8],
    runs: list[tuple[int, int]],
) -> None:
    session.predict(images[:5], **arguments)
    assert runs == expected


def test_a_stage_that_is_not_needed_may_be_broken(
    tiny_bundle: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(tiny_bundle, threads=1)
    expected = session.predict(images, thresholds=[-1.0, None])
    run = StageRunner.run_bound

    def broken(self: StageRunner, index: int, x: NDArray[Any]) -> Any:
        assert index == 0, "ran"
        return run(self, index, x)

    monkeypatch.setattr(StageRunner, "run_bound", broken)
    answer = session.predict(images, thresholds=[-1.0, None])
    assert np.array_equal(answer.probabilities, expected.probabilities)
    assert (session.predict(images, max_exit=0).exits == 0).all()
    with pytest.raises(AssertionError, match="ran"):
        session.predict(images, thresholds=[2.0, None])


# ---------------------------------------------------------------- limits


def test_a_limit_on_macs_is_one_on_exits(session: Session, images: NDArray[np.uint8]) -> None:
    macs = [stage.macs for stage in session.manifest.stages]
    for limit, last in [
        (macs[0], 0),
        (macs[1] - 1, 0),
        (macs[1], 1),
        (macs[2] - 0.5, 1),
        (macs[2], 2),
        (1e12, 2),
    ]:
        answer = session.predict(images[:9], operating_point="no-exit", max_macs=limit)
        assert answer.exits.tolist() == [last] * 9
        assert answer.macs.max() <= limit
    both = session.predict(images[:9], operating_point="no-exit", max_macs=macs[1], max_exit=0)
    assert both.exits.tolist() == [0] * 9
    other = session.predict(images[:9], operating_point="no-exit", max_macs=macs[0], max_exit=2)
    assert other.exits.tolist() == [0] * 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operating_point": "fast"}, "no operating point 'fast' in this bundle; it has: no-exit, risk-5"),
        ({"operating_point": "no-exit", "thresholds": [0.5, 0.5]}, "an operating point or thresholds, not"),
        ({"thresholds": []}, "0 thresholds for 3 exits: expected 2, None to disable an exit"),
        ({"thresholds": [0.5] * 3}, "3 thresholds for 3 exits: expected 2"),
        ({"max_exit": 3}, "max_exit is 3, this bundle has exits 0 to 2"),
        ({"max_exit": -1}, "max_exit is -1, this bundle has exits 0 to 2"),
        ({"max_macs": 10}, "max_macs is 10, the first exit already takes"),
        ({"max_macs": float("inf")}, "max_macs is inf, expected a finite number"),
        ({"max_macs": float("nan")}, "max_macs is nan, expected a finite number"),
    ],
)
def test_wrong_limits(
    arguments: dict[str, Any], message: str, session: Session, images: NDArray[np.uint8]
) -> None:
    for some in (images[:2], images[:0]):
        with user_error(message):
            session.predict(some, **arguments)


# ---------------------------------------------------------------- deadlines


@pytest.fixture
def timed(bundle_copy: Path) -> Session:
    """A session with a profile of round numbers: 1 + 2 + 4 ms for one image, 4 + 8 + 16 ms for eight."""
    profile = Session(bundle_copy, threads=1).profile(rounds=1, batch_sizes=(1, 8))
    times = {8: [4.0, 8.0, 16.0], 1: [1.0, 2.0, 4.0]}
    profile.model_copy(update={"milliseconds": times}).write(bundle_copy / PROFILE)
    return Session(bundle_copy, threads=1)


@pytest.mark.parametrize(
    ("count", "deadline", "last"),
    [
        (1, 1, 0),
        (1, 2.99, 0),
        (1, 3, 1),
        (1, 6.99, 1),
        (1, 7, 2),
        (0, 3, 1),
        # The profiled batch that holds them all, not a share of its time.
        (2, 4, 0),
        (2, 12, 1),
        (7, 27.9, 1),
        (8, 28, 2),
        # More than were profiled: the largest one, scaled.
        (12, 6, 0),
        (12, 17.9, 0),
        (12, 18, 1),
        (16, 55.9, 1),
        (16, 56, 2),
        (16, float("inf"), 2),
    ],
)
def test_a_deadline_is_a_limit_on_exits(
    count: int, deadline: float, last: int, timed: Session, images: NDArray[np.uint8]
) -> None:
    with recorded() as runs:
        answer = timed.predict(images[:count], operating_point="no-exit", deadline_ms=deadline)
    assert answer.exits.tolist() == [last] * count
    assert runs == expected_runs(answer.exits, last)
    assert answer.capped == (last < 2)


def test_the_tightest_limit_counts(timed: Session, images: NDArray[np.uint8]) -> None:
    macs = [stage.macs for stage in timed.manifest.stages]
    for limits, last in (
        ({"deadline_ms": 3, "max_exit": 0}, 0),
        ({"deadline_ms": 1, "max_exit": 1}, 0),
        ({"deadline_ms": 7, "max_macs": macs[1]}, 1),
        ({"deadline_ms": 3, "max_macs": macs[2], "max_exit": 2}, 1),
    ):
        answer = timed.predict(images[:1], operating_point="no-exit", **limits)
        assert answer.exits.tolist() == [last]


@pytest.mark.parametrize(
    ("count", "deadline", "message"),
    [
        (1, 0.99, r"deadline_ms is 0.99, by .*profile.json the first exit takes 1 ms for a batch of 1: "),
        (0, 0.5, "deadline_ms is 0.5, by "),
        (5, 3.99, "the first exit takes 4 ms for a batch of 5: allow more time, or give fewer images"),
        (12, 5.9, "the first exit takes 6 ms for a batch of 12"),
        (1, -1, "deadline_ms is -1, "),
        (1, float("nan"), "deadline_ms is nan, "),
    ],
)
def test_a_deadline_that_no_exit_meets(
    count: int, deadline: float, message: str, timed: Session, images: NDArray[np.uint8]
) -> None:
    with user_error(message), recorded() as runs:
        timed.predict(images[:count], deadline_ms=deadline)
    assert runs == []


def test_a_deadline_needs_a_profile(bundle_copy: Path, images: NDArray[np.uint8]) -> None:
    session = Session(bundle_copy, threads=1)
    with user_error("no profile at .*profile.json: `erde bundle profile` writes one"):
        session.predict(images[:1], deadline_ms=100)
    with user_error("no profile at"):
        session.predict_stream([], deadline_ms=100)
    # Measured, it is there at once; measured again, the old one is forgotten.
    session.profile(rounds=1)
    assert not session.predict(images[:1], deadline_ms=1e6).capped
    measured = session.profile(rounds=1)
    assert session._read_profile() == measured
    assert session.predict(images[:1], deadline_ms=1e6).labels.shape == (1,)
    assert session._profile == measured


def test_macs_are_known_beside_a_profile_that_does_not_fit(timed: Session) -> None:
    path = timed.folder / PROFILE
    path.write_text(path.read_text().replace(bundle.stages_hash(timed.manifest), "0" * 64))
    cost = Session(timed.folder, threads=1).cost()
    assert cost.exit_macs == tuple(stage.macs for stage in timed.manifest.stages)
    assert cost.exit_milliseconds is None
    with user_error("profile.json"):
        Session(timed.folder, threads=1).cost(timed=True)


def test_a_profile_of_another_number_of_threads(timed: Session, images: NDArray[np.uint8]) -> None:
    other = Session(timed.folder, threads=2)
    with user_error(r"profile.json was measured with threads=1, this session has threads=2: open it"):
        other.predict(images[:1], deadline_ms=100)
    assert other.cost().exit_milliseconds == timed.cost().exit_milliseconds


# ---------------------------------------------------------------- compaction


def carrying(timed: Session, gather: float) -> Session:
    """A session that believes that taking one image over to the next stage costs ``gather`` milliseconds."""
    path = timed.folder / PROFILE
    value = json.loads(path.read_text())
    value["gather_milliseconds"] = [gather, gather]
    path.write_text(json.dumps(value))
    return Session(timed.folder, threads=1)


def test_stage_times_are_interpolated(timed: Session) -> None:
    profile = timed._read_profile()
    times = [profile.stage_milliseconds(1, count) for count in (1, 8, 3, 16)]
    assert times == pytest.approx([2, 8, 2 + 2 * 6 / 7, 16])


def test_images_are_carried_along_where_taking_them_out_costs_more(
    timed: Session, images: NDArray[np.uint8]
) -> None:
    some = images[:8]
    scores = scores_of(timed, some)
    # Three of the eight leave at exit 0, two more at exit 1.
    first = float(np.sort(scores[0])[4:6].mean())
    later = np.sort(scores[1][scores[0] <= first])
    levels = (first, float(later[2:4].mean()))
    exits = policy.decide(scores, levels)
    assert np.bincount(exits).tolist() == [3, 2, 3]
    # A stage for one image less saves 6/7 of a millisecond at exit 0: 3 of them against 5 times the gather.
    for gather, sizes in (
        (0.0, [8, 5, 3]),
        (0.514, [8, 5, 3]),
        (0.515, [8, 8, 3]),
        (3.0, [8, 8, 8]),
    ):
        session = carrying(timed, gather)
        with recorded() as runs:
            answer = session.predict(some, thresholds=levels)
        assert [rows for _, rows in runs] == sizes
        assert answer.exits.tolist() == exits.tolist()
        logits = session.all_logits(some)
        assert answer.labels.tolist() == logits[exits, np.arange(8)].argmax(axis=-1).tolist()
        # Work that was done counts, whoever asked for it.
        macs = np.array([stage.macs for stage in session.manifest.stages])
        reached = exits if sizes[1] == 5 else np.maximum(exits, 1 if sizes[2] == 3 else 2)
        assert answer.macs.tolist() == macs[reached].tolist()


def test_a_profile_that_is_none_changes_nothing(timed: Session, images: NDArray[np.uint8]) -> None:
    levels = [float(np.median(scores_of(timed, images[:8])[0])), None]
    carrying(timed, 3.0)
    path = timed.folder / PROFILE
    path.write_text(path.read_text()[:-20])
    with recorded() as runs:
        Session(timed.folder, threads=1).predict(images[:8], thresholds=levels)
    assert [rows for _, rows in runs] == [8, 4, 4]


# ---------------------------------------------------------------- what an answer says of itself


def test_capped_is_what_no_operating_point_decides(timed: Session, images: NDArray[np.uint8]) -> None:
    macs = [stage.macs for stage in timed.manifest.stages]
    levels = timed.manifest.point("risk-5").thresholds
    own: list[dict[str, Any]] = [
        {},
        *({"operating_point": point.name} for point in timed.manifest.operating_points),
        # Limits that leave every exit change nothing.
        {"max_exit": 2},
        {"max_macs": macs[2]},
        {"deadline_ms": 1e3},
        {"operating_point": "risk-10", "max_exit": 2, "max_macs": 1e12, "deadline_ms": 1e3},
    ]
    capped: list[dict[str, Any]] = [
        {"max_exit": 1},
        {"max_exit": 0, "operating_point": "budget-80"},
        {"max_macs": macs[2] - 1},
        {"deadline_ms": 17},  # 10 images: 35 ms for all exits
        {"thresholds": levels},  # even those of an operating point: given as numbers they have no certificate
        {"max_exit": 2, "max_macs": macs[0]},
    ]
    for count in (0, 1, 10):  # whichever images there are, and wherever they would have left
        for arguments in own:
            assert timed.predict(images[:count], **arguments).capped is False
        for arguments in capped:
            if count == 10 or "deadline_ms" not in arguments:
                assert timed.predict(images[:count], **arguments).capped is True


def test_int8_is_certified_on_the_cpu_of_onnx_runtime_only(
    tiny_bundle: Path, bundle_copy: Path, images: NDArray[np.uint8]
) -> None:
    cpu = "CPUExecutionProvider"
    others = [name for name in onnxruntime.get_available_providers() if name != cpu]
    if not others:
        pytest.skip("this ONNX Runtime has no provider but the CPU")
    bundle.seal(bundle_copy, bundle.read(bundle_copy).model_copy(update={"precision": "int8"}))
    for folder, providers, capped in (
        (bundle_copy, None, False),
        (bundle_copy, [(cpu, {})], False),
        (bundle_copy, [others[-1], cpu], True),
        (tiny_bundle, [others[-1], cpu], False),
    ):
        session = Session(folder, threads=1, providers=providers)
        assert session.predict(images[:2]).capped is capped


def test_milliseconds_are_those_of_each_stage(
    session: Session, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    run = StageRunner.run_bound

    def slow(self: StageRunner, index: int, x: NDArray[Any]) -> Any:
        nonlocal now
        now += (0.5, 0.25, 2.0)[index]
        return run(self, index, x)

    monkeypatch.setattr(StageRunner, "run_bound", slow)
    monkeypatch.setattr("erde.runtime.session.time.perf_counter", lambda: now)
    assert session.predict(images[:5], operating_point="no-exit").milliseconds == (500.0, 250.0, 2000.0)
    assert session.predict(images[:5], operating_point="no-exit", max_exit=1).milliseconds == (500.0, 250.0)
    assert session.predict(images[:5], thresholds=[-1.0, None]).milliseconds == (500.0,)
    assert session.predict(images[:0]).milliseconds == (500.0,)


# ---------------------------------------------------------------- streams


def joined(answers: list[Prediction], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(prediction, name) for prediction in answers])


@settings(max_examples=30, deadline=None)
@given(rows=batches, levels=st.tuples(thresholds, thresholds), batch_size=st.sampled_from([1, 2, 3, 7, 64]))
def test_a_stream_is_answered_in_order(
    session: Session,
    images: NDArray[np.uint8],
    rows: list[int],
    levels: tuple[float | None, float | None],
    batch_size: int,
) -> None:
    some = images[np.array(rows, dtype=int)]
    answers = list(session.predict_stream(iter(some), batch_size=batch_size, thresholds=levels))
    starts = range(0, len(some), batch_size)
    expected = [session.predict(some[start : start + batch_size], thresholds=levels) for start in starts]
    assert len(answers) == len(expected)
    for answer, other in zip(answers, expected, strict=True):
        for name in ("labels", "probabilities", "exits", "scores", "macs"):
            assert np.array_equal(getattr(answer, name), getattr(other, name))
        assert answer.capped


def test_a_stream_takes_what_predict_takes(timed: Session, images: NDArray[np.uint8]) -> None:
    assert list(timed.predict_stream([])) == []
    # An array of images is a stream of images.
    whole = list(timed.predict_stream(images[:70], operating_point="risk-10"))
    assert [len(prediction.labels) for prediction in whole] == [32, 32, 6]
    assert not any(prediction.capped for prediction in whole)
    exits = timed.predict(images[:70], operating_point="risk-10").exits
    assert joined(whole, "exits").tolist() == exits.tolist()
    macs = timed.manifest.stages[0].macs
    for limits, last in (({"max_exit": 1}, 1), ({"max_macs": macs}, 0), ({"deadline_ms": 12}, 1)):
        answers = list(
            timed.predict_stream(iter(images[:10]), batch_size=5, operating_point="no-exit", **limits)
        )
        assert joined(answers, "exits").tolist() == [last] * 10
        assert all(prediction.capped for prediction in answers)


def test_an_endless_stream_in_bounded_memory(session: Session, images: NDArray[np.uint8]) -> None:
    taken, alive = 0, []

    def endless() -> Iterator[NDArray[np.uint8]]:
        nonlocal taken
        for number in counting():
            image = images[number % 200].copy()
            alive.append(weakref.ref(image))
            taken += 1
            yield image

    most = 0
    answers = session.predict_stream(endless(), batch_size=7)
    assert taken == 0
    labels: list[int] = []
    for number, answer in enumerate(islice(answers, 60), start=1):
        assert taken == 7 * number
        labels += answer.labels.tolist()
        alive = [reference for reference in alive if reference() is not None]
        most = max(most, len(alive))
    # The answers do not keep their images, and neither does the stream but for the one at hand.
    assert most <= 2
    assert labels == np.resize(session.predict(images).labels, 420).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"operating_point": "fast"}, "no operating point 'fast'"),
        ({"thresholds": [0.5]}, "1 thresholds for 3 exits"),
        ({"max_exit": 3}, "max_exit is 3"),
        ({"max_macs": 1}, "max_macs is 1"),
        ({"deadline_ms": 1}, "the first exit takes 16 ms for a batch of 32"),
    ],
)
def test_a_stream_refuses_what_cannot_be_before_it_begins(
    arguments: dict[str, Any], message: str, timed: Session
) -> None:
    def images() -> Iterator[NDArray[np.uint8]]:
        raise AssertionError("an image was taken")
        yield

    with user_error(message):
        timed.predict_stream(images(), **arguments)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (np.zeros((8, 8), np.uint8), r"got uint8 of shape \(8, 8\)"),
        (np.zeros((1, 8, 8, 1), np.uint8), r"got uint8 of shape \(1, 8, 8, 1\)"),
        (np.zeros((8, 8, 1), np.float32), r"got float32 of shape \(8, 8, 1\)"),
        (None, "got object"),
    ],
)
def test_a_stream_says_which_image_is_wrong(
    wrong: Any, got: str, session: Session, images: NDArray[np.uint8]
) -> None:
    answers = session.predict_stream([*images[:5], wrong, *images[:5]], batch_size=2)
    assert len(list(islice(answers, 2))) == 2
    with user_error(rf"image 5 of the stream \(from 0\): expected uint8 of shape \(8, 8, 1\), {got}"):
        next(answers)


# ---------------------------------------------------------------- images


def test_a_profile_takes_images_as_the_network_does(session: Session) -> None:
    with user_error(
        r"expected uint8 images of shape \(N, 8, 8, 1\), got uint8 of shape \(2, 8, 8, 3\): decode"
    ):
        session.profile(images=np.zeros((2, 8, 8, 3), np.uint8))


def test_images_in_any_order_in_memory(session: Session, images: NDArray[np.uint8]) -> None:
    before = images.copy()
    turned = images[:10, ::-1, ::-1]
    expected = session.predict(turned.copy())
    assert np.array_equal(session.predict(turned).probabilities, expected.probabilities)
    assert not np.array_equal(session.predict(images[:10]).probabilities, expected.probabilities)
    read_only = before.copy()
    read_only.setflags(write=False)
    session.predict(read_only)
    assert np.array_equal(images, before)


def test_all_logits_in_parts(session: Session, images: NDArray[np.uint8]) -> None:
    whole = session._stages.all_logits(images, batch_size=200)
    assert whole.shape == (3, 200, 10)
    np.testing.assert_allclose(session._stages.all_logits(images, batch_size=7), whole, rtol=1e-4, atol=1e-4)
    assert session.all_logits(images[:0]).shape == (3, 0, 10)
    with user_error(r"expected images of shape \(N, 8, 8, 1\), got \(5, 4, 8, 1\)"):
        session.all_logits(images[:5, :4])


def test_classes(session: Session, digits: DataSplits) -> None:
    assert tuple(session.classes) == digits.classes
    right = session.predict(np.asarray(digits.test.images[:])).labels == digits.test.labels
    assert right.mean() > 0.85


# ---------------------------------------------------------------- threads and imports


def test_several_threads_share_a_session(timed: Session, images: NDArray[np.uint8]) -> None:
    settings: list[dict[str, Any]] = [
        {"thresholds": [0.9, 0.9]},
        *({"operating_point": point.name} for point in timed.manifest.operating_points),
        {"operating_point": "no-exit", "max_exit": 1},
        {"operating_point": "risk-10", "deadline_ms": 20},
    ]
    calls = [
        (images[start : start + (0, 1, 2, 3, 7, 8, 12)[start % 7]], settings[(start // 5) % len(settings)])
        for start in range(0, 190, 5)
    ]

    def answer(call: tuple[NDArray[np.uint8], dict[str, Any]]) -> Prediction:
        return timed.predict(call[0], **call[1])

    serial = [answer(call) for call in calls]
    assert len({exit for prediction in serial for exit in prediction.exits.tolist()}) == 3
    assert {prediction.capped for prediction in serial} == {False, True}
    # A session of its own, so that threads also meet where it reads the profile first.
    timed._profile = None
    with ThreadPoolExecutor(6) as pool:
        for predictions in pool.map(lambda _: [answer(call) for call in calls], range(12)):
            for prediction, expected in zip(predictions, serial, strict=True):
                for name in ("labels", "probabilities", "exits", "scores", "macs"):
                    assert np.array_equal(getattr(prediction, name), getattr(expected, name))
                assert prediction.capped == expected.capped


def test_the_runtime_loads_nothing_heavy(tiny_bundle: Path) -> None:
    code = (
        "import json, sys\n"
        "from erde.runtime import Session\n"
        "import erde.runtime.predict_files, numpy\n"
        "session = Session(sys.argv[1], threads=1)\n"
        "session.predict(numpy.zeros((2, *session.manifest.input_shape), numpy.uint8))\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle)]
    loaded = set(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert {"erde", "numpy", "onnxruntime", "pydantic"} <= loaded
    heavy = {"torch", "torchvision", "timm", "scipy", "sklearn", "plotly", "jinja2", "matplotlib", "pandas"}
    heavy |= {"datasets", "pyarrow", "onnx", "onnxscript", "safetensors", "typer", "yaml", "openvino"}
    assert not loaded & heavy


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_a_number_of_threads_that_no_machine_has(threads: int, tiny_bundle: Path) -> None:
    with user_error(f"threads is {threads}, expected 1 to 1024"):
        Session(tiny_bundle, threads=threads)
