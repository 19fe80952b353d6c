"""A bundle as one ONNX file with branches, held against the bundle's own session."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

import erde
from erde.bundle.sealing import seal_of
from erde.chains import single_file
from erde.chains.cascading import cascade
from erde.chains.preprocessing import Preprocessing
from erde.chains.single_file import write_single_file
from erde.data.load import DataSplits
from erde.networks.network import EarlyExitNetwork
from erde.policy import rule as policy
from erde.runtime.session import Session
from tests.helpers.big_network import MEAN, STD, write_big_network, write_photos
from tests.helpers.checks import entries, user_error
from tests.helpers.command import run_command
from tests.helpers.hand_made_bundle import convolution_bundle


def answers(path: Path, images: NDArray[np.uint8]) -> tuple[list[int], NDArray[np.float32], list[int]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = [session.run(["label", "probabilities", "exit"], {"images": image[None]}) for image in images]
    labels, probabilities, exits = zip(*rows, strict=True)
    return np.concatenate(labels).tolist(), np.concatenate(probabilities), np.concatenate(exits).tolist()


def compare(bundle: Path, path: Path, images: NDArray[np.uint8], point: str | None = None) -> list[int]:
    """Hold the file against the session; returned are the exits."""
    session = Session(bundle, threads=1)
    thresholds = session.manifest.point(point).thresholds
    logits = session.all_logits(images)
    sure = ~(policy.in_band(session.rule.apply(logits)[1], thresholds) | policy.near_tie(logits))
    assert sure.mean() > 0.9
    expected = session.predict(images, operating_point=point)
    labels, probabilities, exits = answers(path, images)
    assert np.array(labels)[sure].tolist() == expected.labels[sure].tolist()
    assert np.array(exits)[sure].tolist() == expected.exits[sure].tolist()
    assert np.abs(probabilities - expected.probabilities)[sure].max() < 1e-5
    return exits


@pytest.fixture(scope="module")
def uncalibrated(
    tiny_network: EarlyExitNetwork, digits: DataSplits, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return erde.export(tiny_network, digits, tmp_path_factory.mktemp("uncalibrated") / "bundle")


RULES = [
    *[{"score": score, "ensemble": "none"} for score in policy.SCORES],
    {"score": "margin", "ensemble": "arithmetic"},
    {"score": "entropy", "ensemble": "geometric"},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule['score']}-{rule['ensemble']}")
def test_every_rule_is_that_of_the_bundle(
    rule: dict[str, Any], uncalibrated: Path, digits: DataSplits, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    erde.calibrate(uncalibrated, digits, out=bundle, max_risk=(0.05, 0.1), **rule)
    images = np.asarray(digits.test.images[:])
    path = tmp_path / "one.onnx"
    write_single_file(bundle, path, "risk-10")
    exits = compare(bundle, path, images, "risk-10")
    if rule["score"] not in ("energy", "patience"):
        assert len(set(exits)) > 1


def test_points_and_what_the_file_says(tiny_bundle: Path, digits: DataSplits, tmp_path: Path) -> None:
    images = np.asarray(digits.test.images[:60])
    manifest = Session(tiny_bundle).manifest
    for point in manifest.operating_points:
        path = tmp_path / f"{point.name}.onnx"
        write_single_file(tiny_bundle, path, point.name)
        exits = compare(tiny_bundle, path, images, point.name)
        model = onnx.load(path)
        branches = [node for node in model.graph.node if node.op_type == "If"]
        assert bool(branches) == (point.name != "no-exit")
        notes = {entry.key: entry.value for entry in model.metadata_props}
        assert notes["operating_point"] == point.name
        assert json.loads(notes["classes"]) == manifest.classes
        assert notes["bundle_seal"] == seal_of(manifest)
        assert notes.get("promise") == (point.certificate and point.certificate.sentence())
        if point.name == "no-exit":
            assert set(exits) == {2}
    # The default, and weights where they are needed: in the branch of their stage.
    write_single_file(tiny_bundle, tmp_path / "default.onnx")
    model = onnx.load(tmp_path / "default.onnx")
    assert compare(tiny_bundle, tmp_path / "default.onnx", images)
    assert not any(tensor.name.startswith(("stage_1", "stage_2")) for tensor in model.graph.initializer)


def test_disabled_exits_are_not_computed(tiny_bundle: Path, tmp_path: Path) -> None:
    stages = [onnx.load(stage) for stage in sorted(tiny_bundle.glob("stage_*.onnx"))]
    heads = [
        {name for node in stage.graph.node if node.op_type == "Gemm" for name in node.input}
        for stage in stages
    ]
    assert all(heads)
    write_single_file(tiny_bundle, tmp_path / "alone.onnx", "no-exit")
    model = onnx.load(tmp_path / "alone.onnx")
    assert [node.op_type for node in model.graph.node].count("Gemm") == 1
    weights = {tensor.name for tensor in model.graph.initializer}
    assert not any(f"stage_{index}/{name}" in weights for index in (0, 1) for name in heads[index])
    assert weights <= {name for node in model.graph.node for name in node.input}


def test_int8_and_chains(
    tiny_network: EarlyExitNetwork, tiny_bundle: Path, digits: DataSplits, tmp_path: Path
) -> None:
    images = np.asarray(digits.test.images[:])
    erde.export(tiny_network, digits, tmp_path / "int8", precision="int8")
    erde.calibrate(tmp_path / "int8", digits, max_risk=0.1)
    write_single_file(tmp_path / "int8", tmp_path / "int8.onnx")
    assert len(set(compare(tmp_path / "int8", tmp_path / "int8.onnx", images))) > 1
    notes = {entry.key: entry.value for entry in onnx.load(tmp_path / "int8.onnx").metadata_props}
    assert "the full network in int8" in notes["promise"]
    # A chain: its fallback takes the image, in a branch; without an early exit it runs alone.
    big = write_big_network(digits, tmp_path / "big.onnx")
    photos = write_photos(digits, tmp_path / "photos", True)
    cascade(
        [tiny_bundle, big],
        photos,
        tmp_path / "chain",
        preprocessing=[Preprocessing(mean=(MEAN,), std=(STD,))],
    )
    write_single_file(tmp_path / "chain", tmp_path / "chain.onnx")
    assert 3 in compare(tmp_path / "chain", tmp_path / "chain.onnx", images)
    write_single_file(tmp_path / "chain", tmp_path / "alone.onnx", "no-exit")
    assert set(compare(tmp_path / "chain", tmp_path / "alone.onnx", images, "no-exit")) == {3}
    model = onnx.load(tmp_path / "alone.onnx")
    assert not any(tensor.name.startswith("stage_0") for tensor in model.graph.initializer)


def test_the_command_and_what_is_refused(
    tiny_bundle: Path,
    bundle_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "one.onnx"
    assert run_command(monkeypatch, "bundle", "onnx", str(tiny_bundle), str(path)) == 0
    assert f"{path}: risk-5" in capsys.readouterr().out
    with user_error("no operating point 'risk-7'"):
        write_single_file(tiny_bundle, tmp_path / "other.onnx", "risk-7")
    with user_error("one.bin is no name of an ONNX file"):
        write_single_file(tiny_bundle, tmp_path / "one.bin")
    # A file that answers otherwise is not kept.
    other = single_file._Single._answer

    def wrong(self: Any, graph: Any, index: int, logits: str) -> list[str]:
        return other(self, graph, index - 1, logits)

    monkeypatch.setattr(single_file._Single, "_answer", wrong)
    monkeypatch.setattr(Session, "_check_reference_sample", lambda self, folder: None)
    shutil.rmtree(tmp_path / "chain", ignore_errors=True)
    with user_error("answers otherwise than the bundle"):
        write_single_file(bundle_copy, tmp_path / "wrong.onnx", "no-exit")
    assert not (tmp_path / "wrong.onnx").exists()


def test_a_new_folder_is_made(tmp_path: Path) -> None:
    convolution_bundle(tmp_path / "bundle")
    path = tmp_path / "x" / "y" / "z.onnx"
    with user_error("no operating point 'risk-7'"):
        write_single_file(tmp_path / "bundle", path, "risk-7")
    assert not (tmp_path / "x").exists()
    write_single_file(tmp_path / "bundle", path)
    assert entries(path.parent) == ["z.onnx"]


def test_a_file_that_is_there_stays(bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "network.onnx").write_bytes(b"mine")
    for path in (tmp_path / "network.onnx", bundle_copy / "stage_0.onnx"):
        before = path.read_bytes()
        with user_error(f"{path} is there already: choose another name, or remove it"):
            write_single_file(bundle_copy, path, "no-exit")
        assert path.read_bytes() == before


SCRIPT = """
const ort = require('onnxruntime-node');
const fs = require('fs');
(async () => {
  const [model, images, count, height, width, channels] = process.argv.slice(2);
  const session = await ort.InferenceSession.create(model);
  const bytes = fs.readFileSync(images);
  const size = height * width * channels;
  const rows = [];
  for (let row = 0; row < count; row++) {
    const image = new Uint8Array(bytes.subarray(row * size, (row + 1) * size));
    const shape = [1, Number(height), Number(width), Number(channels)];
    const out = await session.run({images: new ort.Tensor('uint8', image, shape)});
    rows.push([Number(out.label.data[0]), Number(out.exit.data[0]), Array.from(out.probabilities.data)]);
  }
  console.log(JSON.stringify(rows));
})();
"""


@pytest.mark.slow
def test_a_program_in_javascript_gets_the_same_answers(
    tiny_bundle: Path, digits: DataSplits, tmp_path: Path
) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "onnxruntime-node@1.30.0"]
    if subprocess.run(install, cwd=tmp_path, capture_output=True, timeout=300, check=False).returncode:
        pytest.skip("npm cannot install onnxruntime-node")
    write_single_file(tiny_bundle, tmp_path / "one.onnx")
    images = np.asarray(digits.test.images[:100])
    (tmp_path / "images.bin").write_bytes(images.tobytes())
    (tmp_path / "run.js").write_text(SCRIPT)
    command = ["node", "run.js", "one.onnx", "images.bin", *map(str, images.shape)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    labels, exits, probabilities = zip(*json.loads(done.stdout), strict=True)
    expected = Session(tiny_bundle).predict(images)
    assert list(labels) == expected.labels.tolist()
    assert list(exits) == expected.exits.tolist()
    assert np.abs(np.array(probabilities) - expected.probabilities).max() < 1e-5
