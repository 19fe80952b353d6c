"""Images that leave at any exits, in any order: answers stay in place, and later stages do not see who is done."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erde.bundle.profile import PROFILE
from erde.policy.rule import ExitRule, decide, leaves, softmax, take_exit
from erde.runtime.prediction import Prediction
from erde.runtime.session import Session
from tests.helpers.hand_made_bundle import CLASSES, convolution_bundle, pixel_bundle, pixel_logits, some_harm

Images = NDArray[np.uint8]
EXITS = 4
# Names of the rules that a bundle may decide by, and how.
RULES: dict[str, ExitRule] = {
    "margin": ExitRule("margin"),
    "entropy": ExitRule("entropy", 0.5),
    "energy": ExitRule("energy", 2.0),
    "arithmetic": ExitRule("max_probability", ensemble="arithmetic"),
    "geometric": ExitRule("margin", ensemble="geometric"),
    "patience": ExitRule("patience"),
    "patience with an ensemble": ExitRule("patience", ensemble="arithmetic"),
    "harm": ExitRule("harm", harm=some_harm(EXITS)),
    "harm with an ensemble": ExitRule("harm", ensemble="geometric", harm=some_harm(EXITS)),
}
# Whether it pays to take images out of a batch, by what the profile says.
TIMES: dict[str, dict[int, list[float]] | None] = {
    "no profile": None,
    "as measured": {},
    "carrying is free": {1: [1.0] * EXITS, 64: [1.0] * EXITS},
    "carrying is dear": {1: [1.0] * EXITS, 64: [1e6] * EXITS},
    "some of each": {1: [1.0] * EXITS, 8: [8.0, 1.0, 8.0, 1.0], 64: [9.0, 90.0, 9.0, 90.0]},
}
GATHER = {"carrying is free": 10.0, "carrying is dear": 1e-9, "some of each": 0.1}


def with_times(folder: Path, name: str) -> Session:
    """A session whose profile says ``TIMES[name]``."""
    times = TIMES[name]
    (folder / PROFILE).unlink(missing_ok=True)
    if times is not None:
        profile = Session(folder, threads=1).profile(rounds=2, batch_sizes=(1, 4, 16))
        if times:
            fixed = {"milliseconds": times, "gather_milliseconds": [GATHER[name]] * (EXITS - 1)}
            profile.model_copy(update=fixed).write(folder / PROFILE)
    return Session(folder, threads=1)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Session]:
    """A session for every rule with every profile."""
    folders = {}
    for rule, times in itertools.product(RULES, TIMES):
        folder = pixel_bundle(tmp_path_factory.mktemp("pixels") / "bundle", EXITS, RULES[rule])
        folders[rule, times] = with_times(folder, times)
    return folders


def empty(count: int, exits: int = EXITS) -> Images:
    """Images whose exits are all as unsure as can be, and whose stages all run."""
    return np.zeros((count, exits, CLASSES + 1, 1), dtype=np.uint8)


def leaving_at(pattern: list[int], exits: int = EXITS, labels: list[int] | None = None) -> Images:
    """Images that leave exactly where ``pattern`` says, by a margin above 0.5."""
    images = empty(len(pattern), exits)
    for row, exit in enumerate(pattern):
        images[row, exit, labels[row] if labels else row % CLASSES, 0] = 255
    return images


@st.composite
def batches(draw: st.DrawFn) -> Images:
    """None, one or more images: with exits as drawn, of few grey levels (so that scores tie), or of noise."""
    count = draw(st.one_of(st.sampled_from([0, 1, 3, 17, 33]), st.integers(0, 20)))
    how = draw(st.sampled_from(["pattern", "levels", "noise"]))
    if how == "pattern":
        exits = st.integers(0, EXITS - 1)
        return leaving_at(draw(st.lists(exits, min_size=count, max_size=count)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    images = empty(count)
    levels = 256 if how == "noise" else 4
    images[:, :, :-1] = generator.integers(0, levels, images[:, :, :-1].shape) * (255 // (levels - 1))
    return images


def same(first: Prediction, other: Prediction) -> None:
    for name in ("labels", "exits"):
        assert getattr(first, name).tolist() == getattr(other, name).tolist()
    for name in ("probabilities", "scores", "first_scores"):
        np.testing.assert_allclose(getattr(first, name), getattr(other, name), rtol=1e-9, atol=1e-12)
    assert (first.capped, first.operating_point) == (other.capped, other.operating_point)


def rows(answer: Prediction, row: int) -> list[Any]:
    names = ("labels", "exits", "probabilities", "scores", "first_scores")
    return [getattr(answer, name)[row] for name in names]


def check(session: Session, images: Images, arguments: dict[str, Any]) -> Prediction:
    """The answers to ``images`` are those of the policy, worked out from the pixels, and of each image alone."""
    manifest, rule = session.manifest, session.rule
    answer = session.predict(images, **arguments)
    levels = arguments.get("thresholds") or manifest.point(arguments.get("operating_point")).thresholds
    last = arguments.get("max_exit", EXITS - 1)
    answers, scores = rule.apply(pixel_logits(images))
    expected = np.minimum(decide(scores, levels), last)
    assert answer.exits.tolist() == expected.tolist()
    given = take_exit(answers, expected)
    assert answer.labels.tolist() == given.argmax(axis=-1).tolist()
    temperatures = np.asarray(manifest.temperatures)[expected]
    tempered = softmax(given / temperatures[:, None])
    np.testing.assert_allclose(answer.probabilities, tempered, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(answer.scores, take_exit(scores, expected), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(answer.first_scores, scores[0], rtol=1e-9, atol=1e-12)
    # Up to the exit that answered; further for those that were carried along, never beyond the last stage that ran.
    macs = np.asarray([stage.macs for stage in manifest.stages])
    furthest = expected.max(initial=0)
    assert ((answer.macs >= macs[expected]) & (answer.macs <= macs[furthest])).all()
    assert np.isin(answer.macs, macs).all()
    if not (session.folder / PROFILE).exists():
        assert answer.macs.tolist() == macs[expected].tolist()
    assert len(answer.milliseconds) == furthest + 1
    for row in range(min(len(images), 5)):
        alone = session.predict(images[row : row + 1], **arguments)
        assert alone.exits.tolist() == [expected[row]]
        assert alone.macs.tolist() == [macs[expected[row]]]
        for own, other in zip(rows(alone, 0), rows(answer, row), strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-9, atol=1e-12)
    return answer


# ---------------------------------------------------------------- any mixture of exits


def test_logits_are_pixels(sessions: dict[tuple[str, str], Session]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, EXITS, CLASSES + 1, 1), dtype=np.uint8)
    images[:, :, -1] = 0
    for session in sessions.values():
        assert np.array_equal(session.all_logits(images), pixel_logits(images))


levels = st.one_of(st.none(), st.sampled_from([-1.0, 0.3, 0.5, 0.9, 1.5, 2.5, 5.0]), st.floats(0, 1))


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=12, deadline=None)
@given(
    images=batches(),
    thresholds=st.one_of(st.none(), st.lists(levels, min_size=EXITS - 1, max_size=EXITS - 1)),
    point=st.sampled_from([None, "half", "low", "last-but-one", "no-exit"]),
    max_exit=st.sampled_from([None, None, 0, 1, 2, 3]),
)
def test_answers_are_those_of_the_policy(
    sessions: dict[tuple[str, str], Session],
    rule: str,
    times: str,
    images: Images,
    thresholds: list[float | None] | None,
    point: str | None,
    max_exit: int | None,
) -> None:
    session = sessions[rule, times]
    arguments: dict[str, Any] = {} if max_exit is None else {"max_exit": max_exit}
    arguments |= {"operating_point": point} if thresholds is None else {"thresholds": thresholds}
    scores = session.rule.apply(pixel_logits(images))[1][:-1]
    chosen = thresholds or session.manifest.point(point).thresholds
    for values, level in zip(scores, chosen, strict=True):
        # Scores of a batch and of an image alone may differ in the last bits.
        assume(level is None or not (np.abs(values - level) < 1e-9).any())
    check(session, images, arguments)


@pytest.mark.parametrize("times", TIMES)
def test_every_pattern_of_leaving(sessions: dict[tuple[str, str], Session], times: str) -> None:
    # All of 4^3 patterns of three images, each with its neighbours' labels told apart.
    session = sessions["margin", times]
    for pattern in itertools.product(range(EXITS), repeat=3):
        answer = check(session, leaving_at(list(pattern)), {})
        assert answer.exits.tolist() == list(pattern)
        assert answer.labels.tolist() == [0, 1, 2]


def test_the_profiles_make_a_difference(sessions: dict[tuple[str, str], Session]) -> None:
    # Otherwise nothing was carried along above, or nothing taken out.
    images = leaving_at([0, 1, 3, 0, 2])
    macs = {times: sessions["margin", times].predict(images).macs.tolist() for times in TIMES}
    assert macs["no profile"] == macs["carrying is dear"] == [100, 200, 400, 100, 300]
    assert macs["carrying is free"] == [400] * 5
    assert macs["some of each"] not in (macs["no profile"], macs["carrying is free"])


@pytest.mark.parametrize("times", TIMES)
def test_a_stream_and_a_monitor_take_any_mixture(tmp_path: Path, times: str) -> None:
    folder = pixel_bundle(tmp_path / "bundle", EXITS, calibrate=True)
    session = with_times(folder, times)
    pattern = [0, 3, 1, 0, 2, 2, 3, 0, 1, 1, 0]
    images = leaving_at(pattern)
    monitor = session.monitor()
    answered = []
    for answer in session.predict_stream(iter(images), batch_size=3):
        monitor.add(answer)
        answered += list(zip(answer.exits.tolist(), answer.labels.tolist(), strict=True))
    assert answered == [(exit, row % CLASSES) for row, exit in enumerate(pattern)]
    report = monitor.report()
    assert (report.images, report.ignored) == (11, 0)
    assert report.exit_rates == tuple((np.bincount(pattern) / 11).tolist())


# ---------------------------------------------------------------- stages that must not run


def armed(images: Images, stages: list[list[int]]) -> Images:
    """``images`` on which the stages named for each row fail, if they run."""
    images = images.copy()
    for row, some in enumerate(stages):
        for stage in some:
            images[row, stage, -1, 0] = 1
    return images


def test_an_armed_image_is_an_error_where_its_stage_runs(
    sessions: dict[tuple[str, str], Session], capfd: pytest.CaptureFixture[str]
) -> None:
    session = sessions["margin", "no profile"]
    images = leaving_at([3, 3])
    for stage in range(EXITS):
        with pytest.raises(Exception, match="out of data bounds"):
            session.predict(armed(images, [[], [stage]]))
    capfd.readouterr()  # ONNX Runtime says so too


@settings(max_examples=100, deadline=None)
@given(pattern=st.lists(st.integers(0, EXITS - 1), min_size=0, max_size=12))
def test_no_stage_runs_on_an_image_that_left(
    sessions: dict[tuple[str, str], Session], pattern: list[int]
) -> None:
    images = armed(leaving_at(pattern), [list(range(exit + 1, EXITS)) for exit in pattern])
    for times in ("no profile", "carrying is dear"):
        answer = sessions["margin", times].predict(images)
        assert answer.exits.tolist() == pattern
        assert len(answer.milliseconds) == max(pattern, default=0) + 1
        assert answer.macs.tolist() == [100 * (exit + 1) for exit in pattern]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("rule", RULES)
def test_no_stage_runs_when_all_have_left(
    sessions: dict[tuple[str, str], Session], rule: str, times: str
) -> None:
    session = sessions[rule, times]
    for last in range(EXITS):
        after = list(range(last + 1, EXITS))
        images = armed(leaving_at([0, last, 0, last, last]), [after] * 5)
        # By a limit, at any profile, whatever the thresholds ...
        for point in (None, "no-exit", "low"):
            answer = session.predict(images, max_exit=last, operating_point=point)
            assert len(answer.milliseconds) == answer.exits.max() + 1 <= last + 1
        # ... and by thresholds that let everything go there.
        if last < EXITS - 1:
            chosen: list[float | None] = [None] * (EXITS - 1)
            chosen[last] = -100.0
            answer = session.predict(images, thresholds=chosen)
            assert answer.exits.tolist() == [last] * 5
            assert len(answer.milliseconds) == last + 1


def test_a_batch_of_none_runs_the_first_stage_alone(sessions: dict[tuple[str, str], Session]) -> None:
    for session in sessions.values():
        answer = session.predict(empty(0))
        assert len(answer.milliseconds) == 1
        assert answer.probabilities.shape == (0, CLASSES)


# ---------------------------------------------------------------- threads

Call = tuple[Images, dict[str, Any]]


def hammer(session: Session, calls: list[Call], seconds: float, threads: int = 8) -> int:
    """All threads ask the same session, each in an order of its own; the number of calls. Fails as ``same`` does."""
    expected = [session.predict(images, **arguments) for images, arguments in calls]
    together = threading.Barrier(threads)

    def predicted(number: int) -> int:
        generator = np.random.default_rng(number)
        done = 0
        together.wait()
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            for index in generator.permutation(len(calls)):
                images, arguments = calls[index]
                same(session.predict(images, **arguments), expected[index])
                done += 1
        return done

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(predicted, range(threads)))


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("times", ["no profile", "some of each"])
@pytest.mark.parametrize("rule", ["margin", "harm with an ensemble"])
def test_threads_do_not_meet_over_pixels(
    sessions: dict[tuple[str, str], Session], rule: str, times: str
) -> None:
    session = sessions[rule, times]
    generator = np.random.default_rng(3)
    calls: list[Call] = []
    for size in (0, 1, 1, 2, 3, 7, 8, 8, 16, 33, 33):
        images = leaving_at(generator.integers(0, EXITS, size).tolist())
        images[:, :, :-1] |= generator.integers(0, 8, images[:, :, :-1].shape, dtype=np.uint8)
        points: list[dict[str, Any]] = [
            {},
            {"operating_point": "no-exit"},
            {"max_exit": 1},
            {"operating_point": "low"},
        ]
        calls += [(images, point) for point in points]
    assert hammer(session, calls, 1.0) > len(calls)


@pytest.mark.usefixtures("hasty")
def test_threads_do_not_meet_in_a_network(tmp_path: Path) -> None:
    session = Session(convolution_bundle(tmp_path / "bundle"), threads=1)
    generator = np.random.default_rng(4)
    calls: list[Call] = []
    for size in (1, 2, 5, 8, 8, 64, 64):
        images = generator.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8)
        calls += [(images, {"operating_point": name}) for name in ("early", "other", "no-exit")]
    exits = np.concatenate([session.predict(images, **point).exits for images, point in calls])
    assert set(exits.tolist()) == {0, 1, 2}
    assert hammer(session, calls, 2.0) > len(calls)


def test_leaving_is_what_the_policy_says(sessions: dict[tuple[str, str], Session]) -> None:
    # The pattern of the images above rests on this: sure at one exit, unsure before.
    scores = sessions["margin", "no profile"].rule.apply(pixel_logits(leaving_at([2, 0])))[1]
    assert leaves(scores[2], 0.5).tolist() == [True, False]
    assert leaves(scores[0], 0.5).tolist() == [False, True]
