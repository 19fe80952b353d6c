"""The batch axis of a foreign graph: made open where it is fixed, and checked: no image's answer may depend on another's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from erde.chains.onnx_files import (
    add_constant,
    copied,
    image_dependent,
    import_onnx,
    keep_output,
    open_session,
    tensors,
)
from erde.chains.onnx_macs import shapes_for_one_image
from erde.common.errors import UserError, in_one_line

PROBES = 3
BATCH_AXIS = "batch"
# Largest difference between an image alone and in a batch, relative to the outputs' spread: the libraries add in
# another order. Numbers that are rounded inside (float16, int8) may be rounded to a neighbour.
TOLERANCE, ROUNDED_TOLERANCE = 1e-2, 5e-2

Verdict = Literal["equal", "different", "fails"]


def probe_images(shape: Sequence[int], count: int = PROBES, seed: int = 16) -> NDArray[np.uint8]:
    """Random images uint8 (N, H, W, C) that are smooth as photographs are; noise is too far from what networks know."""
    height, width, channels = shape
    generator = np.random.default_rng(seed)
    images = np.zeros((count, height, width, channels))
    side = 2
    while side <= 2 * max(height, width):
        for image in images:
            for channel in range(channels):
                noise = generator.standard_normal((min(side, height), min(side, width)))
                plane = Image.fromarray(noise.astype(np.float32)).resize(
                    (width, height), Image.Resampling.BILINEAR
                )
                # Each octave half as strong as the one before, about as in photographs.
                image[..., channel] += np.asarray(plane) / side
        side *= 2
    images = (images - images.mean()) / max(float(images.std()), 1e-6)
    pixels: NDArray[np.uint8] = np.clip(np.round(images * 60 + 115), 0, 255).astype(np.uint8)
    return pixels


def run_one_by_one(
    session: onnxruntime.InferenceSession, x: NDArray[Any], path: Path, names: Sequence[str] | None = None
) -> list[NDArray[Any]]:
    """The outputs for every image alone, put together; ``path`` names the network in errors."""
    source = session.get_inputs()[0].name
    rows = []
    for start in range(len(x)):
        try:
            rows.append(session.run(names, {source: x[start : start + 1]}))
        except Exception as error:  # ONNX Runtime raises types of its own
            raise UserError(
                f"{path} cannot be run on an image of shape {x.shape[1:]}: {in_one_line(str(error))}"
            ) from error
    return [
        np.concatenate(parts) if all(np.ndim(part) for part in parts) else np.stack(parts)
        for parts in zip(*rows, strict=True)
    ]


def open_batch(model: Any, x: NDArray[Any], alone: NDArray[Any], path: Path) -> tuple[Any, bool]:
    """``model`` with a batch axis of any length; or with one of 1, and True, where the graph cannot be so.

    Args:
        model: a graph with one input and one output.
        x: probes as its input takes them.
        alone: its outputs for each of them alone.

    Raises:
        UserError: an open batch axis, but answers that depend on the other images.
    """
    if any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node):
        # It rounds by the range of the whole batch.
        return _with_batch(model, 1), True
    declared_open = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 0
    as_it_is = _with_batch(model, None)
    verdict = _compare(as_it_is, x, alone, path)
    if verdict == "equal":
        return as_it_is, False
    opened = _with_batch(model, None)
    _open_constants(opened, model)
    if _compare(opened, x, alone, path) == "equal":
        keep_output(opened, opened.graph.output[0].name)  # without the shapes that were replaced
        return opened, False
    if declared_open and verdict == "different":
        raise UserError(
            f"{path} gives an image other answers in other batches, expected one answer: export it in evaluation mode "
            "(model.eval()) or with a batch of 1"
        )
    return _with_batch(model, 1), True


def tolerance_of(model: Any) -> float:
    """See ``TOLERANCE``."""
    rounding = {"QuantizeLinear", "QLinearConv", "QLinearMatMul"}
    half = any(tensor.data_type in (10, 16) for tensor in model.graph.initializer)  # float16, bfloat16
    return (
        ROUNDED_TOLERANCE if half or any(node.op_type in rounding for node in model.graph.node) else TOLERANCE
    )


def are_close(values: NDArray[Any], expected: NDArray[Any], tolerance: float) -> bool:
    """Equal shapes, and no difference above ``tolerance`` times the spread of ``expected``."""
    if values.shape != expected.shape:
        return False
    expected = expected.astype(np.float64)
    scale = max(float(expected.std()), 0.1 * float(np.abs(expected).max(initial=0)))
    return float(np.abs(values - expected).max(initial=0)) <= tolerance * scale


def _compare(model: Any, x: NDArray[Any], alone: NDArray[Any], path: Path) -> Verdict:
    try:
        session = open_session(model, path)
        together = session.run(None, {session.get_inputs()[0].name: x})[0]
    except Exception:  # a shape that holds for one image only
        return "fails"
    if np.shape(together) != alone.shape:
        return "fails"
    return "equal" if are_close(together, alone, tolerance_of(model)) else "different"


def _with_batch(model: Any, length: int | None) -> Any:
    """A copy with a batch axis of ``length``, or an open one."""
    model = copied(model)
    for value in (*model.graph.input, *model.graph.output):
        sides = value.type.tensor_type.shape.dim
        if not len(sides):
            continue
        if length is None:
            sides[0].dim_param = BATCH_AXIS
        else:
            sides[0].dim_value = length
    return model


def _open_constants(model: Any, original: Any) -> None:
    """Let ``model``, a copy of ``original``, follow the batch where it was written for one image.

    Constant new shapes get a free first axis. Constants that are put beside an image's own numbers (the class token of a
    vision transformer) are repeated.
    """
    make_node = import_onnx().helper.make_node
    constants, dependent = tensors(original), image_dependent(original)
    shapes = shapes_for_one_image(original)
    nodes = []
    for index, node in enumerate(model.graph.node):
        if node.op_type == "Reshape" and node.input[0] in dependent and node.input[1] in constants:
            shape = shapes.get(node.output[0])
            if shape:
                new = np.array([-1, *shape[1:]], dtype=np.int64)
                node.input[1] = add_constant(model, f"open_shape_{index}", new)
        if node.op_type == "Concat" and dependent.intersection(node.input):
            along = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
            image = next(name for name in node.input if name in dependent)
            for place, name in enumerate(node.input):
                sides = () if name in dependent else shapes.get(name, ())
                if along == 0 or along == -len(sides) or not sides or sides[0] != 1:
                    continue
                rows, whole, wide = (f"open_{part}_{index}_{place}" for part in ("rows", "shape", "constant"))
                first = add_constant(model, f"open_first_{index}_{place}", np.array([0]))
                ones = add_constant(model, f"open_ones_{index}_{place}", np.ones(len(sides) - 1, np.int64))
                nodes += [
                    make_node("Shape", [image], [f"{rows}_all"]),
                    make_node("Gather", [f"{rows}_all", first], [rows]),
                    make_node("Concat", [rows, ones], [whole], axis=0),
                    make_node("Expand", [name, whole], [wide]),
                ]
                node.input[place] = wide
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
