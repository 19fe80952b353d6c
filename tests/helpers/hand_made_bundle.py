"""Bundles built node by node, without training: small, quick to make, and with exits under a test's control."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from erde import bundle
from erde.bundle.manifest import Manifest, ReferenceSample, Stage
from erde.bundle.sealing import file_hash
from erde.policy.points import Calibration, OperatingPoint
from erde.policy.rule import ExitRule, HarmParameters, decide, harm_feature_count
from erde.runtime.stages import StageRunner

OPSET = 18
CLASSES = 4
PAPER = ExitRule("margin")


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, NDArray[Any]],
    inputs: dict[str, tuple[int, Sequence[Any]]],
    outputs: dict[str, Sequence[Any]],
) -> onnx.ModelProto:
    """A checked model; ``inputs`` have a type and a shape, outputs are float32."""
    graph = helper.make_graph(
        list(nodes),
        "stage",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def write_bundle(
    folder: Path,
    models: Sequence[onnx.ModelProto],
    sample: NDArray[np.uint8],
    points: dict[str, Sequence[float | None]],
    *,
    classes: int = CLASSES,
    rule: ExitRule = PAPER,
    calibrate_on: NDArray[np.uint8] | None = None,
    networks: Sequence[int] = (0,),
) -> Path:
    """A sealed bundle of these stages; the first of ``points`` is the default. ``folder``'s parent has to be there.

    ``networks`` are the first stages of the networks of a chain. Each stage costs 100 MACs.
    """
    paths = []
    scratch = folder.with_name(f"{folder.name}-stages")
    scratch.mkdir()
    for index, model in enumerate(models):
        paths.append(scratch / f"stage_{index}.onnx")
        onnx.save(model, str(paths[-1]))
    takes_image = [index in networks for index in range(len(models))]
    runner = StageRunner(paths, threads=1, takes_image=takes_image)
    logits = runner.all_logits(sample)
    calibration = None
    if calibrate_on is not None:
        scores = rule.apply(runner.all_logits(calibrate_on))[1]
        exits = decide(scores, next(iter(points.values())))
        ranges = [(float(row.min()), float(row.max())) for row in scores]
        calibration = Calibration(
            exit_rates=(np.bincount(exits, minlength=len(models)) / len(exits)).tolist(),
            score_histograms=[
                np.histogram(row, 20, span)[0].tolist() for row, span in zip(scores, ranges, strict=True)
            ],
            score_ranges=ranges,
            tune_images=len(exits),
            certify_images=len(exits),
            tune_fingerprint="tune",
            certify_fingerprint="certify",
            sources=[],
            choices="",
        )
    channels = sample.shape[3]
    manifest = Manifest(
        format_version=bundle.FORMAT_VERSION,
        name="by hand",
        classes=[f"class {label}" for label in range(classes)],
        input_shape=sample.shape[1:],
        mean=[0.0] * channels,
        std=[1.0] * channels,
        resize="shorter side, then centre crop; bilinear",
        precision="fp32",
        opset=OPSET,
        stages=[
            Stage(
                file=path.name,
                exit_name=f"group{index}",
                macs=100 * (index + 1),
                parameters=10,
                input="image" if takes_image[index] else "features",
            )
            for index, path in enumerate(paths)
        ],
        no_exit_macs=100 * (len(models) - networks[-1]),
        no_exit_parameters=10,
        score=rule.score,
        sharpness=rule.sharpness,
        ensemble=rule.ensemble,
        score_parameters=None if rule.harm is None else list(rule.harm),
        temperatures=[1.0 + 0.25 * index for index in range(len(models))],
        operating_points=[
            OperatingPoint(name=name, kind="budget", target=0.5, thresholds=list(levels), certificate=None)
            for name, levels in points.items()
        ],
        default_operating_point=next(iter(points)),
        left_out=[],
        calibration=calibration,
        reference_sample=ReferenceSample(
            images=ReferenceSample.encode(sample),
            count=len(sample),
            logits=logits.astype(float).tolist(),
            tolerance=1e-4,
        ),
        provenance={"erde": "by hand"},
        files={path.name: file_hash(path) for path in paths},
    )
    bundle.write(folder, manifest, paths)
    return folder


# ---------------------------------------------------------------- logits are pixels


def pixel_stage(index: int, exits: int, classes: int, networks: Sequence[int] = (0,)) -> onnx.ModelProto:
    """Logits are row ``index`` of the image divided by 16; the stage fails where that row's last pixel is not 0."""
    shape = ["N", exits, classes + 1, 1]
    takes_image = index in networks
    source = "images" if takes_image else "features_in"
    floats = helper.make_node("Cast", [source], ["features"], to=TensorProto.FLOAT)
    constants = {
        "start": np.array([index, 0]),
        "stop": np.array([index + 1, classes]),
        "bomb_start": np.array([index, classes]),
        "bomb_stop": np.array([index + 1, classes + 1]),
        "rows_and_columns": np.array([1, 2]),
        "ones": np.array([1, 3]),
        "sixteenth": np.array(1 / 16, dtype=np.float32),
        "nothing": np.zeros(1, dtype=np.float32),
    }
    nodes = [
        helper.make_node("Slice", ["features", "start", "stop", "rows_and_columns"], ["row"]),
        helper.make_node("Squeeze", ["row", "ones"], ["pixels"]),
        helper.make_node("Mul", ["pixels", "sixteenth"], ["divided"]),
        # An index beyond the table's only entry is an error when the node is executed.
        helper.make_node("Slice", ["features", "bomb_start", "bomb_stop", "rows_and_columns"], ["corner"]),
        helper.make_node("Squeeze", ["corner", "ones"], ["fuse"]),
        helper.make_node("Cast", ["fuse"], ["entry"], to=TensorProto.INT64),
        helper.make_node("Gather", ["nothing", "entry"], ["zero"]),
        helper.make_node("Add", ["divided", "zero"], ["logits"]),
    ]
    final = index == exits - 1 or index + 1 in networks
    if not takes_image:
        floats = helper.make_node("Identity", [source], ["features"])
    outputs: dict[str, Sequence[Any]] = {} if final else {"features": shape}
    return graph_of(
        [floats, *nodes],
        constants,
        {source: (TensorProto.UINT8 if takes_image else TensorProto.FLOAT, shape)},
        {**outputs, "logits": ["N", classes]},
    )


