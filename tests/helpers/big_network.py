"""A network that is costlier and better than the tests' tiny one: random features and a linear layer, fitted at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from erde.data.load import DataSplits

FEATURES = 8192
MEAN, STD = 0.3, 0.4
MACS = 64 * FEATURES + FEATURES * 10


def write_big_network(data: DataSplits, path: Path, softmax: bool = False, seed: int = 0) -> Path:
    """An ONNX classifier of digits, float (N, 1, 8, 8) of pixels ``(x / 255 - MEAN) / STD``; about 97 % right."""
    generator = np.random.default_rng(seed)
    first = (generator.normal(size=(64, FEATURES)) / 8).astype(np.float32)
    x = _pixels(np.asarray(data.train.images[:]))
    hidden = np.maximum(x @ first, 0)
    targets = 10 * np.eye(10)[data.train.labels] - 1
    second = np.linalg.solve(hidden.T @ hidden + 100 * np.eye(FEATURES), hidden.T @ targets).astype(
        np.float32
    )
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "first"], ["h"]),
        helper.make_node("Relu", ["h"], ["features"]),
        helper.make_node("MatMul", ["features", "second"], ["linear" if softmax else "logits"]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["linear"], ["logits"], axis=1))
    graph = helper.make_graph(
        nodes,
        "big",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, str(path))
    return path


def big_answers(path: Path, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """What the network says, computed here from its weights."""
    first, second = (numpy_helper.to_array(value) for value in onnx.load(str(path)).graph.initializer)
    return np.asarray((np.maximum(_pixels(images) @ first, 0) @ second).argmax(axis=1))


def _pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), 64)
    return ((flat / 255 - MEAN) / STD).astype(np.float32)


def write_photos(data: DataSplits, folder: Path, labelled: bool) -> Path:
    """All digits as PNG files, in a folder per class or in a single one."""
    for split in (data.train, data.tune, data.certify, data.test):
        for row, (pixels, label) in enumerate(zip(np.asarray(split.images[:]), split.labels, strict=True)):
            place = folder / data.classes[label] if labelled else folder
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(place / f"{split.name}{row}.png")
    return folder
