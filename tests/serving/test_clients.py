"""Unmodified clients of the protocol get the answers of ``Session.predict``."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from erde.runtime import Prediction, Session
from erde.serving.answering import PARAMETERS
from erde.serving.metrics import Metrics
from erde.serving.tensors import OUTPUTS
from tests.helpers.served import Served, as_json, some_images

# Not installed on Python 3.12 (pyproject.toml).
triton_http = pytest.importorskip("tritonclient.http")
triton_grpc = pytest.importorskip("tritonclient.grpc")
utils = pytest.importorskip("tritonclient.utils")

Answers = dict[str, NDArray[Any]]


class Client:
    """tritonclient's four clients with one face."""

    def __init__(self, server: Served, kind: str) -> None:
        self.module = {"http": triton_http, "grpc": triton_grpc}[kind.split("-")[0]]
        self.url = server.http if self.module is triton_http else server.grpc
        self.asynchronous = kind.endswith("aio")
        self.kind = kind

    def call(self, method: str, *arguments: Any, **settings: Any) -> Any:
        if not self.asynchronous:
            with self.module.InferenceServerClient(self.url) as client:
                return getattr(client, method)(*arguments, **settings)
        return asyncio.run(self._call(method, *arguments, **settings))

    async def _call(self, method: str, *arguments: Any, **settings: Any) -> Any:
        import tritonclient.grpc.aio
        import tritonclient.http.aio

        module = tritonclient.http.aio if self.module is triton_http else tritonclient.grpc.aio
        async with module.InferenceServerClient(self.url) as client:
            return await getattr(client, method)(*arguments, **settings)

    def infer(self, images: NDArray[Any], *, model: str = "a", outputs: Any = None, **settings: Any) -> Any:
        kind = "BYTES" if images.dtype == np.object_ else "UINT8"
        given = self.module.InferInput("images", list(images.shape), kind)
        given.set_data_from_numpy(images)
        wanted = None if outputs is None else [self.module.InferRequestedOutput(name) for name in outputs]
        return self.call("infer", model, [given], outputs=wanted, **settings)


@pytest.fixture(params=["http", "http-aio", "grpc", "grpc-aio", "http to processes", "grpc to processes"])
def client(request: pytest.FixtureRequest) -> Client:
    kind, _, processes = request.param.partition(" to ")
    return Client(request.getfixturevalue("server_of_processes" if processes else "server"), kind)


def answers(result: Any, names: Any = OUTPUTS) -> Answers:
    return {name: result.as_numpy(name) for name in names}


def expected(prediction: Prediction) -> Answers:
    return {
        "labels": prediction.labels,
        "probabilities": prediction.probabilities.astype(np.float32),
        "exit": prediction.exits,
        "score": prediction.scores.astype(np.float32),
        "macs": prediction.macs,
    }


def same(given: Answers, wanted: Answers) -> None:
    for name, values in wanted.items():
        assert given[name].dtype == values.dtype, name
        assert np.array_equal(given[name], values), name


def said(client: Client, result: Any) -> dict[str, Any]:
    """The parameters of a response."""
    response = result.get_response()
    if client.module is triton_http:
        return dict(response["parameters"])
    return {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in response.parameters.items()
    }


@pytest.mark.parametrize("count", [1, 5, 8])
def test_answers_are_those_of_the_session(client: Client, session_a: Session, count: int) -> None:
    images = some_images(count)
    result = client.infer(images, request_id="né 1")
    same(answers(result), expected(session_a.predict(images)))
    response = result.get_response()
    request_id, version = (
        (response["id"], response["model_version"])
        if client.module is triton_http
        else (response.id, response.model_version)
    )
    assert request_id == "né 1"
    assert len(version) == 12
    assert said(client, result) == {"operating_point": "risk-1", "certified": True, "capped": False}


def test_no_image_is_a_batch_too(server: Served, session_a: Session) -> None:
    result = Client(server, "grpc").infer(some_images(0))
    assert result.as_numpy("probabilities").shape == (0, 4)


