"""Small changes to exported ONNX graphs that leave every number as it is."""

from __future__ import annotations

from typing import Any

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
    for node in users:
        for place, name in enumerate(node.input):
            if name == source.name:
                node.input[place] = BLOCKED
    graph.node.insert(
        0, helper.make_node("MaxPool", [source.name], [BLOCKED], "block_input", kernel_shape=[1, 1])
    )


def unblock_input(model: Any) -> None:
    """Undo :func:`block_input`: int8 kernels have no blocked layout."""
    graph = model.graph
    first = next((node for node in graph.node if list(node.output) == [BLOCKED]), None)
    if first is None:
        return
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == BLOCKED:
                node.input[place] = first.input[0]
    graph.node.remove(first)
