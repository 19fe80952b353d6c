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

from erde.errors import UserError
from erde.graph_files import check_graph_file
from tests.conftest import user_error

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
    one = model()
    one.graph.initializer[0].data_location = TensorProto.DEFAULT  # written out, and nothing outside
    assert b"\x70\x00" in one.SerializeToString()
    check_graph_file(save(one, tmp_path))
    check_graph_file(save(model(constant(value=numpy_helper.from_array(ONE))), tmp_path))


def test_weights_in_other_files(tmp_path: Path) -> None:
    places = []
    for where in (
        "initializer",
        "sparse values",
        "sparse indices",
        "attribute",
        "attributes",
        "sparse attribute",
    ):
        one = model()
        tensor = outside(numpy_helper.from_array(ONE, "other"))
        whole = numpy_helper.from_array(np.arange(3), "whole")
        if where == "initializer":
            one.graph.initializer.append(tensor)
        elif where == "sparse values":
            one.graph.sparse_initializer.append(
                onnx.SparseTensorProto(values=tensor, indices=whole, dims=[9])
            )
        elif where == "sparse indices":
            one.graph.sparse_initializer.append(
                onnx.SparseTensorProto(values=whole, indices=tensor, dims=[9])
            )
        elif where == "attribute":
            one.graph.node.append(constant(value=tensor))
        elif where == "attributes":
            one.graph.node.append(constant(value=[whole, tensor]))
        else:
            one.graph.node.append(
                constant(value=onnx.SparseTensorProto(values=tensor, indices=whole, dims=[9]))
            )
        places.append(where)
        with user_error("stage.onnx keeps weights in another file, which no stage needs"):
            check_graph_file(save(one, tmp_path))
    assert len(places) == 6
    # Either field alone is enough.
    for left_out in ("data_location", "external_data"):
        one = model()
        one.graph.initializer.append(outside(numpy_helper.from_array(ONE, "other")))
        one.graph.initializer[-1].ClearField(left_out)
        with user_error("keeps weights in another file"):
            check_graph_file(save(one, tmp_path))


def test_loops_branches_and_functions(tmp_path: Path) -> None:
    inner = model().graph
    for name, value in (("body", inner), ("bodies", [inner, inner])):
        node = helper.make_node("Loop", ["x"], ["y"])
        node.attribute.append(helper.make_attribute(name, value))
        with user_error("stage.onnx has a loop or a branch"):
            check_graph_file(save(model(node), tmp_path))
    one = model()
    one.functions.append(helper.make_function("own", "f", ["x"], ["y"], [], [helper.make_opsetid("", 18)]))
    with user_error("stage.onnx has functions of its own"):
        check_graph_file(save(one, tmp_path))


def test_a_second_graph_is_looked_at_too(tmp_path: Path) -> None:
    # Protobuf merges messages that stand one behind the other.
    bad = model()
    bad.graph.initializer.append(outside(numpy_helper.from_array(ONE, "other")))
    for parts in ((model(), bad), (bad, model())):
        path = tmp_path / "stage.onnx"
        path.write_bytes(b"".join(one.SerializeToString() for one in parts))
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
        assert not any(one.external_data or one.data_location for one in read.graph.initializer)
        assert not any(one.HasField("g") or one.graphs for node in read.graph.node for one in node.attribute)
