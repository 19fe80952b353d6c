"""Small changes to exported ONNX graphs that leave every number as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import helper

BLOCKED = "features_in_blocked"


def strip_metadata(model: Any) -> None:
    """Drop the exporter's notes: source paths and stack traces are nobody's business, and size."""
    graph = model.graph
    del model.metadata_props[:]
    del graph.metadata_props[:]
    for group in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for item in group:
            del item.metadata_props[:]
            item.doc_string = ""


def block_input(model: Any) -> None:
    """Let a stage's feature map enter through a 1x1 max pooling, which changes nothing, where that is quicker.

    On a CPU ONNX Runtime computes convolutions in a blocked layout (NCHWc), fused with the addition and the ReLU that
    follow, if what is added has that layout too. The input of a graph has not; what a pooling gives has. Without
    this, a stage that begins with a residual block takes up to a quarter more time than the same block amid a network.
    """
    graph = model.graph
    source = graph.input[0]
    users = [node for node in graph.node if source.name in node.input]
    if len(source.type.tensor_type.shape.dim) != 4 or all(node.op_type == "Conv" for node in users):
        return
    rename(graph, {source.name: BLOCKED})
    graph.node.insert(
        0, helper.make_node("MaxPool", [source.name], [BLOCKED], "block_input", kernel_shape=[1, 1])
    )


def unblock_input(model: Any) -> None:
    """Undo :func:`block_input`: int8 kernels have no blocked layout."""
    graph = model.graph
    first = next((node for node in graph.node if list(node.output) == [BLOCKED]), None)
    if first is None:
        return
    graph.node.remove(first)
    rename(graph, {BLOCKED: first.input[0]})


def rename(graph: Any, names: Mapping[str, str]) -> None:
    """Rename tensors between nodes; inputs and outputs of the graph keep their names."""
    for node in graph.node:
        for tensors in (node.input, node.output):
            for place, name in enumerate(tensors):
                tensors[place] = names.get(name, name)


def _counting_from(entry: str, node: Any, graph: Any) -> Any:
    """``node``, or where it counts the images of the graph's input, the same for ``entry``."""
    if node.op_type != "Shape" or node.input[0] != graph.input[0].name:
        return node
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if given != {"start": 0, "end": 1}:
        return node
    return helper.make_node("Shape", [entry], node.output, node.name, **given)


def cut_graph(model: Any, entry: tuple[str, str], outputs: Mapping[str, str]) -> Any:
    """The part of ``model`` that computes ``outputs`` from the value ``entry``; both with a name and a new name.

    All of them are inputs or outputs of ``model``, whose graph has no graphs inside. The number of images, which ``model``
    may read from its input wherever it needs it, is read from ``entry``.
    """
    graph = model.graph
    steps = [_counting_from(entry[0], node, graph) for node in graph.node]
    known = {value.name: value for value in (*graph.input, *graph.output)}
    renamed = {entry[0]: entry[1], **outputs}
    makers = {name: node for node in steps for name in node.output}
    needed, waiting = set(), [name for name in outputs if name != entry[0]]
    while waiting:
        name = waiting.pop()
        if name in makers and name != entry[0] and name not in needed:
            needed.update(makers[name].output)
            waiting += makers[name].input
    nodes = [node for node in steps if not needed.isdisjoint(node.output)]
    used = {name for node in nodes for name in node.input}

    def value(name: str) -> Any:
        copied = onnx.ValueInfoProto()
        copied.CopyFrom(known[name])
        copied.name = renamed[name]
        return copied

    cut = helper.make_graph(
        nodes,
        graph.name,
        [value(entry[0])],
        [value(name) for name in outputs],
        [tensor for tensor in graph.initializer if tensor.name in used],
    )
    rename(cut, renamed)
    return helper.make_model(cut, opset_imports=model.opset_import, ir_version=model.ir_version)
