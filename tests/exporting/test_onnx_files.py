from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import erde
import erde.runtime
from erde import bundle
from erde.common.splits import TrainSplit
from erde.data.batches import TrainBatches
from erde.data.load import DataSplits
from erde.exporting import onnx_files
from erde.exporting.modules import Preprocess
from erde.exporting.onnx_files import ExportedStages, export_plain, export_stages
from erde.exporting.parity import allowed_differences, check_equal, probe_images
from erde.networks.cost import network_cost
from erde.networks.network import EarlyExitNetwork
from erde.recipe.schema import AugmentationConfig
from erde.runtime.stages import StageRunner
from tests.helpers.checks import entries, user_error

COLOUR = (32, 32, 3)
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
# One exit is one graph: for what does not depend on the number of them.
GRAY = (8, 8, 1)


def noise(count: int, shape: tuple[int, int, int], seed: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def torch_logits(
    network: EarlyExitNetwork, images: NDArray[np.uint8], mean: Any, std: Any
) -> NDArray[np.float32]:
    """Normalised the long way, in float64."""
    x = ((images / 255.0 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        return network.eval()(torch.from_numpy(x.astype(np.float32))).numpy()


def plain_network(channels: int = 1, size: int = 8, exits: int = 1) -> EarlyExitNetwork:
    torch.manual_seed(0)
    backbone = erde.build_backbone("resnet8x0.5", classes=10, channels=channels)
    network = erde.attach_exits(backbone, exits, input_size=(channels, size, size))
    # Statistics that are not the identity.
    network.train()(torch.randn(16, channels, size, size))
    return network.eval()


@pytest.fixture(scope="module")
def gray(
    tiny_network: EarlyExitNetwork, digits: DataSplits, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EarlyExitNetwork, ExportedStages, Path]:
    folder = tmp_path_factory.mktemp("gray") / "stages"
    exported = export_stages(tiny_network, digits.image_shape, digits.mean, digits.std, folder)
    return tiny_network, exported, folder


@pytest.fixture(scope="module")
def colour(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[EarlyExitNetwork, ExportedStages, Path]:
    folder = tmp_path_factory.mktemp("colour") / "stages"
    # As training leaves it.
    network = plain_network(channels=3, size=32, exits=2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, export_stages(network, COLOUR, MEAN, STD, folder), folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[EarlyExitNetwork, Path]:
    """A network of one exit, exported for another opset."""
    folder = tmp_path_factory.mktemp("single") / "stages"
    network = plain_network()
    export_stages(network, GRAY, (0.3,), (0.4,), folder, opset=20)
    return network, folder


# ---------------------------------------------------------------- the graphs


@pytest.mark.parametrize("kind", ["gray", "colour"])
@pytest.mark.parametrize("batch", [0, 1, 2, 7, 32])
def test_every_exit_agrees_with_torch(kind: str, batch: int, request: pytest.FixtureRequest) -> None:
    network, exported, folder = request.getfixturevalue(kind)
    runner = StageRunner(exported.paths(folder), threads=1)
    images = noise(batch, exported.input_shape)
    expected = torch_logits(network, images, exported.mean, exported.std)
    x: NDArray[Any] | None = images
    for index in range(len(exported.files)):
        assert x is not None
        x, logits = runner.run(index, x)
        assert logits.shape == (batch, 10)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected[index], rtol=1e-4, atol=1e-4)
    assert x is None
    if batch:
        # The exits can be told apart, or the comparison would say little.
        assert all(np.abs(first - second).max() > 0.1 for first, second in itertools.pairwise(expected))


def test_preprocessing_is_that_of_the_training_batches(
    gray: tuple[EarlyExitNetwork, ExportedStages, Path], digits: DataSplits
) -> None:
    network, exported, folder = gray
    # The place as the label says which image is which after shuffling.
    split = TrainSplit(digits.test.images[:16], np.arange(16))
    batches = TrainBatches(
        split,
        batch_size=16,
        seed=0,
        augmentation=AugmentationConfig(crop_padding=0, flip=False),
        mean=digits.mean,
        std=digits.std,
        device=torch.device("cpu"),
    )
    ((x, places, *_),) = batches.epoch(0)
    with torch.no_grad():
        expected = network(x).numpy()
    logits = StageRunner(exported.paths(folder), threads=1).all_logits(split.images[places.numpy()])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "shape"), [("gray", (8, 8, 1)), ("colour", COLOUR)])
def test_names_types_and_shapes_of_the_stages(
    kind: str, shape: tuple[int, int, int], request: pytest.FixtureRequest
) -> None:
    _, exported, folder = request.getfixturevalue(kind)
    last = len(exported.files) - 1
    assert exported.files == tuple(f"stage_{index}.onnx" for index in range(last + 1))
    given: Any = None
    for index, path in enumerate(exported.paths(folder)):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (x,) = session.get_inputs()
        outputs = {value.name: value for value in session.get_outputs()}
        if index == 0:
            assert (x.name, x.type, x.shape) == ("images", "tensor(uint8)", ["batch", *shape])
        else:
            assert (x.name, x.type, x.shape) == ("features_in", "tensor(float)", given)
        assert list(outputs) == (["logits"] if index == last else ["features", "logits"])
        assert (outputs["logits"].type, outputs["logits"].shape) == ("tensor(float)", ["batch", 10])
        if index < last:
            assert outputs["features"].type == "tensor(float)"
            given = outputs["features"].shape
            assert given[0] == "batch"
            assert len(given) == 4


def test_a_file_tells_nothing_of_the_machine(
    gray: tuple[EarlyExitNetwork, ExportedStages, Path], single: tuple[EarlyExitNetwork, Path]
) -> None:
    for path in [*gray[1].paths(gray[2]), single[1] / "stage_0.onnx"]:
        content = path.read_bytes()
        for word in (
            "site-packages",
            ".py",
            "/home",
            "/tmp",
            str(Path(__file__).parents[2]),
            "File ",
            "pkg.",
            "torch.nn",
            "aten.",
        ):
            assert word.encode() not in content, word
        assert str(Path.cwd()).encode() not in content
        model = onnx.load(path)
        assert (model.producer_name, model.producer_version) == ("erde", erde.__version__)
        assert not model.metadata_props
        assert not model.doc_string
        assert not model.graph.doc_string
        assert all(not node.metadata_props and not node.doc_string for node in model.graph.node)
        assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)


def test_the_graphs_hold_nothing_that_could_be_done_before(
    gray: tuple[EarlyExitNetwork, ExportedStages, Path],
    colour: tuple[EarlyExitNetwork, ExportedStages, Path],
    tmp_path: Path,
) -> None:
    # Weights in channels-last order, as training leaves them, are what the exporter stumbled over.
    export_plain(colour[0], COLOUR, MEAN, STD, tmp_path / "plain.onnx")
    for path in [*gray[1].paths(gray[2]), *colour[1].paths(colour[2]), tmp_path / "plain.onnx"]:
        graph = onnx.load(path).graph
        made_by = {name: node.op_type for node in graph.node for name in node.output}
        norms = [node for node in graph.node if node.op_type == "BatchNormalization"]
        assert all(made_by[node.input[0]] == "Relu" for node in norms), path
        operations = {node.op_type for node in graph.node}
        known = {
            "Cast",
            "Mul",
            "Add",
            "Transpose",
            "Conv",
            "Relu",
            "BatchNormalization",
            "AveragePool",
            "Reshape",
            "Gemm",
        }
        assert operations <= known, operations - known
        used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        assert all(tensor.name in used for tensor in graph.initializer)
        assert set(made_by) <= used
        # One image is one row: its own size is nowhere computed.
        assert sum(node.op_type == "Reshape" for node in graph.node) == 1


def test_equal_networks_give_equal_bytes(
    gray: tuple[EarlyExitNetwork, ExportedStages, Path], tiny_bundle: Path
) -> None:
    # The bundle's were exported before, on their own.
    for path in gray[1].paths(gray[2]):
        assert path.read_bytes() == (tiny_bundle / path.name).read_bytes()


def test_the_opset_is_the_one_asked_for(
    gray: tuple[EarlyExitNetwork, ExportedStages, Path], single: tuple[EarlyExitNetwork, Path]
) -> None:
    for opset, folder in ((18, gray[2]), (20, single[1])):
        assert ExportedStages.read(folder).opset == opset
        for path in folder.glob("*.onnx"):
            result = {opset.domain: opset.version for opset in onnx.load(path).opset_import}
            assert result == {"": opset}


def test_one_exit_is_one_stage(single: tuple[EarlyExitNetwork, Path]) -> None:
    network, folder = single
    assert entries(folder) == ["stage_0.onnx", "stages.json"]
    images = noise(5, GRAY)
    logits = StageRunner([folder / "stage_0.onnx"], threads=1).all_logits(images)
    np.testing.assert_allclose(logits, torch_logits(network, images, (0.3,), (0.4,)), rtol=1e-4, atol=1e-4)


def test_export_plain_is_the_final_exit(
    gray: tuple[EarlyExitNetwork, ExportedStages, Path], tmp_path: Path
) -> None:
    network, exported, _ = gray
    path = tmp_path / "baselines" / "no-exit.onnx"
    export_plain(network, exported.input_shape, exported.mean, exported.std, path)
    assert entries(path.parent) == ["no-exit.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("images", ["batch", 8, 8, 1])]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    for batch in (0, 1, 7):
        images = noise(batch, exported.input_shape)
        expected = torch_logits(network, images, exported.mean, exported.std)[-1]
        np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, rtol=1e-4, atol=1e-4)
    # No intermediate head came along.
    weights = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)
    assert weights < network_cost(network, (1, 8, 8)).no_exit_parameters * 1.02


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize("kind", ["gray", "colour"])
def test_exported_stages_come_back(kind: str, request: pytest.FixtureRequest) -> None:
    network, exported, folder = request.getfixturevalue(kind)
    assert entries(folder) == [*exported.files, "stages.json"]
    assert ExportedStages.read(folder) == exported
    height, width, channels = exported.input_shape
    assert exported.cost == network_cost(network, (channels, height, width))
    assert exported.paths(folder) == [folder / name for name in exported.files]


