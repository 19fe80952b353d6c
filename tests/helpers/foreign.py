"""ONNX classifiers as other people's code writes them."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIDE, CLASSES = 24, 7


class Convolutions(nn.Module):
    """A small classifier for images (B, 3, 24, 24), or (B, 24, 24, 3)."""

    def __init__(self, softmax: bool = False, channels_last: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, groups=2),
        )
        self.classify = nn.Linear(12, CLASSES)
        self.softmax, self.channels_last = softmax, channels_last

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        # With fixed numbers, as in code that was written for one batch: its size is part of the graph.
        x = self.features(x).relu().mean((2, 3)).reshape(x.shape[0], 12)
        x = self.classify(x)
        return x.softmax(1) if self.softmax else x


def random_network(**options: bool) -> Convolutions:
    """With logits that differ from image to image."""
    torch.manual_seed(0)
    network = Convolutions(**options).eval()
    with torch.no_grad():
        network.features[1].running_mean.uniform_(-0.3, 0.3)
        network.features[1].running_var.uniform_(0.5, 2)
        network.classify.weight.mul_(8)
    return network


def export(
    network: nn.Module,
    path: Path,
    example: Tensor,
    *,
    dynamo: bool = True,
    dynamic: bool = True,
    opset: int = 18,
    inputs: tuple[str, ...] = ("input",),
    outputs: tuple[str, ...] = ("output",),
) -> Path:
    """A plain ``torch.onnx.export``."""
    batch: dict[str, Any] = {}
    if dynamic and dynamo:
        batch = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    elif dynamic:
        batch = {"dynamic_axes": {name: {0: "batch"} for name in (*inputs, *outputs)}}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (example,),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            dynamo=dynamo,
            verbose=False,
            **({"external_data": False} if dynamo else {}),
            **batch,
        )
    return path


def hand_made(
    *nodes: onnx.NodeProto,
    weights: dict[str, NDArray[Any]] | None = None,
    inputs: dict[str, list[int | str]] | None = None,
    outputs: dict[str, list[int | str]] | None = None,
    kind: int = TensorProto.FLOAT,
    output_kind: int = TensorProto.FLOAT,
    opset: int = 18,
) -> onnx.ModelProto:
    """A graph from ``input`` (N, 3, 4, 4) to ``output`` (N, 5): by default the flattened image times a matrix."""
    generator = np.random.default_rng(0)
    weights = {"matrix": generator.standard_normal((48, 5)).astype(np.float32), **(weights or {})}
    nodes = nodes or (
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["output"]),
    )
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "foreign",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, shape in (inputs or {"input": ["N", 3, 4, 4]}).items()
        ],
        [
            helper.make_tensor_value_info(name, output_kind, shape)
            for name, shape in (outputs or {"output": ["N", 5]}).items()
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def saved(model: onnx.ModelProto, folder: Path, name: str = "net.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path
