from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from erde.bundle import graph_check
from erde.bundle.graph_check import OPERATORS, check_graph_file
from erde.common.errors import UserError
from tests.helpers.checks import user_error

ONE = np.ones(3, dtype=np.float32)


def outside(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """``tensor`` with its numbers in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


def model(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in ("x", "y")]
    constant = numpy_helper.from_array(ONE, "one")
    nodes = nodes or (helper.make_node("Add", ["x", "one"], ["y"]),)
    return helper.make_model(helper.make_graph(nodes, "stage", values[:1], values[1:], [constant]))


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "stage.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def constant(**attribute: object) -> onnx.NodeProto:
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.append(helper.make_attribute("value", next(iter(attribute.values()))))
    return node


def test_graphs_that_only_compute(tiny_bundle: Path, tmp_path: Path) -> None:
    for path in sorted(tiny_bundle.glob("*.onnx")):
        check_graph_file(path)
    proto = model()
    proto.graph.initializer[0].data_location = TensorProto.DEFAULT  # written out, and nothing outside
    assert b"\x70\x00" in proto.SerializeToString()
    check_graph_file(save(proto, tmp_path))
    check_graph_file(save(model(constant(value=numpy_helper.from_array(ONE))), tmp_path))


def test_weights_in_other_files(tmp_path: Path) -> None:
    for where in ("initializer", "attribute", "attributes"):
        proto = model()
        tensor = outside(numpy_helper.from_array(ONE, "other"))
        whole = numpy_helper.from_array(np.arange(3), "whole")
        if where == "initializer":
            proto.graph.initializer.append(tensor)
        elif where == "attribute":
            proto.graph.node.append(constant(value=tensor))
        else:
            proto.graph.node.append(constant(value=[whole, tensor]))
        with user_error("stage.onnx keeps weights in another file, which no stage needs"):
            check_graph_file(save(proto, tmp_path))
    # Either field alone is enough.
    for left_out in ("data_location", "external_data"):
        proto = model()
        proto.graph.initializer.append(outside(numpy_helper.from_array(ONE, "other")))
        proto.graph.initializer[-1].ClearField(left_out)
        with user_error("keeps weights in another file"):
            check_graph_file(save(proto, tmp_path))


def test_sparse_weights(tmp_path: Path) -> None:
    whole = numpy_helper.from_array(np.arange(3), "whole")
    sparse = onnx.SparseTensorProto(values=whole, indices=whole, dims=[2**40])
    proto = model()
    proto.graph.sparse_initializer.append(sparse)
    for bad in (proto, model(constant(value=sparse)), model(constant(value=[sparse, sparse]))):
        with user_error("stage.onnx has sparse weights"):
            check_graph_file(save(bad, tmp_path))


def test_loops_branches_and_functions(tmp_path: Path) -> None:
    inner = model().graph
    for name, value in (("body", inner), ("bodies", [inner, inner])):
        node = helper.make_node("Identity", ["x"], ["y"])
        node.attribute.append(helper.make_attribute(name, value))
        with user_error("stage.onnx has a loop or a branch"):
            check_graph_file(save(model(node), tmp_path))
    proto = model()
    proto.functions.append(helper.make_function("own", "f", ["x"], ["y"], [], [helper.make_opsetid("", 18)]))
    with user_error("stage.onnx has functions of its own"):
        check_graph_file(save(proto, tmp_path))


def test_operators_that_no_stage_has(tmp_path: Path) -> None:
    # Inverse and QLinearSigmoid of com.microsoft end the process (ONNX Runtime 1.31.1); a loop may never end.
    for operator, domain in (
        ("Inverse", "com.microsoft"),
        ("Relu", "com.microsoft"),
        ("Relu", "own"),
        ("Loop", ""),
        ("If", ""),
        ("Scan", ""),
        ("RandomNormal", ""),
        ("SequenceConstruct", ""),
        ("StringNormalizer", ""),
        ("Custom\n\x1b[31m", ""),
        ("", ""),
    ):
        bad = model(
            helper.make_node("Relu", ["x"], ["z"]), helper.make_node(operator, ["z"], ["y"], domain=domain)
        )
        with user_error(r"stage.onnx has the (operator|operators of the domain) '.*', which no stage needs"):
            check_graph_file(save(bad, tmp_path))
    for domain in ("", "ai.onnx"):
        check_graph_file(save(model(helper.make_node("Relu", ["x"], ["y"], domain=domain)), tmp_path))


def test_int8_operators_of_other_tools(tmp_path: Path) -> None:
    for operator in ("QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"):
        check_graph_file(save(model(helper.make_node(operator, ["x"], ["y"])), tmp_path))
    # ONNX Runtime's own are not: some of them end the process.
    with user_error("stage.onnx has the operator 'QLinearAdd', which no stage needs"):
        check_graph_file(
            save(model(helper.make_node("QLinearAdd", ["x"], ["y"], domain="com.microsoft")), tmp_path)
        )


def test_a_second_name_of_an_operator_is_looked_at_too(tmp_path: Path) -> None:
    # Of a field that comes twice protobuf takes the last.
    node = helper.make_node("Relu", ["x"], ["y"]).SerializeToString()
    for extra in (b"\x22\x04Loop", b"\x3a\x03own"):
        graph = b"\x0a" + bytes([len(node + extra)]) + node + extra
        path = tmp_path / "stage.onnx"
        path.write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
        with user_error("which no stage needs"):
            check_graph_file(path)


def as_onnx_runtime_reads(tag: int, high: int) -> bytes:
    """The key ``tag`` in five bytes with bits beyond the 32nd, which ONNX Runtime's protobuf drops."""
    return bytes([tag | 0x80, 0x80, 0x80, 0x80, high])


@pytest.mark.parametrize("high", [0x10, 0x20, 0x70])
def test_keys_beyond_32_bits(high: int, tmp_path: Path) -> None:
    bad = model()
    bad.graph.initializer.append(outside(numpy_helper.from_array(ONE, "other")))
    content = bad.SerializeToString()
    graph = bad.graph.SerializeToString()
    at = content.index(graph)
    length = at - content.index(b"\x3a", 2)
    hidden = content[: at - length] + as_onnx_runtime_reads(0x3A, high) + content[at - length + 1 :]
    path = tmp_path / "stage.onnx"
    path.write_bytes(hidden)
    with user_error("it is not a graph"):
        check_graph_file(path)


def test_a_graph_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "MAX_FIELDS", 10)
    with user_error("stage.onnx has more than 10 entries"):
        check_graph_file(save(model(), tmp_path))


