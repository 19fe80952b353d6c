"""Check a stage's file before ONNX Runtime opens it, without the onnx package.

A seal says nothing about its author. A stranger's graph is data, but for what ONNX allows and no stage needs:
weights in other files, which no checksum covers; loops and branches, which may never end; functions that call
functions, which may unfold without bound; operators that end the process. They are refused here, and so is what
ONNX Runtime's protobuf would read differently. How long a graph without loops takes is not looked at.

Source of the numbers: onnx.proto (github.com/onnx/onnx), and protobuf's encoding (protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import mmap
from collections.abc import Collection
from pathlib import Path

from erde.common.errors import UserError, in_one_line

# Operators of the standard domain (``ai.onnx``), the only one that a stage may use: those that torch's exporter can give
# (torchlib of torch 2.13 and onnxscript 0.7.2), which the shipped backbones and timm's models are made of, those that
# int8 files add, and their nearest relatives. Left out are control flow, sequences, text, chance, windows and transforms
# of signals, losses, and what gives a number of rows that depends on the values.
TABLE = {
    "element by element": "Abs Acos Acosh Add Asin Asinh Atan Atanh BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike "
    "Ceil Clip Cos Cosh Div Erf Exp Floor Identity Log Max Mean Min Mod Mul Neg Pow Reciprocal Round Sign Sin Sinh Sqrt Sub "
    "Sum Tan Tanh",
    "comparisons": "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Where Xor",
    "activations": "Celu Elu Gelu HardSigmoid HardSwish LeakyRelu LogSoftmax Mish PRelu Relu Selu Sigmoid Softmax Softplus "
    "Softsign Swish ThresholdedRelu",
    "layers": "Attention AveragePool BatchNormalization Conv ConvTranspose Einsum GRU Gemm GlobalAveragePool GlobalMaxPool "
    "GridSample GroupNormalization InstanceNormalization LRN LSTM LayerNormalization LpNormalization LpPool MatMul MaxPool "
    "RMSNormalization RotaryEmbedding",
    "reductions": "ArgMax ArgMin CumSum ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
    "ReduceProd ReduceSum ReduceSumSquare TopK",
    "shapes and places": "Col2Im Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather GatherElements "
    "GatherND Pad Range Reshape Resize ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile Transpose "
    "Trilu Unsqueeze",
    "int8": "ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul QuantizeLinear",
}
OPERATORS = frozenset(name for names in TABLE.values() for name in names.split())
DOMAINS = ("", "ai.onnx")
# Fields of messages that are looked at: a stage of 10,000 nodes has some 300,000, and a second goes through a million.
MAX_FIELDS = 3_000_000

# Of each kind of message the fields to look into, by number; all others are skipped.
INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {4: "operator", 5: "attribute", 7: "domain"},
    "attribute": {
        5: "tensor",
        6: "subgraph",
        10: "tensor",
        11: "subgraph",
        22: "sparse tensor",
        23: "sparse tensor",
    },
    "tensor": {13: "external data", 14: "external data"},
}
REFUSED = {
    "external data": "keeps weights in another file",
    "sparse tensor": "has sparse weights",
    "subgraph": "has a loop or a branch",
    "function": "has functions of its own",
    "training": "has steps of a training",
}
NAMES: dict[str, Collection[str]] = {"operator": OPERATORS, "domain": DOMAINS}
# Protobuf keeps 32 bits of a key and drops the rest.
MAX_KEY = 2**32 - 1
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5


class _MalformedError(ValueError):
    pass


def check_graph_file(path: Path) -> None:
    """Refuse a stage that could do more than compute.

    Raises:
        UserError: what is wrong with it, in one line.
    """
    refused = refusal(path)
    if refused is not None:
        raise UserError(f"{path} {refused}, which no stage needs: do not use this bundle")


def refusal(path: Path) -> str | None:
    """Why a file could not be a stage, as the end of a sentence; None where it could.

    Raises:
        UserError: the file is no graph.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _first_refused(content)
    except (_MalformedError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(
            f"ONNX Runtime cannot load {path}: it is not a graph, or not a whole one: copy the bundle again"
        ) from error


def _first_refused(content: mmap.mmap) -> str | None:
    """The first fault of a serialized model; messages wait in a list, so depth does not matter."""
    waiting = [("model", 0, len(content))]
    fields = 0
    while waiting:
        kind, at, end = waiting.pop()
        while at < end:
            fields += 1
            if fields > MAX_FIELDS:
                return f"has more than {MAX_FIELDS:,} entries"
            key, at = _varint(content, at, end)
            number, wire = key >> 3, key & 7
            inside = INSIDE[kind].get(number)
            value = 1
            start = at
            if wire == VARINT:
                value, at = _varint(content, at, end)
            elif wire == LENGTH:
                length, start = _varint(content, at, end)
                at = start + length
            elif wire in (EIGHT_BYTES, FOUR_BYTES):
                at += 8 if wire == EIGHT_BYTES else 4
            else:  # groups, which ONNX does not use
                raise _MalformedError
            if at > end or not number or key > MAX_KEY:
                raise _MalformedError
            if inside in REFUSED and value:  # a data location of 0 is the usual one
                return REFUSED[inside]
            if inside is None or wire != LENGTH:
                continue
            if inside in NAMES:
                name = content[start : min(at, start + 100)].decode("utf-8", "replace")
                if name not in NAMES[inside]:
                    kind = "operator" if inside == "operator" else "operators of the domain"
                    return f"has the {kind} '{in_one_line(name)}'"
            elif inside not in REFUSED:
                waiting.append((inside, start, at))
    return None


def _varint(content: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _MalformedError
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at
    raise _MalformedError
