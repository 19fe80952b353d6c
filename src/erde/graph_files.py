"""What may stand in a stage's file, looked at before ONNX Runtime does and without the onnx package.

A seal says nothing about its author. A graph of a stranger is data, but for three things that ONNX allows and no
stage needs: weights in other files, which no checksum covers; loops and branches, which may never end; and functions
that call functions, which may unfold without bound. They are refused here.

Source of the numbers: onnx.proto (github.com/onnx/onnx), and protobuf's encoding (protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import mmap
from pathlib import Path

from erde.errors import UserError

# Of each kind of message the fields to look into, by number; all others are skipped.
INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "subgraph",
        10: "tensor",
        11: "subgraph",
        22: "sparse tensor",
        23: "sparse tensor",
    },
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external data", 14: "external data"},
}
REFUSED = {
    "external data": "keeps weights in another file",
    "subgraph": "has a loop or a branch",
    "function": "has functions of its own",
}
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5


class _MalformedError(ValueError):
    pass


def check_graph_file(path: Path) -> None:
    """Refuse a stage that could do more than compute.

    Raises:
        UserError: what is wrong with it, in one line.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = _first_refused(content)
    except (_MalformedError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f"ONNX Runtime cannot load {path}: it is not a graph") from error
    if found is not None:
        raise UserError(f"{path} {REFUSED[found]}, which no stage needs: do not use this bundle")


def _first_refused(content: mmap.mmap) -> str | None:
    """The first of REFUSED in a serialized model; messages wait in a list, so depth does not matter."""
    waiting = [("model", 0, len(content))]
    while waiting:
        kind, at, end = waiting.pop()
        while at < end:
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
            if at > end or not number:
                raise _MalformedError
            if inside in REFUSED and value:  # a data location of 0 is the usual one
                return inside
            if inside is not None and inside not in REFUSED and wire == LENGTH:
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
