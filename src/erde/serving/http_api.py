"""The protocol over HTTP: JSON, and the binary tensor data extension in both directions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from pydantic import ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from erde.common.model import Frozen
from erde.serving import metrics
from erde.serving.answering import Answer, Asked, Exchange, little_endian
from erde.serving.errors import Reason, RequestError, as_request_error, bad
from erde.serving.log import request_id
from erde.serving.page import PATH, STATUS_PATH, page, status
from erde.serving.service import Service
from erde.serving.tensors import OUTPUTS, Tensor

HEADER_LENGTH = "Inference-Header-Content-Length"
REQUEST_ID = "X-Request-Id"
# A client that is slower holds a place in the queue for nothing.
BODY_SECONDS = 60.0
RETRY_SECONDS = 1
_BINARY_OUTPUT = "binary_data_output"


class _Strict(Frozen):
    model_config = ConfigDict(strict=True)


class _Input(_Strict):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: Any = None


class _Output(_Strict):
    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class _Request(_Strict):
    id: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[_Input]
    outputs: list[_Output] = Field(default_factory=list)


class _Http(Exchange[Response]):
    """One request: its model from the URL, and which outputs it wants in binary."""

    def __init__(self, model: str, version: str, header_length: str | None, known_as: str) -> None:
        super().__init__(self._read, self._write, model, version, "http", known_as)
        self._header_length = header_length
        self._binary: dict[str, bool] = {}
        self._all_binary = False

    def _read(self, body: bytes) -> Asked:
        length = len(body)
        if self._header_length is not None:
            length = (
                int(self._header_length)
                if self._header_length.isdecimal() and len(self._header_length) < 20
                else -1
            )
            if not 0 <= length <= len(body):
                raise bad(
                    f"{HEADER_LENGTH} is '{self._header_length[:40]}', expected a number up to the body's {len(body)} bytes"
                )
        request = _parse(body[:length])
        parameters = dict(request.parameters)
        self._all_binary = _boolean(_BINARY_OUTPUT, parameters.pop(_BINARY_OUTPUT, False))
        for output in request.outputs:
            self._binary[output.name] = _boolean(
                "binary_data", _only(output.parameters, "binary_data", self._all_binary)
            )
        return Asked(
            model=self.name,
            version=self.version,
            id=request.id,
            parameters=parameters,
            inputs=_tensors(request.inputs, memoryview(body)[length:]),
            outputs=list(self._binary),
        )

    def _write(self, asked: Asked, answer: Answer) -> Response:
        outputs, contents = [], []
        for name, values in answer.outputs.items():
            output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name][0], "shape": list(values.shape)}
            if self._binary.get(name, self._all_binary):
                contents.append(little_endian(values))
                output["parameters"] = {"binary_data_size": len(contents[-1])}
            else:
                output["data"] = values.ravel().tolist()
            outputs.append(output)
        head: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version}
        if asked.id:
            head["id"] = asked.id
        content = json.dumps({**head, "parameters": answer.parameters, "outputs": outputs}).encode()
        if not contents:
            return Response(content, media_type="application/json")
        return Response(
            b"".join([content, *contents]),
            media_type="application/octet-stream",
            headers={HEADER_LENGTH: str(len(content))},
        )


def _parse(text: bytes) -> _Request:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # no UTF-8, cut short, nested without end
        raise bad(f"the request is not JSON: {error}") from error
    try:
        return _Request.model_validate(value)
    except (ValidationError, RecursionError) as error:
        problem = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            problem = f"{'.'.join(str(part)[:40] for part in first['loc'][:6]) or 'its body'}: {first['msg']}"
        raise bad(f"the request is not as the protocol has it: {problem}") from error


def _only(parameters: dict[str, Any], name: str, default: Any) -> Any:
    """The parameter ``name`` of a tensor; :class:`RequestError` where there is another one."""
    for given in parameters:
        if given != name:
            raise bad(f"unknown parameter '{given[:100]}' of a tensor: only {name} is known")
    return parameters.get(name, default)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise bad(f"the parameter {name} is not true or false")
    return value


def _tensors(inputs: list[_Input], binary: memoryview) -> list[Tensor]:
    """The inputs with their content, from ``data`` or from the bytes behind the JSON, in order."""
    tensors, start = [], 0
    for given in inputs:
        size = _only(given.parameters, "binary_data_size", None)
        data: Any = given.data
        if size is not None:
            if data is not None:
                raise bad(f"'{given.name}' has both data and binary_data_size")
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary) - start:
                raise bad(
                    f"binary_data_size of '{given.name}' is no number up to the {len(binary) - start} bytes that are there"
                )
            data = binary[start : start + size]
            start += size
        elif not isinstance(data, list):
            raise bad(f"'{given.name}' has neither a list as data nor binary_data_size")
        tensors.append(Tensor(given.name, given.datatype, given.shape, data))
    if start != len(binary):
        raise bad(f"{len(binary) - start} bytes at the end of the body belong to no input")
    return tensors


def _too_large(most: int) -> RequestError:
    return RequestError(
        Reason.LARGE, f"the body is larger than {most:,} bytes: send fewer or smaller images at once"
    )


async def _read_body(request: Request, most: int) -> bytes:
    """The body; :class:`RequestError` as soon as it is known to be too large, or takes too long."""
    declared = request.headers.get("content-length", "0")
    if int(declared) > most:  # the parser has seen to it that it is a number
        raise _too_large(most)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise bad("the body is compressed (Content-Encoding): send it as it is")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise _too_large(most)
    except TimeoutError as error:
        raise RequestError(Reason.SLOW, f"the body did not come within {BODY_SECONDS:g} seconds") from error
    except ClientDisconnect as error:
        raise bad("the client went away") from error
    return bytes(body)


def _refuse(error: RequestError) -> Response:
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.reason is Reason.BUSY else None
    return JSONResponse({"error": str(error)}, status_code=error.reason.http_status, headers=headers)


def http_app(service: Service) -> Starlette:
    """The ASGI application."""

    def reply(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def safe(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:  # nothing but one line goes to the client
                return _refuse(as_request_error(error))

        return safe

    def asked_model(request: Request) -> Any:
        return service.model(request.path_params["name"], request.path_params.get("version", ""))

    async def live(_: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(_: Request) -> Response:
        return JSONResponse({"ready": service.ready}, status_code=200 if service.ready else 503)

    async def server_metadata(_: Request) -> Response:
        return JSONResponse(service.server_metadata())

    async def model_metadata(request: Request) -> Response:
        return JSONResponse(service.model_metadata(asked_model(request)))

    async def model_ready(request: Request) -> Response:
        name = asked_model(request).name
        return JSONResponse({"name": name, "ready": service.ready}, status_code=200 if service.ready else 503)

    async def infer(request: Request) -> Response:
        places = request.path_params
        headers, known_as = request.headers, request_id(request.headers.get(REQUEST_ID))
        exchange = _Http(places["name"], places.get("version", ""), headers.get(HEADER_LENGTH), known_as)
        try:
            response = await service.infer(exchange, partial(_read_body, request, service.max_body))
        except RequestError as error:
            response = _refuse(error)
        except asyncio.CancelledError:  # by uvicorn, which waits no longer
            response = _refuse(RequestError(Reason.BUSY, "the server stops; try again later"))
        response.headers[REQUEST_ID] = known_as
        return response

    async def prometheus(_: Request) -> Response:
        return PlainTextResponse(service.metrics_text(), media_type=metrics.CONTENT_TYPE)

    content, headers = page()

    async def for_people(_: Request) -> Response:
        return HTMLResponse(content, headers=headers)

    async def state(_: Request) -> Response:
        return JSONResponse(status(service), headers={"Cache-Control": "no-store"})

    async def not_there(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}"[:300]
        return JSONResponse({"error": message}, status_code=error.status_code, headers=error.headers)

    routes = [
        Route("/v2/health/live", reply(live)),
        Route("/v2/health/ready", reply(ready)),
        Route("/v2", reply(server_metadata)),
        Route("/metrics", reply(prometheus)),
        Route(PATH, reply(for_people)),
        Route(STATUS_PATH, reply(state)),
    ]
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            Route(path, reply(model_metadata)),
            Route(f"{path}/ready", reply(model_ready)),
            Route(f"{path}/infer", reply(infer), methods=["POST"]),
        ]
    return Starlette(routes=routes, exception_handlers={HTTPException: not_there})
