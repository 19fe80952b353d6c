from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from erde.common.splits import TrainSplit, TuneSplit
from erde.data.load import DataSplits
from erde.exporting import quantisation
from erde.exporting.onnx_files import (
    ExportedStages,
    export_int8_plain,
    export_int8_stages,
    export_plain,
    export_stages,
)
from erde.exporting.quantisation import CANDIDATES, Trial, choose, quantise, range_images
from erde.networks.network import EarlyExitNetwork
from erde.runtime.stages import StageRunner
from tests.helpers.checks import entries, user_error

# Two products of a uint8 and an int8 weight, added in 16 bits: what a CPU without VNNI does.
LARGEST_SUM = 2**15 - 1


@pytest.fixture(scope="module")
def floats(
    tiny_network: EarlyExitNetwork, digits: DataSplits, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("float") / "stages"
    export_stages(tiny_network, digits.image_shape, digits.mean, digits.std, folder)
    export_plain(tiny_network, digits.image_shape, digits.mean, digits.std, folder.parent / "plain.onnx")
    return folder


@pytest.fixture(scope="module")
def int8(floats: Path, digits: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "stages"
    export_int8_stages(floats, folder, digits.train, digits.tune)
    return folder


def runner(folder: Path) -> StageRunner:
    return StageRunner(ExportedStages.read(folder).paths(folder), threads=1)


def constants(path: Path) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def computed_in(path: Path) -> list[str]:
    """The operations that ONNX Runtime runs for a graph, after its own fusions."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    path.with_suffix(".optimised").unlink()
    return [node.op_type for node in graph.node]


# ---------------------------------------------------------------- one layer, by hand


def write_convolution(path: Path, weight: NDArray[Any], bias: NDArray[Any] | None, groups: int = 1) -> Path:
    """``features_in`` (batch, C, 6, 6), a convolution with its ReLU, ``features``; and a linear layer behind."""
    outputs, inputs = len(weight), weight.shape[1] * groups
    tensors = {"weight": weight, "linear": np.eye(2, outputs), "shape": np.array([0, outputs * 36])}
    tensors["linear"] = np.random.default_rng(9).normal(size=(2, outputs * 36))
    if bias is not None:
        tensors["bias"] = bias
    nodes = [
        helper.make_node(
            "Conv", ["features_in", "weight", *(["bias"] if bias is not None else [])], ["sum"], "conv",
            pads=[1, 1, 1, 1], group=groups,
        ),
        helper.make_node("Relu", ["sum"], ["features"], "relu"),
        helper.make_node("Reshape", ["features", "shape"], ["flat"], "reshape"),
        helper.make_node("Gemm", ["flat", "linear"], ["logits"], "linear", transB=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "hand-made",
        [helper.make_tensor_value_info("features_in", TensorProto.FLOAT, ["batch", inputs, 6, 6])],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", outputs, 6, 6]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2]),
        ],
        [
            numpy_helper.from_array(value if name == "shape" else value.astype(np.float32), name)
            for name, value in tensors.items()
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def convolve(x: NDArray[Any], weight: NDArray[Any], groups: int = 1) -> NDArray[Any]:
    """3x3, padded with zeros, in the arithmetic of its arguments."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    parts = zip(np.split(patches, groups, axis=1), np.split(weight, groups), strict=True)
    return np.concatenate([np.einsum("bchwij,ocij->bohw", *part) for part in parts], axis=1)


def features(path: Path, x: NDArray[Any]) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    result: NDArray[Any] = session.run(["features"], {"features_in": x})[0]
    return result


def test_a_convolution_is_what_integers_give_by_hand(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    # As behind a batch norm: channels of very different weights, inputs below and above zero.
    weight = generator.normal(size=(5, 3, 3, 3)) * np.array([0.01, 0.1, 1, 10, 0.5])[:, None, None, None]
    weight, bias = weight.astype(np.float32), generator.normal(size=5).astype(np.float32)
    x = generator.normal(0.7, 1, size=(96, 3, 6, 6)).astype(np.float32)
    quantise(write_convolution(tmp_path / "float.onnx", weight, bias), tmp_path / "int8.onnx", x)

    # Everything from the definitions: uint8 over the range, int8 in -64..64 per output channel, biases in int32.
    scale = (x.max() - x.min()) / 255
    zero = np.rint(-x.min() / scale)
    steps = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    weight_scale = np.abs(weight).max(axis=(1, 2, 3)) / 64
    weight_steps = np.rint(weight / weight_scale[:, None, None, None])
    lost = weight - weight_steps * weight_scale[:, None, None, None]
    moved = (lost.sum(axis=(2, 3)) * x.mean(axis=(0, 2, 3))).sum(axis=1)
    bias_steps = np.rint(bias / (scale * weight_scale)) + np.rint(moved / (scale * weight_scale))
    sums = convolve(steps, weight_steps) + bias_steps[:, None, None]
    exact = np.maximum(convolve(x, weight) + bias[:, None, None], 0)
    grid = exact.max() / 255
    expected = np.clip(np.rint(sums * (scale * weight_scale)[:, None, None] / grid), 0, 255) * grid

    result = features(tmp_path / "int8.onnx", x)
    # A tie may be rounded the other way where float32 is a last bit off.
    difference = np.abs(result - expected) / grid
    assert difference.max() < 1.01
    assert (difference < 0.01).mean() > 0.999
    # And it is no float in disguise.
    assert np.abs(result - exact).max() > grid / 4
    assert computed_in(tmp_path / "int8.onnx").count("QLinearConv") == 1


@pytest.mark.parametrize(("groups", "with_bias"), [(1, True), (1, False), (4, True), (2, False)])
def test_biases_take_up_what_rounding_weights_loses_on_average(
    groups: int, with_bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(1)
    # One large weight a channel, and all others between two steps: they are lost together.
    weight = np.full((4, 4 // groups, 3, 3), 0.45 / 64, dtype=np.float32)
    weight[:, 0, 1, 1] = 1
    bias = np.ones(4, dtype=np.float32) if with_bias else None
    # Each channel its own mean, which a mean over the wrong ones would miss.
    x = (
        generator.uniform(0, 1, size=(64, 4, 6, 6)).astype(np.float32)
        * np.array([1, 2, 3, 4], np.float32)[:, None, None]
    )
    source = write_convolution(tmp_path / "float.onnx", weight, bias, groups)
    exact = convolve(x, weight, groups) + (0 if bias is None else bias[:, None, None])
    quantise(source, tmp_path / "corrected.onnx", x)
    monkeypatch.setattr(quantisation, "_correct_biases", lambda *_: None)
    quantise(source, tmp_path / "plain.onnx", x)
    # Away from the border, where zeros stand in for part of the map.
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    left, right = (
        np.abs((features(tmp_path / name, x) - exact)[inner].mean(axis=(0, 2, 3)))
        for name in ("corrected.onnx", "plain.onnx")
    )
    assert (left < 0.15 * right).all(), (left, right)


def test_logits_are_not_put_on_a_grid(int8: Path, digits: DataSplits) -> None:
    logits = runner(int8).all_logits(digits.tune.images)
    for rows in logits:
        # On 256 values, 3,000 logits would collide.
        assert len(np.unique(rows)) > 1500


def test_nothing_is_said_to_the_user(
    floats: Path, digits: DataSplits, tmp_path: Path, capfd: Any, caplog: Any
) -> None:
    quantise(floats / "stage_0.onnx", tmp_path / "int8.onnx", range_images(digits.train))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert entries(tmp_path) == ["int8.onnx"]


# ---------------------------------------------------------------- the stages of a trained network


def test_int8_answers_like_float_on_digits(floats: Path, int8: Path, digits: DataSplits) -> None:
    expected, result = (runner(folder).all_logits(digits.test.images) for folder in (floats, int8))
    assert (result.argmax(axis=-1) == digits.test.labels).mean(axis=1) == pytest.approx(
        (expected.argmax(axis=-1) == digits.test.labels).mean(axis=1), abs=0.02
    )
    assert ((result.argmax(axis=-1) == expected.argmax(axis=-1)).mean(axis=1) >= 0.985).all()
    # Different all the same: not the float stages under another name.
    assert np.abs(result - expected).max() > 0.01


def test_weights_in_the_file_are_int8_per_channel_and_no_sum_overflows(floats: Path, int8: Path) -> None:
    for name in ExportedStages.read(int8).files:
        graph, held, exact = onnx.load(int8 / name).graph, constants(int8 / name), constants(floats / name)
        dequantised = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
        layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
        assert len(layers) == 4
        # The first convolution of all is as it was.
        layers = layers[1:] if name == "stage_0.onnx" else layers
        for layer in layers:
            source = dequantised[layer.input[1]]
            weight, scale, zero = (held[name] for name in source.input)
            before = exact[source.input[0].removesuffix("_quantized")]
            assert weight.dtype == np.int8
            assert weight.shape == before.shape
            assert scale.shape == zero.shape == (len(weight),)
            assert not zero.any()
            assert next(attribute.i for attribute in source.attribute if attribute.name == "axis") == 0
            assert 2 * 255 * np.abs(weight.astype(int)).max() <= LARGEST_SUM
            np.testing.assert_allclose(
                np.abs(before.reshape(len(before), -1)).max(axis=1) / 64, scale, rtol=1e-5
            )
            assert held[dequantised[layer.input[2]].input[0]].dtype == np.int32


def test_the_whole_chain_runs_in_integers(int8: Path) -> None:
    for index, path in enumerate(ExportedStages.read(int8).paths(int8)):
        operations = computed_in(path)
        # The very first convolution stays in float.
        assert operations.count("QLinearConv") == (2 if index == 0 else 3), operations
        assert operations.count("Conv") + operations.count("FusedConv") == (index == 0)
        assert operations.count("QLinearAdd") == 1
        assert operations.count("QGemm") == 1
        assert not {"Add", "Gemm", "FusedGemm"} & set(operations[operations.index("QLinearConv") :])


def interface(path: Path) -> list[tuple[str, str, list[Any]]]:
    """Name, type and shape of a graph's inputs and outputs."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [
        (value.name, value.type, value.shape) for value in (*session.get_inputs(), *session.get_outputs())
    ]


def test_inputs_and_outputs_are_those_of_the_float_stages(floats: Path, int8: Path) -> None:
    def handed_over_as(kind: str, path: Path) -> list[tuple[str, str, list[Any]]]:
        return [
            (name, kind if name in ("features", "features_in") else own, shape)
            for name, own, shape in interface(path)
        ]

    for name in ExportedStages.read(floats).files:
        # But for the feature map itself, which is handed over in integers.
        assert interface(int8 / name) == handed_over_as("tensor(uint8)", floats / name)
        assert interface(floats / name) == handed_over_as("tensor(float)", floats / name)
        model = onnx.load(int8 / name)
        assert (model.producer_name, {opset.domain: opset.version for opset in model.opset_import}) == (
            "erde",
            {"": 18},
        )
        assert not model.metadata_props


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 32, 200])
def test_an_images_logits_do_not_depend_on_its_batch(batch: int, int8: Path, digits: DataSplits) -> None:
    stages, images = runner(int8), digits.test.images
    together = stages.all_logits(images[:batch], batch_size=max(batch, 1))
    assert together.shape == (3, batch, 10)
    if batch:
        assert np.array_equal(together, stages.all_logits(images[:batch], batch_size=1))


def test_a_feature_map_is_rounded_once_between_two_stages(
    floats: Path, int8: Path, digits: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grids(folder: Path, place: int) -> list[Any]:
        """Scale and zero point of the feature map between two stages, as the one and the other have them."""
        before, after = (constants(folder / f"stage_{index}.onnx") for index in (place, place + 1))
        parts = ("scale", "zero_point")
        return [
            [before[f"features_{part}"] for part in parts],
            [after[f"features_in_{part}"] for part in parts],
        ]

    for place in range(2):
        assert len(set(map(str, grids(int8, place)))) == 1
    # A grid of its own may come out the same by chance: another one is handed over.
    grid = quantisation._grid

    def wider(path: Path, tensor: str) -> Any:
        result = grid(path, tensor)
        assert result is not None
        return np.asarray(result[0] * np.float32(1.25)), result[1]

    monkeypatch.setattr(quantisation, "_grid", wider)
    export_int8_stages(floats, tmp_path / "wider", digits.train, digits.tune)
    for place in range(2):
        (scale, zero), (taken, taken_zero) = grids(tmp_path / "wider", place)
        assert (taken, taken_zero) == (scale * np.float32(1.25), zero)
        # Integers of two grids are not the same numbers: floats are handed over.
        handed = interface(tmp_path / "wider" / f"stage_{place}.onnx")[1]
        assert handed[:2] == ("features", "tensor(float)")


def test_integers_handed_over_give_the_same_numbers(
    floats: Path, int8: Path, digits: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation, "_hand_over_integers", lambda path, after: None)
    export_int8_stages(floats, tmp_path / "floats", digits.train, digits.tune)
    assert interface(tmp_path / "floats" / "stage_1.onnx")[0][1] == "tensor(float)"
    expected, got = (runner(folder).all_logits(digits.test.images) for folder in (tmp_path / "floats", int8))
    assert np.array_equal(got, expected)


def test_the_same_again_to_the_byte(floats: Path, int8: Path, digits: DataSplits, tmp_path: Path) -> None:
    export_int8_stages(floats, tmp_path / "again", digits.train, digits.tune)
    assert (
        entries(tmp_path / "again")
        == entries(int8)
        == ["stage_0.onnx", "stage_1.onnx", "stage_2.onnx", "stages.json"]
    )
    for name in entries(int8):
        assert (tmp_path / "again" / name).read_bytes() == (int8 / name).read_bytes()


def test_the_plain_network_in_int8(floats: Path, digits: DataSplits, tmp_path: Path) -> None:
    source, path = floats.parent / "plain.onnx", tmp_path / "baselines" / "plain.onnx"
    export_int8_plain(source, path, digits.train, ("first",))
    logits = [StageRunner([file], threads=1).all_logits(digits.test.images)[0] for file in (source, path)]
    assert (logits[0].argmax(axis=-1) == logits[1].argmax(axis=-1)).mean() >= 0.985
    assert computed_in(path).count("QLinearConv") == 8
    assert path.stat().st_size < 0.6 * source.stat().st_size


# ---------------------------------------------------------------- what stays in float


def trial(kept: tuple[str, ...], *accuracy: float) -> Trial:
    return Trial(kept, accuracy, (1.0,) * len(accuracy))


def test_the_first_candidate_within_the_tolerance_is_taken() -> None:
    fp32 = (0.8, 0.9)
    everything, first = trial((), 0.9, 0.894), trial(("first",), 0.795, 0.9)
    # Each exit counts by itself: what one wins is nothing to another.
    assert choose(fp32, [everything]) is None
    # On the edge: 0.8 - 0.795 is a last bit more than 0.005.
    assert choose(fp32, [everything, first]) is first
    assert choose(fp32, [trial((), 0.81, 0.91), first]).kept_in_float == ()


def kept_float(folder: Path, name: str, operation: str) -> list[bool]:
    """Of every such layer in a file, in order: whether its weights are floats."""
    graph, held = onnx.load(folder / name).graph, constants(folder / name)
    return [node.input[1] in held for node in graph.node if node.op_type == operation]


def test_all_candidates_are_tried_and_the_best_is_taken_where_none_will_do(
    floats: Path, digits: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation, "TOLERANCE", -1.0)
    # The best by our word: not the last one tried, so that it has to be made once more.
    best = ("first",)
    loss = quantisation._loss
    monkeypatch.setattr(
        quantisation,
        "_loss",
        lambda before, trial: 0.1 if trial.kept_in_float == best else 0.2 + loss(before, trial),
    )
    exported = export_int8_stages(floats, tmp_path / "int8", digits.train, digits.tune)
    result = exported.quantisation
    assert result is not None
    assert tuple(trial.kept_in_float for trial in result.trials) == CANDIDATES
    assert result.kept_in_float == best == result.taken.kept_in_float
    for name in exported.files:
        assert kept_float(tmp_path / "int8", name, "Gemm") == [False]
        assert kept_float(tmp_path / "int8", name, "Conv") == [name == "stage_0.onnx", False, False]
    assert ExportedStages.read(tmp_path / "int8") == exported


@pytest.mark.parametrize(
    ("kept", "first", "last"), [((), 0, 0), (("first",), 1, 0), (("first", "last"), 1, 1)]
)
def test_what_is_kept_in_float(
    kept: tuple[str, ...], first: int, last: int, floats: Path, digits: DataSplits, tmp_path: Path
) -> None:
    images = range_images(digits.train)
    quantise(floats / "stage_0.onnx", tmp_path / "stage_0.onnx", images, kept)
    assert kept_float(tmp_path, "stage_0.onnx", "Conv") == [bool(first), False, False]
    assert kept_float(tmp_path, "stage_0.onnx", "Gemm") == [bool(last)]
    # Only the first convolution of all is "first", not that of every stage.
    features_in = StageRunner([floats / "stage_0.onnx", floats / "stage_2.onnx"]).run(0, images)[0]
    assert features_in is not None
    quantise(floats / "stage_1.onnx", tmp_path / "stage_1.onnx", features_in, kept)
    assert kept_float(tmp_path, "stage_1.onnx", "Conv") == [False, False, False]


def test_what_is_recorded(floats: Path, int8: Path, digits: DataSplits) -> None:
    exported, before = ExportedStages.read(int8), ExportedStages.read(floats)
    result = exported.quantisation
    assert result is not None
    assert dataclasses.replace(exported, quantisation=None) == before
    assert (before.precision, exported.precision) == ("fp32", "int8")
    assert (result.range_images, result.tune_images) == (512, len(digits.tune))
    logits = [runner(folder).all_logits(digits.tune.images).argmax(axis=-1) for folder in (floats, int8)]
    assert result.fp32_accuracy == tuple((logits[0] == digits.tune.labels).mean(axis=1).tolist())
    assert result.taken.accuracy == tuple((logits[1] == digits.tune.labels).mean(axis=1).tolist())
    assert result.taken.agreement == tuple((logits[1] == logits[0]).mean(axis=1).tolist())
    sizes = [sum((folder / name).stat().st_size for name in exported.files) for folder in (floats, int8)]
    assert [result.fp32_bytes, result.bytes] == sizes
    assert result.bytes < 0.6 * result.fp32_bytes


# ---------------------------------------------------------------- which images are looked at


def test_ranges_come_from_train_images_as_they_are(digits: DataSplits) -> None:
    images = range_images(digits.train, seed=3)
    assert images.shape == (512, *digits.image_shape)
    known = {image.tobytes() for image in digits.train.images[:]}
    assert all(image.tobytes() in known for image in images)
    assert np.array_equal(images, range_images(digits.train, seed=3))
    assert not np.array_equal(images, range_images(digits.train, seed=4))
    few = TrainSplit(digits.train.images[:20], digits.train.labels[:20])
    assert np.array_equal(range_images(few), few.images)


def test_the_types_let_no_other_split_in() -> None:
    for function in (export_int8_stages, quantisation.quantise_stages):
        hints = typing.get_type_hints(function)
        assert (hints["train"], hints["tune"]) == (TrainSplit, TuneSplit)
    for other in (range_images, export_int8_plain):
        assert typing.get_type_hints(other)["train"] is TrainSplit


# ---------------------------------------------------------------- what is refused


def test_stages_whose_answers_depend_on_the_batch_are_not_written(
    floats: Path, digits: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = StageRunner.run

    def wrong(self: StageRunner, index: int, x: NDArray[Any]) -> Any:
        result, logits = run(self, index, x)
        return result, logits + np.float32(0.01 * (len(x) == 7))

    monkeypatch.setattr(StageRunner, "run", wrong)
    with user_error(
        r"differs from itself for single images by 0\.01 at exit '.*' for a batch of 7, .* nothing was written"
    ):
        export_int8_stages(floats, tmp_path / "int8", digits.train, digits.tune)
    assert entries(tmp_path) == []
