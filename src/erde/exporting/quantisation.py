"""Static int8 quantisation of exported stages and of the plain network: ranges from train, choices on tune.

Activations are uint8 with a range per tensor (MinMax), weights int8 with a scale per output channel. Weights keep to
-64..64: CPUs without VNNI add two products of a uint8 and an int8 in 16 bits, and 2 * 255 * 64 is the most that
fits, so every CPU computes the same. What the missing bit moves on average is put into the biases (Nagel et al.
2019, arXiv 1906.04721, section 4.2). Logits stay floats: on a grid of 256 values scores would crowd.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from erde.common.environment import erde_version
from erde.common.files import replacing_file
from erde.common.splits import TrainSplit, TuneSplit
from erde.exporting.graphs import rename, unblock_input
from erde.runtime.stages import StageRunner

# Ranges and channel means settle long before: 128 or 2,048 images change no accuracy by more than flipped labels do.
RANGE_IMAGES = 512
# Points of accuracy, as a share, that an exit may lose on tune before more is kept in float. About 1.5 % of
# labels flip, either way: on 2,500 images that alone moves an accuracy by 0.2 points.
TOLERANCE = 0.005
# What is kept in float. The first convolution always: with three channels of input it takes three times as long in
# int8 as in float on a CPU with VNNI, and costs accuracy besides. The last layers only where accuracy needs it.
CANDIDATES: tuple[tuple[str, ...], ...] = (("first",), ("first", "last"))
# A BatchNormalization that no convolution could take in, a head's, stays in float with its pooling: as a convolution
# of its own it runs in int8, and takes longer. Relu is listed since a quantised output clips at zero by itself.
_QUANTISED = ["Conv", "Gemm", "Add", "Relu"]
_BATCH = 64


@dataclass(frozen=True)
class Trial:
    """A way to quantise, on tune: accuracy per exit, and the share of images with the label of the float exit."""

    kept_in_float: tuple[str, ...]
    accuracy: tuple[float, ...]
    agreement: tuple[float, ...]


@dataclass(frozen=True)
class Quantisation:
    """The way that stages were quantised, and its cost on tune: ``kept_in_float`` was taken among ``trials``."""

    kept_in_float: tuple[str, ...]
    range_images: int
    tune_images: int
    tolerance: float
    fp32_accuracy: tuple[float, ...]
    trials: tuple[Trial, ...]
    bytes: int
    fp32_bytes: int

    @property
    def taken(self) -> Trial:
        """The trial that was taken."""
        return next(trial for trial in self.trials if trial.kept_in_float == self.kept_in_float)


def choose(fp32_accuracy: Sequence[float], trials: Sequence[Trial]) -> Trial | None:
    """The first trial that loses at most ``TOLERANCE`` at any exit; None where there is none yet."""
    return next((trial for trial in trials if _loss(fp32_accuracy, trial) <= TOLERANCE), None)


def _loss(fp32_accuracy: Sequence[float], trial: Trial) -> float:
    losses = (before - now for before, now in zip(fp32_accuracy, trial.accuracy, strict=True))
    # Shares of images are compared: the last bits of their difference say nothing.
    return round(max(losses), 9)


def quantise_stages(
    sources: Sequence[Path], folder: Path, train: TrainSplit, tune: TuneSplit, seed: int = 0
) -> Quantisation:
    """Write the stages ``sources`` in int8 into ``folder``, under the same names.

    Candidates are tried in order; the first that loses at most ``TOLERANCE`` at any exit is taken, else the
    one with the smallest loss. Inputs and outputs keep names, types and shapes.
    """
    images = range_images(train, seed)
    before = StageRunner(sources, threads=1).all_logits(tune.images).argmax(axis=-1)
    fp32_accuracy = _shares(before == tune.labels)
    trials: list[Trial] = []
    chosen = None
    for kept in CANDIDATES:
        written = _quantise_chain(sources, folder, images, kept)
        labels = StageRunner(written, threads=1).all_logits(tune.images).argmax(axis=-1)
        trials.append(Trial(kept, _shares(labels == tune.labels), _shares(labels == before)))
        chosen = choose(fp32_accuracy, trials)
        if chosen is not None:
            break
    if chosen is None:
        chosen = min(trials, key=lambda trial: _loss(fp32_accuracy, trial))
        written = _quantise_chain(sources, folder, images, chosen.kept_in_float)
    return Quantisation(
        kept_in_float=chosen.kept_in_float,
        range_images=len(images),
        tune_images=len(tune),
        tolerance=TOLERANCE,
        fp32_accuracy=fp32_accuracy,
        trials=tuple(trials),
        bytes=sum(path.stat().st_size for path in written),
        fp32_bytes=sum(path.stat().st_size for path in sources),
    )


def _shares(hits: NDArray[np.bool_]) -> tuple[float, ...]:
    return tuple(hits.mean(axis=-1).tolist())


def range_images(train: TrainSplit, seed: int = 0) -> NDArray[np.uint8]:
    """``RANGE_IMAGES`` train images, drawn by ``seed``, as they are: augmentation would widen the ranges."""
    count = min(RANGE_IMAGES, len(train))
    rows = np.random.default_rng(seed).choice(len(train), count, replace=False)
    return train.images[np.sort(rows)]


def _quantise_chain(
    sources: Sequence[Path], folder: Path, images: NDArray[np.uint8], kept: Sequence[str]
) -> list[Path]:
    """Stage after stage: each is calibrated on the output of the int8 stages before it, as it will be in use.

    Ranges of the float stages' feature maps do as well for accuracy. But each stage also takes over the grid of
    the one before, so that a feature map is rounded once and not again on arrival: fewer labels flip.
    """
    written = [folder / source.name for source in sources]
    x: NDArray[Any] = images
    grid = None
    for source, path in zip(sources, written, strict=True):
        quantise(source, path, x, kept, grid)
        if source != sources[-1]:
            # The last stage only tells the runner that this one is not it.
            stage = StageRunner([path, sources[-1]], threads=1)
            x = np.concatenate([stage.run(0, batch)[0] for batch in _batches(x)])
            grid = _grid(path, "features")
    for path, after in pairwise(written):
        _hand_over_integers(path, after)
    return written


def _hand_over_integers(path: Path, after: Path) -> None:
    """Let two int8 stages hand the integers of the feature map over, where both have it on the same grid.

    The numbers stay as they are: the stage behind would only round to the integers again. It saves this rounding, and
    three quarters of the bytes that are copied when images leave a batch.
    """
    first, second = onnx.load(path), onnx.load(after)
    feature, entry = first.graph.output[0], second.graph.input[0]
    from_integers = [node for node in first.graph.node if feature.name in node.output]
    to_integers = [node for node in second.graph.node if entry.name in node.input]
    if [node.op_type for node in from_integers] != ["DequantizeLinear"]:
        return
    if not to_integers or any(node.op_type != "QuantizeLinear" for node in to_integers):
        return
    (given,) = from_integers
    grids = [_node_grid(first.graph, given), *(_node_grid(second.graph, node) for node in to_integers)]
    if any(
        not np.array_equal(part, other) for grid in grids for part, other in zip(grids[0], grid, strict=True)
    ):
        return
    kind = onnx.TensorProto.UINT8
    integers, floats = given.input[0], f"{feature.name}_float"
    rename(first.graph, {feature.name: floats, integers: feature.name})
    feature.type.tensor_type.elem_type = entry.type.tensor_type.elem_type = kind
    for node in to_integers:
        second.graph.node.remove(node)
    rename(second.graph, {node.output[0]: entry.name for node in to_integers})
    for model, target in ((first, path), (second, after)):
        onnx.checker.check_model(model)
        target.write_bytes(model.SerializeToString(deterministic=True))


def quantise(
    source: Path,
    path: Path,
    x: NDArray[Any],
    kept: Sequence[str] = (),
    input_grid: tuple[NDArray[Any], NDArray[Any]] | None = None,
) -> None:
    """Write the graph at ``source`` in int8 to ``path``, in one step.

    ``x`` are inputs as training images give them, for ranges and biases. ``kept``: "first" keeps the first
    convolution of a graph that takes images in float, "last" the linear layer that gives the logits.
    ``input_grid``: scale and zero point of an input that was quantised before.
    """
    model = onnx.load(source)
    unblock_input(model)
    _give_biases(model)
    means = _input_means(model, x)
    input_name = model.graph.input[0].name
    # ONNX Runtime asks for its own clean-up first, which the export has done.
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    options: dict[str, Any] = {"OpTypesToExcludeOutputQuantization": ["Gemm"]}
    if input_grid is not None:
        scale, zero_point = input_grid
        options["TensorQuantOverrides"] = {input_name: [{"scale": scale, "zero_point": zero_point}]}
    with replacing_file(path) as partial:
        with _quiet():
            quantize_static(
                copy.deepcopy(model),  # it moves the weights of its argument to a file
                partial,
                _Reader(input_name, x),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=_QUANTISED,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_excluded(model, kept),
                calibrate_method=CalibrationMethod.MinMax,
                extra_options=options,
            )
        quantised = onnx.load(partial)
        _correct_biases(quantised, model, means)
        del quantised.metadata_props[:]
        quantised.producer_name, quantised.producer_version = "erde", erde_version()
        onnx.checker.check_model(quantised)
        partial.write_bytes(quantised.SerializeToString(deterministic=True))


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, x: NDArray[Any]) -> None:
        self._name, self._rest = name, _batches(x)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        batch = next(self._rest, None)
        return None if batch is None else {self._name: batch}


def _batches(x: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(x), _BATCH):
        yield x[start : start + _BATCH]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # It writes advice for people to the root logger.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _excluded(model: Any, kept: Sequence[str]) -> list[str]:
    """Names of the nodes that stay in float."""
    nodes = list(model.graph.node)
    excluded = []
    if model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8:
        # A network of one's own may begin with a linear layer.
        weighted = (index for index, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm"))
        first = next(weighted, len(nodes))
        # What comes before are the images' own steps to float.
        excluded += [node.name for node in nodes[:first]]
        if "first" in kept and first < len(nodes):
            excluded.append(nodes[first].name)
    last = [node for node in nodes if "logits" in node.output]
    added = last[0].input if last and last[0].op_type == "Add" else ()
    boosted = [node for node in nodes if node.op_type == "Gemm" and node.output[0] in added]
    if boosted:
        # The logits so far are added to those of the linear layer, in float.
        excluded += [node.name for node in last]
        last = boosted
    if "last" in kept:
        excluded += [node.name for node in last]
    return excluded


def _layers(model: Any) -> list[Any]:
    """Convolutions and linear layers with constant weights, output channels first."""
    constant = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if (node.op_type == "Conv" or (node.op_type == "Gemm" and _is_transposed(node)))
        and node.input[1] in constant
    ]


def _is_transposed(gemm: Any) -> bool:
    return any(item.name == "transB" and item.i == 1 for item in gemm.attribute)


def _give_biases(model: Any) -> None:
    """Add a bias of zeros where a layer has none: the correction of what quantisation moves needs a place."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in _layers(model):
        if len(node.input) == 2:
            name = f"{node.input[1]}_zero_bias"
            channels = weights[node.input[1]].dims[0]
            model.graph.initializer.append(numpy_helper.from_array(np.zeros(channels, np.float32), name))
            node.input.append(name)