@pytest.mark.parametrize(
    ("parameters", "settings", "point", "certified"),
    [
        ({"operating_point": "early"}, {"operating_point": "early"}, "early", False),
        ({"max_risk": 0.05}, {"operating_point": "risk-5"}, "risk-5", True),
        ({"max_risk": 0.049}, {"operating_point": "risk-1"}, "risk-1", True),
        ({"max_exit": 0}, {"max_exit": 0}, "risk-1", False),
        ({"max_exit": 2}, {"max_exit": 2}, "risk-1", True),
        ({"max_macs": 250}, {"max_macs": 250}, "risk-1", False),
        (
            {"operating_point": "no-exit", "max_macs": 250.5},
            {"operating_point": "no-exit", "max_exit": 1},
            "no-exit",
            False,
        ),
        ({"deadline_ms": 1000}, {"deadline_ms": 1000}, "risk-1", True),
    ],
)
def test_parameters_are_the_arguments_of_predict(
    client: Client,
    session_a: Session,
    parameters: dict[str, Any],
    settings: dict[str, Any],
    point: str,
    certified: bool,
) -> None:
    if client.module is triton_grpc and any(isinstance(value, float) for value in parameters.values()):
        pytest.skip("this client sends no floats")  # test_refusals.py does
    images = some_images(6)
    result = client.infer(images, parameters=parameters)
    same(answers(result), expected(session_a.predict(images, **settings)))
    about = said(client, result)
    assert (about["operating_point"], about["certified"]) == (point, certified)


def test_only_requested_outputs_are_sent(client: Client, session_a: Session) -> None:
    images = some_images(3)
    result = client.infer(images, outputs=["exit", "labels"])
    prediction = expected(session_a.predict(images))
    same(answers(result, ["exit", "labels"]), {name: prediction[name] for name in ("exit", "labels")})
    assert result.as_numpy("probabilities") is None


def encoded(images: NDArray[np.uint8]) -> list[bytes]:
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_encoded_images(client: Client, session_a: Session, shape: tuple[int, ...]) -> None:
    images = some_images(3)
    tensor = np.array(encoded(images), dtype=np.object_).reshape(shape)
    same(answers(client.infer(tensor)), expected(session_a.predict(images)))


def test_encoded_images_get_the_size_that_the_network_takes(server: Served) -> None:
    large = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    result = Client(server, "http").infer(np.array(encoded(large[None]), dtype=np.object_))
    assert result.as_numpy("labels").shape == (1,)


def test_json_both_ways(server: Served, session_a: Session) -> None:
    images = some_images(2)
    wanted = expected(session_a.predict(images))
    files = {"name": "images", "datatype": "BYTES", "shape": [2, 1]}
    texts = [base64.b64encode(file).decode() for file in encoded(images)]
    for body in (
        as_json(images, id="7"),
        {"inputs": [{**as_json(images)["inputs"][0], "data": images.tolist()}]},
        {"inputs": [{**files, "data": texts}]},
        {"inputs": [{**files, "data": [[text] for text in texts]}]},
    ):
        reply = server.infer(body)
        assert reply.status == 200, reply.body
        assert reply.headers["content-type"] == "application/json"
        assert reply.json.get("id") == body.get("id")
        outputs = {output["name"]: output for output in reply.json["outputs"]}
        assert list(outputs) == list(OUTPUTS)
        for name, output in outputs.items():
            assert output["shape"] == list(wanted[name].shape)
            assert output["datatype"] == OUTPUTS[name][0]
            assert np.array_equal(np.reshape(output["data"], output["shape"]), wanted[name])


def test_json_for_some_outputs_and_binary_for_others(server: Served, session_a: Session) -> None:
    images = some_images(2)
    given = triton_http.InferInput("images", list(images.shape), "UINT8")
    given.set_data_from_numpy(images, binary_data=False)
    wanted = [
        triton_http.InferRequestedOutput("labels", binary_data=False),
        triton_http.InferRequestedOutput("score", binary_data=True),
        triton_http.InferRequestedOutput("macs", binary_data=False),
    ]
    with triton_http.InferenceServerClient(server.http) as client:
        result = client.infer("a", [given], outputs=wanted)
    prediction = expected(session_a.predict(images))
    names = ["labels", "score", "macs"]
    same(answers(result, names), {name: prediction[name] for name in names})
    kinds = {output["name"]: "data" in output for output in result.get_response()["outputs"]}
    assert kinds == {"labels": True, "score": False, "macs": True}


