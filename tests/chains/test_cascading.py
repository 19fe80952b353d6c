"""``erde cascade``: networks that exist already, one behind another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from erde.bundle.sealing import read
from erde.calibration.labelled_images import load_unlabelled
from erde.calibration.recalibration import ask_for_labels, recalibrate_with_labels
from erde.calibration.settings import Settings
from erde.chains.cascading import cascade
from erde.chains.preprocessing import Preprocessing
from erde.data.load import DataSplits
from erde.networks.network import EarlyExitNetwork
from erde.policy import rule as policy
from erde.runtime.session import Session
from tests.helpers.big_network import MACS, MEAN, STD, big_answers, write_big_network, write_photos
from tests.helpers.checks import user_error
from tests.helpers.command import run_command

BIG = Preprocessing(mean=(MEAN,), std=(STD,))
SETTINGS = Settings(max_risks=(0.02, 0.01))


@pytest.fixture(scope="module")
def big(digits: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_big_network(digits, tmp_path_factory.mktemp("big") / "big.onnx")


@pytest.fixture(scope="module")
def photos(digits: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(with labels, without)."""
    folder = tmp_path_factory.mktemp("photos")
    return write_photos(digits, folder / "labelled", True), write_photos(digits, folder / "plain", False)


@pytest.fixture(scope="module")
def chain(
    tiny_bundle: Path, big: Path, photos: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A chain that was certified without labels."""
    out = tmp_path_factory.mktemp("chain") / "bundle"
    cascade([tiny_bundle, big], photos[1], out, settings=SETTINGS, preprocessing=[BIG])
    return out


def test_the_chain_answers_as_its_networks_do(
    chain: Path, tiny_bundle: Path, big: Path, digits: DataSplits
) -> None:
    session, front = Session(chain), Session(tiny_bundle)
    manifest = session.manifest
    assert manifest.networks() == (0, 3)
    assert [stage.network for stage in manifest.stages] == ["tiny"] * 3 + ["big"]
    assert manifest.no_exit_macs == MACS
    front_macs = front.manifest.stages[-1].macs
    assert [stage.macs for stage in manifest.stages[2:]] == [front_macs, front_macs + MACS]
    assert manifest.classes == list(digits.classes)
    images = np.asarray(digits.test.images[:])
    logits = session.all_logits(images)
    assert np.allclose(logits[:3], front.all_logits(images), atol=1e-5)
    assert logits[3].argmax(axis=1).tolist() == big_answers(big, images).tolist()
    answer = session.predict(images)
    point = manifest.point("risk-2")
    scores = session.rule.apply(logits)[1]
    sure = ~policy.in_band(scores, point.thresholds)
    expected = policy.take_exit(session.rule.apply(logits)[0], answer.exits).argmax(axis=1)
    assert answer.exits[sure].tolist() == policy.decide(scores, point.thresholds)[sure].tolist()
    assert answer.labels[sure].tolist() == expected[sure].tolist()
    assert len(set(answer.exits.tolist())) > 1


def test_a_promise_without_labels(chain: Path, photos: tuple[Path, Path], big: Path) -> None:
    manifest = read(chain)
    point = manifest.point(None)
    certificate = point.certificate
    assert point.name == "risk-2"
    assert certificate is not None
    assert (certificate.guarantee, certificate.reference) == ("disagreement", "fallback")
    assert certificate.sentence(manifest.precision).startswith(
        "With 90 % confidence, at most 2 % of images get another answer than the last network alone gives them"
    )
    # No number that would need a label.
    assert point.tune is None
    assert point.tune_agreement is not None
    assert point.tune_agreement.macs_saved > 0.2
    assert manifest.temperatures[-1] == 1
    # What was counted on certify is what the networks themselves say.
    images = load_unlabelled(photos[1], manifest.input_shape).certify[:]
    differs = Session(chain).predict(images).labels != big_answers(big, images)
    assert certificate.images == len(images)
    assert certificate.lost == differs.sum()


def test_a_promise_with_labels(
    tiny_bundle: Path, big: Path, photos: tuple[Path, Path], tmp_path: Path
) -> None:
    calibrated = cascade(
        [tiny_bundle, big], photos[0], tmp_path / "out", settings=SETTINGS, preprocessing=[BIG]
    )
    certificate = calibrated.default_point().certificate
    assert certificate is not None
    assert (certificate.guarantee, certificate.reference) == ("risk", "fallback")
    assert "the last network alone gets right" in certificate.sentence()
    assert calibrated.default_point().tune is not None
    with user_error("is there already"):
        cascade([tiny_bundle, big], photos[0], tmp_path / "out")


def test_a_few_labels_give_the_stronger_promise(
    chain: Path, photos: tuple[Path, Path], digits: DataSplits, tmp_path: Path
) -> None:
    import csv

    asked = tmp_path / "ask.csv"
    settings = Settings(max_risks=(0.02,))
    listed, images = ask_for_labels(chain, photos[1], asked, settings)
    assert 0 < listed < images / 4
    rows = list(csv.DictReader(asked.open(newline="")))
    splits = {split.name: split for split in (digits.train, digits.tune, digits.certify, digits.test)}
    for row in rows:
        name = Path(row["image"]).stem
        split = splits[name.rstrip("0123456789")]
        row["label"] = digits.classes[split.labels[int(name[len(split.name) :])]]
    with asked.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    calibrated = recalibrate_with_labels(chain, photos[1], asked, tmp_path / "new", settings)
    certificate = calibrated.default_point().certificate
    assert certificate is not None
    assert (certificate.guarantee, certificate.reference) == ("risk", "fallback")
    before = read(chain).point("risk-2").tune_agreement
    after = calibrated.default_point().tune_agreement
    assert before is not None
    assert after is not None
    # What differs is not always wrong, so the stronger promise saves at least as much.
    assert after.macs_saved >= before.macs_saved


def test_chains_of_chains_and_of_networks_with_names(
    chain: Path, tiny_bundle: Path, big: Path, photos: tuple[Path, Path], tmp_path: Path, digits: DataSplits
) -> None:
    bigger = write_big_network(digits, tmp_path / "bigger.onnx", softmax=True, seed=1)
    out = tmp_path / "out"
    # Images that certified a part can choose nothing again.
    for folder in photos:
        with user_error("already certified 'tiny . big', a part of this chain"):
            cascade([chain, bigger], folder, out, settings=Settings(max_risks=(0.03,)), preprocessing=[BIG])
    assert not out.exists()
    others = tmp_path / "others"
    others.mkdir()
    for path in photos[1].iterdir():
        ImageOps.mirror(Image.open(path)).save(others / path.name)
    cascade([chain, bigger], others, out, settings=SETTINGS, preprocessing=[BIG])
    manifest = read(out)
    assert manifest.networks() == (0, 3, 4)
    assert [stage.network for stage in manifest.stages[2:]] == ["tiny", "big", "bigger"]
    Session(out)


def test_where_nothing_is_saved_the_last_network_runs_alone(
    tiny_network: EarlyExitNetwork, big: Path, photos: tuple[Path, Path], digits: DataSplits, tmp_path: Path
) -> None:
    import copy

    import erde

    # A front that knows nothing: its answers differ nearly always.
    ignorant = copy.deepcopy(tiny_network)
    for head in ignorant.heads:
        head.linear.weight.data.normal_()
    front = erde.export(ignorant, digits, tmp_path / "front")
    calibrated = cascade(
        [front, big],
        photos[1],
        tmp_path / "out",
        settings=Settings(max_risks=(0.02,), score="entropy"),
        preprocessing=[BIG],
    )
    point = calibrated.default_point()
    assert point.tune_agreement is not None
    assert point.tune_agreement.macs_saved == 0
    assert set(point.thresholds) == {None}
    assert point.certificate is not None
    assert point.certificate.lost == 0
    assert "only the last one runs" in str(point.note)
    session = Session(tmp_path / "out")
    assert set(session.predict(np.asarray(digits.test.images[:9])).macs.tolist()) == {MACS}


def test_the_command(
    tiny_bundle: Path,
    big: Path,
    photos: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    about = tmp_path / "preprocessor_config.json"
    about.write_text(json.dumps({"mean": [MEAN], "std": [STD]}))
    arguments = ["cascade", str(tiny_bundle), str(big), "--data", str(photos[1]), "--max-risk", "2%"]
    assert (
        run_command(
            monkeypatch, *arguments, "--out", str(tmp_path / "out"), "--preprocessing", str(about), "--json"
        )
        == 0
    )
    captured = capsys.readouterr()
    value = json.loads(captured.out.splitlines()[-1])
    assert value["default_operating_point"] == "risk-2"
    assert value["operating_points"][1]["certificate"]["guarantee"] == "disagreement"
    assert "first image: tiny says" in captured.err
    assert "first image: big says" in captured.err
    assert "without labels" in captured.err


def test_what_is_not_as_the_preprocessing_asks_is_said_once(
    big: Path,
    photos: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    about = tmp_path / "preprocessor_config.json"
    about.write_text(json.dumps({"image_mean": [MEAN], "image_std": [STD], "do_resize": False}))
    given = ("--preprocessing", str(about), "--out", str(tmp_path))
    said = f"{about} asks for no resizing (do_resize is false); erde resizes images all the same\n"
    # Both are refused right after the networks are opened; in the second, one file is that of two networks.
    assert run_command(monkeypatch, "accelerate", str(big), "--images", str(photos[1]), *given) == 2
    assert capsys.readouterr().err.count(said) == 1
    given = (*given[:3], str(tmp_path / "out"))
    assert run_command(monkeypatch, "cascade", str(big), str(big), "--data", str(photos[1]), *given) == 2
    assert capsys.readouterr().err.count(said) == 1


def test_what_is_refused(
    tiny_bundle: Path, big: Path, photos: tuple[Path, Path], tmp_path: Path, digits: DataSplits
) -> None:
    out = tmp_path / "out"

    def refused(message: str, networks: list[Path], **keywords: Any) -> None:
        with user_error(message):
            cascade(networks, keywords.pop("images", photos[1]), out, **keywords)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))] == []

    refused("a chain has two networks or more", [tiny_bundle])
    refused("nothing can be saved; give the cheapest network first", [big, tiny_bundle], preprocessing=[BIG])
    refused("nothing at .*nowhere that a chain could use", [tmp_path / "nowhere", big], preprocessing=[BIG])
    refused(
        "9 class names .9 different ones. were given for 10 classes",
        [tiny_bundle, big],
        preprocessing=[BIG],
        classes=[*"012345678"],
    )
    refused(
        "two networks have the same classes in another order",
        [tiny_bundle, big],
        preprocessing=[BIG],
        classes=[*"1023456789"],
    )
    refused(
        "two networks have other classes .'x' is in one only.",
        [tiny_bundle, big],
        preprocessing=[BIG],
        classes=[*"x123456789"],
    )
    refused("belongs to an ONNX file, and none is given", [tiny_bundle, tiny_bundle], preprocessing=[BIG])
    refused("3 preprocessings for 1 ONNX files", [tiny_bundle, big], preprocessing=[BIG] * 3)
    refused(
        "the guarantee 'net_drop' needs labels",
        [tiny_bundle, big],
        preprocessing=[BIG],
        settings=Settings(guarantee="net_drop"),
    )
    refused("no folder at", [tiny_bundle, big], preprocessing=[BIG], images=tmp_path / "none")
