from __future__ import annotations

import csv
import gc
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from erde.bundle.profile import PROFILE
from erde.bundle.sealing import canonical_hash, read, seal
from erde.common.errors import UserError
from erde.common.images import load_image, to_array
from erde.data.encoded import decode
from erde.data.load import DataSplits
from erde.runtime.predict_files import COLUMNS, find_images, predict_files
from erde.runtime.prediction import Prediction
from erde.runtime.session import Session
from tests.e2e.conftest import erde
from tests.helpers.checks import entries, save_by_class, user_error
from tests.helpers.hand_made_bundle import pixel_bundle

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}


def picture(mode: str, width: int, height: int) -> Image.Image:
    generator = np.random.default_rng([width, height])
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2}[mode]
    array = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array[:, :, 0] if channels == 1 else array, mode)


@pytest.fixture
def digit_files(digits: DataSplits, tmp_path: Path) -> tuple[list[Path], NDArray[np.uint8]]:
    """Seven digits as files, in an order that is not the names' own."""
    images = np.asarray(digits.test.images[:7])
    folder = tmp_path / "images"
    folder.mkdir()
    paths = []
    for index, image in enumerate(images):
        path = folder / f"{(index * 3) % 7}.png"
        Image.fromarray(image[:, :, 0]).save(path)
        paths.append(path)
    return paths, images


# ---------------------------------------------------------------- files to arrays


