"""Teachers that were trained elsewhere: their tensors, their normalisation, their classes, and a run that uses one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import erde
from erde.common.splits import Split
from erde.data.load import DataSplits, load_data
from erde.losses.base import pair_exits
from erde.networks import checkpoint
from erde.networks.attach import attach_exits
from erde.networks.backbones import build_backbone
from erde.networks.backbones.resnet import PaddedShortcut
from erde.networks.cost import network_cost
from erde.networks.foreign_weights import adapt_teacher, load_teacher_weights
from erde.networks.network import EarlyExitNetwork, split_logits
from erde.recipe.schema import Config, TeacherConfig
from erde.recipe.validation import validate
from erde.training.teacher_cache import network_hash
from tests.helpers.checks import user_error

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
THEIR_MEAN, THEIR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = tuple("abcdefghij")
PLAIN = "resnet8x0.25"


def make(exits: int = 1, backbone: str = PLAIN, seed: int = 0) -> EarlyExitNetwork:
    """A network whose every tensor differs from a fresh one's, batch norm's too."""
    torch.manual_seed(seed)
    network = attach_exits(build_backbone(backbone, classes=10), exits, input_size=(3, 16, 16))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.ndim and "norm" in name:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.eval()


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same_weights(left: nn.Module, right: nn.Module, counters: bool = True) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    assert list(mine) == list(theirs)
    return all(torch.equal(mine[name], theirs[name]) for name in mine if counters or mine[name].ndim)


# ---------------------------------------------------------------- normalisation and classes


@pytest.mark.parametrize("exits", [1, 3])
def test_an_adapted_teacher_says_what_it_says_of_its_own_inputs(exits: int) -> None:
    teacher = make(exits).double()
    pixels = torch.rand(7, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def normalised(mean: Any, std: Any) -> Tensor:
        shift, scale = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        return (pixels - shift) / scale

    expected = teacher(normalised(THEIR_MEAN, THEIR_STD))
    keys, cost = list(teacher.state_dict()), network_cost(teacher, (3, 16, 16))
    shapes = teacher.feature_shapes((3, 16, 16))
    theirs = "jabcdefghi"  # turned, so that there and back differ
    adapted = adapt_teacher(
        teacher,
        mean=MEAN,
        std=STD,
        classes=CLASSES,
        teacher_mean=THEIR_MEAN,
        teacher_std=THEIR_STD,
        teacher_classes=list(theirs),
    )
    for buffer in ("scale", "shift"):
        # Made in float32 for networks in float32: made anew in float64 for a comparison in float64.
        module = adapted.stages[0].renormalise
        ours, other = np.array([MEAN, STD]), np.array([THEIR_MEAN, THEIR_STD])
        exact = ours[1] / other[1] if buffer == "scale" else (ours[0] - other[0]) / other[1]
        np.testing.assert_allclose(getattr(module, buffer).flatten(), exact, rtol=2e-7)
        setattr(module, buffer, torch.tensor(exact)[:, None, None])
    x = normalised(MEAN, STD)
    order = [theirs.index(name) for name in CLASSES]
    torch.testing.assert_close(adapted(x), expected[:, :, order], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(adapted(x), expected)
    # All that training, export and evaluation ask of a network.
    logits, features = adapted.forward_with_features(x)
    assert torch.equal(logits, adapted(x))
    assert len(features) == exits
    assert torch.equal(adapted.forward_until(x, 0)[0], logits[0])
    assert torch.equal(adapted.forward_final(x), logits[-1])
    assert list(adapted.state_dict()) == keys
    assert adapted.float().feature_shapes((3, 16, 16)) == shapes
    assert network_cost(adapted, (3, 16, 16)) == cost


def test_an_adapted_teacher_in_float32_is_within_rounding() -> None:
    teacher, other = make(), make()
    pixels = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        for mean, std in ((MEAN, STD), (THEIR_MEAN, THEIR_STD))
    )
    adapted = adapt_teacher(
        teacher, mean=MEAN, std=STD, classes=CLASSES, teacher_mean=THEIR_MEAN, teacher_std=THEIR_STD
    )
    torch.testing.assert_close(adapted(ours), other(theirs), rtol=1e-4, atol=1e-5)


def test_a_cache_tells_adapted_teachers_apart() -> None:
    def hashed(**settings: Any) -> str:
        return network_hash(adapt_teacher(make(), mean=MEAN, std=STD, classes=CLASSES, **settings))

    turned = ["jabcdefghi", "ijabcdefgh"]
    hashes = [hashed(), *(hashed(teacher_classes=list(names)) for names in turned)]
    hashes += [hashed(teacher_mean=mean, teacher_std=THEIR_STD) for mean in (THEIR_MEAN, MEAN)]
    assert len(set(hashes)) == 5


def test_what_is_the_datas_own_changes_nothing() -> None:
    teacher = make()
    stage, head = teacher.stages[0], teacher.heads[0]
    adapt_teacher(
        teacher,
        mean=MEAN,
        std=STD,
        classes=CLASSES,
        teacher_mean=MEAN,
        teacher_std=STD,
        teacher_classes=list(CLASSES),
    )
    assert (teacher.stages[0], teacher.heads[0]) == (stage, head)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_mean": MEAN}, r"^teacher\.mean and teacher\.std belong together"),
        ({"teacher_mean": [0.5], "teacher_std": STD}, r"^teacher\.mean has 1 values for 3 channels"),
        ({"teacher_mean": MEAN, "teacher_std": [0.5] * 4}, r"^teacher\.std has 4 values for 3 channels"),
        (
            {"teacher_classes": list("abcdefghix")},
            r"^teacher\.classes does not have 'j' and has 'x', which is none of the data's: .* the 10 classes",
        ),
        ({"teacher_classes": list("abcdefghi")}, r"^teacher\.classes does not have 'j': a teacher must"),
        ({"teacher_classes": list("abcdefghijk")}, r"^teacher\.classes has 'k', which is none of the data's"),
        ({"teacher_classes": list("aacdefghij")}, r"^teacher\.classes names a class twice"),
    ],
)
def test_teachers_that_cannot_be_adapted(settings: dict[str, Any], message: str) -> None:
    with user_error(message):
        adapt_teacher(make(), mean=MEAN, std=STD, classes=CLASSES, **settings)


# ---------------------------------------------------------------- weights


def public_name(name: str) -> str:
    """The name that most public ResNets have for a tensor of our network with one exit."""
    name = re.sub(r"^(stages|heads)\.0\.", "", name)
    name = name.replace("stem.conv", "conv1").replace("stem.norm", "bn1").replace("linear", "fc")
    result = re.match(r"group(\d)_block(\d)\.(.*)", name)
    if result is None:
        return name
    rest = result[3].replace("norm", "bn").replace("shortcut", "downsample")
    return f"layer{result[1]}.{int(result[2]) - 1}.{rest}"


def backbone_name(name: str) -> str:
    return re.sub(r"^heads\.0\.", "classifier.", re.sub(r"^stages\.0\.", "blocks.", name))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: f"network.{name}",
        backbone_name,
        lambda name: f"module.{backbone_name(name)}",
        public_name,
        lambda name: f"module.backbone.{public_name(name)}",
    ],
    ids=["own", "checkpoint", "backbone", "module", "public", "prefixes"],
)
def test_weights_by_name(tmp_path: Path, rename: Any) -> None:
    trained, network = make(seed=1), make(seed=2)
    tensors = {rename(name): tensor for name, tensor in weights_of(trained).items()}
    save_file({**tensors, "else.weight": torch.ones(2)}, tmp_path / "some.safetensors")
    report = load_teacher_weights(network, tmp_path / "some.safetensors")
    assert same_weights(network, trained)
    assert dict(report.matched) == {
        name: rename(name).removeprefix("network.") for name in trained.state_dict()
    }
    # An erde checkpoint's own tensors beside the network's are none of a teacher's.
    assert report.unexpected == ([] if "network" in rename("") else ["else.weight"])
    assert report.missing == []


def test_an_exact_name_comes_before_a_prefixed_one(tmp_path: Path) -> None:
    source, target = make(1), make(1, seed=1)
    plain = {
        re.sub(r"^stages\.0\.|^heads\.0\.", "", name): tensor for name, tensor in weights_of(source).items()
    }
    # safetensors sorts by name: this prefix stands before most names.
    prefixed = {f"backbone.{name}": torch.zeros_like(tensor) for name, tensor in plain.items()}
    save_file({**prefixed, **plain}, tmp_path / "both.safetensors")
    load_teacher_weights(target, tmp_path / "both.safetensors")
    assert same_weights(source, target, counters=False)


def test_plain_arrays_without_counters(tmp_path: Path) -> None:
    trained, network = make(seed=1), make(seed=2)
    arrays = {
        public_name(name): tensor.numpy() for name, tensor in weights_of(trained).items() if tensor.ndim
    }
    np.savez(tmp_path / "some.npz", **arrays)
    report = load_teacher_weights(network, tmp_path / "some.npz")
    assert same_weights(network, trained, counters=False)
    assert len(report.matched) == len(arrays)
    assert all(name.endswith("num_batches_tracked") for name in report.missing)
    assert report.line().endswith(
        f"{len(arrays)} tensors matched by name, {len(report.missing)} counters missing"
    )


def test_plain_arrays_by_order(tmp_path: Path) -> None:
    trained, network = make(seed=1), make(seed=2)
    arrays = [tensor.numpy() for tensor in weights_of(trained).values() if tensor.ndim]
    np.savez(tmp_path / "some.npz", **{f"x{99 - index}": array for index, array in enumerate(arrays)})
    with user_error("no name of its 47 tensors matches"):
        load_teacher_weights(network, tmp_path / "some.npz")
    load_teacher_weights(network, tmp_path / "some.npz", "order")
    assert same_weights(network, trained, counters=False)


def test_early_exit_teachers_have_heads_of_their_own(tmp_path: Path) -> None:
    trained, network = make(3, seed=1), make(3, seed=2)
    save_file(weights_of(trained), tmp_path / "some.safetensors")
    load_teacher_weights(network, tmp_path / "some.safetensors")
    assert same_weights(network, trained)


def refused_weights(folder: Path, kind: str) -> tuple[Path, str]:
    """A file, and what is said of it."""
    path, plain = (
        folder / "some.safetensors",
        {f"{public_name(n)}": tensor for n, tensor in weights_of(make()).items()},
    )
    if kind == "none":
        return path, rf"^no checkpoint at {path}"
    if kind == "pickle":
        return (
            folder / "some.pth",
            r"some\.pth is a pickle.*convert it once with safetensors\.torch\.save_file",
        )
    if kind == "damaged":
        path.write_bytes(b"123456789")
        return path, "is not a readable safetensors file"
    if kind == "another":
        save_file({"features.0.weight": torch.ones(3), "bn.num_batches_tracked": torch.tensor(1)}, path)
        return (
            path,
            r"is of another network: no name of its 2 tensors matches, it has '.*', \.\.\., the network '",
        )
    if kind == "classes":
        save_file({**plain, "fc.weight": torch.ones(100, 16), "fc.bias": torch.ones(100)}, path)
        return path, r"'fc\.\w+' has shape .*\(a network for 100 classes, the data has 10\)"
    if kind == "shape":
        save_file({**plain, "conv1.weight": torch.ones(4, 1, 3, 3)}, path)
        return (
            path,
            r"'conv1\.weight' has shape \(4, 1, 3, 3\), 'stages\.0\.stem\.conv\.weight' needs \(4, 3, 3, 3\)$",
        )
    del plain["layer2.0.downsample.0.weight"]
    save_file(plain, path)
    return (
        path,
        r"does not fit the network: 1 of its tensors are missing, the first is 'stages\.0\.group2_block1\.shortcut",
    )


@pytest.mark.parametrize("kind", ["none", "pickle", "damaged", "another", "classes", "shape", "missing"])
def test_weights_that_do_not_fit(tmp_path: Path, kind: str) -> None:
    network, before = make(seed=2), make(seed=2)
    path, message = refused_weights(tmp_path, kind)
    with user_error(message):
        load_teacher_weights(network, path)
    assert same_weights(network, before)


@pytest.mark.parametrize("kind", ["none", "objects", "text", "count", "shape", "safetensors"])
def test_arrays_that_do_not_fit(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "some.npz"
    arrays: dict[str, Any] = {
        name: tensor.numpy() for name, tensor in weights_of(make()).items() if tensor.ndim
    }
    message, match = "", "order"
    if kind == "none":
        message = r"^no weights at"
    elif kind == "text":
        path.write_text("text")
        message = r"is not a readable \.npz file of plain arrays"
    elif kind == "safetensors":
        path = tmp_path / "some.safetensors"
        message = r"teacher\.match is 'order', and .* has none: safetensors files are sorted"
    else:
        if kind == "objects":
            arrays["x"] = np.array([{}], dtype=object)
            message = (
                r"is not a readable \.npz file of plain arrays: '.*' holds Python objects, which are not read"
            )
        if kind == "count":
            arrays["x"] = np.zeros(1)
            message = r"it has 48 tensors, the network 47: teacher\.match=order needs"
        if kind == "shape":
            arrays = dict(reversed(arrays.items()))
            message = r"does not fit the network: '.*' has shape"
        np.savez(path, **arrays)
    with user_error(message):
        load_teacher_weights(make(), path, match)


def test_plain_weights_need_a_plain_teacher(tmp_path: Path) -> None:
    save_file(
        {public_name(name): tensor for name, tensor in weights_of(make()).items()}, tmp_path / "x.safetensors"
    )
    with user_error(r"'heads\.0\.norm\.weight'; weights without early exits need teacher\.exits=1"):
        load_teacher_weights(make(3), tmp_path / "x.safetensors")


# ---------------------------------------------------------------- one exit teaches all


def test_the_one_output_of_a_plain_teacher_teaches_all_exits() -> None:
    for pairing in ("exit", "final"):
        assert pair_exits([10, 20, 30], [100], pairing) == (0, 0, 0)
        assert pair_exits([30], [100], pairing) == (0,)


# ---------------------------------------------------------------- option A


def test_padded_shortcut_is_option_a() -> None:
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    result = PaddedShortcut(4, 2)(x)
    expected = np.zeros((2, 8, 3, 3), np.float32)
    expected[:, 2:6] = x.numpy()[:, :, [0, 2, 4]][:, :, :, [0, 2, 4]]
    assert np.array_equal(result.numpy(), expected)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_parameters_with_option_a(depth: int, parameters: int) -> None:
    # The published 0.27, 0.46 and 0.85 million (He et al. 2015, table 6), counted by hand: no shortcut has any.
    widths, blocks = (16, 32, 64), (depth - 2) // 6
    count, before = 3 * 16 * 9 + 2 * 16, 16
    for width in widths:
        count += 9 * before * width + 9 * width * width + 4 * width
        count += (blocks - 1) * (18 * width * width + 4 * width)
        before = width
    assert count + 64 * 10 + 10 == parameters
    network = build_backbone(f"resnet{depth}-a", classes=10)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained": True}, r"^teacher: trained asks for a teacher .* name its file in weights"),
        ({"trained": True, "weights": "x", "train": {"epochs": 1}}, r"not trained here: leave out train$"),
        ({"trained": True, "weights": "x", "train_subset": 5}, r"leave out train_subset$"),
        ({"trained": True, "weights": "x", "disjoint": True}, r"leave out disjoint$"),
        ({"trained": True, "weights": "x", "cross_fit": 2}, r"leave out cross_fit$"),
        ({"match": "shape"}, r"^teacher\.match: expected 'name' or 'order', got 'shape'"),
        ({"std": [0.0]}, r"^teacher\.std\.0: expected greater than 0"),
    ],
)
def test_recipes_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with user_error(message):
        validate(TeacherConfig, settings, "teacher.")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A plain network trained on digits with other normalisation and classes in reverse, saved; its tune accuracy."""
    data = load_data(
        "digits", channels=1, tune_size=300, certify_size=300, test_size=300, mean=[0.1], std=[0.7]
    )
    names = ("train", "tune", "certify", "test")
    splits: dict[str, Any] = {name: getattr(data, name) for name in names}
    turned = {name: dataclasses.replace(split, labels=9 - split.labels) for name, split in splits.items()}
    backwards = dataclasses.replace(data, classes=data.classes[::-1], **turned)
    torch.manual_seed(0)
    network = attach_exits(build_backbone("resnet8x0.5", classes=10, channels=1), 1, input_size=(1, 8, 8))
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 32, "learning_rate": 0.05, "device": "cpu"}
    erde.train(network, backwards, augmentation={"crop_padding": 1, "flip": False}, **settings)
    path = tmp_path_factory.mktemp("foreign") / "weights.safetensors"
    save_file({public_name(name): tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return path, accuracies(network, backwards.tune, data)


def accuracies(network: EarlyExitNetwork, split: Split, data: DataSplits) -> list[float]:
    logits = split_logits(network, split, data.mean, data.std)
    return [float((answers == split.labels).mean()) for answers in logits.argmax(axis=-1)]


def recipe(path: Path, **teacher: Any) -> Config:
    settings = {
        "backbone": "resnet8x0.5",
        "exits": 1,
        "weights": str(path),
        "trained": True,
        "mean": [0.1],
        "std": [0.7],
        "classes": list("9876543210"),
        **teacher,
    }
    value = {
        "threads": 1,
        "device": "cpu",
        "data": {
            "channels": 1,
            "tune_size": 300,
            "certify_size": 300,
            "test_size": 300,
            "augmentation": {"crop_padding": 1, "flip": False},
        },
        "teacher": settings,
        "student": {"backbone": "resnet8x0.25", "exits": 2},
        "train": {"epochs": 1, "batch_size": 64},
        "arms": {"erde": {"loss": "erde"}},
        "calibration": {"reference": "teacher"},
    }
    return validate(Config, value)


def test_a_run_with_a_teacher_of_ones_own(
    foreign: tuple[Path, list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, accuracy = foreign
    assert accuracy[0] > 0.8
    path, run = tmp_path / "weights.safetensors", tmp_path / "run"
    path.write_bytes(source.read_bytes())
    erde.run(recipe(path), run, until="train")
    said = capsys.readouterr()
    assert f"{path}: 56 tensors matched by name" in said.err + said.out
    assert f"teacher: {100 * accuracy[0]:.2f} % right of 300 tune images" in said.err + said.out
    report = json.loads((run / "arms" / "teacher" / "weights.json").read_text())
    assert report["tune_accuracy"] == accuracy
    assert (report["missing"], report["unexpected"]) == ([], [])
    # Once taken, the run needs the file no longer.
    path.unlink()
    erde.run(recipe(path), run, resume=True)
    result = json.loads((run / "results.json").read_text())
    assert result["arms"]["teacher"]["loss"] == "none"
    assert result["arms"]["teacher"]["history"] == []
    assert result["arms"]["teacher"]["exits"][0]["accuracy"] > 0.8
    assert len(result["arms"]["erde"]["teacher_wrong"]) == 2
    assert result["agreement"]["torch_disagreements"] == 0
    tensors, _ = checkpoint.load(run / "arms" / "teacher" / "checkpoints" / "final.safetensors")
    original, _ = checkpoint.load(source)
    assert torch.equal(tensors["network.heads.0.linear.weight"], original["fc.weight"])


@pytest.mark.parametrize(
    ("settings", "hint"), [({"classes": None}, True), ({"mean": None, "std": None}, False)]
)
def test_a_teacher_that_only_guesses_is_said(
    foreign: tuple[Path, list[float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    hint: bool,
) -> None:
    erde.run(recipe(foreign[0], **settings), tmp_path / "run", until="train")
    said = capsys.readouterr()
    assert ("little better than guessing" in said.err + said.out) == hint


def test_bad_weights_are_said_before_anything_is_written(tmp_path: Path) -> None:
    with user_error("no checkpoint at"):
        erde.run(recipe(tmp_path / "none.safetensors"), tmp_path / "run", until="train")
    assert not (tmp_path / "run").exists()


WEIGHTS = Path(os.environ.get("ERDE_DATA", "")) / "weights"


@pytest.mark.slow
@pytest.mark.skipif(
    not (WEIGHTS / "resnet32_cifar10_akamaster.npz").is_file(), reason="ERDE_DATA has no weights/"
)
@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.9173), (32, 0.9263)])
def test_public_weights_have_their_published_accuracy(depth: int, accuracy: float) -> None:
    data = load_data("cifar10")
    network = attach_exits(build_backbone(f"resnet{depth}-a", classes=10), 1, input_size=(3, 32, 32))
    load_teacher_weights(network, WEIGHTS / f"resnet{depth}_cifar10_akamaster.npz")
    adapt_teacher(
        network,
        mean=data.mean,
        std=data.std,
        classes=data.classes,
        teacher_mean=THEIR_MEAN,
        teacher_std=THEIR_STD,
    )
    assert accuracies(network, data.test, data) == [accuracy]
