"""OpenVINO on the same stages: what it answers is what ONNX Runtime answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import erde
from erde.bench import race
from erde.bench.show import verdicts
from erde.bundle.profile import PROFILE
from erde.bundle.sealing import read, seal
from erde.data.load import DataSplits
from erde.exporting.onnx_files import export_stages
from erde.networks.network import EarlyExitNetwork
from erde.policy import rule as policy
from erde.runtime.engines import open_stages
from erde.runtime.session import Session
from tests.helpers.checks import user_error
from tests.helpers.command import run_command
from tests.helpers.hand_made_bundle import convolution_bundle, pixel_bundle

pytest.importorskip("openvino")
# Two engines add the same numbers in another order: of float32 logits around 10 the last bits.
NEAR = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convolution_bundle(tmp_path_factory.mktemp("engines") / "bundle")


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Session, Session]:
    return Session(folder, threads=1), Session(folder, threads=1, engine="openvino")


def noise(count: int, shape: tuple[int, ...] = (8, 8, 3), seed: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def compare(known: Session, other: Session, images: NDArray[np.uint8], point: str | None = None) -> set[int]:
    """Labels and exits are the same but where a score or two logits lie too near; returned are the exits."""
    logits = known.all_logits(images)
    assert np.abs(other.all_logits(images) - logits).max(initial=0) < NEAR
    thresholds = known.manifest.point(point).thresholds
    sure = ~(policy.in_band(known.rule.apply(logits)[1], thresholds) | policy.near_tie(logits))
    expected, got = (session.predict(images, operating_point=point) for session in (known, other))
    assert sure.sum() >= 0.9 * len(images)
    assert got.labels[sure].tolist() == expected.labels[sure].tolist()
    assert got.exits[sure].tolist() == expected.exits[sure].tolist()
    assert got.macs[sure].tolist() == expected.macs[sure].tolist()
    assert np.abs(got.probabilities - expected.probabilities)[sure].max(initial=0) < NEAR
    assert got.capped is expected.capped is False
    return set(got.exits.tolist())


@pytest.mark.parametrize("point", ["early", "other", "no-exit"])
def test_the_same_answers(point: str, both: tuple[Session, Session]) -> None:
    exits = compare(*both, noise(300), point)
    assert exits == {2} if point == "no-exit" else len(exits) > 1


def test_batches_of_any_size_one_after_another(both: tuple[Session, Session]) -> None:
    # After an empty batch OpenVINO by itself writes where nothing is.
    for count in (7, 0, 1, 40, 0, 300, 2):
        compare(*both, noise(count, seed=count))
    assert both[1].predict(noise(0)).probabilities.shape == (0, 4)


def test_images_that_may_not_be_written_to_stay_as_they_are(both: tuple[Session, Session]) -> None:
    images = noise(20)
    frozen = np.frombuffer(images.tobytes(), dtype=np.uint8).reshape(images.shape)
    compare(*both, frozen)
    assert np.array_equal(frozen, images)


def test_pixels_between_0_and_1_are_refused(both: tuple[Session, Session]) -> None:
    images = noise(3)
    for session in both:
        with user_error(r"expected uint8 images of shape \(N, 8, 8, 3\), got float64"):
            session.all_logits(images / 255)
    # What would be cast without a word.
    with user_error("stage 0 fails on a batch of 3"):
        both[1]._stages.all_logits(images / 255)


@pytest.mark.parametrize("networks", [(0, 2), (0, 1, 2)])
def test_stages_that_take_the_image_again(networks: tuple[int, ...], tmp_path: Path) -> None:
    chain = pixel_bundle(tmp_path / "chain", 3, networks=networks)
    images = noise(200, (3, 5, 1))
    images[:, :, -1] = 0
    sessions = Session(chain, threads=1), Session(chain, threads=1, engine="openvino")
    assert compare(*sessions, images, "half") == {0, 1, 2}
    compare(*sessions, images, "no-exit")


class TwoStreams(nn.Module):
    """Two tensors between all its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList([nn.Conv2d(channels, 4, 3, padding=1) for channels in (3, 4, 4)])
        self.right = nn.ModuleList([nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8)])
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        left = right = x
        for left_layer, right_layer in zip(self.left, self.right, strict=True):
            left, right = torch.relu(left_layer(left)), torch.relu(right_layer(right))
        return self.fc(torch.cat([left, right], dim=1).mean(dim=(2, 3)))


def test_stages_that_hand_several_tensors_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = erde.attach_exits(TwoStreams(), 3, input_size=(3, 16, 16))
    exported = export_stages(network.eval(), (16, 16, 3), (0.5,) * 3, (0.25,) * 3, tmp_path / "stages")
    paths = exported.paths(tmp_path / "stages")
    images = noise(5, (16, 16, 3))
    known, other = (open_stages(engine, paths, 1) for engine in ("onnxruntime", "openvino"))
    features, _ = other.run(0, images)
    assert features is not None
    assert features.ndim == 2
    assert np.abs(other.all_logits(images) - known.all_logits(images)).max() < NEAR


def test_int8_stages_round_otherwise(
    tiny_network: EarlyExitNetwork, digits: DataSplits, tmp_path: Path
) -> None:
    bundle = erde.export(tiny_network, digits, tmp_path / "int8", precision="int8")
    paths = [bundle / stage.file for stage in read(bundle).stages]
    images = np.asarray(digits.test.images[:])
    known, other = (
        open_stages(engine, paths, 1).all_logits(images) for engine in ("onnxruntime", "openvino")
    )
    # A step of the grid more or less: near, and not within the band.
    assert np.abs(known - other).mean() < 0.05 * np.abs(known).max()
    assert (known.argmax(axis=-1) == other.argmax(axis=-1)).mean() > 0.95


