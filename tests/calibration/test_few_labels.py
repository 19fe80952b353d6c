"""Few labels: the same certificate as with all of them, and a promise that holds."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from erde.bundle.sealing import read
from erde.calibration.few_labels import UNKNOWN, FewLabels, read_label_file
from erde.calibration.labelled_images import load_unlabelled
from erde.calibration.recalibration import ask_for_labels, recalibrate_with_labels
from erde.calibration.settings import Settings
from erde.calibration.thresholds import ScoredSplit, ThresholdPath
from erde.cli import main
from erde.common.splits import CertifyLogits, Labels, Logits
from erde.data.load import DataSplits
from erde.evaluation.logits_file import LogitsFile
from erde.policy.cost import Cost
from erde.policy.rule import ExitRule, decide, take_exit
from erde.runtime.session import Session
from tests.helpers.certified import certify
from tests.helpers.checks import user_error
from tests.helpers.hand_made_bundle import pixel_bundle

RULE = ExitRule("margin")
SETTINGS = Settings(max_risks=(0.1,), confidence=0.8)


@pytest.fixture(scope="module")
def pool() -> tuple[Logits, Cost]:
    opened = LogitsFile(Path(__file__).parents[1] / "samples" / "cifar10_logits.npz")
    logits = opened.split("").logits
    return logits, opened.cost(len(logits.logits), None, None)


def waiting(
    pool: tuple[Logits, Cost], generator: np.random.Generator, settings: Settings
) -> tuple[FewLabels, Labels]:
    """A pool of 2,500 and 2,500 images without labels, and the true labels of certify."""
    logits, cost = pool
    tune, certify = generator.permutation(len(logits))[:5000].reshape(2, 2500)
    few = FewLabels.of(
        logits.logits[:, tune], logits.logits[:, certify], RULE, [1.0, 1.0, 1.0], cost, settings
    )
    return few, logits.labels[certify]


def filled(few: FewLabels, true: Labels) -> Labels:
    """Every label that is asked for, round by round."""
    labels = np.full(len(true), UNKNOWN)
    while len(rows := few.more_labels(labels)):
        labels[rows] = true[rows]
    return labels


def test_the_certificate_is_that_of_all_labels(pool: tuple[Logits, Cost]) -> None:
    generator = np.random.default_rng(0)
    for max_risk in (0.005, 0.01, 0.02):
        few, true = waiting(pool, generator, Settings(max_risks=(max_risk,)))
        labels = filled(few, true)
        point = few.certified(labels).default_point()
        all_labels = ScoredSplit.of(CertifyLogits(few.certify.logits, true), RULE, None)
        index, expected = certify(few.path, all_labels, max_risk, 0.9, "final_exit")
        assert index > 0
        assert expected is not None
        assert tuple(point.thresholds) == few.path.thresholds[index]
        assert point.certificate is not None
        for name in ("lost", "images", "risk", "upper_bound", "max_risk", "confidence"):
            assert getattr(point.certificate, name) == getattr(expected, name)
        assert (labels != UNKNOWN).sum() < 0.05 * len(true)


def test_the_promise_holds_and_few_labels_are_asked(pool: tuple[Logits, Cost]) -> None:
    # One path, since it is fixed before; the true risk is that on the whole pool.
    logits, cost = pool
    generator = np.random.default_rng(1)
    draws, broken, asked = 1000, 0, []
    few, _ = waiting(pool, generator, Settings(max_risks=(0.01,)))
    whole = ScoredSplit.of(logits, RULE, None)
    true_risk: dict[tuple[float | None, ...], float] = {}
    for _ in range(draws):
        rows = generator.integers(len(logits), size=600)
        drawn = FewLabels(
            few.tune,
            CertifyLogits(logits.logits[:, rows], logits.logits[-1, rows].argmax(axis=-1)),
            RULE, few.temperatures, cost, few.settings, every_twentieth_point(few.path),
        )  # fmt: skip
        labels = filled(drawn, logits.labels[rows])
        asked.append((labels != UNKNOWN).mean())
        thresholds = tuple(drawn.certified(labels).default_point().thresholds)
        if thresholds not in true_risk:
            true_risk[thresholds] = whole.measure(thresholds, cost).risk
        broken += true_risk[thresholds] > 0.01
    assert binom.sf(broken - 1, draws, 0.1) > 1e-3
    assert broken > 0
    assert np.mean(asked) < 0.03


def every_twentieth_point(path: ThresholdPath) -> ThresholdPath:
    """A shorter path: a thousand walks in seconds."""
    part = slice(None, None, 20)
    return ThresholdPath(path.thresholds[part], path.risk[part], path.macs[part])


def test_a_missing_label_counts_as_harm(pool: tuple[Logits, Cost]) -> None:
    few, true = waiting(pool, np.random.default_rng(2), Settings(max_risks=(0.01,)))
    labels = filled(few, true)
    none = few.certified(np.full(len(true), UNKNOWN)).default_point()
    half = labels.copy()
    half[few.asked()[: len(few.asked()) // 2]] = UNKNOWN
    points = [none, few.certified(half).default_point(), few.certified(labels).default_point()]
    saved = [few.path.thresholds.index(tuple(point.thresholds)) for point in points]
    assert saved[0] <= saved[1] <= saved[2]
    assert saved[0] < saved[2]
    assert none.certificate is not None
    assert "of the lost are images without a label, which count as harmed" in none.certificate.assumptions


def test_a_certificate_says_how_many_of_the_lost_are_images_without_a_label(
    pool: tuple[Logits, Cost],
) -> None:
    generator = np.random.default_rng(3)
    unseen = 0
    for _ in range(3):
        few, true = waiting(pool, generator, Settings(max_risks=(0.01,)))
        labels = np.full(len(true), UNKNOWN)
        labels[few.asked()] = true[few.asked()]
        for every in (0, 2):  # all that were asked for; half of them left empty
            some = labels.copy()
            if every:
                some[few.asked()[::every]] = UNKNOWN
            point = few.certified(some).points[1]
            certificate = point.certificate
            assert certificate is not None
            said = re.search(r"; ([\d,]+) of the lost are images without a label", certificate.assumptions)
            unlabelled = int(said[1]) if said else 0
            scored = ScoredSplit.of(CertifyLogits(few.certify.logits, true), RULE, None)
            exits = decide(scored.scores, point.thresholds)
            harm = take_exit(scored.harm, exits)
            assert certificate.lost - unlabelled == harm[some != UNKNOWN].sum()
            assert certificate.lost - unlabelled <= harm.sum() <= certificate.lost
            unseen += unlabelled if not every else 0
    assert unseen > 0  # even where every label that was asked for is there


@pytest.mark.parametrize("changes", [{"guarantee": "net_drop"}, {"reference": "teacher"}])
def test_what_needs_all_labels(pool: tuple[Logits, Cost], changes: dict[str, str]) -> None:
    with user_error(
        "few labels certify the guarantee 'risk' or 'expected_risk' against the reference 'final_exit'"
    ):
        waiting(pool, np.random.default_rng(0), Settings(max_risks=(0.01,), **changes))


# ---------------------------------------------------------------- a sealed bundle


@pytest.fixture(scope="module")
def photos(digits: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The certify images of the digits without labels, in one folder, and their labels by name."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("few") / "pool"
    folder.mkdir()
    truth = {}
    for row, (image, label) in enumerate(zip(digits.certify.images[:], digits.certify.labels, strict=True)):
        Image.fromarray(image[:, :, 0]).save(folder / f"{row:04}.png")
        truth[f"{row:04}.png"] = str(label)
    return folder, truth


def fill(path: Path, truth: dict[str, str], **changes: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = changes.get(row["image"], truth[row["image"]])
    write(path, rows)
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "sha256", "label"])
        writer.writeheader()
        writer.writerows(rows)


def test_from_a_folder_without_labels_to_a_bundle(
    tiny_bundle: Path, photos: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, truth = photos
    ask, out = tmp_path / "ask.csv", tmp_path / "new"
    listed, images = ask_for_labels(tiny_bundle, folder, ask, SETTINGS)
    assert 0 < listed < images == 250
    assert all(row["label"] == "" for row in csv.DictReader(ask.open(newline="")))
    fill(ask, truth)
    calibrated = recalibrate_with_labels(tiny_bundle, folder, ask, out, SETTINGS)
    manifest, before = read(out), read(tiny_bundle)
    assert manifest.rule() == before.rule()
    assert manifest.temperatures == before.temperatures
    point = calibrated.points[1]
    assert point.certificate is not None
    assert point.certificate.images == 250
    assert point.tune is None
    assert point.tune_agreement is not None
    assert point.tune_agreement.macs_saved > 0.5
    # The same again from the new bundle is the same choice; another one on these images is refused.
    recalibrate_with_labels(out, folder, ask, tmp_path / "again", SETTINGS)
    with user_error("these certify images already certified other choices"):
        recalibrate_with_labels(
            out, folder, ask, tmp_path / "other", Settings(max_risks=(0.2,), confidence=0.8)
        )
    with user_error("is there already: it may hold labels"):
        ask_for_labels(tiny_bundle, folder, ask, SETTINGS)
    # Asked again, what is known is in the file already.
    more, _ = ask_for_labels(tiny_bundle, folder, tmp_path / "more.csv", SETTINGS, labels=ask)
    kept = [row for row in csv.DictReader((tmp_path / "more.csv").open(newline="")) if row["label"]]
    assert kept
    assert more >= len(kept)


def test_a_second_list_has_all_that_the_first_one_had(
    tiny_bundle: Path, photos: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    # Where every image that differs is harmed, the path ends sooner than was thought, and less is asked.
    folder, truth = photos
    settings = Settings(max_risks=(0.02,), confidence=0.8)
    session = Session(tiny_bundle, threads=1)
    harmed = {
        name: session.predict(folder / name, operating_point="no-exit").names[0] for name in sorted(truth)
    }
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    ask_for_labels(tiny_bundle, folder, first, settings)
    rows = fill(first, harmed)
    # A label that nobody asked for is kept too.
    waiting = load_unlabelled(folder, (8, 8, 1))
    name = next(name for name in waiting.certify_names if name not in [row["image"] for row in rows])
    rows.append({"image": name, "sha256": waiting.digests[name], "label": harmed[name]})
    write(first, rows)
    listed, _ = ask_for_labels(tiny_bundle, folder, second, settings, labels=first)
    again = list(csv.DictReader(second.open(newline="")))
    assert listed == len(again)
    for row in rows:
        assert row in again
    fill(second, harmed)
    one_list, two_lists = (
        recalibrate_with_labels(tiny_bundle, folder, labels, tmp_path / labels.stem, settings).points
        for labels in (first, second)
    )
    assert one_list == two_lists


def test_filled_files_that_are_refused(
    tiny_bundle: Path, photos: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, truth = Path(shutil.copytree(photos[0], tmp_path / "pool")), photos[1]
    ask = tmp_path / "ask.csv"
    ask_for_labels(tiny_bundle, folder, ask, SETTINGS)
    rows = fill(ask, truth)

    def refused(message: str) -> None:
        with user_error(message):
            recalibrate_with_labels(tiny_bundle, folder, ask, tmp_path / "new", SETTINGS)
        assert not (tmp_path / "new").exists()

    write(ask, [{**rows[0], "label": "eleven"}, *rows[1:]])
    refused("ask.csv, line 2: 'eleven' is not a class of this bundle")
    write(ask, rows[1:])
    refused(
        f"ask.csv has no row for 1 of the images whose label is needed .first: {rows[0]['image']}.: rows were deleted"
    )
    write(ask, [*rows, {**rows[0], "label": str((int(rows[0]["label"]) + 1) % 10)}])
    refused("has two labels: keep the right one")
    ask.write_text("")
    refused("ask.csv has no rows: expected the columns image,sha256,label")
    ask.write_text("image;sha256;label\na;b;c\n")
    refused("ask.csv, line 2: expected the columns image,sha256,label")
    ask.write_bytes(b"\xff\xfe\x00a")
    refused("ask.csv is not a CSV file in UTF-8")
    write(ask, rows)
    ask.write_text("image,sha256,label\n")
    refused(f"ask.csv has no row for {len(rows)} of the images whose label is needed")
    ask.unlink()
    refused("ask.csv cannot be read: No such file")


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle, and 80 images without labels on which all of its exits agree."""
    from PIL import Image

    scratch = tmp_path_factory.mktemp("agreeing")
    folder = scratch / "pool"
    folder.mkdir()
    generator = np.random.default_rng(3)
    for number in range(80):
        row = generator.integers(0, 256, 5, dtype=np.uint8)
        row[-1] = 0
        Image.fromarray(np.stack([row] * 3)).save(folder / f"{number}.png")
    return pixel_bundle(scratch / "bundle"), folder


