"""The protocol's gRPC messages, built when the module is imported.

They are those of ``open_inference_grpc.proto`` of github.com/kserve/open-inference-protocol (Apache-2.0), commit d49cc23:
names, types and numbers of the fields. Generated code would fit some versions of protobuf only. And it would register the
messages for the whole process, where a client's library, such as tritonclient, has messages of the same names.
"""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live = 1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready = 1",
    "ModelReadyRequest": "string name = 1; string version = 2",
    "ModelReadyResponse": "bool ready = 1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "string name = 1; string version = 2; repeated string extensions = 3",
    "ModelMetadataRequest": "string name = 1; string version = 2",
    "ModelMetadataResponse": """
        string name = 1; repeated string versions = 2; string platform = 3;
        repeated ModelMetadataResponse.TensorMetadata inputs = 4;
        repeated ModelMetadataResponse.TensorMetadata outputs = 5; map<string> properties = 6""",
    "ModelMetadataResponse.TensorMetadata": "string name = 1; string datatype = 2; repeated int64 shape = 3",
    "ModelInferRequest": """
        string model_name = 1; string model_version = 2; string id = 3; map<InferParameter> parameters = 4;
        repeated ModelInferRequest.InferInputTensor inputs = 5;
        repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6; repeated bytes raw_input_contents = 7""",
    "ModelInferRequest.InferInputTensor": """
        string name = 1; string datatype = 2; repeated int64 shape = 3; map<InferParameter> parameters = 4;
        InferTensorContents contents = 5""",
    "ModelInferRequest.InferRequestedOutputTensor": "string name = 1; map<InferParameter> parameters = 2",
    "ModelInferResponse": """
        string model_name = 1; string model_version = 2; string id = 3; map<InferParameter> parameters = 4;
        repeated ModelInferResponse.InferOutputTensor outputs = 5; repeated bytes raw_output_contents = 6""",
    "ModelInferResponse.InferOutputTensor": """
        string name = 1; string datatype = 2; repeated int64 shape = 3; map<InferParameter> parameters = 4;
        InferTensorContents contents = 5""",
    "InferParameter": """
        oneof bool bool_param = 1; oneof int64 int64_param = 2; oneof string string_param = 3;
        oneof double double_param = 4; oneof uint64 uint64_param = 5""",
    "InferTensorContents": """
        repeated bool bool_contents = 1; repeated int32 int_contents = 2; repeated int64 int64_contents = 3;
        repeated uint32 uint_contents = 4; repeated uint64 uint64_contents = 5; repeated float fp32_contents = 6;
        repeated double fp64_contents = 7; repeated bytes bytes_contents = 8""",
}
# "map<T>" has texts as keys; "oneof" stands before each field of a message's only choice.
_FIELD = re.compile(r"(?:(repeated|oneof) )?(?:(map)<([\w.]+)>|([\w.]+)) (\w+) = (\d+)")
_Field = descriptor_pb2.FieldDescriptorProto


def _add_field(message: Any, place: str, text: str) -> None:
    match = _FIELD.fullmatch(text)
    assert match is not None, text
    prefix, is_map, of_map, plain, name, number = match.groups()
    repeated = prefix == "repeated" or is_map
    field = message.field.add(
        name=name, number=int(number), label=_Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    )
    if is_map:
        # As protoc names it: ParametersEntry.
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry", options={"map_entry": True})
        _add_field(entry, "", "string key = 1")
        _add_field(entry, "", f"{of_map} value = 2")
        plain = f"{place}.{entry.name}"
    if plain in MESSAGES or is_map:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{plain}"
    else:
        field.type = getattr(_Field, f"TYPE_{plain.upper()}")
    if prefix == "oneof":
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="open_inference_grpc.proto", package=PACKAGE, syntax="proto3"
    )
    parts: dict[str, Any] = {}
    for place, text in MESSAGES.items():
        parent, _, name = place.rpartition(".")
        parts[place] = (
            parts[parent].nested_type.add(name=name) if parent else file.message_type.add(name=name)
        )
        for field in filter(None, (part.strip() for part in text.split(";"))):
            _add_field(parts[place], place, field)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        place: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{place}"))
        for place in MESSAGES
    }


# Class of each message, by name.
CLASSES = _classes()