def _input_means(model: Any, x: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Per layer the mean of its float input over ``x`` (and over the map, for a convolution): one per channel."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    input_name, outputs = model.graph.input[0].name, {output.name for output in model.graph.output}
    inputs = {node.input[0] for node in _layers(model)}
    names = sorted(inputs - {input_name})
    for name in names:
        if name not in outputs:
            tapped.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(
        tapped.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    sums: dict[str, NDArray[np.float64]] = {}
    for batch in _batches(x):
        values = dict(zip(names, session.run(names, {input_name: batch}), strict=True))
        if input_name in inputs:
            values[input_name] = batch
        for name, value in values.items():
            rows = value.mean(axis=(2, 3), dtype=np.float64) if value.ndim == 4 else value.astype(np.float64)
            sums[name] = sums.get(name, 0) + rows.sum(axis=0)
    return {name: total / len(x) for name, total in sums.items()}


def _correct_biases(quantised: Any, model: Any, means: dict[str, NDArray[np.float64]]) -> None:
    """Add to each int32 bias what rounding the weights takes away on average: ``(W - W_int8) @ E[x]``.

    Zeros around a map are left out of account.
    """
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    grids = {
        node.output[0]: node.input for node in quantised.graph.node if node.op_type == "DequantizeLinear"
    }
    after = {node.name: node for node in quantised.graph.node}
    for before in _layers(model):
        _, weight, bias = after[before.name].input
        if weight not in grids:
            continue  # kept in float
        exact = floats[before.input[1]].astype(np.float64)
        steps, scale, _ = (numpy_helper.to_array(constants[name]) for name in grids[weight])
        lost = exact - steps * scale.astype(np.float64).reshape(-1, *[1] * (exact.ndim - 1))
        lost = lost.sum(axis=tuple(range(2, lost.ndim)))
        mean = means[before.input[0]]
        groups = len(mean) // lost.shape[1]
        per_output = np.repeat(mean.reshape(groups, -1), len(lost) // groups, axis=0)
        name, bias_scale, _ = grids[bias]
        moved = (lost * per_output).sum(axis=1) / numpy_helper.to_array(constants[bias_scale])
        corrected = numpy_helper.to_array(constants[name]) + np.rint(moved)
        constants[name].CopyFrom(numpy_helper.from_array(corrected.astype(np.int32), name))


def _grid(path: Path, tensor: str) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Scale and zero point of ``tensor``; None where it is not quantised."""
    graph = onnx.load(path).graph
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] == tensor:
            return _node_grid(graph, node)
    return None


def _node_grid(graph: Any, node: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scale and zero point of a node that quantises, or takes that back."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    return numpy_helper.to_array(constants[node.input[1]]), numpy_helper.to_array(constants[node.input[2]])
