"""Malformed requests for ``benchmarks/serving.py``: every one has a defect, of its structure or of single bytes."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from erde.serving.messages import CLASSES

PATIENCE = 10.0  # seconds until a reply is overdue


def malformed_http(generator: np.random.Generator) -> tuple[bytes, bool]:
    """A request with defects: of the JSON's structure, of its numbers, of lengths, or of single bytes.

    And whether it is complete, so that it has to be answered.
    """
    value: Any = {
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [7] * 3072}],
        "parameters": {"operating_point": "no-exit"},
    }
    binary = generator.random() < 0.5
    if binary:
        value["inputs"][0].pop("data")
        value["inputs"][0]["parameters"] = {"binary_data_size": 3072}
    for _ in range(generator.integers(1, 4)):
        value = _damaged(value, generator)
    text = json.dumps(value).encode()
    body = text + (generator.bytes(int(generator.choice([3072, 0, 3071, 9000]))) if binary else b"")
    lengths: list[Any] = [len(text), len(text) - 1, 0, -1, 10**30, "x"]
    head = "POST /v2/models/a/infer HTTP/1.1\r\nHost: a\r\n"
    if binary:
        head += f"Inference-Header-Content-Length: {lengths[int(generator.integers(len(lengths)))]}\r\n"
    missing = int(generator.choice([0, 0, 0, 1, -1]))
    head += f"Content-Length: {len(body) + missing}\r\nConnection: close\r\n\r\n"
    request = head.encode() + body
    scrambled = _scrambled(request, generator)
    return scrambled, missing <= 0 and scrambled == request


def malformed_grpc(generator: np.random.Generator) -> bytes:
    """A message with defects: of fields, or of single bytes."""
    message = CLASSES["ModelInferRequest"](model_name="a")
    tensor = message.inputs.add(name="images", datatype="UINT8", shape=[1, 32, 32, 3])
    message.raw_input_contents.append(b"7" * 3072)
    for _ in range(generator.integers(1, 4)):
        match int(generator.integers(6)):
            case 0:
                tensor.shape.append(int(generator.choice([-1, 0, 2**62])))
            case 1:
                tensor.datatype = str(generator.choice(["", "BYTES", "FP32", "x" * 1000]))
            case 2:
                tensor.name = "\x00" * int(generator.integers(100))
            case 3:
                message.raw_input_contents.append(generator.bytes(int(generator.integers(5000))))
            case 4:
                message.parameters["max_risk"].string_param = "1"
            case _:
                message.inputs.add(name="images", datatype="UINT8", shape=[10**9] * 8)
    return _scrambled(message.SerializeToString(), generator)


def _damaged(value: Any, generator: np.random.Generator) -> Any:
    """A JSON value of which a part, however deep, is gone, doubled, or something else."""
    if isinstance(value, dict | list) and value and generator.random() < 0.7:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[int(generator.integers(len(keys)))]
        if generator.random() < 0.2:
            del value[key]
        else:
            value[key] = _damaged(value[key], generator)
        return value
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    others = [
        None,
        True,
        -1,
        2**80,
        1e308,
        float("nan"),
        "",
        "\ud800",
        [],
        {},
        [value, value],
        {"x": value},
        deep,
    ]
    return others[int(generator.integers(len(others)))]


def _scrambled(message: bytes, generator: np.random.Generator) -> bytes:
    """In a third of the cases: bytes changed, cut off at the end, or added."""
    if generator.random() > 1 / 3:
        return message
    scrambled = bytearray(message)
    for _ in range(int(generator.integers(1, 20))):
        scrambled[int(generator.integers(len(scrambled)))] = int(generator.integers(256))
    return bytes(scrambled[: int(generator.integers(1, len(scrambled)))]) + generator.bytes(
        int(generator.integers(3))
    )


def over_http(port: int, request: bytes, complete: bool) -> str:
    """The status of the reply, ``none`` for a request that the server may go on waiting for."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE if complete else 0.05) as connection:
        with contextlib.suppress(ConnectionError):  # closed before all was sent
            connection.sendall(request)
        try:
            while part := connection.recv(65536):
                received += part
        except (TimeoutError, ConnectionError):
            pass
    return received.split(b" ", 2)[1].decode() if received else "overdue" if complete else "none"


def over_grpc(infer: Callable[..., bytes], message: bytes) -> str:
    """The name of the reply's status."""
    try:
        infer(message, timeout=PATIENCE)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"
