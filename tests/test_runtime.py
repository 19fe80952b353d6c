from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erde import policy
from erde.data import DataSplits
from erde.runtime import Prediction, Session, StageRunner
from tests.conftest import user_error

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


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, 199), max_size=33),
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
    answer = session.predict(some, thresholds=levels, max_exit=max_exit)
    exits = policy.decide(scores, levels)
    check_answer(session, some, answer, np.minimum(exits, 2 if max_exit is None else max_exit))


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
    one = images[:1]
    score = float(session.predict(one, max_exit=0).scores[0])
    assert session.predict(one, thresholds=[score, None]).exits.tolist() == [2]
    below = np.nextafter(score, 0)
    assert session.predict(one, thresholds=[below, None]).exits.tolist() == [0]


# ---------------------------------------------------------------- what runs


@pytest.fixture
def runs(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """(stage, size of batch) of every call of a stage."""
    found: list[tuple[int, int]] = []
    run = StageRunner.run

    def record(self: StageRunner, index: int, x: NDArray[Any]) -> Any:
        found.append((index, len(x)))
        return run(self, index, x)

    monkeypatch.setattr(StageRunner, "run", record)
    return found


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


def test_a_stage_that_is_not_needed_may_be_broken(tiny_bundle: Path, images: NDArray[np.uint8]) -> None:
    class Broken:
        def run(self, *_: Any) -> None:
            raise AssertionError("ran")

    session = Session(tiny_bundle, threads=1)
    expected = session.predict(images, thresholds=[-1.0, None])
    sessions = session._stages._sessions
    sessions[1] = sessions[2] = Broken()
    answer = session.predict(images, thresholds=[-1.0, None])
    assert np.array_equal(answer.probabilities, expected.probabilities)
    assert (session.predict(images, max_exit=0).exits == 0).all()
    with pytest.raises(AssertionError, match="ran"):
        session.predict(images, thresholds=[None, None])


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
    ("arguments", "what"),
    [
        ({"operating_point": "fast"}, "no operating point 'fast' in this bundle; it has: no-exit, risk-5"),
        ({"operating_point": "no-exit", "thresholds": [0.5, 0.5]}, "an operating point or thresholds, not"),
        ({"thresholds": []}, "0 thresholds for 3 exits: expected 2, None to disable an exit"),
        ({"thresholds": [0.5] * 3}, "3 thresholds for 3 exits: expected 2"),
        ({"max_exit": 3}, "max_exit is 3, this bundle has exits 0 to 2"),
        ({"max_exit": -1}, "max_exit is -1, this bundle has exits 0 to 2"),
        ({"max_macs": 10}, "max_macs is 10, the first exit already takes"),
    ],
)
def test_wrong_limits(
    arguments: dict[str, Any], what: str, session: Session, images: NDArray[np.uint8]
) -> None:
    for some in (images[:2], images[:0]):
        with user_error(what):
            session.predict(some, **arguments)


# ---------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (np.zeros((2, 8, 8, 1), np.float32), r"got float32 of shape \(2, 8, 8, 1\)"),
        (np.zeros((2, 8, 8, 1), np.int64), "got int64"),
        (np.zeros((8, 8, 1), np.uint8), r"got uint8 of shape \(8, 8, 1\)"),
        (np.zeros((2, 8, 8), np.uint8), r"got uint8 of shape \(2, 8, 8\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"got uint8 of shape \(2, 8, 8, 3\)"),
        (np.zeros((2, 1, 8, 8), np.uint8), r"got uint8 of shape \(2, 1, 8, 8\)"),
        (np.zeros((0, 4, 8, 1), np.uint8), r"got uint8 of shape \(0, 4, 8, 1\)"),
        ([], r"got float64 of shape \(0,\)"),
    ],
)
def test_wrong_images(wrong: Any, got: str, session: Session) -> None:
    with user_error(rf"expected uint8 images of shape \(N, 8, 8, 1\), {got}"):
        session.predict(wrong)


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


def test_several_threads_share_a_session(session: Session, images: NDArray[np.uint8]) -> None:
    parts = [images[start : start + 1 + start % 13] for start in range(0, 190, 5)]
    serial = [session.predict(part, thresholds=[0.9, 0.9]) for part in parts]
    assert len({exit for one in serial for exit in one.exits.tolist()}) == 3
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            answers = pool.map(lambda part: session.predict(part, thresholds=[0.9, 0.9]), parts)
            for answer, expected in zip(answers, serial, strict=True):
                assert np.array_equal(answer.probabilities, expected.probabilities)
                assert np.array_equal(answer.exits, expected.exits)
                assert np.array_equal(answer.scores, expected.scores)


def test_the_runtime_loads_nothing_heavy(tiny_bundle: Path) -> None:
    code = (
        "import json, sys\n"
        "from erde.runtime import Session\n"
        "import erde.prediction, numpy\n"
        "session = Session(sys.argv[1], threads=1)\n"
        "session.predict(numpy.zeros((2, *session.manifest.input_shape), numpy.uint8))\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle)]
    loaded = set(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert {"erde", "numpy", "onnxruntime", "pydantic"} <= loaded
    heavy = {"torch", "torchvision", "timm", "scipy", "sklearn", "plotly", "matplotlib", "pandas"}
    heavy |= {"datasets", "pyarrow", "onnx", "onnxscript", "safetensors", "typer", "yaml"}
    assert not loaded & heavy