def resealed(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy whose manifest has ``changes``."""
    shutil.copytree(folder, to)
    seal(to, read(to).model_copy(update=changes))
    return to


@pytest.mark.parametrize("precision", ["int8", "mixed"])
def test_int8_answers_carry_no_certificate(precision: str, folder: Path, tmp_path: Path) -> None:
    bundle = resealed(folder, tmp_path / "bundle", precision=precision)
    answer = Session(bundle, threads=1, engine="openvino").predict(noise(3))
    assert answer.capped
    # There is no limit, and none is spoken of.
    assert "limit" not in str(answer)
    assert str(answer).endswith("; not certified")
    assert not Session(bundle, threads=1).predict(noise(3)).capped


def test_stages_that_answer_otherwise_are_refused(folder: Path, tmp_path: Path) -> None:
    sample = read(folder).reference_sample
    logits = [[[logit + 1 for logit in row] for row in rows] for rows in sample.logits]
    bundle = resealed(
        folder, tmp_path / "bundle", reference_sample=sample.model_copy(update={"logits": logits})
    )
    with user_error(
        r"\(fp32\): in openvino 20.* do not give the logits of its reference sample.*: use the engine"
    ):
        Session(bundle, engine="openvino")


def test_several_threads_share_a_session(both: tuple[Session, Session]) -> None:
    images = [noise(count, seed=count) for count in (3, 9, 27, 5)]
    expected = [both[1].predict(batch) for batch in images]
    wrong = []

    def work(place: int) -> None:
        for _ in range(50):
            answer = both[1].predict(images[place])
            if not np.array_equal(answer.logits, expected[place].logits):
                wrong.append(place)

    workers = [threading.Thread(target=work, args=(place,)) for place in range(len(images))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_it_reports_to_nobody(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, threading\n"
        "from erde.runtime import Session\n"
        "Session(sys.argv[1], threads=1, engine='openvino')\n"
        "import openvino\n"
        "assert openvino.convert_model\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]\n"
        "print(threading.active_count())\n"
    )
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "1"
    assert not list(tmp_path.iterdir())


def test_an_engine_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with user_error(r"no engine 'openvin' \(did you mean 'openvino'\?\): expected onnxruntime or openvino"):
        Session(folder, engine="openvin")
    with user_error("providers are ONNX Runtime's"):
        Session(folder, engine="openvino", providers=["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "openvino", None)
    with user_error(r"the engine 'openvino' needs the package openvino.*pip install 'erde\[openvino\]'"):
        Session(folder, engine="openvino")
    assert Session(folder, threads=1).predict(noise(1)).labels.shape == (1,)


def test_only_what_the_seal_covers_and_the_check_accepts_is_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(folder, tmp_path / "bundle"))
    monkeypatch.setattr("erde.runtime.openvino_stages.OpenVinoStages", None)
    stage = bundle / "stage_1.onnx"
    content = stage.read_bytes()
    stage.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with user_error("does not match its checksum"):
        Session(bundle, engine="openvino")


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    # OpenVINO tells formats by their content too; here it is told.
    path = tmp_path / "stage.onnx"
    path.write_text('<?xml version="1.0"?><net name="x" version="11"><layers/></net>', encoding="utf-8")
    with user_error(f"OpenVINO cannot load {path}"):
        open_stages("openvino", [path])


def test_a_profile_belongs_to_an_engine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(folder, tmp_path / "bundle"))
    command = ["bundle", "profile", str(bundle), "--threads", "1", "--rounds", "1", "--engine", "openvino"]
    assert run_command(monkeypatch, *command) == 0
    profile = json.loads((bundle / PROFILE).read_text("utf-8"))
    assert profile["engine"] == "openvino"
    assert ", openvino 20" in profile["machine"]
    assert Session(bundle, threads=1, engine="openvino").predict(noise(2), deadline_ms=1e6).exits.max() <= 2
    with user_error("measured with the engine openvino, this session has onnxruntime: measure again"):
        Session(bundle, threads=1).predict(noise(2), deadline_ms=1e6)


def test_image_files_and_a_race(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(noise(30)):
        Image.fromarray(image).save(photos / f"{number:02}.png")
    rows = []
    for engine in ("onnxruntime", "openvino"):
        out = tmp_path / f"{engine}.jsonl"
        assert (
            run_command(
                monkeypatch, "predict", str(folder), str(photos), "--engine", engine, "--out", str(out)
            )
            == 0
        )
        rows.append([json.loads(line) for line in out.read_text("utf-8").splitlines()])
    assert [(row["label"], row["exit"]) for row in rows[0]] == [
        (row["label"], row["exit"]) for row in rows[1]
    ]
    assert run_command(monkeypatch, "predict", str(folder), str(photos), "--engine", "tensorrt") == 2
    both = race.bench(
        folder,
        noise(30),
        data="noise",
        batch_sizes=(1,),
        threads=(1,),
        rounds=2,
        engines=("onnxruntime", "openvino"),
    )
    assert both.reference == "no-exit"
    assert [contender.engine for contender in both.contenders].count("openvino") == len(both.contenders) / 2
    assert {"early", "openvino early", "openvino every exit computed"} <= {
        contender.name for contender in both.contenders
    }
    shares = {timed.contender: timed for timed in both.measurements}
    assert shares["early"].time_per_macs_saved is not None
    # Another engine: what it saves is not due to exits alone.
    assert shares["openvino early"].time_per_macs_saved is None
    assert not any("openvino" in line for line in verdicts(both))
    alone = race.bench(
        folder, noise(9), data="noise", batch_sizes=(1,), threads=(1,), rounds=2, engines=("openvino",)
    )
    assert {contender.engine for contender in alone.contenders} == {"openvino"}
    assert "early" in {contender.name for contender in alone.contenders}
