"""Sets that do not fit in memory: the same images whoever decodes them, bounded memory, one line for a bad file."""

from __future__ import annotations

import gc
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from erde.common.images import converted
from erde.common.splits import TrainSplit
from erde.data import encoded
from erde.data.batches import TrainBatches
from erde.data.encoded import ResizedCrop, StreamedImages, pixels
from erde.data.image_folders import open_image_folder
from erde.data.load import DataSplits, load_data
from erde.data.streaming import PREFETCH, DecodedBatches
from erde.networks.attach import attach_exits
from erde.networks.backbones import build_backbone
from erde.recipe.schema import AugmentationConfig, DataConfig
from erde.recipe.validation import validate
from erde.training.api import train
from erde.training.learner import Learner
from tests.helpers.checks import user_error

CROP = AugmentationConfig(resized_crop=(0.08, 1.0))
PLAIN = AugmentationConfig(crop_padding=2)


def photo(number: int, width: int, height: int) -> Image.Image:
    """Smooth colours, as photographs have, of which no two are alike."""
    small = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_photos(folder: Path, images: int, distinct: int, width: int, height: int) -> Path:
    """JPEG files in ten classes; each of ``distinct`` pictures stands in many, with other bytes behind its end."""
    for number in range(distinct):
        place = folder / f"{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        first = place / f"{number:03}-000.jpg"
        photo(number, width, height).save(first, quality=85)
        content = first.read_bytes()
        for copy in range(1, images // distinct):
            (place / f"{number:03}-{copy:03}.jpg").write_bytes(content + bytes(copy))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 JPEG files of 10 classes and several sizes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(160):
        place = root / f"{number % 10}"
        place.mkdir(exist_ok=True)
        photo(number, 40 + number % 7, 36 + number % 11).save(place / f"{number:03}.jpg", quality=85)
    return root


SIZES = {"tune_size": 20, "certify_size": 20, "test_size": 20, "image_size": 24}
NORMALISED = {"mean": [0.5] * 3, "std": [0.25] * 3}


def load(folder: Path, **settings: Any) -> DataSplits:
    return load_data(str(folder), **{**SIZES, **NORMALISED, "streaming": "always", **settings})


def make_batches(split: TrainSplit, **arguments: Any) -> TrainBatches:
    settings = {"batch_size": 16, "seed": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return TrainBatches(split, **{**settings, "device": torch.device("cpu"), **arguments})


def see(batches: TrainBatches, epoch: int, first_step: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(batch.images, batch.labels) for batch in batches.epoch(epoch, first_step)]


def same(first: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> bool:
    pairs = list(zip(first, other, strict=True))
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


# ---------------------------------------------------------------- the same images whoever decodes them


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("augmentation", [PLAIN, CROP], ids=["plain", "resized_crop"])
def test_batches_do_not_depend_on_workers_or_on_a_resume(
    folder: Path, augmentation: AugmentationConfig
) -> None:
    split = load(folder).train
    batches = {
        workers: make_batches(split, augmentation=augmentation, workers=workers) for workers in (0, 1, 3)
    }
    first, second = (see(batches[0], epoch) for epoch in (0, 1))
    assert len(first) == 6
    assert not same(first, second)
    before = torch.get_rng_state()
    for workers in (1, 3):
        assert same(see(batches[workers], 0), first), workers
        # Killed after four steps and continued, by workers that have seen an epoch and by new ones.
        again = make_batches(split, augmentation=augmentation, workers=workers)
        for loader in (batches[workers], again):
            assert same(see(loader, 1, first_step=4), second[4:]), workers
            assert same(see(loader, 1), second), workers
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_other_parts(folder: Path) -> None:
    split = load(folder).train
    index = np.arange(8)
    assert isinstance(split.images, StreamedImages)
    draws = {
        (seed, epoch): split.images.decode(index, ResizedCrop((0.1, 0.5), seed), epoch).tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(draws.values())) == 4
    # An image's part does not depend on those that it is decoded with.
    alone = split.images.decode(index[5:6], ResizedCrop((0.1, 0.5), 1), 1)
    assert alone.tobytes() == draws[1, 1][5 * alone.nbytes : 6 * alone.nbytes]


def test_workers_stay_from_epoch_to_epoch_and_go_with_their_batches(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = load(folder).train
    batches = make_batches(split, augmentation=CROP, workers=2)

    def workers() -> set[int | None]:
        return {process.pid for process in multiprocessing.active_children()}

    before = workers()
    see(batches, 0)
    started = workers() - before
    # An epoch that is left in its middle, as by a loss that is not finite.
    next(iter(batches.epoch(1)))
    see(batches, 2)
    assert len(started) == 2
    assert workers() - before == started
    # Also where the reference is part of a cycle, as that of an error's traceback is.
    cycle: list[Any] = [batches]
    cycle.append(cycle)
    # What waits for a worker in vain waits far longer than a busy machine needs.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60)
    del batches, cycle
    begun = time.perf_counter()
    gc.collect()
    assert not workers() - before
    assert time.perf_counter() - begun < 30


def test_an_older_pass_cannot_go_on_with_a_newer_ones_images(folder: Path) -> None:
    batches = make_batches(load(folder).train, augmentation=PLAIN, workers=1)
    old = iter(batches.epoch(0))
    next(old)
    see(batches, 1)
    with pytest.raises(AssertionError, match="an older pass"):
        list(old)


def test_threads_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load(folder).train.images
    read = {}
    for cpus in (1, 4):
        monkeypatch.setattr(encoded, "available_cpus", lambda cpus=cpus: cpus)
        read[cpus] = images[0:100]
    assert len(read[1]) == 100
    assert np.array_equal(read[1], read[4])


def test_training_on_streamed_images_resumes_to_the_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import erde
    from erde.networks import checkpoint
    from erde.training.job import FINAL, LAST

    data = load(folder)

    def fit(place: Path) -> bytes:
        torch.manual_seed(0)
        backbone = erde.build_backbone("resnet8x0.25", classes=10, channels=3)
        network = erde.attach_exits(backbone, 2, input_size=data.input_size)
        train(
            network,
            data,
            folder=place,
            device="cpu",
            epochs=2,
            batch_size=16,
            checkpoint_seconds=0,
            augmentation={"resized_crop": [0.2, 1]},
        )
        return (place / FINAL).read_bytes()

    whole = fit(tmp_path / "whole")
    saves, save = [], checkpoint.save

    def killed(path: Path, tensors: Any, state: Any) -> None:
        save(path, tensors, state)
        saves.append(path)
        if len(saves) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed")
    monkeypatch.setattr(checkpoint, "save", save)
    tensors, state = checkpoint.load(tmp_path / "killed" / LAST)
    assert (state["epoch"], 0 < state["step"] < 6) == (1, True)
    fit(tmp_path / "killed")
    expected, _ = checkpoint.load(tmp_path / "whole" / FINAL)
    saved, _ = checkpoint.load(tmp_path / "killed" / FINAL)
    assert whole
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert not all(torch.equal(tensors[name], tensor) for name, tensor in expected.items() if name in tensors)


# ---------------------------------------------------------------- random parts


def test_parts_are_as_they_are_said_to_be() -> None:
    crop = ResizedCrop((0.2, 0.7), 5)
    boxes = np.array([crop.box(0, position, 400, 300) for position in range(4000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 400
    assert bottom.max() <= 300
    share, ratio = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
    assert 0.195 < share.min() < 0.21
    assert 0.68 < share.max() < 0.705
    assert 0.74 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.35
    # Uniform area, log-uniform shape, as far as most shapes fit; places reach both borders.
    fits = share < 0.5
    assert abs(np.mean(share[fits]) - 0.35) < 0.01
    assert abs(np.mean(np.log(ratio[fits]))) < 0.01
    assert left.min() == 0
    assert right.max() == 400


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(300, 20, (136, 0, 163, 20)), (20, 300, (0, 136, 20, 163)), (1, 1, (0, 0, 1, 1))],
)
def test_where_no_part_fits_the_central_one_is_taken(
    width: int, height: int, expected: tuple[int, ...]
) -> None:
    # The whole area in a shape that the image is far from.
    assert ResizedCrop((1.0, 1.0), 0).box(0, 0, width, height) == expected


def encode(image: Image.Image, kind: str = "PNG") -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, kind, quality=95)
    return {"bytes": file.getvalue(), "path": None}


def bilinear(array: NDArray[np.float64], box: tuple[int, int, int, int], size: int) -> NDArray[np.float64]:
    """The part resized by a triangle filter, as wide as the scale where it shrinks, that may look beyond its border."""
    left, top, right, bottom = box

    def weights(start: int, stop: int, length: int) -> NDArray[np.float64]:
        scale = (stop - start) / size
        support = max(1.0, scale)
        centres = start + (np.arange(size)[:, None] + 0.5) * scale
        weights = np.maximum(0, 1 - np.abs(np.arange(length) + 0.5 - centres) / support)
        return weights / weights.sum(axis=1, keepdims=True)

    rows, columns = weights(top, bottom, array.shape[0]), weights(left, right, array.shape[1])
    return np.einsum("ih,jw,hwc->ijc", rows, columns, array, optimize=True)


@pytest.mark.parametrize("box", [(3, 5, 40, 34), (10, 8, 21, 17)], ids=["shrunk", "grown"])
def test_a_part_is_cut_and_resized(box: tuple[int, int, int, int]) -> None:
    image = photo(1, 48, 37)
    resized = pixels(encode(image), "", (24, 24, 3), False, lambda width, height: box)
    expected = bilinear(np.asarray(image, dtype=np.float64), box, 24)
    np.testing.assert_allclose(resized, expected, atol=1.01)


def test_a_large_part_of_a_jpeg_is_decoded_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    value, box = encode(photo(2, 640, 480), "JPEG"), (100, 60, 580, 420)
    sizes = []

    def watched(image: Image.Image, channels: int) -> Any:
        sizes.append(image.size)
        return converted(image, channels)

    monkeypatch.setattr(encoded, "converted", watched)
    resized = pixels(value, "", (90, 90, 3), False, lambda width, height: box)
    # 360 pixels for 90: a quarter is enough.
    assert sizes == [(160, 120)]
    whole = np.asarray(Image.open(io.BytesIO(value["bytes"])), dtype=np.float64)
    assert np.abs(resized - bilinear(whole, box, 90)).mean() < 1.5
    # Nothing is ever grown for it.
    pixels(value, "", (90, 90, 3), False, lambda width, height: (0, 0, 170, 170))
    assert sizes[1] == (640, 480)


def test_whole_images_are_decoded_as_the_deployed_network_sees_them(folder: Path) -> None:
    from erde.common.images import load_image

    splits = load(folder)
    known = {load_image(path, (24, 24, 3)).tobytes() for path in folder.rglob("*.jpg")}
    for part in (splits.train, splits.tune, splits.certify, splits.test):
        assert {image.tobytes() for image in part.images[:]} <= known


def test_images_without_augmentation_are_whole(folder: Path) -> None:
    split = load(folder).train
    rows = np.arange(12).reshape(3, 4)
    plain = [
        list(make_batches(split, augmentation=augmentation).plain(rows)) for augmentation in (PLAIN, CROP)
    ]
    for (images, labels), (others, same_labels) in zip(*plain, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, same_labels)


def test_resized_crop_streams_by_itself(folder: Path) -> None:
    splits = load(folder, streaming="auto", augmentation={"resized_crop": [0.5, 1]})
    assert isinstance(splits.train.images, StreamedImages)
    assert isinstance(load(folder, streaming="auto").train.images, np.ndarray)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "digits", "augmentation": {"resized_crop": [0.1, 1]}},
            r"^data: augmentation\.resized_crop cuts parts from image files while training, and 'digits' has no files: use",
        ),
        (
            {"name": "x", "streaming": "never", "augmentation": {"resized_crop": [0.1, 1]}},
            r"and data\.streaming is 'never'",
        ),
        (
            {"augmentation": {"resized_crop": [0.9, 0.1]}},
            r"^data\.augmentation: resized_crop is \[0\.9, 0\.1\]: expected the lower share first",
        ),
        (
            {"augmentation": {"resized_crop": [0.1, 1], "crop_padding": 4}},
            r"resized_crop and crop_padding=4 are two ways to crop",
        ),
        (
            {"augmentation": {"resized_crop": [0.1]}},
            r"^the key 'data\.augmentation\.resized_crop\.1' is missing",
        ),
        (
            {"augmentation": {"resized_crop": [0, 1]}},
            r"^data\.augmentation\.resized_crop.*greater than 0, got 0",
        ),
    ],
)
def test_resized_crops_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with user_error(message):
        validate(DataConfig, settings, "data.")


