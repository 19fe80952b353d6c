from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erde.chains.preprocessing import UNSET, Preprocessing, preprocessing_beside, read_preprocessing
from tests.helpers.checks import user_error

IMAGENET: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def written(values: Any, folder: Path, name: str = "preprocessor_config.json") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


# Files of the Hugging Face hub, without the keys that say nothing about the pixels; size, resize, warnings.
HUGGING_FACE: list[tuple[dict[str, Any], tuple[int, int], tuple[int, int], str]] = [
    # google/vit-base-patch16-224: older and newer
    ({"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 2}, (224, 224), (224, 224), "stretched"),
    ({"size": {"height": 224, "width": 192}, "resample": 2, "do_center_crop": None}, (224, 192), (224, 192), "stretched"),
    # microsoft/resnet-50 and facebook/convnext
    ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875, "size": {"shortest_edge": 224}, "resample": 3},
     (224, 224), (256, 256), "bicubic"),
    ({"feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.875, "size": 224, "resample": 3},
     (224, 224), (256, 256), "bicubic"),
    ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "resample": 2},
     (384, 384), (384, 384), "stretched"),
    # google/mobilenet_v2
    ({"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}, "resample": 2},
     (224, 224), (256, 256), ""),
    # openai/clip, facebook/deit, sail/poolformer
    ({"do_center_crop": True, "crop_size": 224, "size": 224, "resample": 3}, (224, 224), (224, 224), "bicubic"),
    ({"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "size": {"height": 256, "width": 256},
      "resample": 3}, (224, 224), (256, 256), "stretched"),
    ({"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224},
      "crop_pct": 0.9, "resample": 2}, (224, 224), (248, 248), ""),
    ({"crop_size": {"shortest_edge": 224, "longest_edge": 224}, "size": {"shortest_edge": 224, "longest_edge": 224},
      "resample": 2}, (224, 224), (224, 224), ""),
    # facebook/levit, whose class has a share of its own
    ({"image_processor_type": "LevitImageProcessor", "do_center_crop": True, "size": {"shortest_edge": 224},
      "crop_size": {"height": 224, "width": 224}, "resample": 2}, (224, 224), (256, 256), ""),
    ({"feature_extractor_type": "LevitFeatureExtractor", "size": 224, "resample": 3}, (224, 224), (256, 256), "bicubic"),
    # without resizing
    ({"image_processor_type": "BitImageProcessor", "do_resize": False, "do_center_crop": True, "resample": 2,
      "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, (224, 224), (256, 256), "do_resize"),
    ({"do_resize": False}, UNSET, UNSET, "do_resize"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "size", "resize", "warning"), HUGGING_FACE)
def test_hugging_face(
    values: dict[str, Any], size: tuple[int, int], resize: tuple[int, int], warning: str, tmp_path: Path
) -> None:
    given = read_preprocessing(written({**HALF, **values}, tmp_path))
    assert (given.size, given.resize, given.mean, given.std) == (size, resize, (0.5,) * 3, (0.5,) * 3)
    assert given.scale == pytest.approx(1 / 255)
    assert (given.layout, given.channels) == (None, "RGB")
    assert (warning in " ".join(given.warnings)) if warning else given.warnings == ()
    assert all("\n" not in line for line in given.warnings)


def test_hugging_face_arithmetic(tmp_path: Path) -> None:
    pixels = np.array([0.0, 100, 255])

    def network_takes(values: dict[str, Any]) -> Any:
        given = read_preprocessing(written({"size": 8, "do_center_crop": True, **values}, tmp_path))
        return (pixels * given.scale - given.mean[0]) / given.std[0]

    np.testing.assert_allclose(network_takes(HALF), pixels / 127.5 - 1)
    np.testing.assert_allclose(network_takes({**HALF, "do_rescale": False}), (pixels - 0.5) / 0.5)
    np.testing.assert_allclose(network_takes({**HALF, "do_normalize": False}), pixels / 255)
    # Without means of its own the file says nothing of the number of channels.
    given = read_preprocessing(written({"size": 8, "do_normalize": False}, tmp_path))
    assert (given.mean, given.std) == ((0.0,), (1.0,))
    # EfficientNet of transformers: with an offset of -1 after the scale, and normalised twice.
    offset = {**HALF, "rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False}
    np.testing.assert_allclose(network_takes(offset), (pixels / 127.5 - 1 - 0.5) / 0.5)
    twice = {**HALF, "image_processor_type": "EfficientNetImageProcessor"}
    np.testing.assert_allclose(network_takes(twice), (pixels / 255 - 0.5) / 0.5 / 0.5)
    assert (
        read_preprocessing(written({**HALF, "size": 8, "do_flip_channel_order": True}, tmp_path)).channels
        == "BGR"
    )


def test_timm(tmp_path: Path) -> None:
    inner = {
        **IMAGENET,
        "input_size": [3, 224, 160],
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "crop_mode": "center",
    }
    for values in ({"architecture": "resnet50", "pretrained_cfg": inner}, inner):
        given = read_preprocessing(written(values, tmp_path, "config.json"))
        assert (given.size, given.resize) == ((224, 160), (235, 168))
        assert (given.mean, given.std) == (tuple(IMAGENET["mean"]), tuple(IMAGENET["std"]))
        assert len(given.warnings) == 1
        assert "asks for bicubic resizing; erde resizes bilinearly" in given.warnings[0]
    squash = {**IMAGENET, "input_size": [3, 240, 240], "crop_mode": "squash"}
    given = read_preprocessing(written(squash, tmp_path, "config.json"))
    assert given.resize == (274, 274)
    assert "stretched to 274x274" in given.warnings[0]


def test_own_keys(tmp_path: Path) -> None:
    values = {**IMAGENET, "size": 32, "resize": [40, 36], "scale": 1, "layout": "NHWC", "channels": "BGR"}
    given = read_preprocessing(written(values, tmp_path, "mine.json"))
    assert given == Preprocessing(
        (32, 32), tuple(IMAGENET["mean"]), tuple(IMAGENET["std"]), 1, "NHWC", "BGR", (40, 36)
    )
    assert read_preprocessing(written({"mean": 0.5, "std": 0.5}, tmp_path)) == Preprocessing(
        mean=(0.5,), std=(0.5,)
    )


def test_defaults() -> None:
    assert Preprocessing((4, 5)).resize == (4, 5)
    assert Preprocessing().resize == UNSET


def test_files_beside_a_network(tmp_path: Path) -> None:
    path = tmp_path / "onnx" / "model.onnx"
    path.parent.mkdir()
    assert preprocessing_beside(path) is None
    written({"architectures": ["ViT"], "id2label": {}}, path.parent, "config.json")
    assert preprocessing_beside(path) is None
    written({**HALF, "size": 224}, tmp_path)  # as on the hub: the network in a folder of its own
    beside = preprocessing_beside(path)
    assert beside is not None
    assert beside.size == (224, 224)
    written({**IMAGENET, "input_size": [3, 8, 8]}, path.parent, "config.json")
    other = path.parent / "sub" / "model.onnx"
    assert preprocessing_beside(other) is None


def test_a_file_without_a_size_leaves_it_to_the_graph(tmp_path: Path) -> None:
    values = {**HALF, "do_flip_channel_order": True}
    assert read_preprocessing(written(values, tmp_path)) == Preprocessing(
        size=UNSET, mean=(0.5,) * 3, std=(0.5,) * 3, channels="BGR"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "is not JSON: "),
        ("[" * 100_000, "is not JSON"),
        ([1], "is not a JSON object, expected keys such as mean, std and size"),
        ({}, "no keys, expected some of channels, layout, mean, resize, scale, size, std"),
        ({"meen": [0]}, r"unknown key 'meen' \(did you mean 'mean'\?\)"),
        ({"mean": [0, 0], "std": [1]}, "mean has 2 numbers and std 1, expected one per channel in both"),
        ({"mean": [0], "std": [0]}, r"std is \(0.0,\) and scale 0.0039.*, expected numbers above 0"),
        ({"mean": [0], "std": ["a"]}, "has a value of an unexpected kind"),
        ({"mean": [0], "std": [1], "scale": -1}, "scale -1, expected numbers above 0"),
        ('{"mean": [NaN], "std": [1]}', "must be finite numbers"),
        ({"size": [0, 3]}, "size is 0x3, expected height x width of 1 to 8192 pixels"),
        ({"size": 8, "resize": 7}, "resize is 7x7, which is smaller than the 8x8 that are cropped from it"),
        ({"size": "large"}, "size is 'large', expected height and width in whole pixels"),
        ({"layout": "CHW"}, "layout is 'CHW', expected NCHW or NHWC"),
        ({"channels": "GRB"}, "channels is 'GRB', expected RGB or BGR"),
        ({**HALF, "size": {"longest_edge": 3}}, "size has the keys longest_edge, expected height and width"),
        ({"do_normalize": True, "size": 4}, "no image_mean and image_std: give mean and std yourself"),
        ({"input_size": [3, 4, 4]}, "no mean and std: give them yourself"),
        ({**IMAGENET, "input_size": 4}, "has a value of an unexpected kind"),
    ],
)
def test_bad_files(values: Any, message: str, tmp_path: Path) -> None:
    with user_error(f"preprocessor_config.json.*{message}"):
        read_preprocessing(written(values, tmp_path))


def test_no_file(tmp_path: Path) -> None:
    with user_error("none.json cannot be read: No such file"):
        read_preprocessing(tmp_path / "none.json")
