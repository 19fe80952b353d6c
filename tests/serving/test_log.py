"""The log in JSON, and the ids under which requests stand in it."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from erde.runtime import Session
from erde.serving.log import Log, request_id
from erde.serving.messages import CLASSES, SERVICE
from tests.helpers.hand_made_bundle import pixel_bundle
from tests.helpers.served import Served, as_json, serving, some_images, until


def _ask(server: Served, images: Any, known_as: str) -> dict[str, str]:
    """The trailing metadata of an answer over gRPC."""
    request = CLASSES["ModelInferRequest"](
        model_name="a",
        id="mine",
        inputs=[{"name": "images", "datatype": "UINT8", "shape": images.shape}],
        raw_input_contents=[images.tobytes()],
    )
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        try:
            _, about = call.with_call(
                request.SerializeToString(), timeout=30, metadata=[("x-request-id", known_as)]
            )
        except grpc.RpcError as error:
            about = error
        return dict(about.trailing_metadata())


def test_every_request_is_a_line_with_its_id(bundle_a: Path, session_a: Session, tmp_path: Path) -> None:
    images = some_images(4)
    exits = np.bincount(session_a.predict(images).exits, minlength=3).tolist()
    before = time.time()
    with serving([bundle_a, f"b={pixel_bundle(tmp_path / 'b')}"], "--log-json") as server:
        first = server.infer(as_json(images, id="né 1"), {"X-Request-Id": "abc-1"})
        second = server.infer(b"x", {"X-Request-Id": "two words"})
        third = server.infer(b"", model="c")
        about = _ask(server, images, "over-grpc")
        failed = _ask(server, images[..., :1], "fails-over-grpc")
        _, out, err = server.stop()
    assert first.headers["x-request-id"] == "abc-1"
    # What is no id is not echoed.
    made = [reply.headers["x-request-id"] for reply in (second, third)]
    assert all(re.fullmatch("[0-9a-f]{32}", text) for text in made)
    assert about["x-request-id"] == "over-grpc"
    assert failed["x-request-id"] == "fails-over-grpc"
    lines = [json.loads(line) for line in err.splitlines()]
    for line in lines:
        assert before - 1 < line.pop("time") < time.time() + 1
        assert line.pop("event") == "request"
        assert 0 < line.pop("milliseconds") < 60_000
    answered = {
        "model": "a",
        "outcome": "answered",
        "operating_point": "risk-1",
        "certified": True,
        "exits": exits,
    }
    refused = {"outcome": "refused"}
    assert lines == [
        {**answered, "request_id": "abc-1", "id": "né 1", "protocol": "http"},
        {**refused, "model": "a", "request_id": made[0], "protocol": "http", "error": second.json["error"]},
        {**refused, "request_id": made[1], "protocol": "http", "error": third.json["error"]},
        {**answered, "request_id": "over-grpc", "id": "mine", "protocol": "grpc"},
        {
            **refused,
            "model": "a",
            "request_id": "fails-over-grpc",
            "id": "mine",
            "protocol": "grpc",
            "error": lines[-1]["error"],
        },
    ]
    assert "expected UINT8" in lines[-1]["error"]
    assert out.startswith("stopped after 5 requests")
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    _, example = re.findall(r"^```json\n(.*?)^```$", text, re.M | re.S)
    assert json.loads(example).keys() == json.loads(err.splitlines()[0]).keys() - {"id"}


def test_an_event_is_a_line_too(tmp_path: Path) -> None:
    folder = pixel_bundle(tmp_path / "a")
    images = np.zeros((1, 3, 5, 1), dtype=np.uint8)
    images[:, 0, -1] = 1  # makes stage 0 fail
    with serving([folder], "--log-json") as server:
        assert server.infer(as_json(images)).status == 500
        with (folder / "stage_1.onnx").open("ab") as file:
            file.write(b"!")
        until(lambda: "bundle_refused" in server.err)
        time.sleep(0.5)  # some more looks
        _, _, err = server.stop()
    request, event = map(json.loads, err.splitlines())
    assert (request["outcome"], request["model"]) == ("failed", "a")
    assert "stage 0 fails" in request["error"]
    assert (event["event"], event["model"]) == ("bundle_refused", "a")
    assert "stage_1.onnx does not match" in event["message"]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("closed file")])
def test_a_line_that_cannot_be_written_is_lost(
    monkeypatch: pytest.MonkeyPatch, error: Exception, as_json: bool
) -> None:
    tried = []

    class Full:
        def write(self, text: str) -> None:
            tried.append(text)
            raise error

    monkeypatch.setattr(sys, "stderr", Full())
    log = Log(as_json)
    log.event("drift", "a", "it drifts")
    log.request("a", "failed", "it fails")
    assert len(tried) == 2


def test_an_id_is_short_and_of_plain_characters() -> None:
    for given in ("a", "0f5c-11:A_b.c", "x" * 100):
        assert request_id(given) == given
    for wrong in (None, "", "x" * 101, "a b", "a\nb", 'a"b', "é"):
        assert re.fullmatch("[0-9a-f]{32}", request_id(wrong))
    assert request_id(None) != request_id(None)
