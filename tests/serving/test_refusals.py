"""Bad requests: one line for the client, never a traceback, never a server that is gone."""

from __future__ import annotations

import io
import json
import random
import socket
import struct
import tracemalloc
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from erde.runtime import Session
from erde.serving.errors import RequestError
from erde.serving.messages import CLASSES, SERVICE
from erde.serving.tensors import Tensor, read_images
from tests.helpers.served import Reply, Served, as_json, some_images

IMAGES = some_images(2)
LENGTH = "Inference-Header-Content-Length"


def tensor(**changes: Any) -> dict[str, Any]:
    given = {**as_json(IMAGES)["inputs"][0], **changes}
    return {"inputs": [{key: value for key, value in given.items() if value is not None}]}


def ask(server: Served, content: bytes, method: str = "ModelInfer") -> bytes:
    """Bytes as a gRPC request."""
    with grpc.insecure_channel(server.grpc) as channel:
        return bytes(channel.unary_unary(f"/{SERVICE}/{method}")(content, timeout=30))


def message(**changes: Any) -> Any:
    """A request in gRPC's form, a good one but for the changes."""
    given = {
        "model_name": "a",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [2, 8, 8, 3]}],
        "raw_input_contents": [IMAGES.tobytes()],
    }
    return CLASSES["ModelInferRequest"](**{**given, **changes})


def is_well(server: Served, session: Session) -> None:
    reply = server.infer(as_json(IMAGES))
    assert reply.status == 200
    assert reply.json["outputs"][0]["data"] == session.predict(IMAGES).labels.tolist()


