"""The protocol over gRPC."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from erde.serving.answering import Answer, Asked, Exchange, little_endian
from erde.serving.errors import as_request_error, bad
from erde.serving.log import request_id
from erde.serving.messages import CLASSES, SERVICE
from erde.serving.service import Service
from erde.serving.tensors import OUTPUTS, Tensor

# Beyond those that may wait: questions for health, and requests that are told at once that the queue is full. grpc keeps
# the whole message of each.
SPARE_CALLS = 200
# The message as it came, and grpc's context.
Method = Callable[[bytes, Any], Awaitable[bytes]]


def _parsed(kind: str, content: bytes) -> Any:
    try:
        return CLASSES[kind].FromString(content)
    except DecodeError as error:
        raise bad(f"the request is no {kind} of the protocol") from error


def _decode(content: bytes) -> Asked:
    message = _parsed("ModelInferRequest", content)
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise bad(
            f"{len(raw)} raw_input_contents for {len(message.inputs)} inputs: expected one for each, or none"
        )
    inputs = []
    for index, given in enumerate(message.inputs):
        _no_parameters(given)
        data: Any = raw[index] if raw else list(given.contents.uint_contents or given.contents.bytes_contents)
        if raw and given.HasField("contents"):
            raise bad(f"'{given.name}' has both contents and raw_input_contents")
        inputs.append(Tensor(given.name, given.datatype, list(given.shape[:10]), data))
    for output in message.outputs:
        _no_parameters(output)
    parameters = {}
    for name, parameter in message.parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        parameters[name] = None if choice is None else getattr(parameter, choice)
    return Asked(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        parameters=parameters,
        inputs=inputs,
        outputs=[output.name for output in message.outputs],
    )


def _no_parameters(tensor: Any) -> None:
    for name in tensor.parameters:
        raise bad(f"unknown parameter '{name[:100]}' of a tensor: none is known")


def _encode(asked: Asked, answer: Answer) -> bytes:
    response = CLASSES["ModelInferResponse"](
        model_name=answer.model, model_version=answer.version, id=asked.id
    )
    for name, value in answer.parameters.items():
        kind = "bool_param" if isinstance(value, bool) else "string_param"
        setattr(response.parameters[name], kind, value)
    for name, values in answer.outputs.items():
        response.outputs.add(name=name, datatype=OUTPUTS[name][0], shape=values.shape)
        response.raw_output_contents.append(little_endian(values))
    return bytes(response.SerializeToString())


def exchange_of(known_as: str) -> Exchange[bytes]:
    """A request over gRPC, by the id under which it is logged; its model is in the message."""
    return Exchange(_decode, _encode, protocol="grpc", request_id=known_as)


def grpc_server(service: Service, calls: int) -> grpc.aio.Server:
    """The server, without a port; ``calls`` may be under way at once."""

    async def infer(content: bytes, context: Any) -> bytes:
        known_as = request_id(dict(context.invocation_metadata() or ()).get("x-request-id"))
        context.set_trailing_metadata((("x-request-id", known_as),))

        async def body() -> bytes:
            return content

        return await service.infer(exchange_of(known_as), body)

    def model_metadata(request: Any) -> dict[str, Any]:
        metadata = service.model_metadata(service.model(request.name, request.version))
        # Properties are texts here.
        texts = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in metadata["properties"].items()
        }
        return {**metadata, "properties": texts}

    def model_ready(request: Any) -> dict[str, Any]:
        service.model(request.name, request.version)
        return {"ready": service.ready}

    def simple(kind: str, answer: Callable[[Any], dict[str, Any]]) -> Method:
        async def respond(content: bytes, _: Any) -> bytes:
            response = CLASSES[f"{kind}Response"](**answer(_parsed(f"{kind}Request", content)))
            return bytes(response.SerializeToString())

        return respond

    methods = {
        "ServerLive": simple("ServerLive", lambda _: {"live": True}),
        "ServerReady": simple("ServerReady", lambda _: {"ready": service.ready}),
        "ServerMetadata": simple("ServerMetadata", lambda _: service.server_metadata()),
        "ModelReady": simple("ModelReady", model_ready),
        "ModelMetadata": simple("ModelMetadata", model_metadata),
        "ModelInfer": infer,
    }
    # An own limit on messages: the error for a larger one is grpc's. No port is shared with another server.
    options = [("grpc.max_receive_message_length", service.max_body), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=calls)
    # Messages stay bytes until a handler parses them: what is no message is then answered as any bad request.
    handlers = {name: grpc.unary_unary_rpc_method_handler(_safe(method)) for name, method in methods.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    return server


def _safe(method: Method) -> Method:
    async def handle(content: bytes, context: Any) -> bytes:
        try:
            return await method(content, context)
        except Exception as error:  # nothing but one line goes to the client
            refusal = as_request_error(error)
        await context.abort(getattr(grpc.StatusCode, refusal.reason.grpc_status), str(refusal))
        raise AssertionError("abort raises")

    return handle