def test_resized_crop_of_images_in_memory_is_refused(folder: Path) -> None:
    batches = make_batches(load(folder, streaming="never").train, augmentation=CROP)
    with user_error(r"these images are in memory, .* load them with data\.streaming=always"):
        see(batches, 0)


# ---------------------------------------------------------------- fingerprints


def test_streamed_train_images_are_not_decoded_for_their_fingerprint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load(folder)
    assert len(splits.tune) == 20

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("erde.common.images.Image.open", refuse)
    assert len(splits.train.fingerprint()) == 64
    with user_error("AssertionError: decoded"):  # as those that hold certificates are
        splits.certify.fingerprint()


def test_held_out_images_are_decoded_once_for_their_fingerprint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load(folder)
    first = splits.fingerprints()
    monkeypatch.setattr(encoded, "open_image", None)
    assert splits.fingerprints() == first


def test_fingerprint_of_streamed_train_images_is_sensitive(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(place: Path, rows: NDArray[np.int64] | None = None) -> str:
        train = load(place).train
        assert len(train) == 100
        if rows is not None:
            train = TrainSplit(train.images.part(rows), train.labels[rows])  # type: ignore[attr-defined]
        return train.fingerprint()

    def changed(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    whole = fingerprint(folder)
    moved = changed("moved")
    assert fingerprint(moved) == whole
    longer, other, renamed = changed("longer"), changed("other"), changed("renamed")
    # Every image of a class, so that the train split has some of them.
    for file in sorted((longer / "4").iterdir()):
        file.write_bytes(file.read_bytes() + b"\0")
    for file in sorted((other / "4").iterdir()):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    for file in sorted((renamed / "4").iterdir()):
        file.rename(file.with_name(f"x{file.name}"))
    order = np.arange(100)
    prints = [whole, *(fingerprint(source) for source in (longer, other, renamed))]
    prints += [fingerprint(folder, rows) for rows in (order, order[::-1].copy(), order[:99])]
    # Sizes alone tell, where the bytes of hardly any image are looked at.
    monkeypatch.setattr(encoded, "CONTENT_IMAGES", 1)
    assert fingerprint(longer) != fingerprint(folder)
    # The first hundred are all of them.
    assert prints[4] == whole
    assert len(set(prints)) == 6


# ---------------------------------------------------------------- folders of images


def test_image_folders_are_what_the_datasets_library_makes_of_them(folder: Path, tmp_path: Path) -> None:
    import datasets

    parted = tmp_path / "parted"
    for split, names in (("train", "0123"), ("test", "1239")):
        for name in names:
            shutil.copytree(folder / name, parted / split / name)
    (parted / "train" / "2" / "notes.txt").write_text("not an image")
    (parted / "train" / "2" / "LARGE.JPG").write_bytes((folder / "3" / "003.jpg").read_bytes())
    for place, splits in ((folder, {"train"}), (parted, {"train", "test"})):
        expected = datasets.load_dataset(str(place), cache_dir=str(tmp_path / "cache"))
        opened = open_image_folder(place)
        assert opened is not None
        assert set(opened) == set(expected) == splits
        for split in splits:
            own, other = (
                table[split].cast_column("image", datasets.Image(decode=False))
                for table in (opened, expected)
            )
            assert own.features == other.features
            assert own[:] == other[:]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "0" / "metadata.csv").write_text("file_name,x\n"),
        lambda root: (root / "README.md").write_text("---\n---\n"),
        lambda root: (root / "0" / "deeper").mkdir(),
        lambda root: (root / "empty").mkdir(),
        lambda root: (root / "5.jpg").write_bytes(b""),
        lambda root: (root / "5").rename(root / "test"),
    ],
)
def test_other_layouts_are_left_to_the_datasets_library(folder: Path, tmp_path: Path, change: Any) -> None:
    root = Path(shutil.copytree(folder, tmp_path / "set"))
    assert open_image_folder(root) is not None
    change(root)
    assert open_image_folder(root) is None


