"""Multiply-accumulates and parameters of an ONNX graph, from the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from erde.bundle.graph_check import DOMAINS
from erde.chains.onnx_files import copied, image_dependent, import_onnx, open_session, tensors
from erde.common.errors import UserError

Shapes = dict[str, tuple[int, ...]]
# Weights up to this many elements may be shapes, axes and the like, which shape inference needs to know.
_SMALL = 1024
# Place of the weights, or of the second factor, among the inputs.
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
_PRODUCTS = {"MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3}
_UNCOUNTED = ("Attention", "DeformConv", "GRU", "LSTM", "RNN")
# Inputs that are measured in training and not learned, or say how numbers are stored.
_NO_PARAMETERS = {
    "BatchNormalization": (3, 4),
    "DequantizeLinear": (1, 2),
    "QuantizeLinear": (1, 2),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "ConvInteger": (2, 3),
    "MatMulInteger": (2, 3),
    "Resize": (1, 2, 3),
}


def count_macs(model: Any) -> tuple[int, tuple[str, ...]]:
    """MACs for one image, of convolutions and matrix products; and operators with others, which are not counted.

    Batch norm, activations, pooling and resizing count nothing, as is the custom of the field.

    Args:
        model: a model of the onnx package with one input.
    """
    shapes = shapes_for_one_image(model)
    dependent = image_dependent(model)
    macs = 0
    uncounted = set()
    for node in model.graph.node:
        if not dependent.intersection(node.input):
            continue  # computed once, when the file is loaded
        if node.domain not in DOMAINS or node.op_type in _UNCOUNTED:
            uncounted.add(node.op_type)
            continue
        try:
            macs += _macs_of(node, shapes)
        except (KeyError, ValueError):  # a shape that nobody knows, an equation that is not read here
            uncounted.add(node.op_type)
    return macs, tuple(sorted(uncounted))


def _macs_of(node: Any, shapes: Shapes) -> int:
    inputs, kind = node.input, node.op_type
    if kind in _CONVOLUTIONS:
        return math.prod(shapes[node.output[0]]) * math.prod(shapes[inputs[_CONVOLUTIONS[kind]]][1:])
    if kind == "ConvTranspose":
        return math.prod(shapes[inputs[0]]) * math.prod(shapes[inputs[1]][1:])
    if kind in _PRODUCTS:
        # A vector on the right is summed over like a last axis, and one axis fewer comes out.
        return math.prod(shapes[node.output[0]]) * shapes[inputs[0]][-1]
    if kind == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return math.prod(shapes[node.output[0]]) * shapes[inputs[0]][0 if transposed else 1]
    if kind == "Einsum":
        return _macs_of_einsum(node, shapes)
    return 0


def _macs_of_einsum(node: Any, shapes: Shapes) -> int:
    """A product of two tensors: one MAC for every combination of the indices."""
    equation = next(attribute.s for attribute in node.attribute if attribute.name == "equation").decode()
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if len(terms) != 2 or "." in equation:
        raise ValueError(equation)
    sides: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        sides.update(zip(term, shapes[name], strict=True))
    return math.prod(sides.values())


def count_parameters(model: Any) -> int:
    """Numbers that were learned: weights and biases, each counted once."""
    onnx = import_onnx()
    constants = tensors(model)
    learned: set[str] = set()
    for node in model.graph.node:
        left_out = _NO_PARAMETERS.get(node.op_type, ())
        learned.update(name for place, name in enumerate(node.input) if place not in left_out)
    whole = {onnx.TensorProto.INT64, onnx.TensorProto.BOOL}  # shapes, axes, masks
    return sum(
        math.prod(tensor.dims)
        for name, tensor in constants.items()
        if name in learned and len(tensor.dims) and tensor.data_type not in whole
    )


def shapes_for_one_image(model: Any) -> Shapes:
    """Shapes of the tensors in a graph for a batch of 1, as far as they are known.

    By shape inference; where that leaves something open that matters here, by running the graph once.
    """
    onnx = import_onnx()
    shapes: Shapes = {name: tuple(tensor.dims) for name, tensor in tensors(model).items()}
    skeleton = _without_large_weights(model)
    _set_batch_of_one(skeleton.graph.input[0])
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    except Exception:  # of its own kinds, for graphs that it finds inconsistent
        inferred = skeleton.graph
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sides = [side.dim_value for side in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.HasField("shape") and all(side > 0 for side in sides):
            shapes[value.name] = tuple(sides)
    computing = {*_CONVOLUTIONS, *_PRODUCTS, "ConvTranspose", "Gemm", "Einsum", "Reshape", "Concat"}
    dependent = image_dependent(model)
    missing = {
        name
        for node in model.graph.node
        if node.op_type in computing and dependent.intersection(node.input)
        for name in (*node.input, *node.output)
        if name and name not in shapes
    }
    if missing:
        shapes.update(_shapes_by_running(model, sorted(missing)))
    return shapes


def _shapes_by_running(model: Any, names: Sequence[str]) -> Shapes:
    onnx = import_onnx()
    exposed = copied(model)
    _set_batch_of_one(exposed.graph.input[0])
    kept = [value for value in exposed.graph.output if value.name not in names]
    del exposed.graph.output[:]
    exposed.graph.output.extend(kept)
    # Types are found out by ONNX Runtime itself.
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        session = open_session(exposed, Path("the graph"))
        source = session.get_inputs()[0]
        if not all(isinstance(side, int) for side in source.shape):
            return {}
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
        zeros = np.zeros(source.shape, dtype=kinds[source.type])
        results = session.run(list(names), {source.name: zeros})
    except (UserError, KeyError, RuntimeError, ValueError):
        return {}
    except Exception:  # ONNX Runtime raises types of its own
        return {}
    return {name: tuple(np.shape(result)) for name, result in zip(names, results, strict=True)}


def _set_batch_of_one(value: Any) -> None:
    sides = value.type.tensor_type.shape.dim
    if len(sides):
        sides[0].dim_value = 1


def _without_large_weights(model: Any) -> Any:
    """A copy in which large weights are inputs: shape inference copies and serialises what it gets."""
    onnx = import_onnx()
    skeleton = onnx.ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    graph = skeleton.graph
    graph.name = "shapes"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for value in model.graph.output:
        graph.output.append(onnx.ValueInfoProto(name=value.name))
        graph.output[-1].type.tensor_type.elem_type = value.type.tensor_type.elem_type
    return skeleton
