"""``erde accelerate``: somebody's network and images, from start to end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erde.acceleration import images as material_images
from erde.acceleration import work
from erde.acceleration.fronts import Training, affordable_trial, affordable_views, trial_epochs
from erde.acceleration.images import Material, Pool, load_material, read_pool
from erde.acceleration.work import NO_GAIN, Accelerated, accelerate
from erde.bundle.sealing import read
from erde.chains.preprocessing import Preprocessing
from erde.data.load import DataSplits
from erde.policy.points import Agreement, OperatingPoint
from erde.runtime.session import Session
from erde.training.learner import Learner
from tests.common.test_files import LOCK, dead_process, other_process
from tests.helpers.big_network import MACS, MEAN, STD, big_answers, write_big_network, write_photos
from tests.helpers.checks import entries, user_error
from tests.helpers.command import run_command

BIG = Preprocessing(mean=(MEAN,), std=(STD,))
BIG_AND_BRIGHT = Preprocessing(size=(8, 8), mean=(MEAN + 0.1,), std=(STD,))


@pytest.fixture(scope="module")
def big(digits: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [MEAN], "image_std": [STD], "size": {"height": 8, "width": 8}})
    )
    return write_big_network(digits, folder / "big.onnx")


@pytest.fixture(scope="module")
def photos(digits: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(digits, tmp_path_factory.mktemp("photos") / "plain", False)


def test_from_a_model_and_images_to_a_quicker_bundle(
    big: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    digits: DataSplits,
) -> None:
    out = tmp_path / "fast"
    options = ("--images", str(photos), "--out", str(out), "--max-risk", "5%", "--minutes", "2", "--json")
    arguments = ("accelerate", str(big), *options)
    # Neither is to depend on how busy the machine is: how long is trained, and whether it was quicker in the end.
    monkeypatch.setattr(work, "FEWEST_EPOCHS", 60)
    monkeypatch.setattr(work, "MOST_EPOCHS", 60)
    monkeypatch.setattr(Accelerated, "gains", True)
    # A start that was killed while it wrote the settings is no obstacle.
    out.mkdir()
    (out / f".settings.json.{dead_process()}-12345678.partial").write_text("half")
    # Stopped in the middle of the training of the front, as by a kill.
    step = Learner.step

    def stop(self: Learner, *given: object) -> None:
        if not self.job.name.startswith("trial") and self.position == (2, 1):
            raise KeyboardInterrupt
        step(self, *given)

    monkeypatch.setattr(Learner, "step", stop)
    assert run_command(monkeypatch, *arguments) != 0
    assert not (out / "front").exists()
    monkeypatch.setattr(Learner, "step", step)
    assert run_command(monkeypatch, *arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert run_command(monkeypatch, *arguments, "--resume") == 0
    captured = capsys.readouterr()
    value = json.loads(captured.out.splitlines()[-1])
    offer, gain, promise = captured.out.splitlines()[2:5]
    assert offer.endswith(
        f"erde calibrate {out / 'bundle'} --data OTHERS --labels-out ask.csv (OTHERS: images that trained neither network, "
        "and that this command has not seen)"
    )
    assert "ms an image in the mean" in gain
    assert "at most 5 % of images get another answer than the last network alone gives them" in promise
    # The bundle: a front of a tenth of the cost, then the network as it was.
    manifest = read(out / "bundle")
    assert manifest.networks() == (0, 1)
    assert manifest.no_exit_macs == MACS
    assert manifest.stages[0].macs <= 0.101 * MACS
    risk = manifest.point(None).target
    assert [point.target for point in manifest.operating_points if point.kind == "risk"] == pytest.approx(
        [risk, 2 * risk, 3 * risk, 5 * risk]
    )
    session = Session(out / "bundle")
    images = np.asarray(digits.test.images[:])
    answer = session.predict(images, operating_point="no-exit")
    assert answer.labels.tolist() == big_answers(big, images).tolist()
    assert set(answer.macs.tolist()) == {MACS}
    # Images that nothing was chosen on; no number that would need a label.
    assert value["test"]["images"] == 180
    assert value["test"]["macs_saved"] > 0.2
    assert value["test"]["disagreement"] < 0.1
    assert "accuracy" not in value["test"]
    page = (out / "report.html").read_text()
    assert "Certified." in page
    assert "Accuracy" not in page
    # The page has the same milliseconds in its headline and in its table.
    for milliseconds in re.match(r"(\S+) ms -> (\S+) ms", gain).groups():
        assert re.search(rf">{milliseconds}<", page)
    assert not (out / "trial").exists()
    # Once more changes nothing but the clock's part.
    before = (out / "bundle" / "manifest.json").read_bytes()
    assert run_command(monkeypatch, *arguments, "--resume") == 0
    assert (out / "bundle" / "manifest.json").read_bytes() == before
    with user_error("was begun with other settings .max_risk."):
        accelerate(big, photos, out, max_risk=0.02, resume=True)
    with user_error("was begun with other settings .preprocessing."):
        accelerate(big, photos, out, max_risk=0.05, resume=True, preprocessing=BIG_AND_BRIGHT)


def test_a_trial_that_was_stopped_goes_on_as_it_began(
    big: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def stop(fronts: object, training: Training, *given: object) -> None:
        seen.append((training.views, training.mirrored, *given[3:]))
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "trial", stop)
    # The second time the machine is busier, and fewer minutes are given.
    for minutes, views, few, mirrored in ((60, 3, 1078, True), (10, 2, 1000, False)):
        monkeypatch.setattr(work, "affordable_views", lambda *_, views=views: views)
        monkeypatch.setattr(work, "affordable_trial", lambda *_, few=few: few)
        monkeypatch.setattr(work, "answers_alike_mirrored", lambda *_, mirrored=mirrored: mirrored)
        with pytest.raises(KeyboardInterrupt):
            accelerate(big, photos, tmp_path / "out", minutes=minutes, resume=bool(seen))
    assert seen == [(3, True, 12, 1078)] * 2


def test_one_process_at_a_time_works_in_a_folder(
    big: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(work._Work, "train_front", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        accelerate(big, photos, out)
    half = out / f".answers.npy.{dead_process()}-12345678.partial"
    half.write_text("half")
    other = other_process(LOCK, out / ".lock")
    with user_error(f"{out} is being written by process {other.pid}"):
        accelerate(big, photos, out, resume=True)
    assert half.exists()
    # The files that a killed process leaves are no obstacle.
    other.kill()
    other.wait()
    with pytest.raises(RuntimeError, match="stopped"):
        accelerate(big, photos, out, resume=True)
    assert entries(out) == ["model", "settings.json"]


def test_a_folder_that_another_start_takes_meanwhile(
    big: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    # A start that was killed left its lock's file.
    out.mkdir()
    (out / ".lock").touch()

    def load(*given: Any) -> Material:
        (out / "settings.json").write_text("of the other one")
        return load_material(*given)

    monkeypatch.setattr(work, "load_material", load)
    with user_error("is there already"):
        accelerate(big, photos, out)
    assert (out / "settings.json").read_text() == "of the other one"


@pytest.mark.parametrize(("after_ms", "gains"), [(0.97, True), (0.99, False)])
def test_labels_are_asked_for_only_where_something_is_gained(
    after_ms: float,
    gains: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = Accelerated(
        bundle=tmp_path / "bundle",
        point=OperatingPoint(name="risk-5", kind="risk", target=0.05, thresholds=[0.5], certificate=None),
        test=Agreement(images=180, disagreement=0.01, macs=500.0, macs_saved=0.5, exit_rates=[0.5, 0.5]),
        before_ms=1.0,
        after_ms=after_ms,
        median_times=1.0,
    )
    monkeypatch.setattr(work, "accelerate", lambda *_, **__: result)
    assert run_command(monkeypatch, "accelerate", "big.onnx", "--images", "photos", "--out", "fast") == 0
    printed = capsys.readouterr().out
    assert ("--labels-out ask.csv" in printed) == gains
    assert (NO_GAIN in printed) == (not gains)


def test_images_are_split_once_and_apart(photos: Path, digits: DataSplits, tmp_path: Path) -> None:
    classes = list(digits.classes)
    pool = read_pool(photos, classes)
    material = load_material(pool, None, (8, 8, 1), seed=3, max_risk=0.01)
    splits = material.calibration.splits
    parts = [material.train, splits.tune.images, splits.certify.images, material.test.images]
    seen = [{image.tobytes() for image in np.asarray(part)} for part in parts]
    sizes = [len(part) for part in parts]
    assert sizes == [len(pool) - sum(sizes[1:]), 270, 270, 180]
    assert len(set().union(*seen)) == sum(map(len, seen))
    assert not material.calibration.labelled
    again = load_material(pool, None, (8, 8, 1), seed=3, max_risk=0.01)
    assert np.array_equal(material.train, again.train)


def rows_of(pool: Pool, rows: slice) -> Pool:
    return Pool(pool.paths[rows], pool.labels[rows], pool.digests[rows])


def test_held_out_images_are_for_all_but_the_training(
    photos: Path, digits: DataSplits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = list(digits.classes)
    pool = read_pool(photos, classes)
    labelled = read_pool(write_photos(digits, tmp_path / "labelled", True), classes)
    assert set(labelled.labels.tolist()) == set(range(10))
    # Where one side has no labels, none are used.
    train = rows_of(labelled, slice(800))
    mixed = load_material(train, pool.without(train), (8, 8, 1), 3, 0.01)
    assert set(mixed.train_labels.tolist()) == {-1}
    capsys.readouterr()
    # What is in both folders does not train.
    both = load_material(labelled, rows_of(labelled, slice(1000, None)), (8, 8, 1), 3, 0.02)
    assert "797 images are held out too, and do not train" in capsys.readouterr().err
    assert both.calibration.labelled
    splits = both.calibration.splits
    parts = [both.train, splits.tune.images, splits.certify.images, both.test.images]
    assert [len(part) for part in parts] == [1000, 199, 199, 399]
    with user_error("0 images to train on: a front needs 500 or more"):
        load_material(labelled, labelled, (8, 8, 1), 3, 0.02)
    with user_error("199 images to certify on: a promise of 1 % with 90 % confidence needs 230 at the least"):
        load_material(labelled, rows_of(labelled, slice(1000, None)), (8, 8, 1), 3, 0.01)


def ordered_by_class(count: int, name: str) -> Pool:
    """``count`` images in ten folders, as they are read: class by class."""
    labels = np.repeat(np.arange(10), count // 10)
    paths = tuple(Path(name, str(label), f"{row:05}.png") for row, label in enumerate(labels))
    return Pool(paths, labels, tuple(str(path).encode() for path in paths))


def class_of(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture of the path's class."""
    return np.full(shape, int(path.parent.name), np.uint8)


