from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import erde
from erde.exporting.graphs import BLOCKED, block_input, unblock_input
from erde.exporting.modules import FEATURES_IN
from erde.exporting.onnx_files import export_stages
from erde.exporting.quantisation import quantise
from erde.runtime.stages import StageRunner


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """resnet14 with an exit amid its first group and one behind it: a residual block on its stage's input, and none."""
    torch.manual_seed(0)
    network = erde.attach_exits(
        erde.build_backbone("resnet14", classes=10, channels=3), ["group1_block1", "group1_block2"], input_size=(3, 32, 32)
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("graphs") / "stages"
    export_stages(network, (32, 32, 3), (0.5,) * 3, (0.25,) * 3, folder)
    return folder


def test_only_a_stage_that_adds_its_input_is_blocked(stages: Path) -> None:
    kinds = []
    for index in range(3):
        graph = onnx.load(stages / f"stage_{index}.onnx").graph
        kinds.append([node.op_type for node in graph.node].count("MaxPool"))
    # group2 begins with two convolutions on its input.
    assert kinds == [0, 1, 0]


def test_blocking_changes_no_number_and_can_be_undone(stages: Path, tmp_path: Path) -> None:
    blocked = onnx.load(stages / "stage_1.onnx")
    plain = copy.deepcopy(blocked)
    unblock_input(plain)
    assert not any(BLOCKED in (*node.input, *node.output) for node in plain.graph.node)
    onnx.checker.check_model(plain)
    x = np.random.default_rng(0).normal(size=(3, 16, 32, 32)).astype(np.float32)
    result = []
    for name, model in (("blocked", blocked), ("plain", plain)):
        onnx.save(model, tmp_path / f"{name}.onnx")
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        result.append(session.run(None, {FEATURES_IN: x}))
    for part, other in zip(*result, strict=True):
        np.testing.assert_allclose(part, other, atol=1e-5)
    again = copy.deepcopy(plain)
    block_input(again)
    assert again.SerializeToString(deterministic=True) == blocked.SerializeToString(deterministic=True)


def test_a_graph_without_such_a_node_stays(stages: Path) -> None:
    model = onnx.load(stages / "stage_2.onnx")
    before = model.SerializeToString(deterministic=True)
    unblock_input(model)
    block_input(model)
    assert model.SerializeToString(deterministic=True) == before


def test_int8_has_no_such_node(stages: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(2).normal(size=(8, 16, 32, 32)).astype(np.float32)
    quantise(stages / "stage_1.onnx", tmp_path / "stage_1.onnx", x)
    kinds = {node.op_type for node in onnx.load(tmp_path / "stage_1.onnx").graph.node}
    assert "QuantizeLinear" in kinds
    assert "MaxPool" not in kinds


def test_convolutions_of_a_blocked_stage_are_fused(stages: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(stages / "stage_1.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    if "ReorderInput" not in kinds:
        pytest.skip("this CPU has no blocked layout for 16 channels")
    # Without the pooling the addition and its ReLU stand alone, in the layout of the input.
    assert "Add" not in kinds
    assert "Relu" not in kinds


def test_the_stages_run_as_they_are(stages: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    runner = StageRunner([stages / f"stage_{index}.onnx" for index in range(3)], threads=1)
    assert runner.all_logits(images).shape == (3, 5, 10)
