"""The same bundle behind other servers: ``examples/serving/``. Each answers as ``Session.predict`` does."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erde.runtime import Session
from tests.helpers.served import as_json, some_images

EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"
TRITON = EXAMPLES / "triton" / "erde"


def needs(package: str, install: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed (pip install {install})")


def test_no_example_asks_an_index_for_erde() -> None:
    """It is on none: whoever follows an example has a copy of the repository."""
    for path in EXAMPLES.parent.rglob("*"):
        if path.suffix in (".py", ".md", ".ipynb", ".yaml", ".pbtxt", "") and path.is_file():
            text = path.read_text("utf-8")
            assert not re.search(r"pip install [^\n]*(?<![\w/-])'?erde\b(?! repository)", text), path


def ask(url: str, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
    """Status and JSON of an answer."""
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


# ---------------------------------------------------------------- Triton: its module exists inside of it only


@dataclass
class _Tensor:
    name: str
    values: Any

    def as_numpy(self) -> Any:
        return self.values


@dataclass
class _Error:
    message: str
    code: int

    INVALID_ARG = 3


@dataclass
class _Response:
    output_tensors: Any = ()
    error: _Error | None = None


@dataclass
class _Request:
    tensors: list[_Tensor]
    text: str

    def parameters(self) -> str:
        return self.text


def _stand_in() -> types.ModuleType:
    """``triton_python_backend_utils``, as far as a model needs it."""
    module: Any = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = _Tensor, _Error, _Response
    module.get_input_tensor_by_name = lambda request, name: next(
        tensor for tensor in request.tensors if tensor.name == name
    )
    return module


def test_the_model_of_triton(bundle_a: Path, session_a: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    config = text_format.Parse((TRITON / "config.pbtxt").read_text(encoding="utf-8"), configs.ModelConfig())
    assert config.name == TRITON.name
    assert config.backend == "python"
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", _stand_in())
    spec = importlib.util.spec_from_file_location("model", TRITON / "1" / "model.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    assert list(config.parameters) == ["bundle"]
    model.initialize(
        {"model_config": json.dumps({"parameters": {"bundle": {"string_value": str(bundle_a)}}})}
    )
    images = some_images(8)
    full = session_a.predict(images, operating_point="no-exit")
    assert full.exits.tolist() != session_a.predict(images).exits.tolist()
    first, second, wrong = model.execute(
        [
            _Request([_Tensor("images", images)], ""),
            _Request([_Tensor("images", images)], '{"operating_point": "no-exit"}'),
            _Request([_Tensor("images", images[:2].astype(np.float32))], "{}"),
        ]
    )
    for response, wanted in (
        (first, session_a.predict(images)),
        (second, full),
    ):
        values = {tensor.name: tensor.values for tensor in response.output_tensors}
        assert list(values) == [output.name for output in config.output]
        assert values["labels"].tolist() == wanted.labels.tolist()
        assert values["exit"].tolist() == wanted.exits.tolist()
        assert values["macs"].tolist() == wanted.macs.tolist()
        assert np.allclose(values["probabilities"], wanted.probabilities)
        # As the configuration has promised.
        types_of = {configs.TYPE_INT64: np.int64, configs.TYPE_FP32: np.float32}
        for output in config.output:
            assert values[output.name].dtype == types_of[output.data_type]
            assert values[output.name].ndim == len(output.dims)
    assert wrong.error is not None
    assert "float32 of shape (2, 8, 8, 3)" in wrong.error.message
    (given,) = config.input
    assert (given.name, given.data_type, len(given.dims)) == ("images", configs.TYPE_UINT8, images.ndim)


# ---------------------------------------------------------------- servers that can be installed


@needs("kserve", "kserve")
def test_kserves_model_server(bundle_a: Path, session_a: Session) -> None:
    http, grpc = free_port(), free_port()
    options = ["--model_name", "a", "--bundle", bundle_a, "--http_port", http, "--grpc_port", grpc]
    process = subprocess.Popen([sys.executable, EXAMPLES / "kserve_model.py", *map(str, options)])
    try:
        end = time.monotonic() + 120
        while True:
            try:
                assert ask(f"http://127.0.0.1:{http}/v2/models/a/infer", b"{}")[0]
                break
            except urllib.error.URLError:
                assert time.monotonic() < end
                assert process.poll() is None
                time.sleep(0.2)
        images = some_images(4)
        wanted = session_a.predict(images, operating_point="risk-5")
        for point, status in (("risk-5", 200), ("risk-6", 400)):
            body = as_json(images, parameters={"operating_point": point})
            answer = ask(f"http://127.0.0.1:{http}/v2/models/a/infer", json.dumps(body).encode())
            assert answer[0] == status, answer
            if status == 400:
                assert "no operating point 'risk-6'" in answer[1]["error"]
                continue
            outputs = {output["name"]: output["data"] for output in answer[1]["outputs"]}
            assert outputs["labels"] == wanted.labels.tolist()
            assert outputs["exit"] == wanted.exits.tolist()
            assert answer[1]["parameters"] == {"operating_point": "risk-5"}
    finally:
        process.terminate()
        process.wait(60)


_RAY = """
import sys, ray
from ray import serve
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
import ray_serve
serve.run(ray_serve.app({"bundle": sys.argv[1]}))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
"""


@needs("ray", "'ray[serve]'")
def test_ray_serve(bundle_a: Path, session_a: Session) -> None:
    port = free_port()
    # A relative path would be looked for where the replica runs; its module too.
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n{_RAY}", str(bundle_a), str(port)],
        cwd=EXAMPLES, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert any(line.strip() == "ready" for line in process.stdout)
        images = some_images(1)
        buffer = io.BytesIO()
        Image.fromarray(images[0]).save(buffer, "PNG")
        for query, wanted in (
            ("", session_a.predict(images)),
            ("?operating_point=early", session_a.predict(images, operating_point="early")),
        ):
            status, answer = ask(f"http://127.0.0.1:{port}/{query}", buffer.getvalue(), "image/png")
            assert status == 200
            assert (answer["label"], answer["exit"], answer["macs"], answer["operating_point"]) == (
                wanted.labels[0],
                wanted.exits[0],
                wanted.macs[0],
                wanted.operating_point,
            )
        assert ask(f"http://127.0.0.1:{port}/", b"no image", "image/png")[0] == 400
    finally:
        process.communicate(timeout=120)