def test_health_and_metadata(client: Client, session_a: Session) -> None:
    assert client.call("is_server_live")
    assert client.call("is_server_ready")
    assert client.call("is_model_ready", "a")
    assert client.call("is_model_ready", "gray")
    as_dict = {} if client.module is triton_http else {"as_json": True}
    server = client.call("get_server_metadata", **as_dict)
    assert (server["name"], server["extensions"]) == ("erde", ["binary_tensor_data"])
    model = client.call("get_model_metadata", "a", **as_dict)
    shapes = {
        part["name"]: (part["datatype"], [int(side) for side in part["shape"]])
        for part in [*model["inputs"], *model["outputs"]]
    }
    assert shapes == {
        "images": ("UINT8", [-1, 8, 8, 3]),
        "labels": ("INT64", [-1]),
        "probabilities": ("FP32", [-1, 4]),
        "exit": ("INT64", [-1]),
        "score": ("FP32", [-1]),
        "macs": ("INT64", [-1]),
    }
    # The version that it names is one that may be asked for.
    (version,) = model["versions"]
    assert client.call("is_model_ready", "a", version)
    images = some_images(1)
    result = client.infer(images, model_version=version)
    same(answers(result), expected(session_a.predict(images)))


def test_several_models(client: Client) -> None:
    images = np.zeros((2, 3, 5, 1), dtype=np.uint8)
    images[:, 1, 2] = 255
    result = client.infer(images, model="gray")
    assert result.as_numpy("labels").tolist() == [2, 2]
    assert result.as_numpy("exit").tolist() == [1, 1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "b"}, "no model 'b'"),
        ({"parameters": {"max_exit": 9}}, "this bundle has exits 0 to 2"),
        ({"parameters": {"operating_point": "risk-3"}}, "no operating point 'risk-3'"),
        ({"outputs": ["logits"]}, "no output 'logits'"),
        ({"model_version": "3"}, "has no version '3'"),
    ],
)
def test_an_error_is_the_clients_exception(client: Client, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(utils.InferenceServerException, match=says) as raised:
        client.infer(some_images(1), **settings)
    missing = "model" in settings or "model_version" in settings
    wanted = ("404", "NOT_FOUND") if missing else ("400", "INVALID_ARGUMENT")
    assert str(raised.value.status()).removeprefix("StatusCode.") in wanted


def test_the_messages_are_those_of_the_protocol() -> None:
    from tritonclient.grpc import service_pb2

    from erde.serving.messages import CLASSES

    def fields(descriptor: Any) -> dict[str, tuple[Any, ...]]:
        return {
            field.name: (
                field.number,
                field.type,
                field.is_repeated,
                None if field.message_type is None else field.message_type.full_name,
                None if field.containing_oneof is None else field.containing_oneof.name,
            )
            for field in descriptor.fields
        }

    theirs = service_pb2.DESCRIPTOR.message_types_by_name
    for place, ours in CLASSES.items():
        descriptor = theirs[place.split(".")[0]]
        if "." in place:
            descriptor = descriptor.nested_types_by_name[place.split(".")[1]]
        own = fields(ours.DESCRIPTOR)
        # Triton's model metadata have no properties.
        own.pop("properties", None)
        assert own == fields(descriptor), place
        for name in own:
            entry, other = (
                ours.DESCRIPTOR.fields_by_name[name].message_type,
                descriptor.fields_by_name[name].message_type,
            )
            if entry is not None and entry.GetOptions().map_entry:
                assert other.GetOptions().map_entry
                assert fields(entry) == fields(other)


def test_the_example_of_the_document_runs(server: Served, session_a: Session, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    image = some_images(1)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(encoded(image)[0])
    # Its server has the usual port, and a model called like its folder.
    script = script.replace("localhost:8000", server.http).replace('"bundle"', '"a"')
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    prediction = session_a.predict(image, max_exit=1)
    assert f"labels [{prediction.labels[0]}] exits [{prediction.exits[0]}]" in done.stdout
    assert "'certified': False" in done.stdout


def test_the_document_names_what_there_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    metrics = set(re.findall(r"^# TYPE (\w+)", Metrics().text(0, {}, {}, {}), re.M))
    assert named == {"UINT8", "BYTES", *OUTPUTS, *PARAMETERS, *metrics}
