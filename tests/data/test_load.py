from __future__ import annotations

import hashlib
import io
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from erde.common.errors import UserError, check_seed
from erde.common.images import to_array
from erde.common.splits import TrainSplit
from erde.data.load import load_data, stratified_order
from tests.helpers.checks import user_error
from tests.helpers.image_sets import load, parts, picture, png, write_set, write_split

torch.set_num_threads(1)

DIGITS = {"tune_size": 300, "certify_size": 250, "test_size": 200}


# ---------------------------------------------------------------- splits


def test_digits_are_parted_completely() -> None:
    splits = load_data("digits", channels=1, **DIGITS)
    assert [len(part) for part in parts(splits)] == [1047, 300, 250, 200]
    assert splits.classes == tuple("0123456789")
    assert splits.image_shape == (8, 8, 1)
    assert splits.input_size == (1, 8, 8)
    digits = load_digits()
    whole = sorted(
        (int(label), np.round(image * 255 / 16).astype(np.uint8).tobytes())
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    rows = sorted(
        (int(label), image.tobytes())
        for part in parts(splits)
        for image, label in zip(part.images, part.labels, strict=True)
    )
    # As a multiset: every image is in exactly one split, with its own label.
    assert rows == whole


def test_splits_are_stratified() -> None:
    splits = load_data("digits", channels=1, **DIGITS)
    shares = np.bincount(load_digits().target) / 1797
    for part in (*parts(splits), splits.train_share(100), splits.train_share(100, skip=333)):
        assert np.abs(np.bincount(part.labels, minlength=10) - len(part) * shares).max() <= 2


@pytest.mark.parametrize("seed", range(3))
def test_every_stretch_of_the_stratified_order_is_stratified(seed: int) -> None:
    labels = np.random.default_rng(seed).choice(4, p=[0.5, 0.3, 0.15, 0.05], size=2000)
    order = stratified_order(labels, seed)
    assert sorted(order) == list(range(2000))
    shares = np.bincount(labels) / 2000
    for start, size in itertools.product((0, 123, 1500), (40, 333, 500)):
        counts = np.bincount(labels[order[start : start + size]], minlength=4)
        assert np.abs(counts - size * shares).max() <= 3
    # Random all the same: not the order of the rows within a class.
    first = order[labels[order] == 0]
    assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.2


@pytest.mark.parametrize("seed", [-1, None, 1.5, "3", True])
def test_a_seed_out_of_range(seed: Any) -> None:
    with user_error(f"the seed is {seed!r}, expected a whole number from 0 to 2,147,483,647"):
        load_data("digits", channels=1, seed=seed, **DIGITS)


def test_a_seed_of_numpy_is_a_seed() -> None:
    check_seed(np.int64(3))


def test_splits_are_decided_by_the_seed() -> None:
    first, again, other = (
        load_data("digits", channels=1, seed=seed, **DIGITS).fingerprints() for seed in (3, 3, 4)
    )
    assert first == again
    assert [value["size"] for value in first.values()] == [1047, 300, 250, 200]
    assert list(first) == ["train", "tune", "certify", "test"]
    assert all(first[name]["fingerprint"] != other[name]["fingerprint"] for name in first)


def test_train_subset_moves_no_other_split() -> None:
    small, whole = (load_data("digits", channels=1, train_subset=size, **DIGITS) for size in (100, None))
    assert small.fingerprints() == whole.fingerprints()


def test_fingerprint_is_stable_and_sensitive() -> None:
    images, labels = np.stack([picture(number) for number in range(4)]), np.arange(4)
    prints = {TrainSplit(images, labels).fingerprint()}
    assert TrainSplit(images.copy(), labels.astype(np.int64)).fingerprint() in prints
    pixel = images.copy()
    pixel[3, 7, 7, 2] ^= 1
    changes = [(pixel, labels), (images, labels[[0, 1, 3, 2]]), (images[[1, 0, 2, 3]], labels[[1, 0, 2, 3]])]
    changes += [(images[:3], labels[:3]), (images.reshape(4, 4, 16, 3), labels)]
    for changed in changes:
        prints.add(TrainSplit(*changed).fingerprint())
    assert len(prints) == 6
    # SHA-256 over "(1, 1, 1, 1)", the label 1 as eight bytes and the pixel 7.
    known = hashlib.sha256(b"(1, 1, 1, 1)" + (1).to_bytes(8, "little") + b"\x07").hexdigest()
    assert TrainSplit(np.full((1, 1, 1, 1), 7, np.uint8), np.array([1])).fingerprint() == known


def test_train_share() -> None:
    splits = load_data("digits", channels=1, **DIGITS)
    assert splits.train_share(None) is splits.train
    first, second = splits.train_share(400), splits.train_share(600, skip=400)
    for share, start in ((first, 0), (second, 400)):
        assert np.array_equal(share.images, splits.train.images[start : start + len(share)])
        assert np.array_equal(share.labels, splits.train.labels[start : start + len(share)])
    assert (len(first), len(second), len(splits.train_share(None, skip=400))) == (400, 600, 647)
    with pytest.raises(UserError, match=r"1,000 train images beside 400 others.*has 1,047: lower"):
        splits.train_share(1000, skip=400)


# ---------------------------------------------------------------- sources


def test_a_shipped_name_is_found_in_erde_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERDE_DATA", str(root))
    splits = load("svhn")
    assert [len(part) for part in parts(splits)] == [170, 30, 40, 60]
    assert splits.classes == tuple("0123456789")
    # Every image is where it was written: train images in the three splits of train, test in test, labels kept.
    known = {picture(row).tobytes(): row % 10 for row in range(240)}
    seen = [
        (image.tobytes(), label)
        for part in parts(splits)[:3]
        for image, label in zip(part.images, part.labels, strict=True)
    ]
    assert dict(seen) == known
    assert len(seen) == 240
    assert np.array_equal(splits.test.images, [picture(10_000 + row) for row in range(60)])
    assert splits.test.labels.tolist() == [row % 10 for row in range(60)]
    assert load(root / "svhn").fingerprints() == splits.fingerprints()


def test_a_copy_of_the_hubs_repository_with_several_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "svhn"
    write_set(folder / "cropped_digits", train=200)
    write_set(folder / "full_numbers", train=150)
    configurations = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/data/{split}-*\n" for split in ("train", "test"))
        for name in ("full_numbers", "cropped_digits")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    monkeypatch.setenv("ERDE_DATA", str(tmp_path))
    assert len(load("svhn").train) == 200 - 70


def test_without_a_test_split_one_is_taken(tmp_path: Path) -> None:
    splits = load(write_set(tmp_path / "set", test=None), test_size=50)
    assert [len(part) for part in parts(splits)] == [120, 30, 40, 50]
    everything = {image.tobytes() for part in parts(splits) for image in part.images}
    assert everything == {picture(row).tobytes() for row in range(240)}


def test_tune_and_certify_of_the_test_split_leave_all_of_train(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    apart, whole = load(folder, held_out="test", tune_size=8, certify_size=9), load(folder)
    pixels = [{image.tobytes() for image in part.images} for part in parts(apart)]
    assert pixels[0] == {image.tobytes() for part in parts(whole)[:3] for image in part.images}
    assert [len(images) for images in pixels[1:3]] == [8, 9]
    assert set.union(*pixels[1:]) == {image.tobytes() for image in parts(whole)[3].images}
    assert sum(len(images) for images in pixels[1:]) == len(whole.test)
    with pytest.raises(UserError, match=r"asked for tune and certify, of .* and test needs some too"):
        load(folder, held_out="test", tune_size=len(whole.test), certify_size=1)


def test_a_folder_of_images_by_class(tmp_path: Path) -> None:
    for row in range(90):
        folder = tmp_path / "pets" / ("cat", "dog", "emu")[row % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row}.png").write_bytes(png(picture(row)))
    splits = load(tmp_path / "pets", tune_size=15, certify_size=15, test_size=15)
    assert splits.classes == ("cat", "dog", "emu")
    assert [len(part) for part in parts(splits)] == [45, 15, 15, 15]
    known = {picture(row).tobytes(): row % 3 for row in range(90)}
    for part in parts(splits):
        assert [known[image.tobytes()] for image in part.images] == part.labels.tolist()


def test_labels_without_names_and_another_image_column(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", names=None, image="photo")
    assert load(folder).classes == tuple("0123456789")
    assert load(folder, image_column="photo", label_column="label").classes == tuple("0123456789")


def test_images_are_resized_where_asked(tmp_path: Path) -> None:
    encoded = [png(picture(row, (6 + row % 3, 9, 3))) for row in range(200)]
    write_split(tmp_path / "set" / "train.parquet", encoded, [row % 10 for row in range(200)])
    splits = load(tmp_path / "set", image_size=5, test_size=50)
    assert splits.image_shape == (5, 5, 3)
    known = {to_array(Image.open(io.BytesIO(value)), 5, 5, 3).tobytes() for value in encoded}
    assert {image.tobytes() for part in parts(splits) for image in part.images} == known


def test_resize_covers_then_crops_the_centre() -> None:
    # Left third red, middle green, right blue; twice as wide as high: the middle stays.
    array = np.zeros((4, 12, 3), np.uint8)
    for index in range(3):
        array[:, 4 * index : 4 * index + 4, index] = 255
    shrunk = to_array(Image.fromarray(array), 4, 4, 3)
    assert (shrunk == [0, 255, 0]).all()
    assert to_array(Image.fromarray(array), 2, 2, 1).shape == (2, 2, 1)


def test_large_sets_are_streamed_by_themselves(root: Path) -> None:
    assert isinstance(load(root / "svhn").train.images, np.ndarray)
    assert not isinstance(load(root / "svhn", memory_limit_gib=1e-5).train.images, np.ndarray)


# ---------------------------------------------------------------- normalisation


def test_mean_and_std_are_measured_on_train(root: Path) -> None:
    splits = load(root / "svhn")
    assert isinstance(splits.train.images, np.ndarray)
    values = splits.train.images.astype(np.float64) / 255
    assert splits.mean == pytest.approx(values.mean(axis=(0, 1, 2)), abs=6e-5)
    assert splits.std == pytest.approx(values.std(axis=(0, 1, 2)), abs=6e-5)
    assert len(set(splits.mean)) == 3


def test_given_mean_and_std_are_kept(root: Path) -> None:
    splits = load(root / "svhn", mean=[0.1, 0.2, 0.3])
    assert splits.mean == (0.1, 0.2, 0.3)
    assert splits.std == load(root / "svhn").std
    assert load(root / "svhn", mean=[0.1, 0.2, 0.3], std=[1, 2, 3]).std == (1, 2, 3)


@pytest.mark.parametrize("value", [0, 77])
def test_constant_images_give_a_finite_std(
    tmp_path: Path, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = [png(np.full((4, 4, 3), value, np.uint8))] * 60
    write_split(tmp_path / "set" / "train.parquet", encoded, [row % 2 for row in range(60)], names=2)
    # All are copies of one image.
    monkeypatch.setattr("erde.data.load._separate", lambda _, *splits: splits)
    splits = load(tmp_path / "set", tune_size=10, certify_size=10, test_size=10)
    assert splits.std == (1e-3,) * 3
    assert splits.mean == pytest.approx([value / 255] * 3, abs=1e-4)


# ---------------------------------------------------------------- real images


REAL = os.environ.get("ERDE_DATA", "")


@pytest.mark.skipif(
    not (REAL and (Path(REAL) / "cifar10").is_dir()), reason="ERDE_DATA names no folder with cifar10/"
)
def test_cifar10_has_the_published_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERDE_DATA", REAL)
    splits = load_data("cifar10", streaming="always", mean=[0.5] * 3, std=[0.25] * 3)
    assert [len(part) for part in parts(splits)] == [45_000, 2_500, 2_500, 10_000]
    assert splits.classes[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(splits.test.labels).tolist() == [1000] * 10
    assert sum(np.bincount(part.labels) for part in parts(splits)[:3]).tolist() == [5000] * 10
    assert splits.image_shape == (32, 32, 3)
    assert splits.train.images[np.arange(3)].std() > 10
