from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from erde.data import DataSplits
from erde.images import load_image, to_array
from erde.prediction import COLUMNS, find_images, predict_files
from erde.runtime import Session
from erde.sources import decode
from tests.conftest import entries, user_error

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
    assert find_images([single, folder, folder / "b.png"]) == [
        single,
        folder / "a.JPG",
        folder / "b.png",
        folder / "deep" / "c.webp",
        folder / "b.png",
    ]


def test_nothing_to_find(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with user_error(f"no image below the folder {tmp_path}: expected files ending in .png, .jpg"):
        find_images([tmp_path])
    with user_error(f"no image at {tmp_path / 'none.png'}: expected a file or a folder"):
        find_images([tmp_path / "none.png"])


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
    found = load_image(path, (8, 8, channels))
    assert found.shape == (8, 8, channels)
    assert found.dtype == np.uint8
    with Image.open(path) as image:
        assert np.array_equal(found, to_array(image, 8, 8, channels))
        decoded = len(image.getbands())
    if decoded == channels:
        # Training refuses other channels than it was set to; the rest of its way is the same.
        image = decode({"bytes": path.read_bytes(), "path": None}, "here", channels)
        assert np.array_equal(found, to_array(image, 8, 8, channels))
    if kind != "JPEG" and mode in ("L", "RGB") and size == (8, 8) and len(mode) == channels:
        assert np.array_equal(found, np.asarray(picture(mode, 8, 8)).reshape(8, 8, channels))


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
        summary = predict_files(tiny_bundle, paths, threads=1, **arguments)  # type: ignore[arg-type]
        assert summary["exit_rates"] == [float(index == last) for index in range(3)]
        assert summary["mean_macs"] == macs[last]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_that_is_no_image_leaves_no_output(
    suffix: str, digit_files: tuple[list[Path], NDArray[np.uint8]], tiny_bundle: Path, tmp_path: Path
) -> None:
    paths, _ = digit_files
    text = paths[0].parent / "text.png"
    text.write_text("not an image")
    out = tmp_path / "answers" / f"some{suffix}"
    with user_error(f"{text} is not a readable image"):
        predict_files(tiny_bundle, [*paths, text], out, batch_size=2, threads=1)
    assert entries(out.parent) == []
    out.write_text("older answers")
    with user_error("is not a readable image"):
        predict_files(tiny_bundle, [*paths, text], out, batch_size=2, threads=1)
    assert out.read_text() == "older answers"
    assert entries(out.parent) == [out.name]


def test_a_damaged_image(tiny_bundle: Path, tmp_path: Path) -> None:
    content = io.BytesIO()
    picture("L", 64, 64).save(content, "PNG")
    path = tmp_path / "some.png"
    path.write_bytes(content.getvalue()[:1000])
    with user_error(f"{path} is not a readable image"):
        predict_files(tiny_bundle, [path], threads=1)


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
