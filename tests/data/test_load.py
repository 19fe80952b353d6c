from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from erde.common.errors import UserError
from erde.common.images import to_array
from erde.common.splits import TrainSplit
from erde.data.batches import TrainBatches
from erde.data.encoded import StreamedImages
from erde.data.load import DataSplits, load_data, load_splits, stratified_order
from erde.losses import ExitSettings, build_loss
from erde.networks.attach import attach_exits
from erde.networks.backbones import build_backbone
from erde.networks.cost import network_cost
from erde.recipe.losses import resolve_loss
from erde.recipe.schema import AugmentationConfig, DataConfig, DistillationConfig, TrainConfig
from erde.runs.folder import Run
from erde.training.job import Job

torch.set_num_threads(1)

SIZES = {"tune_size": 30, "certify_size": 40}
DIGITS = {"tune_size": 300, "certify_size": 250, "test_size": 200}
NO_AUGMENTATION = AugmentationConfig(crop_padding=0, flip=False)


@pytest.fixture(autouse=True, scope="module")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    folder = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "DOWNLOADED_DATASETS_PATH"):
            patch.setattr(datasets.config, name, str(folder / name))
        yield


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERDE_DATA", raising=False)


# ---------------------------------------------------------------- a data set of our own making


def png(array: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def picture(number: int, shape: tuple[int, ...] = (8, 8, 3)) -> NDArray[np.uint8]:
    """Noise of which no two are alike."""
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def write_split(
    path: Path, encoded: list[Any], labels: list[Any], names: int | None = 10, image: str = "image"
) -> None:
    import datasets

    label = (
        datasets.ClassLabel(names=[str(number) for number in range(names)])
        if names
        else datasets.Value("int64")
    )
    features = datasets.Features({image: datasets.Image(), "label": label})
    rows = [None if content is None else {"bytes": content, "path": None} for content in encoded]
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({image: rows, "label": labels}, features=features).to_parquet(path)


def write_set(folder: Path, train: int = 240, test: int | None = 60, **arguments: Any) -> Path:
    """The hub's layout: <folder>/data/<split>-<part>.parquet, with images 0 .. and test images 10,000 .."""
    for name, first, number in (("train", 0, train), ("test", 10_000, test)):
        if number is not None:
            encoded = [png(picture(first + row)) for row in range(number)]
            labels = [row % 10 for row in range(number)]
            write_split(folder / "data" / f"{name}-00000-of-00001.parquet", encoded, labels, **arguments)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    write_set(folder / "svhn")
    return folder


def load(folder: Path | str, **settings: Any) -> DataSplits:
    return load_data(str(folder), **{**SIZES, **settings})


def parts(splits: DataSplits) -> list[Any]:
    return [splits.train, splits.tune, splits.certify, splits.test]


def load_and_look(folder: Path | str, **settings: Any) -> None:
    for part in parts(load(folder, **settings)):
        assert sum(len(batch) for batch in part.batches(64)) == len(part)


def refusal(folder: Path | str, **settings: Any) -> str:
    """The message of the UserError that loading gives, always one line; streamed images are looked at too."""
    with pytest.raises(UserError) as caught:
        load_and_look(folder, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


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


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_streaming_changes_nothing(root: Path, streaming: Any) -> None:
    resident, splits = load(root / "svhn"), load(root / "svhn", streaming=streaming)
    assert isinstance(splits.train.images, np.ndarray) == (streaming == "never")
    held_out = ("tune", "certify", "test")
    prints, expected_prints = splits.fingerprints(), resident.fingerprints()
    assert [prints[name] for name in held_out] == [expected_prints[name] for name in held_out]
    # Streamed train images are told apart without decoding them (tests/data/test_streaming.py).
    assert (prints["train"] == expected_prints["train"]) == (streaming == "never")
    assert (splits.mean, splits.std) == (resident.mean, resident.std)
    share, expected = splits.train_share(64, skip=20), resident.train_share(64, skip=20)
    assert all(np.array_equal(x, y) for x, y in zip(share.batches(50), expected.batches(50), strict=True))
    for workers in (0, 1):
        streamed = make_batches(share, workers=workers).epoch(1, first_step=1)
        for (x, y, *_), (u, v, *_) in zip(
            streamed, make_batches(expected).epoch(1, first_step=1), strict=True
        ):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_large_sets_are_streamed_by_themselves(root: Path) -> None:
    assert isinstance(load(root / "svhn").train.images, np.ndarray)
    assert not isinstance(load(root / "svhn", memory_limit_gib=1e-5).train.images, np.ndarray)


def test_streaming_leaves_torchs_own_generator_alone(root: Path) -> None:
    split = load(root / "svhn", streaming="always").train
    before = torch.get_rng_state()
    assert len(list(make_batches(split).epoch(0))) == 10
    assert torch.equal(torch.get_rng_state(), before)


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
def test_constant_images_give_a_finite_std(tmp_path: Path, value: int) -> None:
    encoded = [png(np.full((4, 4, 3), value, np.uint8))] * 60
    write_split(tmp_path / "set" / "train.parquet", encoded, [row % 2 for row in range(60)], names=2)
    sizes = {"tune_size": 10, "certify_size": 10, "test_size": 10}
    splits = load_splits(DataConfig(name=str(tmp_path / "set"), **sizes), 0, copies_apart=False)
    assert splits.std == (1e-3,) * 3
    assert splits.mean == pytest.approx([value / 255] * 3, abs=1e-4)


# ---------------------------------------------------------------- batches


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def make_batches(split: TrainSplit, **arguments: Any) -> TrainBatches:
    settings: dict[str, Any] = {
        "batch_size": 16,
        "seed": 5,
        "augmentation": AugmentationConfig(crop_padding=2, cutout=3),
        "mean": MEAN,
        "std": STD,
        "device": torch.device("cpu"),
    }
    return TrainBatches(split, **{**settings, **arguments})


@pytest.fixture(scope="module")
def train_split() -> TrainSplit:
    # Not square, so that rows and columns cannot be exchanged.
    return TrainSplit(np.stack([picture(row, (6, 9, 3)) for row in range(50)]), np.arange(50) % 10)


def assert_equal_batches(first: Any, second: Any) -> None:
    for batch, other in zip(first, second, strict=True):
        assert batch.seed == other.seed
        assert torch.equal(batch.indices, other.indices)
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)


def test_batches_are_a_function_of_seed_epoch_and_step(train_split: TrainSplit) -> None:
    epoch = list(make_batches(train_split).epoch(3))
    torch.rand(5)
    again = make_batches(train_split)
    list(again.epoch(0))
    assert_equal_batches(epoch, again.epoch(3))
    for other in (make_batches(train_split).epoch(4), make_batches(train_split, seed=6).epoch(3)):
        assert not torch.equal(epoch[0][0], next(other)[0])


@pytest.mark.parametrize("first_step", [0, 1, 2, 3])
def test_resuming_within_an_epoch(train_split: TrainSplit, first_step: int) -> None:
    batches = make_batches(train_split)
    whole = list(batches.epoch(2))
    assert len(whole) == batches.steps == 3
    assert_equal_batches(whole[first_step:], batches.epoch(2, first_step))


def test_an_epoch_shows_every_image_once(train_split: TrainSplit) -> None:
    batches = make_batches(
        train_split, batch_size=10, augmentation=NO_AUGMENTATION, mean=(0,) * 3, std=(1,) * 3
    )
    for epoch in (0, 1):
        x = torch.cat([images for images, *_ in batches.epoch(epoch)])
        y = torch.cat([labels for _, labels, *_ in batches.epoch(epoch)])
        rows = sorted(zip(x.permute(0, 2, 3, 1).reshape(50, -1).tolist(), y.tolist(), strict=True))
        pixels = (torch.from_numpy(train_split.images).float() / 255).reshape(50, -1)
        expected = sorted(zip(pixels.tolist(), train_split.labels.tolist(), strict=True))
        np.testing.assert_allclose(
            [values for values, _ in rows], [values for values, _ in expected], atol=1e-6
        )
        assert [label for _, label in rows] == [label for _, label in expected]


def test_batches_are_float32_channels_last(train_split: TrainSplit) -> None:
    x, y, *_ = next(make_batches(train_split).epoch(0))
    assert (x.shape, x.dtype) == ((16, 3, 6, 9), torch.float32)
    assert (y.shape, y.dtype) == ((16,), torch.int64)
    assert x.is_contiguous(memory_format=torch.channels_last)


def slow_augmentation(
    image: NDArray[np.uint8], draw: dict[str, int], augmentation: AugmentationConfig
) -> NDArray[np.float64]:
    """One image: pad with zeros, crop, flip, normalise, cut out; (H, W, C) to (C, H, W)."""
    height, width, _ = image.shape
    padding = augmentation.crop_padding
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    if padding:
        padded = padded[draw["top"] : draw["top"] + height, draw["left"] : draw["left"] + width]
    if augmentation.flip and draw["flip"]:
        padded = padded[:, ::-1]
    x = (padded / 255 - np.array(MEAN)) / np.array(STD)
    side = augmentation.cutout
    for row, column in itertools.product(range(height), range(width)):
        from_top = row - (draw["hole_top"] - side // 2)
        from_left = column - (draw["hole_left"] - side // 2)
        if 0 <= from_top < side and 0 <= from_left < side:
            x[row, column] = 0
    return x.transpose(2, 0, 1)


@pytest.mark.parametrize(
    "augmentation",
    [
        AugmentationConfig(crop_padding=2, flip=True, cutout=0),
        AugmentationConfig(crop_padding=3, flip=False, cutout=0),
        AugmentationConfig(crop_padding=0, flip=True, cutout=0),
        AugmentationConfig(crop_padding=0, flip=False, cutout=0),
        AugmentationConfig(crop_padding=1, flip=True, cutout=4),
    ],
    ids=repr,
)
def test_augmentation_equals_a_slow_one(train_split: TrainSplit, augmentation: AugmentationConfig) -> None:
    batches = make_batches(train_split, augmentation=augmentation)
    draws = batches._draw(4)
    order = np.random.default_rng([5, 4]).permutation(50)
    for step, (images, labels, *_) in enumerate(batches.epoch(4)):
        for place in range(16):
            row = order[16 * step + place]
            draw = {name: int(values[step, place]) for name, values in draws.items()}
            expected = slow_augmentation(train_split.images[row], draw, augmentation)
            np.testing.assert_allclose(images[place].numpy(), expected, atol=2e-6)
            assert labels[place] == train_split.labels[row]


def test_draws_cover_their_ranges_evenly(train_split: TrainSplit) -> None:
    batches = make_batches(train_split)
    draws = [batches._draw(epoch) for epoch in range(60)]
    for name, high in (("top", 5), ("left", 5), ("flip", 2), ("hole_top", 6), ("hole_left", 9)):
        values = torch.cat([draw[name].flatten() for draw in draws])
        counts = torch.bincount(values, minlength=high) / len(values)
        assert len(counts) == high
        assert float((counts - 1 / high).abs().max()) < 0.03
    # Independent of each other.
    top, left = (torch.cat([draw[name].flatten() for draw in draws]).float() for name in ("top", "left"))
    assert abs(float(torch.corrcoef(torch.stack([top, left]))[0, 1])) < 0.1


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_size_of_the_hole(side: int) -> None:
    split = TrainSplit(np.full((64, 12, 12, 3), 255, np.uint8), np.zeros(64, np.int64))
    augmentation = AugmentationConfig(crop_padding=0, flip=False, cutout=side)
    holes = [
        (images == 0).all(dim=1) for images, *_ in make_batches(split, augmentation=augmentation).epoch(0)
    ]
    sizes = torch.cat(holes).sum(dim=(1, 2))
    # At the border a part of the hole lies outside.
    assert int(sizes.max()) == side * side
    assert int(sizes.min()) == (side - side // 2 if side > 1 else 1) ** 2
    assert (sizes == side * side).float().mean() > 0.4


# ---------------------------------------------------------------- what is refused


def test_missing_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert message.startswith(f"no data at {tmp_path / 'nowhere'}: expected a folder")


def test_erde_data_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERDE_DATA", str(tmp_path / "nowhere"))
    assert refusal("svhn").startswith(f"ERDE_DATA is {tmp_path / 'nowhere'}, which is not a folder")


def test_unknown_name_names_the_nearest() -> None:
    assert refusal("cifar-10").startswith("unknown data set 'cifar-10' (did you mean 'cifar10'?)")


@pytest.mark.parametrize("name", ["svhn", "someone/something"])
def test_the_hub_cannot_be_reached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("first line\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refusal(name)
    assert (
        f"data set '{name}' is not in ERDE_DATA and cannot be fetched from the hub (ConnectionError)"
        in message
    )


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set") / "data" / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    assert refusal(tmp_path / "set").startswith(f"{path} is not a readable Parquet file")


def test_parquet_damaged_in_the_middle(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set") / "data" / "train-00000-of-00001.parquet"
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    message = refusal(tmp_path / "set")
    assert str(tmp_path / "set") in message
    assert "cannot be read" in message


def replace_row(folder: Path, row: int, encoded: Any, label: Any = None, names: int | None = 10) -> Path:
    images: list[Any] = [png(picture(number)) for number in range(240)]
    labels: list[Any] = [number % 10 for number in range(240)]
    images[row] = encoded if encoded is not False else images[row]
    labels[row] = labels[row] if label is None else label
    write_split(folder / "train.parquet", images, labels, names)
    return folder


@pytest.mark.parametrize("streaming", ["never", "always"])
@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"not an image", "is not a readable image"),
        (png(picture(0))[:60], "is not a readable image"),
        (png(picture(0, (8, 7, 3))), "is 7x8, the first image is 8x8: set data.image_size"),
        (None, "has no image"),
    ],
    ids=["text", "truncated", "size", "null"],
)
def test_one_bad_image_among_good_ones(tmp_path: Path, streaming: str, encoded: Any, message: str) -> None:
    refused = refusal(replace_row(tmp_path / "set", 123, encoded), streaming=streaming, test_size=50)
    assert refused.startswith(f"data set '{tmp_path / 'set'}', split 'train', row 123 {message}")


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_gray_and_transparent_images_are_converted(
    tmp_path: Path, streaming: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = [(8, 8), (8, 8, 4), (8, 8, 3), (8, 8, 2)]
    pictures = [picture(row, kinds[row // 10 % 4]) for row in range(200)]
    write_split(
        tmp_path / "set" / "train.parquet", list(map(png, pictures)), [row % 10 for row in range(200)]
    )
    colour = load(tmp_path / "set", test_size=50, streaming=streaming)
    assert "the first image is gray; data.channels=1 computes less" in capsys.readouterr().err
    gray = load(tmp_path / "set", test_size=50, streaming=streaming, channels=1)
    assert (colour.image_shape, gray.image_shape) == ((8, 8, 3), (8, 8, 1))
    for part, channels in ((colour.train, 3), (gray.train, 1)):
        expected = {to_array(Image.fromarray(picture), 8, 8, channels).tobytes() for picture in pictures}
        assert {row.tobytes() for row in part.images[np.arange(len(part))]} <= expected


def damaged_set(folder: Path, rows: Sequence[int] = (0, 5, 123)) -> Path:
    encoded: list[Any] = [png(picture(number)) for number in range(240)]
    for row in rows:
        encoded[row] = b"not an image" if row % 2 else None
    write_split(folder / "train.parquet", encoded, [number % 10 for number in range(240)])
    return folder


def test_all_bad_images_are_listed_at_once(tmp_path: Path) -> None:
    message = refusal(damaged_set(tmp_path / "set"), test_size=50)
    where = f"data set '{tmp_path / 'set'}', split 'train', row"
    assert message.startswith(
        f"3 images cannot be read: {where} 0 has no image: remove the row; {where} 5 is not a"
    )
    assert f"{where} 123 is not a readable image" in message
    assert message.endswith("; data.skip_unreadable=true leaves such images out")
    many = refusal(damaged_set(tmp_path / "many", range(30)), test_size=50)
    assert many.startswith("30 images cannot be read")
    assert "; and 20 more; data.skip_unreadable=true" in many


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_bad_images_can_be_left_out(
    tmp_path: Path, streaming: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged_set(tmp_path / "set")
    splits = load(folder, test_size=50, skip_unreadable=True, streaming=streaming)
    assert "skipped 3 of 240 images: 3 images cannot be read: " in capsys.readouterr().err
    seen = {row.tobytes(): label for part in parts(splits) for row, label in rows_and_labels(part)}
    assert seen == {picture(row).tobytes(): row % 10 for row in range(240) if row not in (0, 5, 123)}
    none = refusal(damaged_set(tmp_path / "none", range(240)), skip_unreadable=True, streaming=streaming)
    assert "split 'train' has no image that can be read: 240 images cannot be read" in none


def rows_and_labels(part: Any) -> list[tuple[NDArray[np.uint8], int]]:
    return list(zip(part.images[np.arange(len(part))], part.labels.tolist(), strict=True))


@pytest.mark.parametrize("inside", ["", "train"])
def test_images_that_lie_side_by_side(tmp_path: Path, inside: str) -> None:
    place = tmp_path / "set" / inside
    place.mkdir(parents=True)
    for row in range(5):
        (place / f"{row}.png").write_bytes(png(picture(row)))
    message = refusal(tmp_path / "set")
    assert message.startswith(f"{place} has images (0.png, ...) and no folder per class")


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "place", ["hf://datasets/a/b/*.parquet", "../other/*.parquet", "/etc/*.parquet", "zip://x::y"]
)
def test_a_card_does_not_lead_out_of_the_folder(
    tmp_path: Path, name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    folder = write_set(tmp_path / "set")
    card = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [data/train-*, '{place}']\n"
    (folder / name).write_text(f"---\n{card}---\n# A set\n" if name == "README.md" else card)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("was loaded"))
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda *_, **__: pytest.fail("was looked at"))
    assert (
        refusal(folder)
        == f"{folder / name} takes data from '{place}', which is not in the folder: remove that line"
    )


@pytest.mark.parametrize("streaming", ["auto", "always"])
@pytest.mark.parametrize("place", ["../secret.png", "{outside}/secret.png", "a/../../secret.png"])
@pytest.mark.parametrize("kind", ["metadata.jsonl", "parquet"])
def test_images_outside_of_the_folder_are_refused(
    kind: str, place: str, streaming: str, tmp_path: Path
) -> None:
    import datasets

    folder = tmp_path / "set"
    (folder / "a").mkdir(parents=True)
    for row in range(4):
        (folder / f"{row}.png").write_bytes(png(picture(row)))
    (tmp_path / "secret.png").write_bytes(png(picture(9)))
    place = place.format(outside=tmp_path)
    names = [*(f"{row}.png" for row in range(4)), place]
    if kind == "parquet":
        rows = {
            "image": [{"bytes": None, "path": os.path.join(folder, name)} for name in names],
            "label": [0, 1, 0, 1, 0],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    else:
        lines = [json.dumps({"file_name": name, "label": row % 2}) for row, name in enumerate(names)]
        (folder / kind).write_text("\n".join(lines) + "\n")
    # Metadata files are checked by the datasets library itself, in its later versions.
    assert re.search(
        r"row 4 takes its image from '.*secret\.png', which is not in .*/set: copy it there"
        r"|cannot be read: Invalid metadata file_name '.*secret\.png'",
        refusal(folder, streaming=streaming),
    )


def test_a_card_of_the_hub_s_is_read(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    card = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/test-*\n"
    (folder / "README.md").write_text(f"---\nhomepage: https://example.org/..\n{card}---\n# A set\n")
    assert len(load(folder, tune_size=10, certify_size=10, test_size=10).train) == 30
    (folder / "README.md").write_text("---\nconfigs: [\n---\n")
    assert refusal(folder).startswith(f"the YAML in {folder / 'README.md'} cannot be read: repair it")


@pytest.mark.parametrize("label", [-1, -7])
def test_label_below_the_range(tmp_path: Path, label: int) -> None:
    message = refusal(replace_row(tmp_path / "set", 77, False, label, names=None), test_size=50)
    assert message.endswith(f"split 'train', row 77: the label is {label}, expected a number, 0 to 9")


def test_label_of_the_test_split_that_train_does_not_have(tmp_path: Path) -> None:
    write_split(
        tmp_path / "set" / "train.parquet",
        [png(picture(n)) for n in range(200)],
        [n % 3 for n in range(200)],
        None,
    )
    write_split(
        tmp_path / "set" / "test.parquet", [png(picture(n)) for n in range(6)], [0, 1, 2, 0, 3, 1], None
    )
    message = refusal(tmp_path / "set")
    assert message.endswith("split 'test', row 4: the label is 3, expected a number, 0 to 2")


def test_labels_that_are_words(tmp_path: Path) -> None:
    import datasets

    rows = {"image": [{"bytes": png(picture(n)), "path": None} for n in range(9)], "label": ["cat"] * 9}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    assert "row 0: the label is 'cat', expected a number" in refusal(tmp_path / "set")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tune_size": 200}, "240 images were asked for tune and certify, of 240 in all"),
        ({"train_subset": 171}, "data.train_subset is 171, the train split has 170 images"),
        ({"mean": [0.5]}, "data.mean has 1 values for 3 channels"),
        ({"std": [0.5] * 4}, "data.std has 4 values for 3 channels"),
        ({"image_column": "imag"}, "data.image_column: no column 'imag'"),
        ({"label_column": "labels"}, "data.label_column: no column 'labels'"),
        ({"tune_siz": 3}, "unknown key 'data.tune_siz' (did you mean 'data.tune_size'?)"),
    ],
)
def test_settings_that_do_not_fit(root: Path, settings: dict[str, Any], message: str) -> None:
    assert message in refusal(root / "svhn", **settings)


def test_too_few_images_for_a_test_split() -> None:
    with pytest.raises(UserError, match=r"1,797 images were asked for test, .*1,797.* lower data.test_size"):
        load_splits(DataConfig(name="digits", channels=1, test_size=1797), 0)


def test_a_class_without_images(tmp_path: Path) -> None:
    encoded = [png(picture(row)) for row in range(180)]
    write_split(tmp_path / "set" / "train.parquet", encoded, [row % 9 for row in range(180)])
    assert "class '9' has no image in the train split (60 images for 10 classes)" in refusal(
        tmp_path / "set", test_size=50
    )


def test_a_set_of_one_class(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "cat"
    folder.mkdir(parents=True)
    for row in range(20):
        (folder / f"{row}.png").write_bytes(png(picture(row)))
    message = refusal(tmp_path / "set", test_size=5)
    assert message.endswith("has a single class, cat: a classifier needs images of two classes or more")


def test_a_set_without_an_image_column(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"a": [1], "label": [0]}).to_parquet(tmp_path / "set" / "train.parquet")
    message = refusal(tmp_path / "set")
    assert "no column that looks like the image (it has: a, label): name it in data.image_column" in message


def test_batch_larger_than_the_train_split(train_split: TrainSplit) -> None:
    network = attach_exits(build_backbone("resnet8", classes=10), 2, input_size=(3, 6, 9))
    settings = ExitSettings.resolve(DistillationConfig(), 10, network_cost(network, (3, 6, 9)).macs, None)
    arguments: dict[str, Any] = {
        "name": "ce",
        "network": network,
        "criterion": build_loss(resolve_loss("ce"), settings),
        "teacher": None,
        "train": train_split,
        "augmentation": NO_AUGMENTATION,
        "mean": MEAN,
        "std": STD,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    with pytest.raises(UserError, match=r"train\.batch_size is 51, 'ce' trains on 50 images"):
        Job(config=TrainConfig(batch_size=51), **arguments).check()
    Job(config=TrainConfig(batch_size=50), **arguments).check()
    with pytest.raises(AssertionError, match="51"):
        make_batches(train_split, batch_size=51)
    assert make_batches(train_split, batch_size=50).steps == 1


# ---------------------------------------------------------------- copies and groups


def seen_in(splits: DataSplits) -> list[list[bytes]]:
    return [[row.tobytes() for row, _ in rows_and_labels(part)] for part in parts(splits)]


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_a_set_without_copies_is_split_as_ever(tmp_path: Path, streaming: str) -> None:
    folder = write_set(tmp_path / "set")
    config = DataConfig(name=str(folder), streaming=streaming, **SIZES)
    assert load_splits(config, 3).fingerprints() == load_splits(config, 3, copies_apart=False).fingerprints()


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_copies_stand_on_one_side(tmp_path: Path, streaming: str, capsys: pytest.CaptureFixture[str]) -> None:
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
    before = seen_in(load_splits(config, 0, copies_apart=False))
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


def test_a_run_that_began_with_copies_goes_on(tmp_path: Path) -> None:
    encoded = [png(picture(row % 220)) for row in range(240)]
    write_split(tmp_path / "set" / "train.parquet", encoded, [row % 10 for row in range(240)])
    config = DataConfig(name=str(tmp_path / "set"), test_size=50, **SIZES)
    old, new = (load_splits(config, 0, copies_apart=apart).fingerprints() for apart in (False, True))
    assert old != new
    run: Any = SimpleNamespace(config=SimpleNamespace(data=config, seed=0), folder=tmp_path)
    splits_of = vars(Run)["data"].func
    for begun_with in (old, new):
        (tmp_path / "splits.json").write_text(json.dumps(begun_with))
        assert splits_of(run).fingerprints() == begun_with
    (tmp_path / "splits.json").write_text(json.dumps({**old, "train": new["train"]}))
    with pytest.raises(UserError, match="is not the one that this run started with"):
        splits_of(run)


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