@pytest.mark.parametrize(
    ("change", "readable"),
    [
        ({"quantisation": None, "of_a_later_version": 1}, True),
        ({"files": 3}, False),
        ({"cost": {"macs": [1]}}, False),
        ({"input_shape": [8, 8]}, False),
        ({"quantisation": {"kept_in_float": []}}, False),
    ],
    ids=str,
)
def test_stages_of_other_versions_and_damaged_ones(
    gray: tuple[EarlyExitNetwork, ExportedStages, Path],
    tmp_path: Path,
    change: dict[str, Any],
    readable: bool,
) -> None:
    _, exported, folder = gray
    value = json.loads((folder / "stages.json").read_text())
    # The first versions wrote no such key.
    del value["quantisation"]
    (tmp_path / "stages.json").write_text(json.dumps({**value, **change}))
    if readable:
        assert ExportedStages.read(tmp_path) == exported
        (tmp_path / "stages.json").write_text(json.dumps(value))
        assert ExportedStages.read(tmp_path) == exported
    else:
        with user_error(r"stages\.json is damaged: remove the folder .* and run erde export again"):
            ExportedStages.read(tmp_path)


def use_graph(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the exporter give the graph at ``path``, whatever it is asked for (and in no time)."""

    def copy_graph(module: Any, x: Any, target: Path, *_: Any) -> None:
        shutil.copyfile(path, target)

    monkeypatch.setattr(onnx_files, "write_graph", copy_graph)


def test_a_network_that_disagrees_is_not_written(
    single: tuple[EarlyExitNetwork, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, stages = single
    use_graph(stages / "stage_0.onnx", monkeypatch)
    folder = tmp_path / "stages"
    export_stages(network, GRAY, (0.3,), (0.4,), folder)
    older = (folder / "stages.json").read_bytes()
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.heads[-1].linear.bias += 0.01
    with user_error(r"differs from torch by 0\.01 at exit 'final' for a batch of 2, .*: nothing was written"):
        export_stages(other, GRAY, (0.3,), (0.4,), folder, opset=21)
    assert entries(tmp_path) == ["stages"]
    assert (folder / "stages.json").read_bytes() == older
    with user_error("nothing was written"):
        export_stages(network, GRAY, (0.3,), (0.5,), tmp_path / "new")
    assert entries(tmp_path) == ["stages"]


def test_a_graph_that_no_bundle_may_hold_is_not_written(
    single: tuple[EarlyExitNetwork, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Said at export, not when the bundle is opened.
    use_graph(single[1] / "stage_0.onnx", monkeypatch)
    monkeypatch.setattr("erde.bundle.graph_check.NAMES", {"operator": ("Conv",), "domain": ("",)})
    with user_error(r"this network cannot be a bundle: its graph has the operator '\w+' \(docs/formats.md"):
        export_stages(single[0], GRAY, (0.3,), (0.4,), tmp_path / "stages")
    assert entries(tmp_path) == []


def test_a_plain_network_that_disagrees_is_not_written(
    single: tuple[EarlyExitNetwork, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_graph(single[1] / "stage_0.onnx", monkeypatch)
    with user_error("differs from torch by .*: nothing was written"):
        export_plain(single[0], GRAY, (0.2,), (0.4,), tmp_path / "some.onnx")
    assert entries(tmp_path) == []


def test_no_bundle_of_a_network_that_disagrees(
    digits: DataSplits,
    single: tuple[EarlyExitNetwork, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_graph(single[1] / "stage_0.onnx", monkeypatch)
    with user_error("nothing was written"):
        erde.export(single[0], digits, tmp_path / "bundle")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 32])
@pytest.mark.parametrize("plain", [False, True])
def test_every_size_of_batch_is_compared(
    plain: bool,
    batch: int,
    single: tuple[EarlyExitNetwork, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_graph(single[1] / "stage_0.onnx", monkeypatch)
    run = StageRunner.run

    def wrong(self: StageRunner, index: int, x: NDArray[Any]) -> Any:
        features, logits = run(self, index, x)
        if len(x) == batch:
            logits = logits + np.float32(0.01) if batch else logits[:, 1:]
        return features, logits

    monkeypatch.setattr(StageRunner, "run", wrong)
    with user_error(f"at exit 'final' for a batch of {batch}"):
        (export_plain if plain else export_stages)(
            single[0], GRAY, (0.3,), (0.4,), tmp_path / ("some.onnx" if plain else "some")
        )
    assert entries(tmp_path) == []


def test_what_counts_as_equal() -> None:
    expected = np.array([[1.0, -300.0]], dtype=np.float32)
    check_equal(expected + np.float32(0.02), expected, "final", 1, 0.03)
    check_equal(expected[:0], expected[:0], "final", 0, 0.03)
    for logits in (expected + np.float32(0.04), expected * np.float32("nan")):
        with user_error(r"differs from torch by .* 0\.03 is allowed \(the logits spread by 1\.5e\+02\)"):
            check_equal(logits, expected, "final", 1, 0.03)
    with user_error(r"gives shape \(1, 2\) at exit 'final' for a batch of 0, torch gives \(0, 2\)"):
        check_equal(expected, expected[:0], "final", 0, 0.03)


class Steep(nn.Module):
    """The sine of ``steepness`` times a sum: rounding grows by the steepness, in any library."""

    def __init__(self, steepness: float) -> None:
        super().__init__()
        self.conv, self.linear, self.steepness = nn.Conv2d(1, 8, 5), nn.Linear(8, 10), steepness

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.sin(self.steepness * self.conv(x)).mean(dim=(2, 3)))


def steep(steepness: float) -> EarlyExitNetwork:
    torch.manual_seed(0)
    return erde.attach_exits(Steep(steepness), 1, input_size=(1, 8, 8))


def allowed_for(network: EarlyExitNetwork) -> tuple[float, float, float]:
    """What is allowed, the spread of the logits, and the largest."""
    preprocess = Preprocess((0.3,), (0.4,))
    probes = probe_images(GRAY, (0.3,), (0.4,))
    with torch.no_grad():
        logits = network.eval()(preprocess(probes))[-1].double()
    (allowed,) = allowed_differences(network, preprocess, probes, ["final"])
    return allowed, float(logits.std()), float(logits.abs().max())


def test_how_far_logits_may_differ() -> None:
    # Of a tame network a share of the spread, though its logits are small.
    network = steep(1.0)
    with torch.no_grad():
        network.heads[-1].linear.weight *= 0.01
        network.heads[-1].linear.bias.zero_()
    allowed, spread, largest = allowed_for(network)
    assert allowed == pytest.approx(max(1e-4 * spread, 1e-5 * largest))
    assert largest < 0.1
    # Of large logits that hardly differ a share of their size: float32 knows seven digits.
    with torch.no_grad():
        network.heads[-1].linear.bias.fill_(500.0)
    allowed, spread, largest = allowed_for(network)
    assert spread < 0.1
    assert allowed == pytest.approx(1e-5 * largest)
    # Of a steep one its own rounding.
    allowed, spread, largest = allowed_for(steep(3e4))
    assert 5 * max(1e-4 * spread, 1e-5 * largest) < allowed < 0.05 * spread


def test_a_network_that_torch_itself_computes_as_roughly_is_exported(tmp_path: Path) -> None:
    exported = export_stages(steep(3e4), GRAY, (0.3,), (0.4,), tmp_path / "stages")
    assert exported.files == ("stage_0.onnx",)


def test_where_no_comparison_says_anything_it_is_said(tmp_path: Path) -> None:
    with user_error("exit 'final' cannot be checked: torch's own logits in float32 are off by"):
        export_stages(steep(1e8), GRAY, (0.3,), (0.4,), tmp_path / "stages")
    assert entries(tmp_path) == []


def test_images_for_the_comparison() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.15, 0.2)
    probes = probe_images(COLOUR, mean, std)
    assert probes.shape == (32, *COLOUR)
    pixels = probes.double() / 255
    assert torch.allclose(pixels.mean(dim=(0, 1, 2)), torch.tensor(mean).double(), atol=0.05)
    assert torch.allclose(pixels.std(dim=(0, 1, 2)), torch.tensor(std).double(), atol=0.05)
    # Smooth: neighbours differ by little.
    assert float((pixels[:, 1:] - pixels[:, :-1]).abs().mean()) < 0.3 * float(pixels.std())
    assert probe_images((1, 1, 3), mean, std, count=2).shape == (2, 1, 1, 3)
    given = noise(40, COLOUR)
    assert np.array_equal(probe_images(COLOUR, mean, std, given).numpy(), given[:32])
    assert torch.equal(probe_images(COLOUR, mean, std, given[:31]), probes)


# ---------------------------------------------------------------- erde.export


def test_the_bundle_before_calibration(digits: DataSplits, tmp_path: Path) -> None:
    network = plain_network().train()
    weights = copy.deepcopy(network.state_dict())
    folder = erde.export(network, digits, str(tmp_path / "deep" / "bundle"), name="some")
    assert folder == tmp_path / "deep" / "bundle"
    assert entries(folder.parent) == ["bundle"]
    assert entries(folder) == ["README.md", "manifest.json", "stage_0.onnx"]
    manifest = bundle.read(folder)
    assert manifest.name == "some"
    assert manifest.input_shape == digits.image_shape
    assert tuple(manifest.classes) == digits.classes
    assert (tuple(manifest.mean), tuple(manifest.std)) == (digits.mean, digits.std)
    assert [point.name for point in manifest.operating_points] == ["no-exit"]
    assert manifest.operating_points[0].certificate is None
    cost = network_cost(network, digits.input_size)
    assert manifest.stages[0].macs == cost.macs[0] == manifest.no_exit_macs
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    # What is there already is not touched.
    before = (folder / "manifest.json").read_bytes()
    with user_error("exists already: choose another path, or remove it first"):
        erde.export(network, digits, folder)
    assert (folder / "manifest.json").read_bytes() == before
    assert entries(folder.parent) == ["bundle"]


def test_a_bundle_in_int8(digits: DataSplits, tmp_path: Path) -> None:
    folder = erde.export(plain_network(), digits, tmp_path / "bundle", name="some", precision="int8")
    assert entries(tmp_path) == ["bundle"]
    assert entries(folder) == ["README.md", "manifest.json", "stage_0.onnx"]
    manifest = bundle.read(folder)
    assert manifest.precision == "int8"
    assert manifest.provenance["quantisation"]["range_images"] == 512
    assert manifest.provenance["quantisation"]["kept_in_float"][0] == "first"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "1 channel (int8, logits in float; the first convolution" in card
    weights = onnx.load(folder / "stage_0.onnx").graph.initializer
    assert sum(weight.data_type == onnx.TensorProto.INT8 and len(weight.dims) == 4 for weight in weights) == 8
    # The sample holds on the machine that wrote it, and would on one that rounds a tie the other way.
    logits = erde.runtime.Session(folder).all_logits(digits.test.images)
    assert manifest.reference_sample.tolerance > 1e-3 * float(np.abs(logits).max())
    assert "1 channel (fp32)" in bundle.model_card(manifest.model_copy(update={"precision": "fp32"}))
    assert "1 channel (int8)" in bundle.model_card(manifest.model_copy(update={"provenance": {}}))


def test_a_bundle_of_a_network_that_was_trained_elsewhere(digits: DataSplits, tmp_path: Path) -> None:
    network, names = plain_network(), [f"class {index}" for index in range(10)]
    images = erde.ImageFormat(names, (8, 8, 1), [0.3], [0.4])
    folder = erde.export(network, images, tmp_path / "bundle")
    manifest = bundle.read(folder)
    assert (manifest.classes, manifest.input_shape) == (names, GRAY)
    assert (manifest.mean, manifest.std) == ([0.3], [0.4])
    answers = erde.runtime.Session(folder).predict(digits.test.images[:5])
    expected = torch_logits(network, digits.test.images[:5], (0.3,), (0.4,))[-1]
    assert answers.labels.tolist() == expected.argmax(axis=1).tolist()
    with user_error("precision='int8' needs images"):
        erde.export(network, images, tmp_path / "other", precision="int8")
    with user_error("the data are a NoneType, expected what erde.load_data gives, or an erde.ImageFormat"):
        erde.export(network, None, tmp_path / "other")
    assert entries(tmp_path) == ["bundle"]


def test_as_many_class_names_as_logits(tmp_path: Path) -> None:
    images = erde.ImageFormat([f"class {index}" for index in range(9)], (8, 8, 1), [0.3], [0.4])
    with user_error("9 class names for a network of 10 logits: give a name for each logit"):
        erde.export(plain_network(), images, tmp_path / "bundle")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("opset", [17, 24, 99, "18"])
def test_an_opset_that_is_not_written(opset: Any, digits: DataSplits, tmp_path: Path) -> None:
    with user_error(f"opset is {opset}, expected 18 to 23"):
        erde.export(plain_network(), digits, tmp_path / "bundle", opset=opset)
    assert entries(tmp_path) == []


def test_a_graph_in_another_opset_than_the_one_asked_for(tmp_path: Path) -> None:
    # torch writes opset 18 where it cannot convert.
    with user_error("torch wrote opset 18, not opset 99"):
        export_plain(plain_network(), GRAY, (0.3,), (0.4,), tmp_path / "some.onnx", opset=99)
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_shape": (8, 8)}, r"image_shape=\(8, 8\): expected \(H, W, C\)"),
        ({"mean": (0.5,) * 3}, "mean has 3 values, expected 1"),
        ({"mean": (float("nan"),)}, r"mean=\(nan,\): expected finite values"),
        ({"std": (0.0,)}, r"std=\(0.0,\): expected finite values above 0"),
        ({"std": (float("inf"),)}, r"std=\(inf,\): expected finite values above 0"),
        ({"classes": "cat"}, "classes='cat': expected a list of names"),
        ({"classes": []}, r"classes=\[\]: expected a list of names"),
        ({"classes": ["cat"]}, r"classes=\['cat'\]: expected a list of names, two or more"),
        ({"classes": [1, 2]}, r"classes=\[1, 2\]: expected a list of names"),
    ],
)
def test_image_formats_that_are_none(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "classes": ["a", "b"],
        "image_shape": GRAY,
        "mean": (0.3,),
        "std": (0.4,),
        **changed,
    }
    with user_error(message):
        erde.ImageFormat(**given)


@pytest.mark.parametrize("precision", ["int4", "INT8", ""])
def test_an_unknown_precision(precision: str, digits: DataSplits, tmp_path: Path) -> None:
    with user_error(f"unknown precision '{precision}'"):
        erde.export(plain_network(), digits, tmp_path / "bundle", precision=precision)
    assert entries(tmp_path) == []


def test_a_file_where_the_bundles_folder_would_be(digits: DataSplits, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with user_error("file is a file; choose another folder"):
        erde.export(plain_network(), digits, tmp_path / "file" / "bundle")
