"""The bundles in the package: intact, as good as their card says, small, and found by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import erde
from erde.bundle.card import model_card
from erde.bundle.sealing import CARD, seal_of
from erde.bundle.shipped import FOLDER, bundle_folder, sample_images, shipped_bundles
from erde.common.errors import in_one_line
from erde.data.load import DataSplits, load_splits
from erde.recipe.schema import Config
from erde.recipe.validation import validate
from erde.serving.log import Log
from erde.serving.models import open_models
from tests.e2e.conftest import erde as command
from tests.helpers.checks import entries, save_by_class, user_error
from tests.helpers.command import run_command


def test_digits_demo_is_as_its_card_says() -> None:
    session = erde.load("digits-demo", threads=1)
    assert shipped_bundles() == ["digits-demo"]
    recipe = validate(Config, session.manifest.provenance["recipe"])
    splits = load_splits(recipe.data, recipe.seed)
    # The images of its card, of which certify and test trained nothing.
    fingerprints = {name: values["fingerprint"] for name, values in splits.fingerprints().items()}
    sealed = session.manifest.provenance["splits"]
    assert {name: values["fingerprint"] for name, values in sealed.items()} == fingerprints
    for point in session.manifest.operating_points:
        answer = session.predict(np.asarray(splits.test.images[:]), operating_point=point.name)
        assert point.test is not None
        assert (answer.labels == splits.test.labels).mean() == pytest.approx(point.test.accuracy, abs=0.01)
    default = session.manifest.point(None)
    assert default.certificate is not None
    assert default.test is not None
    assert default.test.accuracy > 0.93
    assert default.test.macs_saved > 0.2
    card = (FOLDER / "digits-demo" / CARD).read_text(encoding="utf-8")
    assert "UCI Machine Learning Repository" in card
    assert "CC BY 4.0" in card


def test_its_samples_are_answered_rightly_at_different_exits() -> None:
    session = erde.load("digits-demo", threads=1)
    samples = session.samples()
    answer = session.predict(samples)
    assert len(samples) == 3
    assert answer.names == [path.stem for path in samples]
    assert len(set(answer.exits.tolist())) > 1
    assert not answer.capped


def test_it_is_small() -> None:
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < 100_000


def test_a_folder_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bundle_folder("digits-demo") == FOLDER / "digits-demo"
    assert bundle_folder(Path("other")) == Path("other")
    with user_error("no bundle at other: expected a folder"):
        erde.load("other")
    # Neither a way out of the folder of shipped bundles, nor the folder itself.
    for name in ("..", ".", "digits-demo/samples"):
        assert bundle_folder(name) == Path(name)
    shutil.copytree(FOLDER / "digits-demo", "digits-demo")
    assert erde.load("digits-demo", threads=1).folder == Path("digits-demo")


def test_samples_are_images_in_the_order_of_their_names(tmp_path: Path) -> None:
    assert sample_images(tmp_path) == []
    folder = tmp_path / "samples"
    folder.mkdir()
    for name in ("b.png", "a.JPG", "notes.txt"):
        (folder / name).touch()
    assert sample_images(tmp_path) == [folder / "a.JPG", folder / "b.png"]


def test_the_command_line_knows_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = erde.load("digits-demo", threads=1)
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in command("predict", "digits-demo")[0].splitlines()]
    assert [row["path"] for row in rows] == [str(path) for path in session.samples()]
    assert [row["class"] for row in rows] == [path.stem for path in session.samples()]
    Image.open(session.samples()[0]).resize((40, 60)).save("mine.png")
    assert [json.loads(command("predict", "digits-demo", "mine.png")[0])["path"]] == ["mine.png"]
    verified, _ = command("bundle", "verify", "digits-demo")
    assert f"intact, 3 stages run here as sealed ({seal_of(session.manifest)[:12]})" in verified
    # A bundle without samples, and no images.
    shutil.copytree(session.folder, "bare", ignore=shutil.ignore_patterns("samples"))
    _, refused = command("predict", "bare", code=2)
    assert refused == "error: no images: give image files, or folders that are searched for them\n"


def test_the_other_commands_know_it_too(
    digits: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    models = open_models(["digits-demo", "mine=digits-demo"], 1, Log())
    assert {name: model.path for name, model in models.items()} == dict.fromkeys(
        ("digits-demo", "mine"), FOLDER / "digits-demo"
    )
    # The bundle is read before the runtime of the page is looked for.
    assert run_command(monkeypatch, "demo", "digits-demo", "--out", "page", "--runtime", "none") == 2
    assert "onnxruntime-web" in capsys.readouterr().err
    samples = str(FOLDER / "digits-demo" / "samples")
    timing = ("--batch-sizes", "1", "--threads", "1", "--rounds", "2")
    assert run_command(monkeypatch, "bench", "digits-demo", "--data", samples, *timing) == 0
    # What is made of it lies here, and not in the package.
    save_by_class(digits.test, tmp_path / "photos")
    assert run_command(monkeypatch, "calibrate", "digits-demo", "--data", "photos", "--max-risk", "20%") == 0
    assert entries(tmp_path) == ["digits-demo-recalibrated", "photos"]


def test_an_attribution_of_somebody_else_is_text() -> None:
    manifest = erde.load("digits-demo", threads=1).manifest
    for attribution, shown in (("a\nb\x1b" + 999 * "c", True), (["a"], False), (None, False)):
        provenance = {**manifest.provenance, "attribution": attribution}
        card = model_card(manifest.model_copy(update={"provenance": provenance}))
        assert ("- Source of the images: " in card) == shown
        assert not shown or f"- Source of the images: {in_one_line(str(attribution))}." in card


def test_it_answers_in_a_moment_and_without_torch() -> None:
    code = (
        "import sys, erde; erde.load('digits-demo'); print('torch' in sys.modules, 'sklearn' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.split() == ["False", "False"]