def test_find_images(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deep/c.webp", "notes.txt", "deep/labels.csv"):
        (folder / name).touch()
    (folder / "z.png").mkdir()
    single = tmp_path / "single.txt"
    single.touch()
    # Files as given, whatever they are called; images below folders, sorted.
    assert list(find_images([single, folder, folder / "b.png"])) == [
        single,
        folder / "a.JPG",
        folder / "b.png",
        folder / "deep" / "c.webp",
        folder / "b.png",
    ]


def test_images_below_folders_have_the_order_of_their_paths(tmp_path: Path) -> None:
    # A folder `a` comes before `a-b.png` and before `a.png`, though "/" comes after "-" and "." in ASCII.
    names = [
        "a/z.png",
        "a-b.png",
        "a.png",
        "a/b/c.gif",
        "B.png",
        "a b/ä.png",
        "a/.png",
        "a/.x.png",
        ".d/e.tif",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path)
    # What cannot be read is in the list too: it is skipped with a word, not in silence.
    expected = sorted(tmp_path / name for name in [*names, "link.png", "gone.png"] if name != "a/.png")
    assert list(find_images([tmp_path])) == expected


def test_a_folder_is_listed_only_when_its_turn_comes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    paths = find_images([tmp_path])
    assert next(paths) == tmp_path / "a" / "1.png"
    (tmp_path / "b" / "2.png").touch()
    assert list(paths) == [tmp_path / "b" / "1.png", tmp_path / "b" / "2.png"]


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(folder: Path) -> Any:  # root may list every folder, so the mode does not do it
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr("erde.runtime.predict_files.os.scandir", closed)
    with user_error(f"the folder {tmp_path / 'closed'} cannot be read: Permission denied"):
        list(find_images([tmp_path]))


def test_nothing_to_find(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with user_error(f"no image below the folder {tmp_path}: expected files ending in .png, .jpg"):
        list(find_images([tmp_path]))
    with user_error(f"no image at {tmp_path / 'none.png'}: expected a file or a folder"):
        list(find_images([tmp_path / "none.png"]))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("size", [(8, 8), (21, 13), (5, 9)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_is_decoded_as_in_training(
    kind: str, mode: str, size: tuple[int, int], channels: int, tmp_path: Path
) -> None:
    if kind == "JPEG" and "A" in mode:
        mode = mode.removesuffix("A")  # JPEG has no alpha
    path = tmp_path / f"some{FORMATS[kind]}"
    picture(mode, *size).save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
    array = load_image(path, (8, 8, channels))
    assert array.shape == (8, 8, channels)
    assert array.dtype == np.uint8
    with Image.open(path) as image:
        assert np.array_equal(array, to_array(image, 8, 8, channels))
    decoded = decode({"bytes": path.read_bytes(), "path": None}, "here")
    assert np.array_equal(array, to_array(decoded, 8, 8, channels))
    if kind != "JPEG" and mode in ("L", "RGB") and size == (8, 8) and len(mode) == channels:
        assert np.array_equal(array, np.asarray(picture(mode, 8, 8)).reshape(8, 8, channels))


def test_a_digit_comes_back_from_its_file(
    digit_files: tuple[list[Path], NDArray[np.uint8]],
) -> None:
    for path, image in zip(*digit_files, strict=True):
        assert np.array_equal(load_image(path, (8, 8, 1)), image)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with user_error("none.png cannot be read: No such file"):
        load_image(tmp_path / "none.png", (8, 8, 1))


# ---------------------------------------------------------------- predict


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        assert tuple(table.fieldnames or ()) == COLUMNS
        rows: list[dict[str, Any]] = list(table)
    for row in rows:
        for name in ("label", "exit", "macs"):
            row[name] = int(row[name])
        for name in ("probability", "score"):
            row[name] = float(row[name])
    return rows


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 32])
def test_rows_are_the_answers_in_order(
    suffix: str,
    batch_size: int,
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths, images = digit_files
    out = tmp_path / "deep" / f"answers{suffix}"
    summary = predict_files(
        tiny_bundle, paths, out, operating_point="risk-10", batch_size=batch_size, threads=1
    )
    session = Session(tiny_bundle, threads=1)
    answer = session.predict(images, operating_point="risk-10")
    rows = rows_of(out)
    assert all(tuple(row) == COLUMNS == tuple(rows[0]) for row in rows)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert [row["label"] for row in rows] == answer.labels.tolist()
    assert [row["class"] for row in rows] == [session.classes[label] for label in answer.labels]
    assert [row["exit"] for row in rows] == answer.exits.tolist()
    assert [row["macs"] for row in rows] == answer.macs.tolist()
    probabilities = answer.probabilities.max(axis=1)
    np.testing.assert_allclose([row["probability"] for row in rows], probabilities, atol=1e-5)
    np.testing.assert_allclose([row["score"] for row in rows], answer.scores, atol=1e-5)
    assert summary == {
        "images": 7,
        "skipped": 0,
        "exit_rates": pytest.approx((np.bincount(answer.exits, minlength=3) / 7).tolist()),
        "mean_macs": pytest.approx(answer.macs.mean()),
        "out": str(out),
    }
    assert entries(out.parent) == [out.name]
    assert capsys.readouterr().out == ""


def test_rows_on_stdout(
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = digit_files[0][0].parent
    summary = predict_files(tiny_bundle, [folder], threads=1)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in rows] == [str(folder / f"{index}.png") for index in range(7)]
    assert summary["out"] is None


def test_limits_are_passed_on(digit_files: tuple[list[Path], NDArray[np.uint8]], tiny_bundle: Path) -> None:
    paths, _ = digit_files
    macs = [stage.macs for stage in Session(tiny_bundle, threads=1).manifest.stages]
    for arguments, last in (
        ({"operating_point": "no-exit"}, 2),
        ({"operating_point": "no-exit", "max_exit": 1}, 1),
        ({"operating_point": "no-exit", "max_macs": macs[0]}, 0),
    ):
        summary = predict_files(tiny_bundle, paths, threads=1, **arguments)
        assert summary["exit_rates"] == [float(index == last) for index in range(3)]
        assert summary["mean_macs"] == macs[last]


def test_a_deadline_is_passed_on(
    digit_files: tuple[list[Path], NDArray[np.uint8]], bundle_copy: Path, tmp_path: Path
) -> None:
    paths, _ = digit_files
    with user_error("no profile at"):
        predict_files(bundle_copy, paths, tmp_path / "some.csv", deadline_ms=10, threads=1)
    assert not list(tmp_path.glob("*.unfinished"))
    profile = Session(bundle_copy, threads=1).profile(rounds=1)
    profile = profile.model_copy(update={"milliseconds": {1: [1.0] * 3, 8: [2.0] * 3}})
    profile.write(bundle_copy / PROFILE)
    options: dict[str, Any] = {"operating_point": "no-exit", "deadline_ms": 4.5, "threads": 1}
    for batch_size, last in ((1, 2), (6, 1)):  # a last batch of one image is as the others
        summary = predict_files(bundle_copy, paths, batch_size=batch_size, **options)
        assert summary["exit_rates"] == [float(index == last) for index in range(3)]


# ---------------------------------------------------------------- images that cannot be read


@pytest.fixture
def mixed_files(digit_files: tuple[list[Path], NDArray[np.uint8]]) -> tuple[list[Path], list[str]]:
    """The seven digits among files that are no images, and what is to be said of the latter."""
    paths, _ = digit_files
    folder = paths[0].parent
    text = folder / "text.png"
    text.write_text("not an image")
    content = io.BytesIO()
    picture("L", 64, 64).save(content, "PNG")
    torn = folder / "torn.png"
    torn.write_bytes(content.getvalue()[:1000])
    empty = folder / "empty.jpg"
    empty.touch()
    reason = "is not a readable image (PNG, JPEG, WebP, BMP, GIF or TIFF expected): remove or replace it"
    mixed = [text, *paths[:2], torn, empty, *paths[2:], text]
    return mixed, [f"{path} {reason}" for path in (text, torn, empty, text)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_what_cannot_be_read_is_skipped_and_listed(
    suffix: str,
    batch_size: int,
    mixed_files: tuple[list[Path], list[str]],
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths, reasons = mixed_files
    out = tmp_path / "answers" / f"some{suffix}"
    summary = predict_files(tiny_bundle, paths, out, batch_size=batch_size, threads=1)
    assert (summary["images"], summary["skipped"]) == (7, 4)
    assert sum(summary["exit_rates"]) == pytest.approx(1)
    assert [row["path"] for row in rows_of(out)] == [str(path) for path in digit_files[0]]
    labels = Session(tiny_bundle, threads=1).predict(digit_files[1]).labels.tolist()
    assert [row["label"] for row in rows_of(out)] == labels
    listed = tmp_path / "answers" / f"some{suffix}.skipped.txt"
    assert listed.read_text().splitlines() == reasons
    assert entries(out.parent) == [out.name, listed.name]
    assert capsys.readouterr().err.splitlines()[-4:] == [f"skipped: {reason}" for reason in reasons]
    # The list of an earlier command does not outlive the next one.
    predict_files(tiny_bundle, digit_files[0], out, batch_size=batch_size, threads=1)
    assert entries(out.parent) == [out.name]


def test_skipped_without_a_file(
    mixed_files: tuple[list[Path], list[str]], tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, reasons = mixed_files
    assert predict_files(tiny_bundle, paths, batch_size=2, threads=1)["skipped"] == 4
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 7
    assert captured.err.splitlines() == [f"skipped: {reason}" for reason in reasons]


def test_any_error_of_a_decoder_is_a_reason_to_skip(
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths, _ = digit_files

    def load(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        if path == paths[3]:
            raise IndexError("two\nlines")
        return load_image(path, shape)

    monkeypatch.setattr("erde.runtime.predict_files.load_image", load)
    assert predict_files(tiny_bundle, paths, threads=1)["images"] == 6
    err = capsys.readouterr().err
    assert err == f"skipped: {paths[3]} cannot be decoded: IndexError: two\\nlines\n"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_nothing_readable_leaves_no_output(
    suffix: str, mixed_files: tuple[list[Path], list[str]], tiny_bundle: Path, tmp_path: Path
) -> None:
    text, torn = mixed_files[0][0], mixed_files[0][3]
    out = tmp_path / "answers" / f"some{suffix}"
    with user_error(rf"no image can be read \(2 in all\): {text} is not a readable image"):
        predict_files(tiny_bundle, [text, torn], out, batch_size=1, threads=1)
    assert entries(out.parent) == []
    out.write_text("older answers")
    with user_error(f"no image can be read: {torn} is not a readable image"):
        predict_files(tiny_bundle, [torn], out, threads=1)
    assert out.read_text() == "older answers"
    assert entries(out.parent) == [out.name]
    with user_error("no image can be read"):
        predict_files(tiny_bundle, [torn], threads=1)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_names_that_are_not_utf_8(
    suffix: str, digit_files: tuple[list[Path], NDArray[np.uint8]], tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    path = Path(os.fsdecode(os.fsencode(folder) + b"/\xff,\n.png"))
    path.write_bytes(digit_files[0][0].read_bytes())
    (folder / "z.png").write_bytes(path.read_bytes())
    Path(os.fsdecode(os.fsencode(folder) + b"/\xfe.png")).touch()
    out = tmp_path / f"some{suffix}"
    predict_files(tiny_bundle, [folder], out, threads=1)
    assert b"\xfe.png is not a readable image" in (tmp_path / f"{out.name}.skipped.txt").read_bytes()
    text = out.read_bytes().decode("utf-8", "surrogateescape")
    rows = (
        list(csv.DictReader(io.StringIO(text, newline="")))
        if suffix == ".csv"
        else [json.loads(line) for line in text.splitlines()]
    )
    assert [row["path"] for row in rows] == [str(folder / "z.png"), str(path)]


def test_what_is_no_file_is_skipped_and_listed(
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    shutil.copy(digit_files[0][0], folder / "0.png")
    (folder / "dangling.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    (folder / "red\x1b[31m\n.png").touch()
    summary = predict_files(tiny_bundle, [folder], tmp_path / "some.csv", threads=1)
    assert (summary["images"], summary["skipped"]) == (1, 3)
    said = capsys.readouterr().err.splitlines()
    assert said[-3:] == [
        f"skipped: {folder}/dangling.png cannot be read: No such file or directory",
        f"skipped: {folder}/pipe.png cannot be read: it is not a regular file",
        f"skipped: {folder}/red\\x1b[31m\\n.png is not a readable image (PNG, JPEG, WebP, BMP, GIF or TIFF expected): "
        "remove or replace it",
    ]
    assert (tmp_path / "some.csv.skipped.txt").read_text().splitlines() == [
        line[len("skipped: ") :] for line in said[-3:]
    ]


@pytest.mark.parametrize("first", ["=1+2", "+1", "-1", "@sum"])
def test_no_cell_is_a_formula(
    first: str,
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    bundle_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = read(bundle_copy)
    classes = [f"{first}{index}" for index in range(10)]
    seal(bundle_copy, manifest.model_copy(update={"classes": classes}))
    monkeypatch.chdir(tmp_path)
    shutil.copy(digit_files[0][0], f"{first}.png")
    predict_files(bundle_copy, [Path(f"{first}.png")], Path("some.csv"), threads=1)
    (row,) = rows_of(Path("some.csv"))
    assert row["path"] == f"./{first}.png"
    assert row["class"].startswith(f"'{first}")
    # JSON has no formulas.
    predict_files(bundle_copy, [Path(f"{first}.png")], Path("some.jsonl"), threads=1)
    (row,) = rows_of(Path("some.jsonl"))
    assert (row["path"], row["class"][:-1]) == (f"{first}.png", first)


def test_the_command_says_what_it_skipped(
    mixed_files: tuple[list[Path], list[str]], tiny_bundle: Path, tmp_path: Path
) -> None:
    paths, reasons = mixed_files
    out = tmp_path / "some.jsonl"
    stdout, stderr = erde(
        "predict", str(tiny_bundle), *map(str, paths), "--out", str(out), "--threads", "1", "--json", code=3
    )
    said, summary = stdout.splitlines()
    assert said == f"7 images (4 skipped): {out}"
    assert json.loads(summary)["skipped"] == 4
    assert stderr.splitlines() == [f"skipped: {reason}" for reason in reasons]
    assert len(rows_of(out)) == 7
    _, stderr = erde("predict", str(tiny_bundle), str(paths[0]), code=2)
    assert stderr == f"error: no image can be read: {reasons[0]}\n"


@pytest.mark.parametrize("limits", [{}, {"deadline_ms": 3, "batch_size": 8}])
def test_an_image_on_which_a_stage_fails_is_skipped_with_a_reason(
    limits: dict[str, Any], tmp_path: Path
) -> None:
    bundle = pixel_bundle(tmp_path / "bundle")
    profile = Session(bundle, threads=1).profile(rounds=1)
    # Alone an image would reach the final exit in time, in its batch of 7 the second.
    profile.model_copy(update={"milliseconds": {1: [0.5] * 3, 8: [1.5] * 3}}).write(bundle / PROFILE)
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 1), dtype=np.uint8)
    images[:, :, -1] = 0
    images[4, 0, -1] = 1  # its first stage fails
    folder, out = tmp_path / "images", tmp_path / "some.jsonl"
    folder.mkdir()
    paths = [folder / f"{index}.png" for index in range(7)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[:, :, 0]).save(path)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in limits.items()]
    _, stderr = erde(
        "predict",
        str(bundle),
        str(folder),
        "--operating-point",
        "no-exit",
        "--threads",
        "1",
        "--out",
        str(out),
        *options,
        code=3,
    )
    (line,) = stderr.splitlines()
    assert line.startswith(f"skipped: {paths[4]}: ")
    assert "stage 0 fails" in line
    rest = np.delete(np.arange(7), 4)
    assert [row["path"] for row in rows_of(out)] == [str(paths[index]) for index in rest]
    assert {row["exit"] for row in rows_of(out)} == {1 if limits else 2}
    # What is wrong for all is still an error, and no reason to skip.
    with user_error("max_exit is 3"):
        predict_files(bundle, [folder], out, max_exit=3, threads=1)


# ---------------------------------------------------------------- one writer of an output

PREDICT = """
import sys
from pathlib import Path
from erde.runtime import predict_files as prediction
from erde.runtime import Session
predict = Session.predict
def first(self, *arguments, **keywords):
    Session.predict = predict
    print("begun", flush=True)
    sys.stdin.read()
    return predict(self, *arguments, **keywords)
Session.predict = first
prediction.predict_files(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]), batch_size=2, resume=True)
"""


def test_two_processes_do_not_write_one_output(
    tiny_bundle: Path, digit_files: tuple[list[Path], NDArray[np.uint8]], tmp_path: Path
) -> None:
    photos = digit_files[0][0].parent
    out = tmp_path / "answers.jsonl"
    first = subprocess.Popen(
        [sys.executable, "-c", PREDICT, str(tiny_bundle), str(photos), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "begun\n"
    for resume in (True, False):
        with user_error(f"{out} is being written by process {first.pid} on .*: wait until it has ended"):
            predict_files(tiny_bundle, [photos], out, batch_size=2, resume=resume)
    first.communicate()
    assert first.returncode == 0
    expected = tmp_path / "expected.jsonl"
    predict_files(tiny_bundle, [photos], expected, batch_size=2)
    assert out.read_bytes() == expected.read_bytes()
    assert entries(tmp_path) == ["answers.jsonl", "expected.jsonl", "images"]


# ---------------------------------------------------------------- stopped and continued


class Stopped(BaseException):
    """What Ctrl-C is, for a test."""


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many batches through, and stop in the next one; afterwards no more."""
    predict = Session.predict
    left = iter(range(batches))

    def stop(self: Session, *arguments: Any, **keywords: Any) -> Prediction:
        if next(left, None) is None:
            monkeypatch.setattr(Session, "predict", predict)
            raise Stopped
        return predict(self, *arguments, **keywords)

    monkeypatch.setattr(Session, "predict", stop)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is read from now on."""
    read: list[Path] = []

    def load(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        read.append(path)
        return load_image(path, shape)

    monkeypatch.setattr("erde.runtime.predict_files.load_image", load)
    return read


# A kill may leave any of these behind the last whole row.
TORN = {
    ".jsonl": [b"", b'{"path": "/some/wh', b'{"path": "a", "label": 1, "class"'],
    ".csv": [b"", b"/some/wh", b"a,1,cat,0.5,0,0.5,12", b'"/two\nlines', b'"/two\r\n'],
}


def unfinished_of(out: Path) -> Path:
    (path,) = out.parent.glob(f"{out.name}.*.unfinished")
    return path


@pytest.mark.parametrize(
    ("suffix", "row"),
    [
        (".jsonl", b"{}"),
        (".jsonl", b"x"),
        (".jsonl", b"[1]"),
        (".csv", b"a,b,c,d,e,f,g"),
        (".csv", b"a,1,b,1,99,1,1"),
    ],
)
def test_a_damaged_row_is_an_error_in_a_line(
    suffix: str, row: bytes, mixed_files: tuple[list[Path], list[str]], tiny_bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / f"some{suffix}"
    stop_after(1, monkeypatch)
    with pytest.raises(Stopped):
        predict_files(tiny_bundle, mixed_files[0], out, batch_size=3, threads=1)
    with unfinished_of(out).open("ab") as file:
        file.write(row + b"\n")
    with user_error(f"{unfinished_of(out)} is damaged: delete it to start anew"):
        predict_files(tiny_bundle, mixed_files[0], out, batch_size=3, threads=1, resume=True)


@pytest.mark.parametrize(("suffix", "torn"), [(suffix, torn) for suffix in TORN for torn in TORN[suffix]])
@pytest.mark.parametrize("batches", [1, 3])
def test_resumed_no_row_is_lost_and_none_is_there_twice(
    suffix: str,
    torn: bytes,
    batches: int,
    mixed_files: tuple[list[Path], list[str]],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mixed, reasons = mixed_files
    paths = [*mixed[:3], mixed[1], *mixed[3:]]  # one image is asked for twice
    settings: dict[str, Any] = {"batch_size": 3, "threads": 1, "operating_point": "risk-10"}
    whole, out = tmp_path / f"whole{suffix}", tmp_path / "deep" / f"some{suffix}"
    expected = predict_files(tiny_bundle, paths, whole, **settings)

    stop_after(batches, monkeypatch)
    with pytest.raises(Stopped):
        predict_files(tiny_bundle, paths, out, **settings)
    unfinished = unfinished_of(out)
    begun = unfinished.read_bytes()
    rows = rows_of(whole)[: begun.count(b"\n") - (suffix == ".csv")]
    assert 0 < len(rows) < 8
    with unfinished.open("ab") as file:
        file.write(torn)
    with user_error(rf"{unfinished} has {len(rows)} images of a command that was stopped: .* --resume"):
        predict_files(tiny_bundle, paths, out, **settings)
    assert unfinished.read_bytes() == begun + torn

    read = counted(monkeypatch)
    capsys.readouterr()
    summary = predict_files(tiny_bundle, paths, out, resume=True, **settings)
    left = list(paths)
    for row in rows:
        left.remove(Path(row["path"]))
    assert read == left
    assert summary == {**expected, "out": str(out)}
    assert out.read_bytes().startswith(begun)
    same = [{**row, "probability": 0, "score": 0} for row in rows_of(out)]
    assert same == [{**row, "probability": 0, "score": 0} for row in rows_of(whole)]
    skipped = out.with_name(f"{out.name}.skipped.txt")
    assert skipped.read_text().splitlines() == reasons
    assert capsys.readouterr().err.splitlines() == [f"skipped: {reason}" for reason in reasons]
    assert entries(out.parent) == [out.name, skipped.name]


def test_names_that_csv_quotes_or_guards_are_known_again(
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [b"=1.png", b"a\n,b.png", b"c\r.png", b'd".png', b"\xff.png"]
    for name in names:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(digit_files[0][0].read_bytes())
    monkeypatch.chdir(folder)
    paths = [Path(os.fsdecode(name)) for name in names]
    for suffix in (".csv", ".jsonl"):
        out = tmp_path / f"some{suffix}"
        stop_after(len(names) - 1, monkeypatch)
        with pytest.raises(Stopped):
            predict_files(tiny_bundle, paths, out, batch_size=1, threads=1)
        with monkeypatch.context() as patch:
            read = counted(patch)
            predict_files(tiny_bundle, paths, out, batch_size=1, threads=1, resume=True)
        assert read == paths[-1:]


def test_rows_are_in_the_file_as_soon_as_their_batch_is_done(
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "some.jsonl"
    out.write_text("older answers")
    seen = []
    predict = Session.predict

    def look(self: Session, *arguments: Any, **keywords: Any) -> Prediction:
        seen.append(unfinished_of(out).read_bytes().count(b"\n"))
        assert out.read_text() == "older answers"
        return predict(self, *arguments, **keywords)

    monkeypatch.setattr(Session, "predict", look)
    predict_files(tiny_bundle, digit_files[0], out, batch_size=2, threads=1)
    assert seen == [0, 2, 4, 6]
    assert len(rows_of(out)) == 7


def test_stopped_in_the_first_batch_leaves_nothing_in_the_way(
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "answers" / "some.csv"
    stop_after(0, monkeypatch)
    with pytest.raises(Stopped):
        predict_files(tiny_bundle, digit_files[0], out, threads=1)
    assert entries(out.parent) == []
    # With nothing to continue, --resume starts at the beginning, so that a script may always give it.
    predict_files(tiny_bundle, digit_files[0], out, threads=1, resume=True)
    assert len(rows_of(out)) == 7
    # A kill leaves what no handler can clean up: a file without one whole row.
    expected = out.read_bytes()
    stop_after(1, monkeypatch)
    with pytest.raises(Stopped):
        predict_files(tiny_bundle, digit_files[0], out, batch_size=2, threads=1)
    unfinished = unfinished_of(out)
    for rows in (b"", b"pa", b"path,la"):
        for resume in (False, True):
            unfinished.write_bytes(rows)
            predict_files(tiny_bundle, digit_files[0], out, threads=1, resume=resume)
            assert out.read_bytes() == expected
            assert entries(out.parent) == [out.name]


def write_slow_profile(bundle: Path) -> None:
    """Times by which one image gets as far as the final exit within 4.5 ms, and two do not."""
    profile = Session(bundle, threads=1).profile(rounds=1)
    profile.model_copy(update={"milliseconds": {1: [1.0] * 3, 2: [2.0] * 3}}).write(bundle / PROFILE)


def test_with_a_deadline_another_batch_size_is_another_limit(
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    bundle_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths, _ = digit_files
    out = tmp_path / "some.jsonl"
    write_slow_profile(bundle_copy)
    stop_after(1, monkeypatch)
    with pytest.raises(Stopped):
        predict_files(bundle_copy, paths, out, deadline_ms=4.5, batch_size=2, threads=1)
    # One by one the rest would get as far as the final exit.
    with user_error("was begun with another bundle or other options"):
        predict_files(bundle_copy, paths, out, deadline_ms=4.5, batch_size=1, threads=1, resume=True)
    predict_files(bundle_copy, paths, out, deadline_ms=4.5, batch_size=2, threads=1, resume=True)
    assert len(rows_of(out)) == 7


def test_with_a_deadline_too_a_resumed_command_takes_more_images(
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    bundle_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths, _ = digit_files
    out = tmp_path / "some.jsonl"
    write_slow_profile(bundle_copy)
    # Time for all exits, whether a batch has six images or seven.
    options: dict[str, Any] = {"deadline_ms": 1000.0, "threads": 1}

    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("erde.runtime.predict_files._Output.name_skipped", stop)
        with pytest.raises(Stopped):
            predict_files(bundle_copy, paths[1:], out, **options)
    predict_files(bundle_copy, paths, out, resume=True, **options)
    assert {row["path"] for row in rows_of(out)} == {str(path) for path in paths}


def test_with_a_deadline_a_resumed_command_answers_as_one_that_was_not_stopped(
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    bundle_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths, _ = digit_files
    folder, whole, out = tmp_path / "images", tmp_path / "whole.jsonl", tmp_path / "some.jsonl"
    paths[0].write_bytes(b"not an image")
    write_slow_profile(bundle_copy)
    options: dict[str, Any] = {
        "deadline_ms": 4.5,
        "batch_size": 2,
        "threads": 1,
        "operating_point": "no-exit",
    }
    predict_files(bundle_copy, [folder], whole, **options)
    assert {row["exit"] for row in rows_of(whole)} == {1}
    stop_after(1, monkeypatch)
    with pytest.raises(Stopped):
        predict_files(bundle_copy, [folder], out, **options)
    # The image that was skipped is tried again, and the batches are others.
    predict_files(bundle_copy, [folder], out, resume=True, **options)
    assert [(row["path"], row["exit"]) for row in rows_of(out)] == [
        (row["path"], row["exit"]) for row in rows_of(whole)
    ]


@pytest.mark.parametrize(
    "change", [{"operating_point": "risk-10"}, {"max_exit": 1}, {"max_macs": 1e9}, {"bundle": "other"}]
)
def test_rows_of_two_bundles_or_limits_do_not_meet(
    change: dict[str, Any],
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    tiny_bundle: Path,
    bundle_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths, _ = digit_files
    out = tmp_path / "some.jsonl"
    stop_after(2, monkeypatch)
    with pytest.raises(Stopped):
        predict_files(tiny_bundle, paths, out, batch_size=2, threads=1)
    unfinished = unfinished_of(out)
    before = unfinished.read_bytes()
    bundle = tiny_bundle
    if change.pop("bundle", None):
        manifest = json.loads((bundle_copy / "manifest.json").read_text())
        manifest["default_operating_point"] = "risk-10"
        manifest["seal"] = canonical_hash(manifest)
        (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
        bundle, change = bundle_copy, {"operating_point": "risk-5"}
    for resume in (True, False):
        with user_error(f"{unfinished} was begun with another bundle or other options: give what was given"):
            predict_files(bundle, paths, out, batch_size=2, threads=1, resume=resume, **change)
    assert unfinished.read_bytes() == before
    # The default point by its name, another batch size, more images: these may go on.
    predict_files(
        tiny_bundle, [*paths, paths[0]], out, resume=True, operating_point="risk-5", batch_size=3, threads=1
    )
    assert [row["path"] for row in rows_of(out)] == [str(path) for path in [*paths, paths[0]]]


def test_resume_needs_a_file(tmp_path: Path) -> None:
    with user_error("--resume goes with --out"):
        predict_files(tmp_path / "no bundle", [tmp_path / "no image"], resume=True)


def test_a_full_disk_is_said_and_what_is_done_is_kept(
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "some.csv"
    replace = os.replace

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("erde.runtime.predict_files.os.replace", full)
    with user_error("no space left on the disk while writing .*some.csv: .*--resume"):
        predict_files(tiny_bundle, digit_files[0], out, threads=1)
    monkeypatch.setattr("erde.runtime.predict_files.os.replace", replace)
    read = counted(monkeypatch)
    predict_files(tiny_bundle, digit_files[0], out, threads=1, resume=True)
    assert read == []
    assert len(rows_of(out)) == 7


@pytest.mark.parametrize("failing", ["skipped.txt", "reading"])
def test_what_is_done_outlives_a_resume_that_fails_at_once(
    failing: str,
    digit_files: tuple[list[Path], NDArray[np.uint8]],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "some.csv"
    stop_after(2, monkeypatch)
    with pytest.raises(Stopped):
        predict_files(tiny_bundle, digit_files[0], out, batch_size=2, threads=1)
    begun = unfinished_of(out).read_bytes()
    with monkeypatch.context() as patch:
        if failing == "skipped.txt":
            (tmp_path / "some.csv.skipped.txt").mkdir()
            with user_error("some.csv.skipped.txt is a folder: .*remove it, or choose another name"):
                predict_files(tiny_bundle, digit_files[0], out, threads=1, resume=True)
            (tmp_path / "some.csv.skipped.txt").rmdir()
        else:

            def broken(*_: Any) -> None:
                raise OSError(5, "Input/output error")

            patch.setattr("erde.runtime.predict_files._read_rows", broken)
            with pytest.raises(OSError, match="Input/output"):
                predict_files(tiny_bundle, digit_files[0], out, threads=1, resume=True)
    assert unfinished_of(out).read_bytes() == begun
    predict_files(tiny_bundle, digit_files[0], out, threads=1, resume=True)
    assert len(rows_of(out)) == 7


def test_older_answers_keep_their_list_until_the_new_ones_are_there(
    mixed_files: tuple[list[Path], list[str]],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths, reasons = mixed_files
    out = tmp_path / "answers" / "some.csv"
    listed = tmp_path / "answers" / "some.csv.skipped.txt"
    settings: dict[str, Any] = {"batch_size": 3, "threads": 1}
    predict_files(tiny_bundle, [*paths[3:], paths[0]], out, **settings)
    older = out.read_bytes(), listed.read_bytes()
    assert len(listed.read_text().splitlines()) == 4
    stop_after(1, monkeypatch)
    with pytest.raises(Stopped):
        predict_files(tiny_bundle, paths, out, **settings)
    assert (out.read_bytes(), listed.read_bytes()) == older
    with user_error("continue it with --resume"):
        predict_files(tiny_bundle, paths, out, **settings)
    assert (out.read_bytes(), listed.read_bytes()) == older
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if target == out:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    # The list comes first: were the answers there without it, nothing would be left to resume.
    with monkeypatch.context() as patch, user_error("some.csv cannot be written: permission denied"):
        patch.setattr("erde.runtime.predict_files.os.replace", refuse)
        predict_files(tiny_bundle, paths, out, resume=True, **settings)
    predict_files(tiny_bundle, paths, out, resume=True, **settings)
    assert listed.read_text().splitlines() == reasons
    assert len(rows_of(out)) == 7
    assert entries(out.parent) == [out.name, listed.name]


def test_memory_does_not_grow_with_the_folder(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    some = tmp_path / "some.png"
    some.touch()

    def load(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        number = int(path.stem)
        if number % 1000 == 999:
            gc.collect()
            used.append(tracemalloc.get_traced_memory()[0])
        if number % 3 == 0:
            raise UserError(f"{path} is not a readable image")
        return np.full(shape, 7, np.uint8)

    def listed(_: Sequence[Path]) -> Iterator[Path]:
        return (Path(f"{number:09}.png") for number in range(6000))

    monkeypatch.setattr("erde.runtime.predict_files.load_image", load)
    monkeypatch.setattr("erde.runtime.predict_files.find_images", listed)
    tracemalloc.start()
    try:
        predict_files(tiny_bundle, [some], tmp_path / "some.csv", threads=1)
    finally:
        tracemalloc.stop()
    assert len(used) == 6
    # Bytes for another thousand images; the median, since a table of Python's own may grow once, by megabytes.
    assert np.median(np.diff(used)) < 20_000


# The command, which is killed when it has so many rows.
KILLED = """
import os, signal, sys
from erde.cli.main import main
from erde.runtime.predict_files import _Tally
rows = int(sys.argv.pop(1))
count = _Tally.add
def add(self, row):
    count(self, row)
    if self.answered == rows:
        os.kill(os.getpid(), signal.SIGKILL)
_Tally.add = add
main()
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_in_the_middle_and_resumed(
    seed: int, digits: DataSplits, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = save_by_class(digits.certify, tmp_path / "images")
    (folder / "0" / "text.png").write_text("not an image")
    (folder / "9" / "text.png").write_text("not an image")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out" / "some.jsonl"
    command = ("predict", str(tiny_bundle), str(folder), "--batch-size", "1", "--threads", "1", "--resume")
    erde(*command, "--out", str(whole), code=3)
    assert len(rows_of(whole)) == 500

    done = 0
    generator = random.Random(seed)
    for share in (0.1, 0.4):
        rows = int(500 * (share + generator.uniform(0, 0.3)))
        process = subprocess.run([sys.executable, "-c", KILLED, str(rows), *command, "--out", str(out)])
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
        content = unfinished_of(out).read_bytes()
        assert whole.read_bytes().startswith(b"".join(content.splitlines(keepends=True)[:done]))
        done = content.count(b"\n")
        assert done == rows
    _, refused = erde(*command[:-1], "--out", str(out), code=2)
    assert "continue it with --resume" in refused
    stdout, stderr = erde(*command, "--out", str(out), code=3)
    assert stdout == f"500 images (2 skipped): {out}\n"
    assert stderr.count("skipped: ") == 2
    # Batches of one image, so that even the last bits are the same.
    assert out.read_bytes() == whole.read_bytes()
    assert entries(out.parent) == ["some.jsonl", "some.jsonl.skipped.txt"]


# ---------------------------------------------------------------- outputs that cannot be


@pytest.mark.parametrize("name", ["answers.txt", "answers", "answers.csv.gz", "answers.json"])
def test_an_output_of_another_kind(name: str, tmp_path: Path) -> None:
    # Said before anything else is looked at.
    with user_error(f"--out is {tmp_path / name}: expected a name ending in .csv or .jsonl"):
        predict_files(tmp_path / "no bundle", [tmp_path / "no image"], tmp_path / name)


def test_an_empty_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with user_error(f"no image below the folder {tmp_path / 'images'}"):
        predict_files(tiny_bundle, [tmp_path / "images"], tmp_path / "some.csv", threads=1)
    assert entries(tmp_path) == ["images"]


def test_a_file_where_the_outputs_folder_would_be(
    digit_files: tuple[list[Path], NDArray[np.uint8]], tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with user_error(f"{tmp_path / 'file'} is a file; choose another folder"):
        predict_files(tiny_bundle, digit_files[0], tmp_path / "file" / "some.csv", threads=1)
