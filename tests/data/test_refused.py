from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erde.common.errors import UserError
from erde.common.images import to_array
from erde.data.load import load_splits
from erde.recipe.schema import DataConfig
from tests.helpers.image_sets import (
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