# ---------------------------------------------------------------- what goes wrong late


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "is not a readable image"),
        (None, "cannot be read: No such file"),
        (b"half", "is not a readable image"),
    ],
    ids=["text", "gone", "truncated"],
)
def test_a_bad_file_found_while_training(
    folder: Path, tmp_path: Path, workers: int, content: bytes | None, message: str
) -> None:
    root = Path(shutil.copytree(folder, tmp_path / "set"))
    split = load(root).train
    table, rows = split.images._table, split.images._rows  # type: ignore[attr-defined]
    file = Path(table[int(rows[57])]["image"]["path"])
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:300] if content == b"half" else content)
    with user_error(rf"^data set '{root}', split 'train', row {rows[57]} \({file}\) {message}"):
        see(make_batches(split, augmentation=CROP, workers=workers), 0)


def test_whatever_a_decoder_raises_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("some\nthing")

    split = load(folder).train
    monkeypatch.setattr("erde.common.images.Image.open", broken)
    with user_error(r"\.jpg\) cannot be decoded \(KeyError: .*\): remove or replace it"):
        see(make_batches(split, augmentation=PLAIN, workers=1), 0)


class _Deadly(StreamedImages):
    def decode(self, *_: Any, **__: Any) -> NDArray[np.uint8]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(load(folder).train, augmentation=PLAIN, workers=1)
    before = set(multiprocessing.active_children())
    see(batches, 0)
    # Only now: the first epoch waits for the worker's start too. The loader keeps the patience that it began with.
    monkeypatch.setattr("erde.data.streaming.PATIENCE", 1)
    batches._decoded._loader._iterator._timeout = 1
    (worker,) = set(multiprocessing.active_children()) - before
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        with user_error(r"no process that decodes images has answered for 1 seconds.*data\.workers=0"):
            see(batches, 1)
    finally:
        os.kill(worker.pid, signal.SIGCONT)


