"""ONNX files of other tools: read whole, freed of what a bundle does not take, or refused in one line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from erde.bundle.graph_check import DOMAINS, OPERATORS
from erde.bundle.sealing import MAX_FILE_BYTES
from erde.common.errors import UserError, in_one_line, listed
from erde.common.files import replacing_file

# Every IR version from this on has weights that are no inputs, and every opset up to 18.
IR_VERSION = 8


def import_onnx() -> Any:
    """The onnx package with the parts that are used here.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnx
        import onnx.external_data_helper
        import onnx.inliner
        import onnx.shape_inference
        import onnx.version_converter
    except ImportError as error:
        raise UserError(
            "ONNX files are read and written by the onnx package, which is not installed: "
            'pip install "erde[analysis]"'
        ) from error
    return onnx


def load_network(path: Path) -> Any:
    """The model in ``path`` with all weights inside, without functions, training and notes.

    Raises:
        UserError: no ONNX file, a part of it missing, too large, or operators that a bundle does not take.
    """
    onnx = import_onnx()
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(_too_large(path))
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UserError:
        raise
    except Exception as error:  # protobuf's errors are no part of its interface
        raise UserError(
            f"{path} is no ONNX file, or not a whole one: give a file as torch.onnx.export writes it"
        ) from error
    if not model.graph.node:
        raise UserError(f"{path} has no operators: give a file as torch.onnx.export writes it")
    _embed_weights(model, path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    del model.training_info[:]
    del model.metadata_props[:]
    graph = model.graph
    del graph.metadata_props[:]
    # Shapes that an exporter noted down may be those of its example.
    del graph.value_info[:]
    for group in (graph.node, graph.input, graph.output, graph.initializer):
        for item in group:
            del item.metadata_props[:]
            item.doc_string = ""
    model.doc_string = graph.doc_string = ""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, IR_VERSION)
    return model


def check_operators(model: Any, path: Path) -> None:
    """Refuse operators that a bundle's graphs may not have; drop-out, which does nothing here, is taken out.

    Raises:
        UserError: names them.
    """
    graph = model.graph
    foreign = set()
    for node in graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise UserError(
                f"{path} has a loop or a branch ({node.op_type}), which a bundle does not take: export it again with "
                "torch.onnx.export(..., dynamo=True), or with fixed sizes"
            )
        if node.op_type == "Dropout" and node.domain in DOMAINS and not any(node.input[2:]):
            _replace_dropout(node)
        if node.domain not in DOMAINS:
            foreign.add(f"{node.op_type} of {node.domain}")
        elif node.op_type not in OPERATORS:
            foreign.add(node.op_type)
    if foreign:
        names = in_one_line(listed(sorted(foreign)))
        raise UserError(
            f"{path} has operators that a bundle does not take: {names}: export the network again with standard "
            "operators only (for int8 in the QDQ format)"
        )
    if len(graph.sparse_initializer):
        raise UserError(f"{path} has sparse weights, which a bundle does not take: export it with dense ones")
    opsets = [entry for entry in model.opset_import if entry.domain in DOMAINS]
    del model.opset_import[:]
    model.opset_import.extend(opsets)


def _replace_dropout(node: Any) -> None:
    node.op_type = "Identity"
    del node.attribute[:]
    del node.input[1:]
    del node.output[1:]


def keep_output(model: Any, name: str) -> None:
    """Leave ``name`` as the only output, and what it is computed from."""
    graph = model.graph
    wanted, kept = {name}, []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    weights = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    outputs = [value for value in graph.output if value.name == name]
    del graph.output[:]
    graph.output.extend(outputs)


def opset_of(model: Any) -> int:
    """Version of the standard operators."""
    return max((entry.version for entry in model.opset_import if entry.domain in DOMAINS), default=1)


def copied(model: Any) -> Any:
    """An independent copy."""
    other = type(model)()
    other.CopyFrom(model)
    return other


def serialised(model: Any, path: Path) -> bytes:
    """The file's content; ``path`` names the network in the error."""
    try:
        content: bytes = model.SerializeToString(deterministic=True)
    except Exception as error:  # protobuf holds 2 GiB
        raise UserError(_too_large(path)) from error
    return content


def save(model: Any, path: Path) -> None:
    """Write ``model`` to ``path`` in one step."""
    content = serialised(model, path)
    with replacing_file(path) as partial:
        partial.write_bytes(content)


def open_session(model: Any, path: Path) -> onnxruntime.InferenceSession:
    """``model`` in ONNX Runtime on the CPU; ``path`` names it in errors.

    Raises:
        UserError: ONNX Runtime does not take it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(serialised(model, path), options, ["CPUExecutionProvider"])
    except UserError:
        raise
    except Exception as error:  # ONNX Runtime raises types of its own for each kind of bad model
        raise UserError(f"ONNX Runtime cannot load {path}: {in_one_line(str(error))}") from error


# Attributes of a ``Constant`` that hold numbers and no tensor.
_PLAIN_CONSTANTS = {
    "value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32,
}  # fmt: skip


def tensors(model: Any) -> dict[str, Any]:
    """Constant tensors of a graph by name: its weights, and what ``Constant`` nodes hold."""
    onnx = import_onnx()
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    constants[node.output[0]] = attribute.t
                elif attribute.name in _PLAIN_CONSTANTS:
                    kind = _PLAIN_CONSTANTS[attribute.name]
                    values = np.array(onnx.helper.get_attribute_value(attribute), dtype=kind)
                    constants[node.output[0]] = onnx.numpy_helper.from_array(values, node.output[0])
    return constants


def image_dependent(model: Any) -> set[str]:
    """Names of what is computed from the graph's input."""
    names = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if names.intersection(node.input):
            names.update(node.output)
    return names


def add_constant(model: Any, name: str, values: Iterable[Any] | NDArray[Any]) -> str:
    """Add a weight; its name."""
    array = np.asarray(values)
    model.graph.initializer.append(import_onnx().numpy_helper.from_array(array, name))
    return name


def _embed_weights(model: Any, path: Path) -> None:
    """Read the weights that lie in other files."""
    onnx = import_onnx()
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if not outside:
        return
    names = {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"}
    folder = path.parent
    for name in sorted(names):
        if not (folder / name).is_file():
            raise UserError(f"{path} has its weights in the file '{name}', which is not beside it: copy both")
    if any((folder / name).is_symlink() for name in names):  # which onnx does not follow
        raise UserError(
            f"the weights of {path} are a link, as in the cache of the Hugging Face hub: copy its folder to real files with "
            "cp -rL"
        )
    if path.stat().st_size + sum((folder / name).stat().st_size for name in names) > MAX_FILE_BYTES:
        raise UserError(_too_large(path))
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(folder))
    except Exception as error:  # a path outside the folder, an offset beyond the end ...
        raise UserError(
            f"the weights of {path} cannot be read ({in_one_line(str(error))}): export it again"
        ) from error


def _too_large(path: Path) -> str:
    return f"{path} is larger than {MAX_FILE_BYTES:,} bytes with its weights, the most that an ONNX file can hold"