def test_a_second_graph_is_looked_at_too(tmp_path: Path) -> None:
    # Protobuf merges messages that stand one behind the other.
    bad = model()
    bad.graph.initializer.append(outside(numpy_helper.from_array(ONE, "other")))
    for parts in ((model(), bad), (bad, model())):
        path = tmp_path / "stage.onnx"
        path.write_bytes(b"".join(part.SerializeToString() for part in parts))
        with user_error("keeps weights in another file"):
            check_graph_file(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"\x3a\x05ab",
        b"\x3b\x3c",
        b"\x00\x00",
        b"\xff" * 20,
        b"not a graph",
        b"\x3a\x02\x0a\x7f",
        b"\x39abc",
    ],
)
def test_what_is_no_graph(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stage.onnx"
    path.write_bytes(content)
    with user_error("ONNX Runtime cannot load .*stage.onnx: it is not a graph"):
        check_graph_file(path)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200), at=st.floats(0, 1), seed=st.integers(0, 3))
def test_no_bytes_upset_it(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, at: float, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.onnx"
    whole = model().SerializeToString()
    cut = int(at * len(whole))
    path.write_bytes((content, whole[:cut], whole[:cut] + content, whole[:cut] + content + whole[cut:])[seed])
    with contextlib.suppress(UserError):
        check_graph_file(path)
        # What passes here and is a graph for ONNX has nothing of what is refused.
        try:
            read = onnx.load_model_from_string(path.read_bytes())
        except DecodeError:
            return
        assert not read.functions
        assert not any(tensor.external_data or tensor.data_location for tensor in read.graph.initializer)
        assert all(node.op_type in OPERATORS and node.domain in ("", "ai.onnx") for node in read.graph.node)
        assert not any(
            attribute.HasField("g") or attribute.graphs
            for node in read.graph.node
            for attribute in node.attribute
        )