def one_line(reply: Reply) -> str:
    assert list(reply.json) == ["error"]
    text = str(reply.json["error"])
    assert text.isprintable()
    assert 10 < len(text) <= 600
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (json.dumps(as_json(IMAGES)).encode()[:-20], "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "not as the protocol has it"),
        ({}, "inputs"),
        ({"inputs": []}, "0 inputs, expected one"),
        ({"inputs": as_json(IMAGES)["inputs"] * 2}, "2 inputs, expected one"),
        ({"inputs": "images"}, "inputs"),
        (as_json(IMAGES, sequence=1), "sequence"),
        (as_json(IMAGES, id=7), "id"),
        (as_json(IMAGES, parameters={"max_risks": 0.1}), "did you mean 'max_risk'"),
        (as_json(IMAGES, parameters={"operating_point": 3}), "not a text"),
        (as_json(IMAGES, parameters={"operating_point": "early", "max_risk": 0.1}), "not both"),
        (as_json(IMAGES, parameters={"max_risk": 0.001}), "risk-1 (0.01), risk-5 (0.05)"),
        (as_json(IMAGES, parameters={"max_risk": "1%"}), "not a finite number"),
        (as_json(IMAGES, parameters={"max_exit": -1}), "exits 0 to 2"),
        (as_json(IMAGES, parameters={"max_exit": True}), "not a whole number"),
        (as_json(IMAGES, parameters={"max_exit": 1.0}), "not a whole number"),
        (as_json(IMAGES, parameters={"max_macs": 3}), "the first exit already takes 100"),
        (as_json(IMAGES, parameters={"max_macs": 10**400}), "not a finite number"),
        (as_json(IMAGES, parameters={"deadline_ms": float("nan")}), "not a finite number"),
        (as_json(IMAGES, parameters={"deadline_ms": 0}), "allow more time"),
        (as_json(IMAGES, parameters={"binary_data_output": 1}), "not true or false"),
        (as_json(IMAGES, outputs=[{"name": "label"}]), "did you mean 'labels'"),
        (
            as_json(IMAGES, outputs=[{"name": "labels", "parameters": {"classification": 3}}]),
            "classification",
        ),
        (tensor(name="input"), "no input 'input'"),
        (tensor(datatype="FP32"), "'FP32'"),
        (tensor(datatype="uint8"), "'uint8'"),
        (tensor(shape=[2, 3, 8, 8]), "expected UINT8 of shape (B, 8, 8, 3)"),
        (tensor(shape=[384]), "expected UINT8 of shape (B, 8, 8, 3)"),
        (tensor(shape=[-2, 8, 8, 3]), "expected UINT8 of shape"),
        (tensor(shape=[-1, 8, 8, 3]), "expected UINT8 of shape"),
        (tensor(shape=[2**62, 8, 8, 3]), "at most 8"),
        (tensor(shape=[10**30, 8, 8, 3]), "at most 8"),
        (tensor(shape=[1] * 100_000), "expected UINT8 of shape"),
        (tensor(shape=[9, 8, 8, 3], data=[0] * 9 * 192), "9 images, at most 8"),
        (tensor(shape=["2", 8, 8, 3]), "shape"),
        (tensor(shape=[2.5, 8, 8, 3]), "shape"),
        (tensor(shape=[3, 8, 8, 3]), "its shape needs 576"),
        (tensor(data=None), "neither"),
        (tensor(data="AAAA"), "neither"),
        (tensor(data=[256] * 384), "from 0 to 255"),
        (tensor(data=[-1] * 384), "from 0 to 255"),
        (tensor(data=[0.5] * 384), "from 0 to 255"),
        (tensor(data=["0"] * 384), "from 0 to 255"),
        (tensor(data=[10**30] * 384), "from 0 to 255"),
        (tensor(data=[None] * 384), "from 0 to 255"),
        (tensor(data=[True] + [1] * 383), "from 0 to 255"),
        (tensor(data=[[[1, 2], [3]], [[4], [5]]]), "from 0 to 255"),
        (tensor(data=[[0, 1], [2]]), "from 0 to 255"),
        (tensor(data=[]), "from 0 to 255"),
        (tensor(data=IMAGES.transpose(0, 3, 1, 2).tolist()), "flat or as nested as its shape"),
        (tensor(data=IMAGES.swapaxes(0, 1).tolist()), "flat or as nested as its shape"),
        (tensor(data=IMAGES.reshape(2, -1).tolist()), "flat or as nested as its shape"),
        (tensor(parameters={"shared_memory_region": "x"}), "shared_memory_region"),
        (tensor(parameters={"binary_data_size": 384}), "both data and binary_data_size"),
        (tensor(data=None, parameters={"binary_data_size": 384}), "up to the 0 bytes"),
        (tensor(datatype="BYTES", shape=[2], data=["$$", "AAAA"]), "base64"),
        (tensor(datatype="BYTES", shape=[2], data=["AAAA", "AAAA"]), "image 0 of the request"),
        (tensor(datatype="BYTES", shape=[2], data=["AAAA"]), "1 encoded images, its shape needs 2"),
        (tensor(datatype="BYTES", shape=[1, 2], data=["AAAA", "AAAA"]), "BYTES of shape (1, 2)"),
        (tensor(datatype="BYTES", shape=[], data=["AAAA"]), "BYTES of shape ()"),
        (tensor(name="\ud800\n\x1b[31m"), "\\ud800\\n\\x1b[31m"),
    ],
)
def test_a_bad_body_is_refused(server: Served, session_a: Session, body: Any, says: str) -> None:
    reply = server.infer(body)
    assert reply.status == 400
    assert says in one_line(reply)
    is_well(server, session_a)


