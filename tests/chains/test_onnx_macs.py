from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import erde
from erde.bundle import read
from erde.chains.onnx_macs import count_macs, count_parameters
from tests.helpers.foreign import export, hand_made

node = helper.make_node
RNG = np.random.default_rng(0)


def array(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def macs_of(*nodes: onnx.NodeProto, **weights: Any) -> tuple[int, tuple[str, ...]]:
    """Of a graph from ``input`` (N, 3, 4, 4) to ``output``."""
    return count_macs(hand_made(*nodes, weights=weights, outputs={"output": []}))


def test_the_stages_of_a_bundle(tiny_bundle: Path) -> None:
    manifest = read(tiny_bundle)
    before = 0
    for stage in manifest.stages:
        model = onnx.load(tiny_bundle / stage.file)
        macs, uncounted = count_macs(model)
        assert uncounted == ()
        assert macs == pytest.approx(stage.macs - before, rel=0.01)
        before = stage.macs


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
def test_plain_networks(name: str, dynamo: bool, tmp_path: Path) -> None:
    network = erde.build_backbone(f"timm/{name}", classes=20).eval()
    torch.manual_seed(0)
    for parameter in network.parameters():  # the exporters merge equal ones
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x[:1])
    model = onnx.load(export(network, tmp_path / "net.onnx", x, dynamo=dynamo))
    macs, uncounted = count_macs(model)
    assert (macs, uncounted) == (counter.get_total_flops() // 2, ())
    learned = sum(parameter.numel() for parameter in network.parameters())
    norms = sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    # A norm that is folded into its convolution leaves one bias of its two rows.
    assert learned - norms <= count_parameters(model) <= learned


def test_a_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)
            self.head = nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.layer(x.flatten(1).unflatten(1, (8, 12))).mean(1))
            return y

    network = Tokens().eval()
    model = onnx.load(export(network, tmp_path / "net.onnx", torch.randn(2, 3, 4, 8), opset=18))
    expected = 8 * 12 * (4 * 12 + 2 * 24) + 2 * 3 * 8 * 8 * 4 + 12 * 5
    assert count_macs(model) == (expected, ())


def test_each_operator_by_hand() -> None:
    assert macs_of(node("Conv", ["input", "w"], ["output"], group=3), w=array(6, 1, 2, 2)) == (6 * 9 * 4, ())
    assert macs_of(node("ConvTranspose", ["input", "w"], ["output"]), w=array(3, 5, 2, 2)) == (48 * 5 * 4, ())
    flat = node("Flatten", ["input"], ["flat"])
    for transposed, shape in ((0, (48, 7)), (1, (7, 48))):
        gemm = node("Gemm", ["flat", "w"], ["output"], transB=transposed)
        assert macs_of(flat, gemm, w=array(*shape)) == (48 * 7, ())
    assert macs_of(node("MatMul", ["input", "w"], ["output"]), w=array(4)) == (48, ())
    einsum = node("Einsum", ["input", "w"], ["output"], equation="nchw, cd -> ndhw")
    assert macs_of(einsum, w=array(3, 9)) == (3 * 9 * 16, ())
    trace = node("Einsum", ["input", "w", "w"], ["output"], equation="nchw,cd,dc->nhw")
    assert macs_of(trace, w=array(3, 3)) == (0, ("Einsum",))
    square = node("MatMul", ["w", "w"], ["ww"])  # of weights alone: not for each image
    assert macs_of(square, node("Add", ["input", "ww"], ["output"]), w=array(4, 4)) == (0, ())


def test_int8_operators() -> None:
    scale, zero = np.array(0.1, dtype=np.float32), np.array(3, dtype=np.uint8)
    round_input = node("QuantizeLinear", ["input", "s", "z"], ["x"])
    given = {"s": scale, "z": zero, "w": RNG.integers(0, 9, (5, 3, 3, 3)).astype(np.uint8)}
    conv = node("QLinearConv", ["x", "s", "z", "w", "s", "z", "s", "z"], ["output"])
    assert macs_of(round_input, conv, **given) == (5 * 4 * 27, ())
    assert macs_of(round_input, node("ConvInteger", ["x", "w", "z", "z"], ["output"]), **given) == (
        5 * 4 * 27,
        (),
    )
    given["w"] = RNG.integers(0, 9, (4, 6)).astype(np.uint8)
    product = node("QLinearMatMul", ["x", "s", "z", "w", "s", "z", "s", "z"], ["output"])
    assert macs_of(round_input, product, **given) == (48 * 6, ())
    assert count_parameters(hand_made(round_input, product, weights=given)) == 24
    assert macs_of(round_input, node("MatMulInteger", ["x", "w", "z", "z"], ["output"]), **given) == (
        48 * 6,
        (),
    )


def test_what_cannot_be_counted_is_named() -> None:
    lstm = node("LSTM", ["rows", "w", "r"], ["output"], hidden_size=2)
    rows = node("Squeeze", ["input", "axis"], ["rows"])
    model = hand_made(rows, lstm, weights={"w": array(1, 8, 4), "r": array(1, 8, 2), "axis": np.array([0])},
                      outputs={"output": []})  # fmt: skip
    assert count_macs(model) == (0, ("LSTM",))
    own = hand_made(node("FusedConv", ["input"], ["output"], domain="com.microsoft"), outputs={"output": []})
    assert count_macs(own) == (0, ("FusedConv",))
    conv = node("Conv", ["input", "w"], ["output"])
    any_size: dict[str, Any] = {"inputs": {"input": ["N", 3, "H", "W"]}, "outputs": {"output": []}}
    model = hand_made(conv, weights={"w": array(2, 3, 3, 3)}, **any_size)
    assert count_macs(model) == (0, ("Conv",))


def test_shapes_that_inference_does_not_know() -> None:
    """A shape computed from numbers: only running the graph tells it."""
    shape = [
        node("ReduceMax", ["ones"], ["one"], keepdims=0),
        node("Cast", ["one"], ["whole"], to=TensorProto.INT64),
        node("Unsqueeze", ["whole", "axis"], ["first"]),
        node("Concat", ["first", "rest"], ["shape"], axis=0),
        node("Reshape", ["input", "shape"], ["folded"]),
        node("MatMul", ["folded", "w"], ["output"]),
    ]
    weights = {
        "ones": np.ones(3, dtype=np.float32),
        "axis": np.array([0]),
        "rest": np.array([6, -1]),
        "w": array(8, 2),
    }
    assert macs_of(*shape, **weights) == (6 * 8 * 2, ())


def test_parameters() -> None:
    model = hand_made(
        node("Conv", ["input", "w", "b"], ["x"]),
        node("BatchNormalization", ["x", "scale", "shift", "mean", "var"], ["y"]),
        node("Add", ["y", "scalar"], ["output"]),
        weights={"w": array(2, 3, 1, 1), "b": array(2), "scale": array(2), "shift": array(2), "mean": array(2),
                 "var": array(2), "scalar": np.array(1.0, dtype=np.float32), "unused": array(9)},
    )  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(array(9), "unused"))
    assert count_parameters(model) == 6 + 2 + 2 + 2
