from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from torch import Tensor, nn

from erde.bundle.graph_check import check_graph_file
from erde.bundle.manifest import MAX_TOLERANCE
from erde.bundle.sealing import read
from erde.chains.building import TOLERANCE, built_chain
from erde.chains.networks import open_network
from erde.chains.onnx_batch import probe_images
from erde.chains.onnx_classifier import OnnxClassifier, read_classifier, resize_input, write_stage
from erde.chains.onnx_files import tensors
from erde.chains.preprocessing import Preprocessing
from erde.common.images import to_array
from tests.helpers.checks import entries, user_error
from tests.helpers.foreign import CLASSES, MEAN, SIDE, STD, export, hand_made, random_network, saved

PREPROCESSING = Preprocessing(size=(SIDE, SIDE), mean=MEAN, std=STD)
PLAIN = Preprocessing(mean=(0.0,), std=(1.0,))
IMAGES = probe_images((SIDE, SIDE, 3), count=6, seed=1)
node = helper.make_node


def normalised(images: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, C) uint8 to (B, C, H, W), by torch."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    column = (1, 3, 1, 1)
    return ((x - torch.tensor(MEAN).double().view(column)) / torch.tensor(STD).double().view(column)).float()


def stage_logits(path: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(str(path))
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    assert (source.name, source.type, target.name, target.type) == (
        "images",
        "tensor(uint8)",
        "logits",
        "tensor(float)",
    )
    assert source.shape[1:] == list(images.shape[1:])
    assert source.shape[0] == target.shape[0]
    size = 1 if source.shape[0] == 1 else len(images)
    parts = [
        session.run(None, {"images": images[start : start + size]})[0]
        for start in range(0, len(images), size)
    ]
    return np.concatenate(parts)


def as_stage(
    classifier: OnnxClassifier, folder: Path, images: NDArray[np.uint8] = IMAGES
) -> NDArray[np.float32]:
    path = folder / "stage.onnx"
    write_stage(classifier, path, images.shape[1:])
    check_graph_file(path)
    return stage_logits(path, images)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_networks_that_torch_exports(dynamo: bool, dynamic: bool, tmp_path: Path) -> None:
    network = random_network()
    path = export(
        network,
        tmp_path / "net.onnx",
        torch.randn(2 if dynamic else 1, 3, SIDE, SIDE),
        dynamo=dynamo,
        dynamic=dynamic,
    )
    classifier = read_classifier(path, PREPROCESSING)
    assert (classifier.name, classifier.class_count) == ("net", CLASSES)
    assert (classifier.output_kind, classifier.preprocessing.layout) == ("logits", "NCHW")
    # A batch of 1 that the exporter wrote into the graph is taken out again.
    assert not classifier.fixed_batch_of_one
    macs = 12 * 12 * 8 * 27 + 10 * 10 * 12 * 4 * 9 + 12 * CLASSES
    assert (classifier.macs, classifier.uncounted) == (macs, ())
    with torch.no_grad():
        expected = network(normalised(IMAGES)).numpy()
    assert expected.std() > 0.3
    np.testing.assert_allclose(as_stage(classifier, tmp_path), expected, atol=1e-4)


@pytest.mark.parametrize("dynamo", [True, False])
def test_probabilities_become_logits(dynamo: bool, tmp_path: Path) -> None:
    network = random_network(softmax=True)
    path = export(network, tmp_path / "net.onnx", torch.randn(2, 3, SIDE, SIDE), dynamo=dynamo)
    classifier = read_classifier(path, PREPROCESSING)
    assert classifier.output_kind == "probabilities"
    with torch.no_grad():
        expected = network(normalised(IMAGES)).numpy()
    logits = as_stage(classifier, tmp_path)
    np.testing.assert_allclose(torch.from_numpy(logits).softmax(1), expected, atol=1e-5)
    np.testing.assert_allclose(logits, np.log(expected), atol=1e-4)


def test_a_probability_of_zero_is_a_finite_logit(tmp_path: Path) -> None:
    matrix = np.zeros((48, 5), dtype=np.float32)
    matrix[:, 2] = 1000
    model = hand_made(
        node("Flatten", ["input"], ["flat"]),
        node("MatMul", ["flat", "matrix"], ["scores"]),
        node("Softmax", ["scores"], ["output"], axis=1),
        weights={"matrix": matrix},
    )
    classifier = read_classifier(saved(model, tmp_path), PLAIN)
    logits = as_stage(classifier, tmp_path, IMAGES[:, :4, :4])
    np.testing.assert_allclose(
        logits, [[np.log(1e-30)] * 2 + [0] + [np.log(1e-30)] * 2] * len(IMAGES), rtol=1e-6
    )


def test_float16(tmp_path: Path) -> None:
    network = random_network()
    path = export(network.half(), tmp_path / "net.onnx", torch.randn(2, 3, SIDE, SIDE).half())
    logits = as_stage(read_classifier(path, PREPROCESSING), tmp_path)
    with torch.no_grad():
        expected = network.float()(normalised(IMAGES)).numpy()
    assert 0 < np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()


def test_channels_last_and_the_other_order_of_channels(tmp_path: Path) -> None:
    network = random_network(channels_last=True)
    path = export(network, tmp_path / "net.onnx", torch.randn(2, SIDE, SIDE, 3))
    with torch.no_grad():
        expected = network(normalised(IMAGES).permute(0, 2, 3, 1)).numpy()
        x = torch.from_numpy(np.ascontiguousarray(IMAGES[..., ::-1])).float() * 2 - 100
        turned = network((x - torch.tensor([3.0, 4, 5])) / 64).numpy()
    classifier = read_classifier(path, PREPROCESSING)
    assert classifier.preprocessing.layout == "NHWC"
    np.testing.assert_allclose(as_stage(classifier, tmp_path), expected, atol=1e-4)
    # mean and std are those of the network's own channels: (2 pixels - 100 - mean) / 64.
    blue_first = Preprocessing(mean=(103.0, 104, 105), std=(64.0,) * 3, scale=2.0, channels="BGR")
    logits = as_stage(read_classifier(path, blue_first), tmp_path)
    np.testing.assert_allclose(logits, turned, atol=1e-4)
    assert np.abs(turned - expected).max() > 0.1


def test_a_network_that_takes_pixels(tiny_bundle: Path, tmp_path: Path) -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = random_network()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x.permute(0, 3, 1, 2).float() / 64 - 2)
            return y

    network = Pixels().eval()
    path = export(network, tmp_path / "net.onnx", torch.from_numpy(IMAGES[:2]))
    classifier = read_classifier(path)
    with torch.no_grad():
        expected = network(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(as_stage(classifier, tmp_path), expected, atol=1e-4)
    assert classifier.notes == ()
    assert "mean and std are not used" in read_classifier(path, PREPROCESSING).notes[0]


def test_images_are_resized_and_cropped_in_the_graph_as_pillow_does(tmp_path: Path) -> None:
    """A network that gives its input back: what arrives there are Pillow's pixels."""
    height, width, size = 20, 28, (12, 16)
    model = hand_made(
        node("Flatten", ["input"], ["output"]),
        inputs={"input": ["N", 3, *size]},
        outputs={"output": ["N", 3 * 12 * 16]},
    )
    path = saved(model, tmp_path)
    images = np.random.default_rng(3).integers(0, 256, (5, 40, 52, 3)).astype(np.uint8)
    for resize in ((height, width), (14, 30), (80, 104), (40, 52), size):
        given = Preprocessing(size, (0.0,), (1.0,), scale=1.0, resize=resize)
        stage = as_stage(read_classifier(path, given), tmp_path, images)
        for image, row in zip(images, stage, strict=True):
            whole = to_array(Image.fromarray(image), *resize, 3).astype(float)
            top, left = (resize[0] - size[0]) // 2, (resize[1] - size[1]) // 2
            expected = whole[top : top + size[0], left : left + size[1]].transpose(2, 0, 1)
            difference = np.abs(row.reshape(expected.shape) - expected)
            assert difference.max() <= 1
            assert difference.mean() < 0.05


@pytest.mark.parametrize(("opset", "unresized"), [(9, 13), (11, 11)])
def test_an_older_opset_is_raised_where_that_is_needed(opset: int, unresized: int, tmp_path: Path) -> None:
    network = random_network(softmax=True)
    path = export(network, tmp_path / "net.onnx", torch.randn(2, 3, SIDE, SIDE), dynamo=False, opset=opset)
    classifier = read_classifier(path, PREPROCESSING)
    assert classifier.opset == opset
    large = probe_images((60, 60, 3))
    small = np.stack([to_array(Image.fromarray(image), SIDE, SIDE, 3) for image in large])
    with torch.no_grad():
        expected = network(normalised(small)).log().numpy()
        same_size = network(normalised(IMAGES)).log().numpy()
    np.testing.assert_allclose(as_stage(classifier, tmp_path, large), expected, atol=0.02)
    assert onnx.load(tmp_path / "stage.onnx").opset_import[0].version == 18
    np.testing.assert_allclose(as_stage(classifier, tmp_path), same_size, atol=1e-4)
    assert onnx.load(tmp_path / "stage.onnx").opset_import[0].version == unresized


def test_a_stage_of_erde_takes_larger_images(tiny_bundle: Path, tmp_path: Path) -> None:
    source = tiny_bundle / "stage_0.onnx"
    target = tmp_path / "larger.onnx"
    resize_input(source, target, (20, 16, 1))
    check_graph_file(target)
    images = probe_images((20, 16, 1))
    small = np.stack([to_array(Image.fromarray(image[..., 0]), 8, 8, 1) for image in images])
    before = onnxruntime.InferenceSession(str(source))
    after = onnxruntime.InferenceSession(str(target))
    assert after.get_inputs()[0].shape[1:] == [20, 16, 1]
    assert [value.name for value in after.get_outputs()] == ["features", "logits"]
    expected = before.run(None, {"images": small})
    for got, wanted in zip(after.run(None, {"images": images}), expected, strict=True):
        assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()
    again = tmp_path / "again.onnx"
    resize_input(target, again, (40, 33, 1))
    resize_input(again, target, (50, 50, 1))
    assert onnxruntime.InferenceSession(str(target)).get_inputs()[0].shape[1:] == [50, 50, 1]
    with user_error("stage_0.onnx takes images of 1 channels, the other parts of the chain take 3"):
        resize_input(source, target, (20, 16, 3))


# ---------------------------------------------------------------- batches


def test_a_batch_of_one_in_the_shapes_of_the_graph(tmp_path: Path) -> None:
    for shape, outcome in (([1, 48], False), ([1, -1], False), ([-1, 48], False), ([0, 48], False)):
        model = hand_made(
            node("Reshape", ["input", "shape"], ["flat"]),
            node("MatMul", ["flat", "matrix"], ["output"]),
            weights={"shape": np.array(shape)},
            inputs={"input": [1, 3, 4, 4]},
            outputs={"output": [1, 5]},
        )
        classifier = read_classifier(saved(model, tmp_path), PLAIN)
        assert classifier.fixed_batch_of_one is outcome
        assert len(as_stage(classifier, tmp_path, IMAGES[:, :4, :4])) == len(IMAGES)


def alone(path: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Outputs of the network itself for one image after another, between 0 and 1."""
    session = onnxruntime.InferenceSession(str(path))
    x = (images.transpose(0, 3, 1, 2) / 255).astype(np.float32)
    return np.concatenate([session.run(None, {"input": image[None]})[0] for image in x])


@pytest.mark.parametrize("computed", [False, True])
def test_a_constant_row_beside_the_numbers_of_an_image(computed: bool, tmp_path: Path) -> None:
    """As the class token of a vision transformer that was exported with one image."""
    weights = {
        "token": np.ones((1, 2), dtype=np.float32),
        "wider": np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32),
    }
    model = hand_made(
        *([node("Abs", ["token"], ["more"])] if computed else []),
        node("Flatten", ["input"], ["flat"]),
        node("Concat", ["flat", "more" if computed else "token"], ["wide"], axis=1),
        node("MatMul", ["wide", "wider"], ["output"]),
        weights=weights,
        inputs={"input": [1, 3, 4, 4]},
        outputs={"output": [1, 5]},
    )
    path = saved(model, tmp_path)
    classifier = read_classifier(path, PLAIN)
    assert not classifier.fixed_batch_of_one
    images = IMAGES[:, :4, :4]
    np.testing.assert_allclose(as_stage(classifier, tmp_path, images), alone(path, images), atol=1e-5)


def test_a_batch_of_one_that_cannot_be_opened(tmp_path: Path) -> None:
    """As torch writes ``as_strided``: all numbers in a row, and the places of the first image's among them."""
    model = hand_made(
        node("Reshape", ["input", "row"], ["all"]),
        node("Gather", ["all", "places"], ["first"]),
        node("MatMul", ["first", "matrix"], ["output"]),
        weights={"row": np.array([-1]), "places": np.arange(48)[None]},
        inputs={"input": [1, 3, 4, 4]},
        outputs={"output": [1, 5]},
    )
    path = saved(model, tmp_path)
    classifier = read_classifier(path, PLAIN)
    assert classifier.fixed_batch_of_one
    images = IMAGES[:, :4, :4]
    np.testing.assert_allclose(as_stage(classifier, tmp_path, images), alone(path, images), atol=1e-5)
    # An open batch axis that the graph does not follow is the same.
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    assert read_classifier(saved(model, tmp_path), PLAIN).fixed_batch_of_one


def test_answers_that_depend_on_the_batch(tmp_path: Path) -> None:
    flat = node("Flatten", ["input"], ["flat"])
    product = node("MatMul", ["flat", "matrix"], ["scores"])
    mean = node("ReduceMean", ["scores", "axis"], ["mean"])
    model = hand_made(
        flat, product, mean, node("Sub", ["scores", "mean"], ["output"]), weights={"axis": np.array([0])}
    )
    # Alone an image gives zeros only; with something more the answers are finite and differ.
    model.graph.node[-1].input[0] = "doubled"
    model.graph.node.insert(3, node("Add", ["scores", "scores"], ["doubled"]))
    with user_error(
        "net.onnx gives an image other answers in other batches, expected one answer: export it in eval"
    ):
        read_classifier(saved(model, tmp_path), PLAIN)


def test_int8_with_ranges_of_each_batch_runs_image_by_image(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    model = hand_made(
        node("Flatten", ["input"], ["flat"]),
        node("DynamicQuantizeLinear", ["flat"], ["whole", "scale", "zero"]),
        node("MatMulInteger", ["whole", "int8", "zero"], ["sums"]),
        node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        node("Mul", ["floats", "scale"], ["output"]),
        weights={"int8": generator.integers(-100, 100, (48, 5)).astype(np.int8)},
    )
    classifier = read_classifier(saved(model, tmp_path), PLAIN)
    assert classifier.fixed_batch_of_one
    assert (classifier.macs, classifier.parameters) == (48 * 5, 48 * 5)
    as_stage(classifier, tmp_path, IMAGES[:, :4, :4])


def test_a_chain_with_a_network_that_rounds_has_int8s_tolerance(tmp_path: Path) -> None:
    scale, zero = np.array(0.1, dtype=np.float32), np.array(128, dtype=np.uint8)
    matrix = np.random.default_rng(0).standard_normal((48, 5)).astype(np.float32)
    rounding = [
        node("QuantizeLinear", ["input", "scale", "zero"], ["whole"]),
        node("DequantizeLinear", ["whole", "scale", "zero"], ["same"]),
        node("Flatten", ["same"], ["flat"]),
        node("MatMul", ["flat", "matrix"], ["output"]),
    ]
    plain = [node("Flatten", ["input"], ["flat"]), node("MatMul", ["flat", "matrix"], ["output"])]
    weights = {"matrix": matrix, "scale": scale, "zero": zero}
    saved(hand_made(*plain, weights={"matrix": matrix}), tmp_path, "plain.onnx")
    saved(hand_made(*rounding, weights=weights), tmp_path, "rounds.onnx")

    def tolerance(*places: Path) -> float:
        networks = [open_network(place, PLAIN if place.suffix else None) for place in places]
        folder = tmp_path / "+".join(place.stem for place in places)
        with built_chain(networks, folder, IMAGES[:2, :4, :4], [*"01234"]) as built:
            shutil.copytree(built, folder)
        sample = read(folder).reference_sample
        return sample.tolerance / max(1.0, float(np.abs(sample.logits).max()))

    front, rounds = tmp_path / "plain.onnx", tmp_path / "rounds.onnx"
    assert tolerance(front, front) == pytest.approx(TOLERANCE)
    assert tolerance(front, rounds) == pytest.approx(MAX_TOLERANCE)
    # And where that chain is a part of another.
    assert tolerance(tmp_path / "plain+rounds", front) == pytest.approx(MAX_TOLERANCE)


# ---------------------------------------------------------------- odd files


def test_weights_that_are_listed_as_inputs(tmp_path: Path) -> None:
    model = hand_made()
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("matrix", TensorProto.FLOAT, [48, 5]))
    assert read_classifier(saved(model, tmp_path), PLAIN).parameters == 240


def test_weights_in_another_file(tmp_path: Path) -> None:
    model = hand_made()
    path = tmp_path / "net.onnx"
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    assert entries(tmp_path) == ["net.data", "net.onnx"]
    inside = as_stage(read_classifier(path, PLAIN), tmp_path, IMAGES[:, :4, :4])
    whole = read_classifier(saved(hand_made(), tmp_path, "whole.onnx"), PLAIN)
    np.testing.assert_array_equal(inside, as_stage(whole, tmp_path, IMAGES[:, :4, :4]))
    # As in Hugging Face's cache.
    links = tmp_path / "links"
    links.mkdir()
    for name in ("net.data", "net.onnx"):
        (links / name).symlink_to(tmp_path / name)
    with user_error("the weights of .*net.onnx are a link, .* copy its folder to real files with cp -rL"):
        read_classifier(links / "net.onnx", PLAIN)
    (tmp_path / "net.data").write_bytes(b"short")
    with user_error(r"the weights of .*net.onnx cannot be read \("):
        read_classifier(path, PLAIN)
    (tmp_path / "net.data").unlink()
    with user_error("net.onnx has its weights in the file 'net.data', which is not beside it: copy both"):
        read_classifier(path, PLAIN)


def test_functions_are_inlined_and_dropout_is_taken_out(tmp_path: Path) -> None:
    model = hand_made(
        node("Dropout", ["input"], ["same", "mask"]),
        node("Flatten", ["same"], ["flat"]),
        node("product", ["flat", "matrix"], ["output"], domain="own"),
    )
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.append(
        helper.make_function(
            "own",
            "product",
            ["a", "b"],
            ["c"],
            [node("MatMul", ["a", "b"], ["c"])],
            [helper.make_opsetid("", 18)],
        )
    )
    images = IMAGES[:, :4, :4]
    logits = as_stage(read_classifier(saved(model, tmp_path), PLAIN), tmp_path, images)
    plain = as_stage(read_classifier(saved(hand_made(), tmp_path), PLAIN), tmp_path, images)
    np.testing.assert_array_equal(logits, plain)


def test_pooled_outputs_and_sizes_that_are_open(tmp_path: Path) -> None:
    weights = {"kernel": np.random.default_rng(0).standard_normal((5, 3, 1, 1)).astype(np.float32)}
    model = hand_made(
        node("GlobalAveragePool", ["input"], ["pooled"]),
        node("Conv", ["pooled", "kernel"], ["output"]),
        weights=weights,
        inputs={"input": ["batch", "num_channels", "height", "width"]},
        outputs={"output": ["batch", 5, 1, 1]},
    )
    path = saved(model, tmp_path)
    with user_error("net.onnx takes images of any size: give the size that it was trained for"):
        read_classifier(path, PLAIN)
    classifier = read_classifier(path, Preprocessing((6, 8), (0.0,), (1.0,)))
    assert (classifier.class_count, classifier.channels, classifier.macs) == (5, 3, 15)
    images = probe_images((6, 8, 3))
    expected = (images.mean((1, 2)) / 255) @ weights["kernel"][:, :, 0, 0].T
    np.testing.assert_allclose(as_stage(classifier, tmp_path, images), expected, atol=1e-5)


def test_one_of_several_outputs(tmp_path: Path) -> None:
    flat, product = hand_made().graph.node
    features = node("Relu", ["flat"], ["features"])
    softmax = node("Softmax", ["output"], ["probabilities"])
    both = {"probabilities": ["N", 5], "output": ["N", 5]}
    path = saved(hand_made(flat, product, softmax, outputs=both), tmp_path)
    assert read_classifier(path, PLAIN).output_kind == "logits"
    product.output[0] = "scores"
    shapes: dict[str, list[Any]] = {"features": ["N", 48], "scores": ["N", 5]}
    two = hand_made(flat, product, features, outputs=shapes)
    with user_error(
        r"net.onnx has 2 outputs \(features, scores\), expected one with a number per class: export"
    ):
        read_classifier(saved(two, tmp_path), PLAIN)
    whole = hand_made(
        flat, product, node("Relu", ["input"], ["features"]), outputs={**shapes, "features": ["N", 3, 4, 4]}
    )
    assert read_classifier(saved(whole, tmp_path), PLAIN).class_count == 5
    # What no answer needs is no reason to refuse.
    other = hand_made(flat, product, node("NonZero", ["flat"], ["features"]), outputs=shapes)
    other.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    assert read_classifier(saved(other, tmp_path), PLAIN).class_count == 5


def test_preprocessing_beside_the_network(tmp_path: Path) -> None:
    path = saved(hand_made(), tmp_path)
    with user_error(
        "net.onnx takes normalised images: give its mean and std .* or a preprocessor_config.json"
    ):
        read_classifier(path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "size": {"height": 4, "width": 4}, "resample": 2}'
    )
    assert read_classifier(path).preprocessing.mean == (0.1, 0.2, 0.3)


# ---------------------------------------------------------------- bad input


def test_files_that_are_no_networks(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with user_error("net.onnx cannot be read: No such file"):
        read_classifier(path, PLAIN)
    path.write_bytes(b"PK\x03\x04 a pickle")
    with user_error(
        "net.onnx is no ONNX file, or not a whole one: give a file as torch.onnx.export writes it"
    ):
        read_classifier(path, PLAIN)
    path.write_bytes(b"")
    with user_error("net.onnx has no operators: give a file"):
        read_classifier(path, PLAIN)


BAD_INPUTS: list[tuple[dict[str, Any], str]] = [
    ({"inputs": {"a": [1, 3, 4, 4], "b": [1]}}, r"has 2 inputs \(a, b\), expected one image"),
    ({"kind": TensorProto.INT64}, r"takes int64 \('input'\), expected float32, float16 or uint8"),
    ({"inputs": {"input": ["N", 48]}}, r"takes an input of shape \(N, 48\), expected four axes"),
    (
        {"inputs": {"input": [8, 3, 4, 4]}},
        "takes batches of exactly 8 images: export it with an open batch axis",
    ),
    (
        {"inputs": {"input": ["N", 3, 16, 1]}},
        r"takes an input of shape \(N, 3, 16, 1\), which does not tell where the channels are: give the layout, NCHW",
    ),
    ({"inputs": {"input": ["N", 4, 12, 2]}}, "takes images of 4 channels, expected 1 or 3"),
    (
        {"inputs": {"input": ["N", "a", "b", "c"]}},
        r"takes .* \(N, a, b, c\), which does not tell where the channels are",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
def test_inputs_that_are_not_one_image(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with user_error(f"net.onnx {message}"):
        read_classifier(saved(hand_made(**change), tmp_path), PLAIN)


def test_preprocessing_that_does_not_fit(tmp_path: Path) -> None:
    path = saved(hand_made(), tmp_path)
    for given, message in (
        (Preprocessing((8, 8), (0.0,), (1.0,)), "takes images of 4x4, but its preprocessing gives 8x8"),
        (
            Preprocessing(mean=(0.0,) * 2, std=(1.0,) * 2),
            "takes images of 3 channels, but mean and std have 2 numbers",
        ),
        (
            Preprocessing(mean=(0.0,), std=(1.0,), layout="NHWC"),
            r"takes an input of shape \(N, 3, 4, 4\), which is not NHWC",
        ),
    ):
        with user_error(f"net.onnx {message}"):
            read_classifier(path, given)
    with user_error(
        "net.onnx takes images of 3 channels, the other parts of the chain take 1: all must take the same"
    ):
        write_stage(read_classifier(path, PLAIN), tmp_path / "stage.onnx", (4, 4, 1))
    assert entries(tmp_path) == ["net.onnx"]


BAD_OUTPUTS: list[tuple[list[onnx.NodeProto], str]] = [
    (
        [node("Identity", ["input"], ["output"])],
        r"gives an output of shape \(1, 3, 4, 4\) and type float32 for one",
    ),
    (
        [node("ArgMax", ["input"], ["output"], axis=1)],
        r"gives an output of shape .* and type int64 for one image",
    ),
    ([node("ReduceMax", ["input", "axes"], ["output"], keepdims=0)], "gives an output of shape"),
    (
        [node("Flatten", ["input"], ["flat"]), node("ReduceMax", ["flat", "axis"], ["output"])],
        "gives one number per image, expected one per class, 2 or more",
    ),
    (
        [node("Flatten", ["input"], ["flat"]), node("Sigmoid", ["flat"], ["output"])],
        "ends in Sigmoid, a yes or no for each class by itself; expected a network that chooses one class",
    ),
    (
        [node("Flatten", ["input"], ["flat"]), node("Div", ["flat", "zero"], ["output"])],
        "gives numbers that are not finite for random images",
    ),
    (
        [
            node("Flatten", ["input"], ["flat"]),
            node("QLinearAdd", ["flat"], ["output"], domain="com.microsoft"),
        ],
        "has operators that a bundle does not take: QLinearAdd of com.microsoft: export the network again with",
    ),
    ([node("NonZero", ["input"], ["output"])], "has operators that a bundle does not take: NonZero:"),
]


@pytest.mark.parametrize(("nodes", "message"), BAD_OUTPUTS)
def test_outputs_that_are_no_answer(nodes: list[onnx.NodeProto], message: str, tmp_path: Path) -> None:
    weights = {
        "axes": np.array([1, 2, 3]),
        "axis": np.array([1]),
        "zero": np.zeros(48, dtype=np.float32),
    }
    kind = TensorProto.INT64 if nodes[-1].op_type in ("ArgMax", "NonZero") else TensorProto.FLOAT
    model = hand_made(*nodes, weights=weights, output_kind=kind)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    with user_error(f"net.onnx {message}"):
        read_classifier(saved(model, tmp_path), PLAIN)


def test_branches(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [node("Identity", ["scores"], ["chosen"])],
        "branch",
        [],
        [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)],
    )
    flat, product = hand_made().graph.node
    product.output[0] = "scores"
    choice = node("If", ["yes"], ["output"], then_branch=branch, else_branch=branch)
    model = hand_made(flat, product, choice, weights={"yes": np.array(True)})
    with user_error(
        r"net.onnx has a loop or a branch \(If\), which a bundle does not take: export it again with"
    ):
        read_classifier(saved(model, tmp_path), PLAIN)


def test_an_operator_that_onnx_runtime_does_not_take(tmp_path: Path) -> None:
    model = hand_made(node("Relu", ["input", "input"], ["output"]))
    with user_error("ONNX Runtime cannot load .*net.onnx: "):
        read_classifier(saved(model, tmp_path), PLAIN)
    far = node("Gather", ["flat", "places"], ["output"], axis=1)
    model = hand_made(node("Flatten", ["input"], ["flat"]), far, weights={"places": np.array([0, 1, 99])})
    with user_error(r"net.onnx cannot be run on an image of shape \(3, 4, 4\): "):
        read_classifier(saved(model, tmp_path), PLAIN)


def test_without_the_onnx_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(hand_made(), tmp_path)
    real = builtins.__import__

    def without(name: str, *rest: Any, **others: Any) -> Any:
        if name.split(".")[0] == "onnx":
            raise ImportError(name)
        return real(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    with user_error(
        'ONNX files are read and written by the onnx package, which is not installed: pip install "erde\\[analysis\\]"'
    ):
        read_classifier(path, PLAIN)


@pytest.mark.parametrize("last", [{"op": "Identity"}, {"op": "Cast", "to": TensorProto.FLOAT}])
def test_sigmoid_behind_which_nothing_is_computed(last: dict[str, Any], tmp_path: Path) -> None:
    attributes = dict(last)
    model = hand_made(
        node("Flatten", ["input"], ["flat"]),
        node("MatMul", ["flat", "matrix"], ["product"]),
        node("Sigmoid", ["product"], ["scores"]),
        node(attributes.pop("op"), ["scores"], ["output"], **attributes),
        weights={"matrix": np.random.default_rng(0).standard_normal((48, 5)).astype(np.float32)},
    )
    with user_error("ends in Sigmoid"):
        read_classifier(saved(model, tmp_path), PLAIN)


def test_a_constant_in_plain_numbers_is_a_constant(tmp_path: Path) -> None:
    model = hand_made(
        node("Constant", [], ["shape"], value_ints=[1, 48]),
        node("Reshape", ["input", "shape"], ["flat"]),
        node("MatMul", ["flat", "matrix"], ["output"]),
        weights={"matrix": np.random.default_rng(0).standard_normal((48, 5)).astype(np.float32)},
    )
    assert onnx.numpy_helper.to_array(tensors(model)["shape"]).tolist() == [1, 48]
    classifier = read_classifier(saved(model, tmp_path), PLAIN)
    assert not classifier.fixed_batch_of_one