@pytest.mark.parametrize("letter", ["a", b"a"])
def test_a_long_text_among_numbers_takes_no_memory(letter: str | bytes) -> None:
    data = [letter * 100_000, *[letter] * 383]
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="from 0 to 255"):
            read_images(Tensor("images", "UINT8", [2, 8, 8, 3], data), (8, 8, 3), 8)
        # NumPy would take 100,000 bytes or more for each element.
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("length", "extra", "changes", "says"),
    [
        ("-1", b"", {}, "expected a number up to"),
        ("1e3", b"", {}, "expected a number up to"),
        ("99999999999999999999999", b"", {}, "expected a number up to"),
        ("100000", b"", {}, "expected a number up to"),
        ("10", b"", {}, "not JSON"),
        (None, b"", {"binary_data_size": 10**12}, "up to the 384 bytes"),
        (None, b"", {"binary_data_size": -1}, "up to the 384 bytes"),
        (None, b"", {"binary_data_size": 383}, "1 bytes at the end"),
        (None, b"", {"binary_data_size": "384"}, "up to the 384 bytes"),
        (None, b"!", {"binary_data_size": 384}, "1 bytes at the end"),
        (None, b"!", {"binary_data_size": 385}, "has 385 bytes, its shape needs 384"),
    ],
)
def test_sizes_that_lie(
    server: Served, session_a: Session, length: str | None, extra: bytes, changes: dict[str, Any], says: str
) -> None:
    head = json.dumps(tensor(data=None, parameters=changes or {"binary_data_size": 384})).encode()
    headers = {LENGTH: str(len(head)) if length is None else length}
    reply = server.infer(head + IMAGES.tobytes() + extra, headers)
    assert reply.status == 400
    assert says in one_line(reply)
    is_well(server, session_a)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 encoded images, its shape needs 1"),
        (b"\x01", "longer than what was sent"),
        (struct.pack("<I", 2**32 - 1), "longer than what was sent"),
        (struct.pack("<I", 5) + b"1234", "longer than what was sent"),
        (struct.pack("<I", 4) + b"1234", "not a readable image"),
        (struct.pack("<I", 0) * 200_000, "2 encoded images, its shape needs 1"),
    ],
)
def test_encoded_images_whose_lengths_lie(server: Served, content: bytes, says: str) -> None:
    parameters = {"binary_data_size": len(content)}
    head = json.dumps(tensor(data=None, datatype="BYTES", shape=[1], parameters=parameters)).encode()
    reply = server.infer(head + content, {LENGTH: str(len(head))})
    assert reply.status == 400
    assert says in one_line(reply)


def test_an_image_with_too_many_pixels_is_not_decoded(server: Served) -> None:
    buffer = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(buffer, "PNG")
    content = struct.pack("<I", len(buffer.getvalue())) + buffer.getvalue()
    parameters = {"binary_data_size": len(content)}
    head = json.dumps(tensor(data=None, datatype="BYTES", shape=[1], parameters=parameters)).encode()
    reply = server.infer(head + content, {LENGTH: str(len(head))})
    assert reply.status == 400
    assert "13,000 x 13,000 pixels" in one_line(reply)


def test_bodies_that_are_too_large(server: Served, session_a: Session) -> None:
    reply = server.infer(b" " * (2**20 + 1))
    assert reply.status == 413
    assert "larger than 1,048,576 bytes" in one_line(reply)
    # Declared only: nothing is waited for. And without a declaration, as it comes.
    for head, body in (
        (b"Content-Length: 99999999999999\r\n", b""),
        (b"Transfer-Encoding: chunked\r\n", b"100000\r\n" + b" " * 2**20 + b"\r\n1\r\n \r\n"),
    ):
        with socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as raw:
            raw.sendall(b"POST /v2/models/a/infer HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n" + body)
            assert raw.recv(1000).startswith(b"HTTP/1.1 413 ")
    is_well(server, session_a)
    with pytest.raises(grpc.RpcError) as raised:
        ask(server, message(raw_input_contents=[bytes(2**20)]).SerializeToString())
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/page.html", 404),
        ("POST", "/", 405),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/b", 404),
        ("GET", "/v2/models/b/ready", 404),
        ("POST", "/v2/models/b/infer", 404),
        ("POST", "/v2/models/..%2Fa/infer", 404),
        ("POST", "/v2/models/a/versions/1/infer", 404),
        ("GET", "/v2/models/a/versions/1/ready", 404),
        ("GET", "/v2/models/a/infer", 405),
        ("DELETE", "/v2", 405),
    ],
)
def test_what_is_not_there(server: Served, method: str, path: str, status: int) -> None:
    reply = server.request(method, path)
    assert reply.status == status
    one_line(reply)