def test_a_worker_that_is_killed(folder: Path) -> None:
    images = load(folder).train.images
    images.__class__ = _Deadly
    loader = DecodedBatches(images, np.zeros(100, np.int64), workers=1, pin_memory=False)
    with user_error(r"a process that decodes images was killed, .* lower data\.workers"):
        list(loader.decode(0, np.arange(32).reshape(2, 16)))


def test_a_worker_that_is_killed_while_the_network_computes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(multiprocessing.active_children())

    def compute(*_: Any) -> None:
        for worker in set(multiprocessing.active_children()) - others:
            os.kill(worker.pid, signal.SIGKILL)
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            sum(range(1000))

    monkeypatch.setattr(Learner, "step", compute)
    data = load(folder)
    network = attach_exits(
        build_backbone("resnet8x0.25", classes=10, channels=3), 2, input_size=data.input_size
    )
    with user_error(r"a process that decodes images was killed, .* lower data\.workers"):
        train(network, data, device="cpu", epochs=1, batch_size=16, augmentation={"resized_crop": [0.2, 1]})


# ---------------------------------------------------------------- memory

SIZE, BATCH, WORKERS = 224, 64, 2
BATCH_MIB = BATCH * SIZE * SIZE * 3 / 2**20
FEW = 400  # the baseline: what a set costs that is as good as nothing


