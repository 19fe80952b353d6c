from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erde.data.encoded import StreamedImages
from erde.data.load import DataSplits, load_splits
from erde.recipe.schema import DataConfig
from tests.helpers.image_sets import (
    SIZES,
    load,
    parts,
    picture,
    png,
    refusal,
    rows_and_labels,
    write_set,
    write_split,
)

torch.set_num_threads(1)


def seen_in(splits: DataSplits) -> list[list[bytes]]:
    return [[row.tobytes() for row, _ in rows_and_labels(part)] for part in parts(splits)]


def leave_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The splits as they are before copies are taken out."""
    monkeypatch.setattr("erde.data.load._separate", lambda _, *splits: splits)


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_a_set_without_copies_is_split_as_ever(
    tmp_path: Path, streaming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_set(tmp_path / "set")
    config = DataConfig(name=str(folder), streaming=streaming, **SIZES)
    expected = load_splits(config, 3).fingerprints()
    leave_copies(monkeypatch)
    assert load_splits(config, 3).fingerprints() == expected


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_copies_stand_on_one_side(
    tmp_path: Path, streaming: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each picture twice, and half of the test pictures in train as well.
    pictures = [picture(row // 2) for row in range(600)]
    pictures[:30] = [picture(10_000 + row) for row in range(30)]
    write_split(
        tmp_path / "set" / "data" / "train-0.parquet",
        list(map(png, pictures)),
        [row // 2 % 10 for row in range(600)],
    )
    tests = [picture(10_000 + row) for row in range(60)]
    write_split(
        tmp_path / "set" / "data" / "test-0.parquet", list(map(png, tests)), [row % 10 for row in range(60)]
    )
    config = DataConfig(name=str(tmp_path / "set"), streaming=streaming, tune_size=90, certify_size=90)
    with monkeypatch.context() as patch:
        leave_copies(patch)
        before = seen_in(load_splits(config, 0))
    assert set(before[0]) & set(before[2])
    capsys.readouterr()
    splits = load_splits(config, 0)
    train, tune, certify, test = after = seen_in(splits)
    for first, second in ((train, tune), (train, certify), (train, test), (tune, certify), (tune, test)):
        assert not set(first) & set(second)
    assert len(set(certify)) == len(certify)
    assert set(certify) == set(before[2])
    assert test == before[3]
    gone = [len(old) - len(new) for old, new in zip(before, after, strict=True)]
    said = f"{sum(gone)} left out ({gone[0]} of train, {gone[1]} of tune, {gone[2]} of certify)"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("streaming", ["never", "always", "auto"])
def test_images_that_weights_have_seen_are_not_held_out(
    tmp_path: Path, streaming: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_set(tmp_path / "set", train=60, test=None)
    # The first 60 of the test pictures are in train too; two of the others are there twice.
    rows = [*range(200), 100, 101]
    path = folder / "data" / "test-00000-of-00001.parquet"
    write_split(path, [png(picture(row)) for row in rows], [row % 10 for row in rows])
    # With `auto` the larger split decides for both: streamed and resident images cannot be compared.
    limit = 100 * np.prod(picture(0).shape) / 2**30
    splits = load(folder, held_out="test", streaming=streaming, memory_limit_gib=limit)
    assert isinstance(splits.train.images, StreamedImages) == (streaming != "never")
    train, tune, certify, test = seen_in(splits)
    assert len(train) == 60
    assert set(train).isdisjoint([*tune, *certify, *test])
    assert set(tune).isdisjoint([*certify, *test])
    assert set(tune) | set(certify) | set(test) == {picture(row).tobytes() for row in range(60, 200)}
    said = capsys.readouterr().err
    assert "(0 of train, " in said
    assert " of certify, " in said
    path.write_bytes(next(folder.rglob("train-*")).read_bytes())
    sizes = {"tune_size": 20, "certify_size": 20}
    assert "no image of tune is left: all are copies" in refusal(folder, held_out="test", **sizes)


def test_streamed_files_of_one_size_are_no_copies(tmp_path: Path) -> None:
    # BMP files of one size: what tells them apart may lie anywhere.
    for row in range(200):
        pixels = np.zeros((64, 64, 3), dtype=np.uint8)
        pixels[0, 0] = row
        place = tmp_path / "set" / str(row % 4)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{row}.bmp")
    splits = load(tmp_path / "set", test_size=40, streaming="always")
    assert [len(part) for part in parts(splits)] == [90, 30, 40, 40]


def write_groups(folder: Path, groups: list[Any], split: str = "train", first: int = 0) -> Path:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(num_classes=3),
            "patient": datasets.Value("string"),
        }
    )
    count = len(groups)
    rows = {
        "image": [{"bytes": png(picture(first + row)), "path": None} for row in range(count)],
        "label": [row % 3 for row in range(count)],
        "patient": groups,
    }
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_a_group_stays_in_one_split(tmp_path: Path, streaming: str) -> None:
    groups = [f"patient {row // 7}" for row in range(240)]
    folder = write_groups(tmp_path / "set", groups)
    group_of = {picture(row).tobytes(): groups[row] for row in range(240)}
    splits = load(folder, group="patient", test_size=40, streaming=streaming)
    kept = [{group_of[image] for image in part} for part in seen_in(splits)]
    for first, second in itertools.combinations(kept, 2):
        assert not first & second
    sizes = [len(part) for part in parts(splits)]
    assert sum(sizes) == 240
    for size, least in zip(sizes[1:], (30, 40, 40), strict=True):
        assert least <= size < least + 7
    again, other_seed = (
        load(folder, group="patient", test_size=40, seed=seed).fingerprints() for seed in (0, 1)
    )
    assert again["tune"] == splits.fingerprints()["tune"] != other_seed["tune"]


def test_a_group_of_the_test_split_stays_in_one_part(tmp_path: Path) -> None:
    groups = [f"patient {row // 7}" for row in range(240)]
    folder = write_groups(tmp_path / "set", groups, "test")
    write_groups(folder, ["of train"] * 60, first=900)
    group_of = {picture(row).tobytes(): groups[row] for row in range(240)}
    splits = load(folder, group="patient", held_out="test")
    kept = [{group_of[image] for image in part} for part in seen_in(splits)[1:]]
    assert sum(len(part) for part in parts(splits)[1:]) == 240
    for first, second in itertools.combinations(kept, 2):
        assert not first & second


def test_groups_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_groups(tmp_path / "set", ["a"] * 100 + [None] * 140)
    assert "data.group: no column 'patent' in data set" in refusal(folder, group="patent", test_size=40)
    assert "data.group: 140 rows of 'patient' in data set" in refusal(folder, group="patient", test_size=40)
    assert "data.group is 'patient', and 'digits' has no columns" in refusal(
        "digits", group="patient", channels=1
    )
    whole = write_groups(tmp_path / "whole", ["a"] * 240)
    assert "240 images were asked for test, of 240 in all" in refusal(whole, group="patient", test_size=40)