def check_shares(labels: np.ndarray) -> None:
    """Every class has about a tenth of them."""
    shares = np.bincount(labels, minlength=10) / len(labels)
    assert shares.min() > 0.03, shares
    assert shares.max() < 0.2, shares


@pytest.mark.parametrize("apart", [False, True])
def test_the_first_images_are_of_all_classes(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def load_image(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
        read.append(path)
        return class_of(path, shape)

    monkeypatch.setattr(material_images, "load_image", load_image)
    monkeypatch.setattr(material_images, "available_cpus", lambda: 1)
    held_out = ordered_by_class(5000, "others") if apart else None
    material = load_material(ordered_by_class(5000, "photos"), held_out, (1, 1, 1), 0, 0.01)
    splits = material.calibration.splits
    parts = [(material.train, material.train_labels), *((part.images, part.labels) for part in
             (splits.tune, splits.certify, material.test))]  # fmt: skip
    for images, labels in parts:
        assert np.array_equal(np.asarray(images)[:, 0, 0, 0], labels)
        check_shares(labels[: max(250, len(labels) // 10)])
    # Files that lie one behind another are read so.
    sizes = [len(labels) for _, labels in (*parts[1:], parts[0])]
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        assert read[end - size : end] == sorted(read[end - size : end])


def test_images_of_all_classes_are_timed(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material_images, "load_image", class_of)
    pool, others = ordered_by_class(500, "photos"), ordered_by_class(5000, "others")
    material = load_material(pool, others, (8, 8, 1), 0, 0.01)
    assert len(material.test.labels) > 2000
    timed: list[np.ndarray] = []

    def bench(path: Path, images: np.ndarray, **_: object) -> None:
        timed.append(images)
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "bench", bench)
    monkeypatch.setattr(Session, "profile", lambda *_, images, **__: timed.append(images))
    accelerating = object.__new__(work._Work)
    accelerating.out, accelerating.material, accelerating.seed = tmp_path, material, 0
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    with pytest.raises(KeyboardInterrupt):
        accelerating.finish(tmp_path / "front", work._settings(0.01))
    assert [len(images) for images in timed] == [256, 2000]
    for images in timed:
        check_shares(images[:, 0, 0, 0])


def test_a_folder_of_before_whose_images_were_in_another_order(
    big: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(work._Work, "train_front", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        accelerate(big, photos, out)
    settings = json.loads((out / "settings.json").read_text())
    del settings["order"]
    (out / "settings.json").write_text(json.dumps(settings))
    with user_error(
        "was begun with an earlier version of erde, which took the images in another order: .*another --out"
    ):
        accelerate(big, photos, out, resume=True)
    # A front that is trained holds nothing that depends on the order.
    (out / "front").mkdir()
    with pytest.raises(RuntimeError, match="stopped"):
        accelerate(big, photos, out, resume=True)


def test_images_fit_into_memory(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = read_pool(photos, [])
    monkeypatch.setattr(material_images, "MEMORY_BYTES", 1500 * 64)
    material = load_material(pool, None, (8, 8, 1), 3, 0.02)
    assert "1,500 of 1,797 images, at random: more do not fit into memory" in capsys.readouterr().err
    splits = material.calibration.splits
    parts = [material.train, splits.tune.images, splits.certify.images, material.test.images]
    assert [len(part) for part in parts] == [900, 225, 225, 150]
    material = load_material(rows_of(pool, slice(900)), rows_of(pool, slice(900, None)), (8, 8, 1), 3, 0.02)
    printed = capsys.readouterr().err
    assert "750 of 900 train images" in printed
    assert "750 of 897 held-out images" in printed
    assert len(material.train) == 750


def test_a_slow_model_is_asked_about_fewer_views() -> None:
    # A quarter of an hour, 900 s, for 50,000 images.
    assert affordable_views(50_000, 0.0001, 3600) == 4
    assert affordable_views(50_000, 0.006, 3600) == 3
    assert affordable_views(50_000, 0.05, 3600) == 2
    assert affordable_views(1_000, 0.001, 60) == 4


def test_the_trial_takes_its_share_of_the_time() -> None:
    assert affordable_trial(50_000, 4, 0.0035, 5000) == 8000
    # 4,000 images in two views, at 10 ms each, are a tenth of 800 seconds.
    assert affordable_trial(50_000, 2, 0.01, 800) == 4000
    assert affordable_trial(50_000, 2, 0.05, 300) == 1000
    assert affordable_trial(700, 2, 0.05, 300) == 700


def test_a_trial_is_longer_where_there_is_time() -> None:
    assert [trial_epochs(minutes) for minutes in (2, 60, 600)] == [2, 12, 15]


def test_numbers_out_of_range(tmp_path: Path) -> None:
    model = tmp_path / "none.onnx"
    for minutes in (float("inf"), float("nan"), 1e300, -5.0, 0.0):
        with user_error(f"^{minutes} minutes: expected more than 0, at most 10,000,000".replace("+", "[+]")):
            accelerate(model, tmp_path, tmp_path / "out", minutes=minutes)
    for seed in (-1, 2**64):
        with user_error(f"the seed is {seed}, expected a whole number from 0 to 2,147,483,647"):
            accelerate(model, tmp_path, tmp_path / "out", seed=seed)


def test_what_is_refused(
    big: Path, photos: Path, tiny_bundle: Path, digits: DataSplits, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for risk in (0.0, 1.0, -0.1):
        with user_error(r"max_risks\.0: expected (greater than 0|less than 1)"):
            accelerate(big, tmp_path / "none", out, max_risk=risk)
    with user_error("is a bundle: give the ONNX file of a classifier"):
        accelerate(tiny_bundle, photos, out)
    with user_error("no folder at .*none"):
        accelerate(big, tmp_path / "none", out)
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(photos.iterdir())[:20]:
        (few / path.name).write_bytes(path.read_bytes())
    with user_error("12 images to train on: a front needs 500 or more"):
        accelerate(big, few, out)
    # The same place is free for another try.
    assert not out.exists()
    with user_error("holds nothing that could be continued"):
        accelerate(big, photos, tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_network_that_is_too_quick(photos: Path, digits: DataSplits, tmp_path: Path) -> None:
    from tests.helpers import big_network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(big_network, "FEATURES", 64)
        small = write_big_network(digits, tmp_path / "small.onnx")
    with user_error("it is too quick to be made quicker by a network in front of it"):
        accelerate(small, photos, tmp_path / "out", preprocessing=BIG)
