"""Training from Python: :func:`train` and :func:`distill`, with the keys of a recipe as arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from erde.common.errors import UserError, check_seed
from erde.common.files import make_folder, write_json
from erde.common.history import Epoch
from erde.data.load import DataSplits
from erde.losses import ExitSettings, build_loss
from erde.networks.cost import network_cost
from erde.networks.network import EarlyExitNetwork
from erde.networks.shapes import example_input, mode
from erde.recipe.losses import LossConfig, resolve_loss
from erde.recipe.schema import (
    FREE_TO_CHANGE,
    AugmentationConfig,
    DistillationConfig,
    TrainConfig,
    check_phases,
)
from erde.recipe.validation import first_difference, validate
from erde.training import parallel
from erde.training.job import FINAL, LAST, Job
from erde.training.loop import choose_device, train_network
from erde.training.teacher_cache import network_hash

# In the folder of a training: what is trained there.
TRAINING = "training.json"


def train(
    network: EarlyExitNetwork,
    data: DataSplits,
    *,
    seed: int = 0,
    device: str = "auto",
    folder: str | Path | None = None,
    augmentation: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Epoch]:
    """Train all exits with joint cross-entropy on ``data.train``; ``settings`` are keys of ``train:``.

    Trains in place and returns one entry per epoch. With a ``folder``, a killed training continues there, and a finished
    one is taken from there; a folder with another training is refused. Start weights are not compared, except those of
    the backbone with ``freeze_backbone`` and without ``backbone_epochs``.
    """
    return _fit(
        network, data, seed=seed, device=device, folder=folder, augmentation=augmentation, settings=settings
    )


def distill(
    network: EarlyExitNetwork,
    teacher: EarlyExitNetwork,
    data: DataSplits,
    *,
    loss: str | Mapping[str, Any] = "erde",
    distillation: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    folder: str | Path | None = None,
    augmentation: Mapping[str, Any] | None = None,
    teacher_cache: str | Path | None = None,
    **settings: Any,
) -> list[Epoch]:
    """Train ``network`` from ``teacher``, exit by exit.

    ``loss`` is a name, or a mapping with ``name`` and the loss's own keys; ``distillation`` holds keys of
    ``distillation:`` (alpha, temperature, ...), ``settings`` keys of ``train:``. With a ``teacher_cache``
    folder the teacher is asked once for each view of each image; further calls find its answers there.
    """
    return _fit(
        network,
        data,
        teacher=teacher,
        loss=loss,
        distillation=distillation,
        seed=seed,
        device=device,
        folder=folder,
        augmentation=augmentation,
        teacher_cache=teacher_cache,
        settings=settings,
    )


def _fit(
    network: EarlyExitNetwork,
    data: DataSplits,
    *,
    teacher: EarlyExitNetwork | None = None,
    loss: str | Mapping[str, Any] = "ce",
    distillation: Mapping[str, Any] | None = None,
    seed: int,
    device: str,
    folder: str | Path | None,
    augmentation: Mapping[str, Any] | None,
    teacher_cache: str | Path | None = None,
    settings: Mapping[str, Any],
) -> list[Epoch]:
    _check(network, teacher, data)
    check_seed(seed)
    config, resolved = validate(TrainConfig, settings, "train."), resolve_loss(loss)
    check_phases("this training", config, len(network.stages) > 1)
    if config.together:
        raise UserError("train.together is for the arms of a recipe: leave it out")
    if config.tensorboard and folder is None:
        raise UserError("train.tensorboard writes into the folder of the training: give one, folder=...")
    frozen = config.freeze_backbone and not config.backbone_epochs
    if teacher is not None and resolved.needs_teacher and not frozen and _share_weights(network, teacher):
        raise UserError(
            "the teacher shares weights with the network, so it would change as that is trained: give a copy of the model, "
            "copy.deepcopy(model), to one of the two, or set freeze_backbone=True"
        )
    if "held_out_logits" in resolved.extras:
        raise UserError(
            "held-out teacher predictions are made by a recipe (teacher.cross_fit): from Python use another wrong_test"
        )
    teaching = validate(DistillationConfig, distillation or {}, "distillation.")
    augmented = validate(AugmentationConfig, augmentation or {}, "augmentation.")
    job = Job(
        name="network",
        network=network,
        criterion=build_criterion(
            resolved,
            teaching,
            network,
            teacher,
            data,
            label_smoothing=config.label_smoothing,
            seed=seed,
        ),
        teacher=teacher if resolved.needs_teacher else None,
        train=data.train,
        config=config,
        augmentation=augmented,
        mean=data.mean,
        std=data.std,
        seed=seed,
        device=choose_device(device),
        extras=resolved.extras,
        teacher_cache=Path(teacher_cache) if teacher_cache is not None else None,
        workers=data.workers,
        scalars=Path(folder) / "tensorboard" if config.tensorboard and folder is not None else None,
    )
    if folder is None:
        return train_network(job, None).history
    job.check()
    free = {key for group, key in FREE_TO_CHANGE if group == "train"}
    sections = {"train": config, "loss": resolved, "distillation": teaching, "augmentation": augmented}
    _claim(
        Path(folder),
        {
            "train": config.model_dump(mode="json", exclude=free),
            "loss": resolved.model_dump(mode="json"),
            "distillation": teaching.model_dump(mode="json") if job.teacher is not None else None,
            "augmentation": augmented.model_dump(mode="json"),
            "seed": int(seed),
            "images": data.train.fingerprint(),
            "data": {"mean": list(data.mean), "std": list(data.std)},
            "teacher": network_hash(job.teacher) if job.teacher is not None else None,
            # It stays what it is; other weights are where a training starts from.
            "backbone": network_hash(nn.ModuleList([*network.stages, network.heads[-1]])) if frozen else None,
        },
        {name: type(section)().model_dump(mode="json") for name, section in sections.items()},
    )
    return train_network(job, Path(folder)).history


def _claim(folder: Path, asked: dict[str, Any], defaults: dict[str, dict[str, Any]]) -> None:
    """Write down in ``folder`` what is trained there; :class:`UserError` where it has checkpoints of something else.

    ``defaults`` of the parts of ``asked`` stand for keys that an earlier version of erde did not have.
    """
    path = folder / TRAINING
    if path.exists() and any((folder / name).exists() for name in (FINAL, LAST)):
        try:
            began = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(began, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise UserError(f"{path} is damaged: train in another folder, or remove this one") from error
        if difference := first_difference(_with_todays_keys(began, asked, defaults), asked):
            key, old, new = difference
            raise UserError(
                f"{folder} holds another training: there {key} is {old}, now it is {new}; train in another folder"
            )
    elif parallel.is_first():
        make_folder(folder)
        write_json(path, asked)


def _with_todays_keys(
    began: dict[str, Any], asked: dict[str, Any], defaults: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    whole = {**asked, **began}
    for name, keys in defaults.items():
        if isinstance(whole[name], dict) and isinstance(asked[name], dict):
            whole[name] = {**{key: keys[key] for key in asked[name]}, **whole[name]}
    return whole


def _check(network: Any, teacher: Any, data: Any) -> None:
    """Raise if networks or data have the wrong type, or do not fit each other."""
    if not isinstance(data, DataSplits):
        raise UserError(f"data is {_kind(data)}: expected the result of erde.load_data")
    for name, given in (("network", network), ("teacher", teacher)):
        if name == "teacher" and given is None:
            continue
        if not isinstance(given, EarlyExitNetwork):
            raise UserError(
                f"the {name} is {_kind(given)}: expected an early-exit network; erde.attach_exits(model, 3, "
                "input_size=...) adds exits to a model, with exits=1 none but its own output"
            )
        channels, height, width = data.input_size
        try:
            with mode(given, False), torch.no_grad():
                shape = tuple(given(example_input(given, data.input_size)).shape)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the {name} does not take the data's images, {channels}x{height}x{width}: {reason}"
            ) from error
        if shape[2] != len(data.classes):
            raise UserError(
                f"the {name} has {shape[2]} outputs, the data has {len(data.classes)} classes: change the model's last layer"
            )


def _share_weights(network: nn.Module, other: nn.Module) -> bool:
    return not set(network.parameters()).isdisjoint(other.parameters())


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def build_criterion(
    loss: LossConfig,
    distillation: DistillationConfig,
    network: EarlyExitNetwork,
    teacher: EarlyExitNetwork | None,
    data: DataSplits,
    *,
    label_smoothing: float = 0.0,
    train_images: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """The criterion of one arm, with the shared settings resolved for its network and its teacher.

    ``label_smoothing`` is that of ``train:``, for cross-entropy alone; ``train_images`` is the number of images that
    the arm sees, all of train if None; ``seed`` initialises the criterion's own parameters.
    """
    if loss.needs_teacher and teacher is None:
        raise UserError(f"the loss '{loss.name}' needs a teacher; without one use 'ce'")
    settings = ExitSettings.resolve(
        distillation,
        len(data.classes),
        network_cost(network, data.input_size).macs,
        network_cost(teacher, data.input_size).macs if teacher is not None else None,
        label_smoothing=label_smoothing if loss.name == "ce" else distillation.label_smoothing,
        student_shapes=network.feature_shapes(data.input_size),
        teacher_shapes=teacher.feature_shapes(data.input_size) if teacher is not None else (),
        train_images=len(data.train) if train_images is None else train_images,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_loss(loss, settings)