def test_where_all_exits_agree_no_label_is_needed(
    agreeing: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", [])
    bundle, folder = map(str, agreeing)
    ask, out = tmp_path / "new" / "ask.csv", tmp_path / "new" / "bundle"
    options = ("calibrate", bundle, "--data", folder, "--max-risk", "10%", "--confidence", "80%")
    assert run(*options, "--labels-out", str(ask)) == 0
    said = capsys.readouterr().out
    assert (
        f"labels: 0 of 40 certify images need one; give {ask} as it is with --labels and the same options"
        in said
    )
    assert run(*options, "--labels", str(ask), "--out", str(out)) == 0
    (certificate,) = [point.certificate for point in read(out).operating_points if point.certificate]
    assert (certificate.lost, certificate.images, certificate.guarantee) == (0, 40, "risk")


def test_too_few_images_are_refused_before_a_label_is_asked_for(
    agreeing: tuple[Path, Path], tmp_path: Path
) -> None:
    message = "40 images to certify on: a promise of 1 % with 90 % confidence needs 230 at the least"
    for max_risks in ((0.01,), (0.001, 0.01)):
        with user_error(message):
            ask_for_labels(*agreeing, tmp_path / "ask.csv", Settings(max_risks=max_risks))
    with user_error("40 images to certify on: a promise of 1 % in expectation needs 99 at the least"):
        ask_for_labels(
            *agreeing, tmp_path / "ask.csv", Settings(max_risks=(0.01,), guarantee="expected_risk")
        )
    assert not (tmp_path / "ask.csv").exists()
    # A risk that they can certify is enough.
    ask_for_labels(*agreeing, tmp_path / "ask.csv", Settings(max_risks=(0.01, 0.1)))


def test_rows_of_other_images_do_no_harm(
    tiny_bundle: Path, photos: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, truth = Path(shutil.copytree(photos[0], tmp_path / "pool")), photos[1]
    ask, joined = tmp_path / "ask.csv", tmp_path / "joined.csv"
    ask_for_labels(tiny_bundle, folder, ask, SETTINGS)
    rows = fill(ask, truth)
    # Another folder's file, joined with its heading: its classes may be others, and its images' names the same.
    others = [
        {"image": name, "sha256": "0" * 64, "label": "eleven"} for name in ("other.png", rows[0]["image"])
    ]
    write(joined, [*others, {name: name for name in rows[0]}, *rows])
    alone, with_others = (
        recalibrate_with_labels(tiny_bundle, folder, labels, tmp_path / labels.stem, SETTINGS).points
        for labels in (ask, joined)
    )
    assert alone == with_others
    # A label belongs to bytes, not to a name.
    assert read_label_file(ask, "0123456789", {rows[0]["image"]: "0" * 64}) == {}
    # An image of the list that is gone makes another pool, whose labels were not asked for.
    (folder / rows[0]["image"]).unlink()
    with user_error("has no row for .* the images, the bundle or an option have changed since"):
        recalibrate_with_labels(tiny_bundle, folder, ask, tmp_path / "gone", SETTINGS)


def test_pools_that_are_refused(tmp_path: Path) -> None:
    with user_error("no folder at .*none: expected images"):
        load_unlabelled(tmp_path / "none", (8, 8, 1))
    with user_error("0 images below .*: calibration needs two or more"):
        load_unlabelled(tmp_path, (8, 8, 1))
    with user_error("the seed is -1, expected a whole number from 0 to 2,147,483,647"):
        load_unlabelled(tmp_path, (8, 8, 1), seed=-1)


def run(*arguments: str) -> int:
    import sys

    sys.argv = ["erde", *arguments]
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_the_command(
    tiny_bundle: Path,
    photos: tuple[Path, dict[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", [])
    folder, truth = photos
    ask = tmp_path / "ask.csv"
    options = (
        "calibrate",
        str(tiny_bundle),
        "--data",
        str(folder),
        "--max-risk",
        "10%",
        "--confidence",
        "80%",
    )
    assert run(*options, "--labels-out", str(ask), "--out", str(tmp_path / "no")) == 2
    assert (
        "--out does not apply: --labels-out writes a list of images, and no bundle" in capsys.readouterr().err
    )
    assert run(*options, "--labels-out", str(ask)) == 0
    assert "of 250 certify images need one; fill the column 'label'" in capsys.readouterr().out
    fill(ask, truth)
    assert run(*options, "--labels", str(ask), "--out", str(tmp_path / "new")) == 0
    assert "risk-10 (default): " in capsys.readouterr().out
    assert run(*options, "--labels", str(ask), "--score", "margin", "--out", str(tmp_path / "no")) == 2
    assert "--score does not apply: with few labels the bundle keeps its score" in capsys.readouterr().err
