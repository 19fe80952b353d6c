"""Chains: stages that take the image again, for the images that no earlier network was sure of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erde.bundle.profile import PROFILE
from erde.bundle.sealing import read
from erde.policy import rule as policy
from erde.policy.rule import ExitRule
from erde.runtime.engines import ENGINES, open_stages
from erde.runtime.session import Session
from tests.helpers.checks import user_error
from tests.helpers.hand_made_bundle import pixel_bundle, pixel_logits, some_harm

EXITS = 4
RULES = {
    "margin": ExitRule("margin"),
    "harm": ExitRule("harm", harm=some_harm(EXITS)),
    "ensemble": ExitRule("entropy", ensemble="arithmetic"),
}
CHAINS = {"two": (0, 2), "three": (0, 1, 3), "every": (0, 1, 2, 3)}


@pytest.fixture(scope="module", params=[(chain, rule) for chain in CHAINS for rule in RULES])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    chain, rule = request.param
    folder = tmp_path_factory.mktemp("chains") / f"{chain}-{rule}"
    return Session(
        pixel_bundle(folder, EXITS, RULES[rule], networks=CHAINS[chain], calibrate=True), threads=1
    )


def draw(count: int, seed: int) -> NDArray[np.uint8]:
    images = np.random.default_rng(seed).integers(0, 256, (count, EXITS, 5, 1), dtype=np.uint8)
    images[:, :, -1] = 0
    return images


level = st.one_of(st.none(), st.floats(0, 1))


@settings(max_examples=40, deadline=None)
@given(
    levels=st.tuples(level, level, level),
    count=st.integers(0, 20),
    seed=st.integers(0, 99),
    max_exit=st.sampled_from([None, 0, 1, 2, 3]),
)
def test_each_image_runs_to_its_exit_and_no_further(
    session: Session, levels: tuple[float | None, ...], count: int, seed: int, max_exit: int | None
) -> None:
    images = draw(count, seed)
    answers, scores = session.rule.apply(pixel_logits(images))
    last = EXITS - 1 if max_exit is None else max_exit
    exits = np.minimum(policy.decide(scores, levels), last)
    alone = last == EXITS - 1 and levels == (None, None, None)
    networks = session.manifest.networks()
    # What an image has behind its exit would fail the stage that reads it.
    for row, exit_index in enumerate(exits):
        images[row, exit_index + 1 :, -1] = 255
        if alone:
            images[row, : networks[-1], -1] = 255
    answer = session.predict(images, thresholds=levels, max_exit=max_exit)
    assert answer.exits.tolist() == exits.tolist()
    assert np.array_equal(answer.logits, answers[exits, np.arange(count)])
    macs = 100 * (exits + 1) - (100 * networks[-1] if alone else 0)
    assert answer.macs.tolist() == macs.tolist()
    if last == EXITS - 1:
        assert answer.macs.tolist() == session.cost().macs_at(levels)[exits].tolist()
    if count:
        assert np.array_equal(answer.first_scores, scores[-1 if alone else 0])
        assert len(answer.milliseconds) == exits.max() + 1


def test_without_early_exits_the_last_network_runs_alone(tmp_path: Path) -> None:
    session = Session(pixel_bundle(tmp_path / "chain", EXITS, networks=(0, 2), calibrate=True))
    images = draw(7, 1)
    images[:, :2, -1] = 255
    answer = session.predict(images, operating_point="no-exit")
    assert answer.macs.tolist() == [200] * 7
    assert session.manifest.no_exit_macs == 200
    assert answer.milliseconds[:2] == (0, 0)
    # A drift watch takes such answers too, and ignores them where another point is the default.
    monitor = session.monitor()
    monitor.add(answer)
    assert monitor.report().ignored == 7
    # Where a limit keeps the last network out, the first one answers.
    with user_error("stage 0 fails on a batch of 7"):
        session.predict(images, operating_point="no-exit", max_exit=1)


def test_limits_count_what_runs_where_the_last_network_runs_alone(tmp_path: Path) -> None:
    folder = pixel_bundle(tmp_path / "chain", EXITS, networks=(0, 2))
    profile = Session(folder, threads=1).profile(batch_sizes=(1,), rounds=1)
    profile.model_copy(update={"milliseconds": {1: [1.0, 2.0, 3.0, 4.0]}}).write(folder / PROFILE)
    session = Session(folder, threads=1)
    # Its stages cost 200 MACs and 7 ms; to the exits before the final one all stages run: 300 and 6 ms at the third.
    for limits, last, macs in (
        ({"max_macs": 250}, 3, 200),
        ({"max_macs": 200, "deadline_ms": 7}, 3, 200),
        ({"deadline_ms": 8}, 3, 200),
        ({"deadline_ms": 6.5}, 2, 300),
        ({"max_macs": 199}, 0, 100),
        ({"max_macs": 250, "max_exit": 2}, 1, 200),
        ({"max_macs": 250, "deadline_ms": 6.5}, 1, 200),
    ):
        answer = session.predict(draw(1, 1), operating_point="no-exit", **limits)
        assert (answer.exits.tolist(), answer.macs.tolist()) == ([last], [macs])
        assert answer.capped is (last < 3)
    # An exit that is enabled needs the first network.
    for limits in ({"max_macs": 250}, {"deadline_ms": 5}):
        assert session.plan(1, operating_point="half", **limits)[1] == 1


def test_all_logits_and_streams_and_profiles(tmp_path: Path) -> None:
    session = Session(pixel_bundle(tmp_path / "chain", EXITS, networks=(0, 2)), threads=1)
    images = draw(50, 2)
    assert np.array_equal(session.all_logits(images), pixel_logits(images))
    whole = session.predict(images)
    parts = list(session.predict_stream(images, batch_size=8))
    assert np.concatenate([part.exits for part in parts]).tolist() == whole.exits.tolist()
    # With a profile images may be carried along within a network, never into the next one.
    session.profile(rounds=2, batch_sizes=(1, 4))
    timed = session.predict(images)
    assert timed.exits.tolist() == whole.exits.tolist()
    assert np.array_equal(timed.logits, whole.logits)
    assert (timed.macs <= np.where(timed.exits < 2, 200, 400)).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_that_takes_single_images(engine: str, tmp_path: Path) -> None:
    import onnx

    pytest.importorskip(engine)

    folder = pixel_bundle(tmp_path / "chain", 2, networks=(0, 1))
    images = draw(9, 3)[:, :2]
    runner = Session(folder)._stages
    path = tmp_path / "single.onnx"
    model = onnx.load(str(folder / "stage_1.onnx"))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, str(path))
    single = open_stages(engine, [folder / "stage_0.onnx", path], takes_image=[True, True])
    assert np.array_equal(single.all_logits(images), runner.all_logits(images))
    for count in (0, 1, 9):
        assert np.array_equal(single.run_bound(1, images[:count])[1], runner.run(1, images[:count])[1])


def test_bundles_of_version_2_are_read_and_written_as_version_3(tmp_path: Path) -> None:
    import json

    from erde.bundle import canonical_hash, seal

    folder = pixel_bundle(tmp_path / "bundle")
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    value["format_version"] = 2
    for stage in value["stages"]:
        del stage["input"], stage["network"]
    for point in value["operating_points"]:
        del point["tune_agreement"]
    value["seal"] = canonical_hash(value)
    path.write_text(json.dumps(value))
    manifest = read(folder)
    assert manifest.takes_image() == [True, False, False]
    assert Session(folder).cost().networks == (0,)
    seal(folder, manifest)
    assert json.loads(path.read_text())["format_version"] == 3
    assert read(folder).networks() == (0,)


def test_a_graph_that_tells_no_shape_of_its_input(tmp_path: Path) -> None:
    import onnx

    from erde.bundle import file_hash, seal

    folder = pixel_bundle(tmp_path / "bundle")
    path = folder / "stage_0.onnx"
    model = onnx.load(str(path))
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    onnx.save(model, str(path))
    whole = Session(pixel_bundle(tmp_path / "other"))
    files = {**whole.manifest.files, path.name: file_hash(path)}
    seal(folder, whole.manifest.model_copy(update={"files": files}))
    images = draw(5, 4)[:, :3]
    assert np.array_equal(Session(folder).all_logits(images), whole.all_logits(images))
