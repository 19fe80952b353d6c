"""Bad input: exit code 2, one line that says what to do, nothing half written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from .conftest import Refused


def coloured_folder(folder: Path, mode: str = "RGB", per_class: int = 8) -> Path:
    """A folder of images by class."""
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            Image.new(mode, (8, 8), color=index * 20 + label).save(folder / name / f"{index}.png")
    return folder


SMALL = (
    "data.tune_size=4",
    "data.certify_size=4",
    "data.test_size=4",
    "train.batch_size=2",
    "data.train_subset=null",
)
PLAIN_TEACHER = ("teacher.train_subset=null", "teacher.disjoint=false")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "digitz"), ("digitz", "did you mean 'digits'")),
        (("run", "digits", "student.backbone=resnet9"), ("resnet9", "did you mean 'resnet")),
        (("run", "digits", "arms.kd.loss.name=kdd"), ("kdd", "did you mean 'kd'")),
        (("run", "digits", "train.epoch=3"), ("train.epoch", "did you mean 'train.epochs'")),
        (("run", "digits", "train.epochs=many"), ("train.epochs", "integer", "many")),
        (("run", "digits", "train.epochs"), ("train.epochs", "KEY=VALUE")),
        (("run", "digits", "data.name=./nowhere"), ("./nowhere", "folder")),
        (("run", "digits", "data.name=digit"), ("digit", "did you mean 'digits'")),
        (("run", "digits", "data.tune_size=1400"), ("data.tune_size", "lower")),
        (("run", "digits", "train.batch_size=600"), ("train.batch_size", "lower")),
        (("run", "digits", "distillation.alpha=[0.5]"), ("distillation.alpha", "3 exits")),
        (("run", "digits", "export.arm=ered"), ("export.arm", "did you mean 'erde'")),
        (("run", "digits", "--resume", "--out", "nothing"), ("nothing to resume", "without --resume")),
        (("run", "digits", "device=cuda"), ("cuda", "device=cpu")),
        (("distill", "nowhere"), ("nowhere", "config.yaml")),
        (("predict", "nowhere", "a.png"), ("no bundle at nowhere",)),
        (("predict", "digits-dem"), ("no bundle at digits-dem: expected a folder",)),
        (
            ("predict", "."),
            ("no bundle at .: it has no manifest.json (`erde run` and `erde.export` write bundles)",),
        ),
        (("calibrate", "nowhere"), ("neither a run", "nor a bundle", ".npz")),
        (("calibrate", "nowhere.npz"), ("no file at nowhere.npz",)),
        (("calibrate", "nowhere.npz", "--max-risk", "5"), ("--max-risk", "0.5% or 0.005")),
        (("calibrate", "nowhere.npz", "--confidence", "sure"), ("--confidence", "sure")),
        (("calibrate", "nowhere.npz", "--score", "entropi"), ("entropi", "did you mean 'entropy'")),
        (
            ("calibrate", "nowhere.npz", "--guarantee", "all"),
            ("all", "'risk', 'net_drop', 'expected_risk' or 'disagreement'"),
        ),
        (("calibrate", "nowhere.npz", "--macs", "1,two"), ("--macs", "numbers separated by commas")),
        (("calibrate", "nowhere.npz", "--data", "photos"), ("--data", "holds logits")),
        (("evaluate", "nowhere.npz"), ("no file at nowhere.npz: expected an .npz of logits",)),
        (("evaluate", "nowhere.npz", "--format", "png"), ("--format", "holds logits")),
        (("compare", "nowhere", "elsewhere"), ("nowhere", "no results")),
        (("cost", "resnet20", "--exits", "group9"), ("group9", "did you mean 'group")),
        (("cost", "resnet20", "--exits", "40"), ("exits=40", "expected 1 to")),
        (("list", "loses"), ("loses", "did you mean 'losses'")),
        (("runn",), ("runn",)),
        (("run", "digits", "--outt", "x"), ("--outt",)),
    ],
)
def test_wrong_words(refused: Refused, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    line = refused(*arguments)
    for word in words:
        assert word in line


def test_gpu_words_only_without_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    assert not torch.cuda.is_available(), "the device=cuda case above expects a machine without one"


def test_corrupt_parquet(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 but not for long")
    line = refused("run", "digits", "data.name=./set")
    assert "train-00000-of-00001.parquet" in line
    assert "Parquet" in line


def test_too_few_images_for_a_split(refused: Refused, tmp_path: Path) -> None:
    coloured_folder(tmp_path / "set")
    line = refused("run", "digits", f"data.name={tmp_path / 'set'}", "data.channels=3")
    assert "lower data.test_size" in line


def test_an_image_file_that_is_text(refused: Refused, tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "note.png").write_text("no picture", encoding="utf-8")
    bundle = str(tiny_bundle)
    assert "note.png is not a readable image" in refused("predict", bundle, "note.png")
    assert "note.png" in refused("predict", bundle, "note.png", "--out", "answers.csv")


def test_answers_into_a_folder(refused: Refused, tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "answers.csv").mkdir()
    assert "which is a folder" in refused("predict", str(tiny_bundle), ".", "--out", "answers.csv")


def test_an_out_folder_beneath_a_regular_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "file is a file" in refused("run", "digits", "--out", "file/run")


def test_a_folder_that_holds_something_else(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("", encoding="utf-8")
    words = "thesis is not empty: it holds other files: choose another folder with --out"
    assert words in refused("run", "digits", "--out", "thesis")


def test_a_bundle_with_a_changed_byte(refused: Refused, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    stage = bundle / "stage_1.onnx"
    content = bytearray(stage.read_bytes())
    content[len(content) // 2] ^= 1
    stage.write_bytes(content)
    for command in (
        ("bundle", "verify", str(bundle)),
        ("bundle", "info", str(bundle)),
        ("predict", str(bundle), "."),
    ):
        assert "stage_1.onnx does not match its checksum" in refused(*command)
