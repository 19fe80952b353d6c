from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from erde.bundle.sealing import read
from erde.data.load import DataSplits
from erde.runtime import stages
from erde.runtime.stages import StageRunner
from tests.helpers.checks import user_error


@pytest.fixture(scope="module")
def images(digits: DataSplits) -> NDArray[np.uint8]:
    return np.asarray(digits.test.images[:])


@pytest.fixture(scope="module")
def paths(tiny_bundle: Path) -> list[Path]:
    return [tiny_bundle / stage.file for stage in read(tiny_bundle).stages]


@pytest.fixture
def runner(paths: list[Path]) -> StageRunner:
    return StageRunner(paths, threads=1)


def through(runner: StageRunner, images: NDArray[np.uint8], bound: bool) -> list[NDArray[Any]]:
    """Copies of every stage's feature map and logits."""
    x: NDArray[np.generic] | None = images
    outputs: list[NDArray[Any]] = []
    for index in range(len(runner)):
        assert x is not None
        x, logits = (runner.run_bound if bound else runner.run)(index, x)
        outputs += [logits.copy()] if x is None else [x.copy(), logits.copy()]
    return outputs


def test_bound_and_plain_are_the_same_to_the_bit(runner: StageRunner, images: NDArray[np.uint8]) -> None:
    # Sizes go up and down: buffers grow, and are used in part.
    for rows in (1, 5, 3, 0, 1, 7, 200, 2):
        some = images[:rows]
        for bound, other in zip(through(runner, some, True), through(runner, some, False), strict=True):
            assert bound.shape == other.shape
            assert bound.tobytes() == other.tobytes()


def test_other_images_of_the_same_size_are_seen(runner: StageRunner, images: NDArray[np.uint8]) -> None:
    batch = images[:4].copy()
    first = through(runner, batch, True)[-1]
    batch[:] = images[4:8]  # at the same address
    second = through(runner, batch, True)[-1]
    assert not np.array_equal(first, second)
    assert np.array_equal(second, through(runner, images[4:8].copy(), True)[-1])


def test_buffers_are_used_again(runner: StageRunner, images: NDArray[np.uint8]) -> None:
    features, logits = runner.run_bound(0, images[:4])
    again, more = runner.run_bound(0, images[4:8])
    assert features is not None
    assert again is not None
    assert np.shares_memory(features, again)
    assert np.shares_memory(logits, more)


def test_a_batch_too_large_for_buffers(
    runner: StageRunner, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = runner.run_bound(0, images[:4])
    monkeypatch.setattr(stages, "KEPT_BYTES", 10)
    features, _ = runner.run_bound(0, images[:4])
    assert kept is not None
    assert features is not None
    assert not np.shares_memory(features, kept)
    assert np.array_equal(runner.gather(1, features, np.array([2, 0])), features[[2, 0]])


def test_gathered_rows_are_side_by_side(runner: StageRunner, images: NDArray[np.uint8]) -> None:
    features, _ = runner.run_bound(0, images[:6])
    assert features is not None
    for keep in ([0, 3, 5], [4], [0, 1, 2, 3, 4, 5], [1, 1]):
        taken = runner.gather(1, features, np.array(keep))
        assert taken.flags.c_contiguous
        assert np.array_equal(taken, features[keep])
        assert not np.shares_memory(taken, features)


def test_threads_do_not_share_buffers(runner: StageRunner, images: NDArray[np.uint8]) -> None:
    _, logits = runner.run_bound(0, images[:4])
    before = logits.copy()
    other: list[NDArray[np.float32]] = []

    def elsewhere() -> None:
        other.append(runner.run_bound(0, images[4:8])[1])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not np.shares_memory(other[0], logits)
    assert np.array_equal(logits, before)


def test_without_spinning_the_answers_are_the_same(paths: list[Path], images: NDArray[np.uint8]) -> None:
    quiet = StageRunner(paths, threads=2, spinning=False)
    lively = StageRunner(paths, threads=2)
    assert np.array_equal(quiet.all_logits(images), lively.all_logits(images))
    key = "session.intra_op.allow_spinning"
    assert quiet._sessions[0].get_session_options().get_session_config_entry(key) == "0"
    with pytest.raises(RuntimeError):  # never said
        lively._sessions[0].get_session_options().get_session_config_entry(key)


def test_providers_are_passed_on(paths: list[Path], images: NDArray[np.uint8]) -> None:
    named = StageRunner(paths, threads=1, providers=[("CPUExecutionProvider", {})])
    assert np.array_equal(named.all_logits(images), StageRunner(paths, threads=1).all_logits(images))
    features, _ = named.run_bound(0, images[:4])
    again, _ = named.run_bound(0, images[:4])
    assert features is not None
    assert again is not None
    assert not np.shares_memory(features, again)  # bound to numpy's memory for the plain CPU only
    with user_error("has no provider 'CUDAExecutionProvide'.*only .*CPUExecutionProvider"):
        StageRunner(paths, providers=["CUDAExecutionProvide"])


def test_shape_of_an_image(runner: StageRunner) -> None:
    assert runner.image_shape == (8, 8, 1)


def test_what_a_graph_does_not_tell_is_not_bound(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    """A graph of another program may give no shape for its output; it runs, unbound."""
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers"], ["logits"], axes=[1, 3], keepdims=0),
    ]
    given = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8, 1])
    told = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "plain", [given], [told])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "plain.onnx")
    runner = StageRunner([tmp_path / "plain.onnx"], threads=1)
    expected = images[:3].astype(np.float32).mean(axis=(1, 3))
    for _ in range(2):
        np.testing.assert_allclose(runner.run_bound(0, images[:3])[1], expected, rtol=1e-6)