def peak(folder: Path, streaming: str = "always", size: int = SIZE) -> dict[str, Any]:
    """Peak memory (MiB) and throughput of one epoch over ``folder``, in processes of their own."""
    arguments = [str(folder), str(WORKERS), str(BATCH), str(size), streaming]
    environment = {
        **os.environ,
        # What the allocator keeps of freed memory comes and goes with its mood: give it back at once.
        "MALLOC_MMAP_THRESHOLD_": "1000000",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "helpers" / "peak_memory.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    print(f"\n{streaming}: {measured}")
    return measured


def bound(few: dict[str, Any], process: str) -> float:
    """A fifth more than a small set, and the batches that may wait."""
    return float(1.2 * few["peak_mib"][process] + WORKERS * PREFETCH * BATCH_MIB)


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    few, many = (peak(write_photos(tmp_path / str(images), images, 100, 240, 230)) for images in (FEW, 1500))
    # Decoded, the larger set has more than what is allowed to be added.
    assert 1.2 * (bound(few, "main") - few["peak_mib"]["main"]) < 1500 * BATCH_MIB / BATCH
    for process in ("main", "worker"):
        assert many["peak_mib"][process] < bound(few, process)


@pytest.mark.slow
def test_memory_with_20_000_images(tmp_path: Path) -> None:
    few = peak(write_photos(tmp_path / "few", FEW, 200, 320, 256))
    many_files = write_photos(tmp_path / "many", 20_000, 200, 320, 256)
    many = peak(many_files)
    assert many["images"] > 19_000
    for process in ("main", "worker"):
        assert many["peak_mib"][process] < bound(few, process)
    assert many["seconds"]["load"] + many["seconds"]["fingerprints"] < 5
    # The measure can tell: all of them in memory are far beyond it.
    assert peak(many_files, "never", size=112)["peak_mib"]["main"] > bound(few, "main")
    assert math.isclose(BATCH_MIB, 9.1875)