def pixel_bundle(
    folder: Path,
    exits: int = 3,
    rule: ExitRule = PAPER,
    classes: int = CLASSES,
    calibrate: bool = False,
    networks: Sequence[int] = (0,),
) -> Path:
    """A bundle for images (N, exits, classes + 1, 1): see ``pixel_stage``. The default point has all thresholds 0.5."""
    generator = np.random.default_rng(0)
    sample = generator.integers(0, 256, (3, exits, classes + 1, 1), dtype=np.uint8)
    sample[:, :, -1] = 0
    points: dict[str, Sequence[float | None]] = {
        "half": [0.5] * (exits - 1),
        "low": [0.1] * (exits - 1),
        "last-but-one": [None] * (exits - 2) + [0.3],
        "no-exit": [None] * (exits - 1),
    }
    models = [pixel_stage(index, exits, classes, networks) for index in range(exits)]
    seen = sample if calibrate else None
    return write_bundle(
        folder, models, sample, points, classes=classes, rule=rule, calibrate_on=seen, networks=networks
    )


def pixel_logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the stages of ``pixel_bundle`` have to give for ``images``: (E, N, K), exactly."""
    return np.moveaxis(images[:, :, :-1, 0].astype(np.float32) / np.float32(16), 1, 0)


def some_harm(exits: int, classes: int = CLASSES) -> tuple[HarmParameters, ...]:
    """A learned score that nobody learned."""
    generator = np.random.default_rng(5)
    return tuple(
        HarmParameters(
            0.5,
            tuple(generator.normal(0, 0.5, harm_feature_count(index, classes)).tolist()),
            tuple(generator.normal(0, 0.5, classes).tolist()),
        )
        for index in range(exits - 1)
    )


# ---------------------------------------------------------------- a small convolutional network


def convolution_stage(
    index: int, exits: int, classes: int, channels: int, generator: np.random.Generator
) -> onnx.ModelProto:
    width = 4 if index else channels

    def weights(*shape: int) -> NDArray[np.float32]:
        return generator.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)

    constants: dict[str, NDArray[Any]] = {
        "conv_weight": weights(4, width, 3, 3),
        "conv_bias": weights(4, 1)[:, 0],
        "head_weight": 3 * weights(classes, 16),
        "head_bias": weights(classes, 1)[:, 0],
        "flat": np.array([0, 16]),
    }
    nodes, source = [], "features_in"
    if not index:
        constants |= {
            "mean": np.full((1, channels, 1, 1), 127.0, dtype=np.float32),
            "std": np.full((1, channels, 1, 1), 64.0, dtype=np.float32),
        }
        nodes = [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Sub", ["planes", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "std"], ["normal"]),
        ]
        source = "normal"
    nodes += [
        helper.make_node("Conv", [source, "conv_weight", "conv_bias"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["features"]),
        helper.make_node("MaxPool", ["features"], ["large"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("AveragePool", ["large"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["pooled", "flat"], ["vector"]),
        helper.make_node("Gemm", ["vector", "head_weight", "head_bias"], ["logits"], transB=1),
    ]
    features = ["N", 4, 8, 8]
    outputs: dict[str, Sequence[Any]] = {} if index == exits - 1 else {"features": features}
    return graph_of(
        nodes,
        constants,
        {"features_in": (TensorProto.FLOAT, features)}
        if index
        else {"images": (TensorProto.UINT8, ["N", 8, 8, channels])},
        {**outputs, "logits": ["N", classes]},
    )


def convolution_bundle(
    folder: Path, seed: int = 0, exits: int = 3, classes: int = CLASSES, channels: int = 3
) -> Path:
    """A network of a few kilobytes with random weights for 8x8 images, calibrated by hand."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (100, 8, 8, channels), dtype=np.uint8)
    points: dict[str, Sequence[float | None]] = {
        "early": [0.4] * (exits - 1),
        "other": [0.7, None][: exits - 1],
        "no-exit": [None] * (exits - 1),
    }
    models = [convolution_stage(index, exits, classes, channels, generator) for index in range(exits)]
    return write_bundle(folder, models, images[:2], points, classes=classes, calibrate_on=images)