def test_a_compressed_body_is_refused(server: Served) -> None:
    reply = server.infer(b"\x1f\x8b", {"Content-Encoding": "gzip"})
    assert reply.status == 400
    assert "compressed" in one_line(reply)


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v2/models/a/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v2/models/a/infer HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n{",
        b"POST /v2/models/a/infer HTTP/1.1\r\nHost: x\r\nContent-Length: one\r\n\r\n{",
        b"POST /v2/models/a/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_clients_that_break_off(server: Served, session_a: Session, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as raw:
        raw.sendall(sent)
    is_well(server, session_a)


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /", b"a" * 65536),
        (b"GET / HTTP/1.1\r\nX: ", b"a" * 65536),
        (b"GET / HTTP/1.1\r\n", b"X: a\r\n" * 10000),
    ],
    ids=["url", "header", "headers"],
)
def test_a_head_without_an_end_is_refused(
    server: Served, session_a: Session, start: bytes, piece: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as raw:
        raw.sendall(start)
        # The answer may be lost with the connection.
        with pytest.raises(ConnectionError):
            raw.sendall(piece * 500)
    is_well(server, session_a)


@pytest.mark.parametrize("piece", [b"X: a\r\n" * 10000, b"a" * 65536], ids=["trailers", "trailer"])
def test_trailers_without_an_end_are_refused(server: Served, session_a: Session, piece: bytes) -> None:
    head = b"POST /v2/models/a/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as raw:
        raw.sendall(head + b"1\r\n{\r\n0\r\nX: ")
        with pytest.raises(ConnectionError):
            raw.sendall(piece * 500)
    is_well(server, session_a)


def test_small_parts_of_a_body_are_no_head(server: Served, session_a: Session) -> None:
    head = b"POST /v2/models/a/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = json.dumps(as_json(IMAGES)).encode().ljust(300_000)
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as raw:
        # 1.8 MB for 0.3 of body.
        raw.sendall(head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\nX: a\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 200 ")
    is_well(server, session_a)


def test_a_client_that_sends_too_slowly_loses_its_place(server: Served, session_a: Session) -> None:
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as raw:
        raw.sendall(b"POST /v2/models/a/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert raw.recv(1000).startswith(b"HTTP/1.1 408 ")
    is_well(server, session_a)


# ---------------------------------------------------------------- gRPC


def test_a_good_message(server: Served, session_a: Session) -> None:
    """With contents in fields, and numbers of every kind as parameters: tritonclient sends neither."""
    contents = {"uint_contents": IMAGES.ravel().tolist()}
    given = message(
        inputs=[{"name": "images", "datatype": "UINT8", "shape": [2, 8, 8, 3], "contents": contents}],
        raw_input_contents=[],
        parameters={
            "max_risk": {"double_param": 0.05},
            "max_macs": {"uint64_param": 250},
            "deadline_ms": {"double_param": 1e6},
            "max_exit": {"int64_param": 2},
        },
    )
    response = CLASSES["ModelInferResponse"].FromString(ask(server, given.SerializeToString()))
    assert response.parameters["operating_point"].string_param == "risk-5"
    labels = np.frombuffer(response.raw_output_contents[0], dtype=np.int64)
    assert labels.tolist() == session_a.predict(IMAGES, operating_point="risk-5", max_exit=1).labels.tolist()


INPUT = {"name": "images", "datatype": "UINT8", "shape": [2, 8, 8, 3]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"raw_input_contents": []}, "from 0 to 255"),
        ({"raw_input_contents": [b"1", b"2"]}, "2 raw_input_contents for 1 inputs"),
        ({"raw_input_contents": [b"1"]}, "has 1 bytes, its shape needs 384"),
        ({"inputs": []}, "1 raw_input_contents for 0 inputs"),
        ({"inputs": [{**INPUT, "shape": [-2, 8, 8, 3]}]}, "expected UINT8 of shape"),
        ({"inputs": [{**INPUT, "shape": [2**62, 8, 8, 3]}]}, "at most 8"),
        ({"inputs": [{**INPUT, "shape": [1] * 1000}]}, "expected UINT8 of shape"),
        ({"inputs": [{**INPUT, "datatype": "FP32"}]}, "'FP32'"),
        ({"inputs": [{**INPUT, "contents": {"uint_contents": [1]}}]}, "both contents"),
        (
            {"inputs": [{**INPUT, "parameters": {"shared_memory_region": {"string_param": "x"}}}]},
            "shared_memory",
        ),
        ({"parameters": {"priority": {"int64_param": 1}}}, "unknown parameter 'priority'"),
        ({"parameters": {"max_exit": {"double_param": 1.0}}}, "not a whole number"),
        ({"parameters": {"max_exit": {"bool_param": True}}}, "not a whole number"),
        ({"parameters": {"max_risk": {"double_param": float("nan")}}}, "not a finite number"),
        ({"parameters": {"max_risk": {}}}, "not a finite number"),
    ],
)
def test_a_bad_message_is_refused(
    server: Served, session_a: Session, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        ask(server, message(**changes).SerializeToString())
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert says in raised.value.details()
    is_well(server, session_a)


def test_bytes_that_are_no_message(server: Served, session_a: Session) -> None:
    for method in ("ModelInfer", "ModelMetadata", "ModelReady", "ServerLive"):
        with pytest.raises(grpc.RpcError) as raised:
            ask(server, b"\xff\xff\xff", method)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as raised:
        ask(server, b"", "RepositoryIndex")
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
    is_well(server, session_a)


# ---------------------------------------------------------------- at random


def test_damaged_requests_never_end_the_server(server: Served, session_a: Session) -> None:
    chance = random.Random(0)
    head = json.dumps(tensor(data=None, parameters={"binary_data_size": 384})).encode()
    good = [(json.dumps(as_json(IMAGES)).encode(), None), (head + IMAGES.tobytes(), len(head))]
    statuses = set()
    for _ in range(300):
        body, length = chance.choice(good)
        damaged = _damaged(body, chance)
        if length is not None and chance.random() < 0.3:
            length = chance.randrange(2 * length)
        reply = server.infer(damaged, {} if length is None else {LENGTH: str(length)})
        statuses.add(reply.status)
        assert reply.status == 200 or one_line(reply)
    # Some damage is to pixels only.
    assert statuses == {200, 400}
    is_well(server, session_a)


def test_damaged_messages_never_end_the_server(server: Served, session_a: Session) -> None:
    chance = random.Random(1)
    content = message(parameters={"max_exit": {"int64_param": 1}}, id="7").SerializeToString()
    codes, lines = set(), []
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for _ in range(300):
            try:
                call(_damaged(content, chance), timeout=30)
                codes.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                codes.add(error.code())
                lines.append(error.details())
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
    assert all(line.isprintable() for line in lines)
    is_well(server, session_a)


def _damaged(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        # The front, where the structure is, more often than the pixels.
        place = min(len(changed) - 1, int(chance.expovariate(1 / 80)))
        kind = chance.randrange(4)
        if kind == 0:
            changed[place] = chance.randrange(256)
        elif kind == 1:
            del changed[place : place + chance.randint(1, 5)]
        elif kind == 2:
            changed[place:place] = bytes(chance.choices(b'0123456789-eE"[]{},:', k=chance.randint(1, 5)))
        else:
            del changed[max(20, chance.randrange(len(changed))) :]
    return bytes(changed)
