from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erde import bundle
from erde.bundle import profile
from erde.calibration.labelled_images import ImageFiles, halves, load_tune_and_certify
from erde.calibration.recalibration import describe, recalibrate_bundle
from erde.calibration.settings import Settings
from erde.cli import main
from erde.data.load import DataSplits
from erde.runtime.session import Session
from tests.helpers.checks import save_by_class, user_error

CLASSES = [str(digit) for digit in range(10)]
SETTINGS = Settings(max_risks=(0.1, 0.001), confidence=0.8, budgets=(0.8,), score="margin", sharpness=1.0)


@pytest.fixture(scope="module")
def photos(digits: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 500 certify images of the digits as files: new to the bundle's calibration in another split."""
    return save_by_class(digits.certify, tmp_path_factory.mktemp("photos") / "by-class")


# ---------------------------------------------------------------- labelled images


def test_images_are_split_by_class_and_seed(photos: Path, digits: DataSplits) -> None:
    first, again, other = (load_tune_and_certify(photos, CLASSES, (8, 8, 1), 0.4, seed) for seed in (0, 0, 1))
    assert len(first.tune) + len(first.certify) == 500
    assert first.tune.images.paths == again.tune.images.paths != other.tune.images.paths  # type: ignore[attr-defined]
    assert not set(first.tune.images.paths) & set(first.certify.images.paths)  # type: ignore[attr-defined]
    for label in range(10):
        total = int((digits.certify.labels == label).sum())
        assert abs((first.tune.labels == label).sum() - 0.4 * total) < 1
    for split in (first.tune, first.certify):
        row = int(split.images.paths[7].stem)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(split.images[7:8][0], digits.certify.images[row : row + 1][0])
        assert split.labels[7] == digits.certify.labels[row]


def test_image_files_are_an_image_source(photos: Path) -> None:
    files = ImageFiles(tuple(sorted(photos.rglob("*.png"))), (8, 8, 1))
    assert files.shape == (500, 8, 8, 1)
    assert files[np.array([3, 1])].shape == (2, 8, 8, 1)
    assert files[:0].shape == (0, 8, 8, 1)
    np.testing.assert_array_equal(files[np.array([3, 1])][1], files[1:2][0])


def test_a_copy_of_a_file_counts_once(photos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    first = sorted((folder / "3").iterdir())[0]
    shutil.copy(first, folder / "3" / "copy.png")
    loaded = load_tune_and_certify(folder, CLASSES, (8, 8, 1))
    assert loaded.copies == 1
    assert len(loaded.tune) + len(loaded.certify) == 500
    shutil.copy(first, folder / "4" / "copy.png")
    with user_error("are the same image in two classes: keep one of them"):
        load_tune_and_certify(folder, CLASSES, (8, 8, 1))


def test_folders_that_are_refused(photos: Path, tmp_path: Path) -> None:
    with user_error("no folder at .*none: expected labelled images"):
        load_tune_and_certify(tmp_path / "none", CLASSES, (8, 8, 1))
    (tmp_path / "empty").mkdir()
    with user_error("has no sub-folders: expected one per class, such as .*empty/0"):
        load_tune_and_certify(tmp_path / "empty", CLASSES, (8, 8, 1))
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "7").rename(folder / "seven")
    with user_error("photos/seven is not a class of this bundle.*its classes are: 0, 1"):
        load_tune_and_certify(folder, CLASSES, (8, 8, 1))
    many = [f"class-{number}" for number in range(1000)]
    with user_error("class-39 and 960 more$"):
        load_tune_and_certify(folder, many, (8, 8, 1))
    shutil.rmtree(folder / "seven")
    # A class without images is no reason to stop: the promise is over images as they come.
    assert 7 not in load_tune_and_certify(folder, CLASSES, (8, 8, 1)).tune.labels
    with user_error("the tune share must lie between 0 and 1 .*, got 1"):
        halves(np.zeros(5, dtype=np.int64), 1.0, 0)
    few = tmp_path / "few"
    for name in CLASSES:
        (few / name).mkdir(parents=True)
    with user_error("0 images below .*few: calibration needs two or more, to tune and to certify"):
        load_tune_and_certify(few, CLASSES, (8, 8, 1))
    Image.new("L", (8, 8)).save(few / "3" / "one.png")
    with user_error("1 image below .*few: calibration needs two or more"):
        load_tune_and_certify(few, CLASSES, (8, 8, 1))


def test_a_long_tail_gives_certify_its_share_of_rare_classes() -> None:
    # 40 classes of one image, 20 of three: on average each gives half of its images to both sides.
    labels = np.concatenate([np.repeat(np.arange(5), 100), np.arange(5, 45), np.repeat(np.arange(45, 65), 3)])
    singles, threes = [], []
    for seed in range(200):
        tune, certify = halves(labels, 0.5, seed)
        assert sorted([*tune, *certify]) == list(range(len(labels)))
        drawn = labels[certify]
        singles.append(((drawn >= 5) & (drawn < 45)).sum())
        threes.append((drawn >= 45).sum())
        assert all((drawn == label).sum() == 50 for label in range(5))
    assert np.mean(singles) == pytest.approx(20, abs=1)
    assert np.mean(threes) == pytest.approx(30, abs=1)


# ---------------------------------------------------------------- a sealed bundle


def test_a_new_bundle_is_sealed_and_the_old_one_stays(
    tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in tiny_bundle.iterdir()}
    out = tmp_path / "new"
    calibrated = recalibrate_bundle(tiny_bundle, photos, out, SETTINGS)
    assert {path.name: path.read_bytes() for path in tiny_bundle.iterdir()} == before
    session = Session(out, threads=1)
    manifest = session.manifest
    assert manifest.default_operating_point == "risk-10"
    assert [missing.name for missing in manifest.left_out] == ["risk-0.1"]
    assert manifest.temperatures == calibrated.temperatures
    # What was promised is what runs: the certificate's own images, answered by the sealed bundle.
    images = load_tune_and_certify(photos, CLASSES, (8, 8, 1)).certify
    answer = session.predict(images.images[:])
    final = session.predict(images.images[:], operating_point="no-exit")
    lost = (final.labels == images.labels) & (answer.labels != images.labels)
    certificate = manifest.point(None).certificate
    assert certificate is not None
    assert (certificate.images, certificate.lost) == (len(images), lost.sum())
    lines = list(describe(calibrated))
    assert lines[0] == "score: margin at sharpness 1"
    assert any(line.startswith("risk-10 (default): ") and "With 80 % confidence" in line for line in lines)
    assert any(line.startswith("risk-0.1: left out, ") for line in lines)


def test_the_same_certify_images_serve_one_choice(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    recalibrate_bundle(tiny_bundle, photos, first, SETTINGS)
    recalibrate_bundle(first, photos, again, SETTINGS)
    assert (first / "manifest.json").read_bytes() == (again / "manifest.json").read_bytes()
    for seed in (0, 1):
        with user_error("these certify images already certified other choices"):
            recalibrate_bundle(first, photos, tmp_path / "other", Settings(max_risks=(0.2,)), seed=seed)
    assert not (tmp_path / "other").exists()


def test_what_is_there_is_not_overwritten(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    with user_error("is there already: give another place with --out"):
        recalibrate_bundle(tiny_bundle, photos, tmp_path, SETTINGS)


def test_a_damaged_image_is_named(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "3" / "torn.png").write_bytes(b"\x89PNG torn")
    with user_error("torn.png is not a readable image"):
        recalibrate_bundle(tiny_bundle, folder, tmp_path / "new", SETTINGS)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- milliseconds


def test_a_profile_gives_a_latency_budget(bundle_copy: Path, photos: Path, tmp_path: Path) -> None:
    written = Session(bundle_copy, threads=1).profile(batch_sizes=(1, 4), rounds=5)
    read = profile.Profile.read(bundle_copy / profile.PROFILE, written.stages, 3)
    assert read == written
    times = read.exit_milliseconds()
    assert times == pytest.approx(np.cumsum(written.milliseconds[1]))
    assert read.exit_milliseconds(4)[0] == pytest.approx(written.milliseconds[4][0] / 4)
    # It lies outside the seal, and moves on with the stages into a new calibration.
    bundle.read(bundle_copy)
    budget = round(times[1], 4)
    settings = Settings(
        max_risks=(0.1,), confidence=0.8, latency_budgets=(budget,), score="margin", sharpness=1.0
    )
    recalibrate_bundle(bundle_copy, photos, tmp_path / "new", settings)
    point = Session(tmp_path / "new").manifest.operating_points[-1]
    assert point.kind == "latency"
    assert point.tune is not None
    assert point.tune.milliseconds is not None
    assert point.tune.milliseconds <= budget
    assert (tmp_path / "new" / profile.PROFILE).is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": "0" * 64}, "belongs to other stages than this bundle's"),
        ({"milliseconds": {"1": [1.0]}}, "belongs to other stages"),
        ({"milliseconds": {"1": [1.0, -1.0, 1.0]}}, "is not a profile of this erde"),
        ({"milliseconds": {"8": [1.0, 1.0, 1.0]}}, "is not a profile of this erde"),
        ({"extra": 1}, "is not a profile of this erde"),
    ],
)
def test_a_profile_that_does_not_fit(change: dict[str, object], message: str, bundle_copy: Path) -> None:
    session = Session(bundle_copy, threads=1)
    session.profile(batch_sizes=(1,), rounds=1)
    path = bundle_copy / profile.PROFILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with user_error(message):
        session.cost(timed=True)
    # Who asks for MACs gets them.
    assert session.cost().exit_milliseconds is None
    assert len(session.cost().exit_macs) == 3


# ---------------------------------------------------------------- the command


@pytest.fixture
def calibrate(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    """``erde calibrate`` of a bundle on the photos: stdout and stderr."""

    def run(folder: Path, *options: str) -> tuple[str, str]:
        arguments = ("calibrate", str(folder), "--data", str(photos), "--score", "margin", *options)
        monkeypatch.setattr(sys, "argv", ["erde", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        assert stopped.value.code == 0
        return capsys.readouterr()

    return run


def test_the_command_calibrates_a_bundle(
    calibrate: Callable[..., tuple[str, str]], bundle_copy: Path
) -> None:
    out, _ = calibrate(bundle_copy, "--max-risk", "10%", "--confidence", "80%", "--budget", "80%", "--json")
    recalibrated = bundle_copy.with_name("bundle-recalibrated")
    lines = out.splitlines()
    printed = json.loads(lines[-1])
    assert printed["out"] == str(recalibrated)
    assert printed["default_operating_point"] == "risk-10"
    assert lines[0] == f"bundle: {recalibrated}"
    assert bundle.read(recalibrated).point("budget-80").note


def test_a_bundle_that_never_leaves_early_is_said(
    calibrate: Callable[..., tuple[str, str]], tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _, err = calibrate(tiny_bundle, "--max-risk", "0.1%", "--budget", "80%", "--out", str(out))
    assert (
        f"warning: risk-0.1 could not be certified, so the default operating point is no-exit: {out} never leaves early by "
        "default; name budget-80 where you use it, or give more images or a larger risk"
    ) in err
